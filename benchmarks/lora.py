"""Fine-tuning a 1 B transformer with LoRA on 8 H200s that are not there: what each keeps and sends, beside training all of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import zerojax as zj

WIDTH, LAYERS, HEADS, VOCABULARY, RANK, SEQUENCE = 2048, 18, 16, 32000, 16, 1024
MIB = 2**20
TX = optax.adamw(1e-4)


class Adapted(nn.Module):
    """A dense layer, kept in bfloat16, with an update of low rank."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.features, use_bias=False, name="base", dtype=x.dtype, param_dtype="bfloat16")(x)
        a = self.param("lora_a", nn.initializers.normal(0.02), (x.shape[-1], RANK)).astype(x.dtype)
        b = self.param("lora_b", nn.initializers.zeros, (RANK, self.features)).astype(x.dtype)
        return y + x @ a @ b


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(dtype=x.dtype)(x)
        q, k, v = (Adapted(WIDTH, name=name)(y).reshape(*y.shape[:2], HEADS, -1) for name in "qkv")
        x = x + Adapted(WIDTH, name="o")(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(y.shape))
        y = nn.RMSNorm(dtype=x.dtype)(x)
        return x + Adapted(WIDTH, name="down")(nn.gelu(Adapted(4 * WIDTH, name="up")(y))), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, dtype="bfloat16", param_dtype="bfloat16")
        block = nn.remat(Block, policy=zj.remat.regather())
        x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=x.dtype)(x))


def _loss(variables, tokens):
    logits = Transformer().apply(variables, tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return zj.Loss(losses.sum(), losses.size)


def _plan(trainable, stage):
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), stage, precision=zj.Precision(compute="bfloat16"))
    init = lambda: Transformer().init(jax.random.key(0), jnp.zeros((1, 8), "int32"))
    state = zero.abstract(init, TX, trainable=trainable)
    tokens = jax.ShapeDtypeStruct((8, SEQUENCE + 1), "int32")
    groups = {leaf.group: sum(x.size for x in state.model.leaves if x.group == leaf.group) for leaf in state.model.leaves}
    return zero.train_step(_loss, TX).plan(state, tokens), groups


def markdown() -> str:
    rows = ["| | stage | frozen, M | trained, M | (frozen in its dtype + 12 x trained) / 8, MiB | state compiled, MiB | ratio "
            "(aim 1.02) | all-gather, MiB | reductions, MiB | explained |", "| --- " * 10 + "|"]
    for name, trainable in (("LoRA", ".*lora_."), ("all", None)):
        for stage in (2, 3):
            plan, groups = _plan(trainable, stage)
            frozen, trained = groups.get("frozen", 0), groups["trained"]
            expected = (2 * frozen + 12 * trained) / 8 / MIB
            sent = lambda kinds, plan=plan: sum(t.bytes for t in plan.communication if t.kind in kinds) / MIB
            ok = "yes" if not any(f.wrong for f in plan.findings) else "no"
            rows.append(f"| {name} | {stage} | {frozen / 1e6:,.1f} | {trained / 1e6:,.1f} | {expected:,.1f} "
                        f"| {plan.memory.state / MIB:,.1f} | {plan.memory.state / MIB / expected:.3f} "
                        f"| {sent(['all-gather']):,.1f} | {sent(['reduce-scatter', 'all-reduce']):,.1f} | {ok} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown())
