"""Fine-tuning a 1 B transformer with LoRA on 8 simulated H200s, compared with full training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from machine import table

import zerojax as zj

WIDTH, LAYERS, HEADS, VOCABULARY, RANK, SEQUENCE = 2048, 18, 16, 32000, 16, 1024
MIB = 2**20
TX = optax.adamw(1e-4)
COLUMNS = ("", "stage", "frozen, M", "trained, M",
           "state predicted, (frozen bytes + 12 x trained) / 8, MiB", "state compiled, MiB",
           "ratio (aim 1.02)", "all-gather, MiB", "reductions, MiB", "explained")


class Adapted(nn.Module):
    """A dense layer in bfloat16 with an update of low rank."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.features, use_bias=False, name="base", dtype=x.dtype,
                     param_dtype="bfloat16")(x)
        a = self.param("lora_a", nn.initializers.normal(0.02), (x.shape[-1], RANK))
        b = self.param("lora_b", nn.initializers.zeros, (RANK, self.features))
        return y + x @ a.astype(x.dtype) @ b.astype(x.dtype)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(dtype=x.dtype)(x)
        q, k, v = (Adapted(WIDTH, name=name)(y).reshape(*y.shape[:2], HEADS, -1) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(y.shape)
        x = x + Adapted(WIDTH, name="o")(y)
        y = nn.gelu(Adapted(4 * WIDTH, name="up")(nn.RMSNorm(dtype=x.dtype)(x)))
        return x + Adapted(WIDTH, name="down")(y), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, dtype="bfloat16", param_dtype="bfloat16")
        blocks = nn.scan(nn.remat(Block, policy=zj.remat.regather()), variable_axes={"params": 0},
                         split_rngs={"params": True}, length=LAYERS)
        x, _ = blocks()(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=x.dtype)(x))


def init():
    return Transformer().init(jax.random.key(0), jnp.zeros((1, 8), "int32"))


def loss(variables, tokens):
    logits = Transformer().apply(variables, tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return zj.Loss(losses.sum(), losses.size)


def plan(trainable, stage):
    """Returns a plan, and the number of elements by group of leaves."""
    mesh = zj.make_mesh(topology="h200:1x8")
    zero = zj.Zero(mesh, stage, precision=zj.Precision(compute="bfloat16"))
    state = zero.abstract(init, TX, trainable=trainable)
    tokens = jax.ShapeDtypeStruct((8, SEQUENCE + 1), "int32")
    elements = {"frozen": 0, "trained": 0}
    for leaf in state.model.leaves:
        elements[leaf.group] = elements.get(leaf.group, 0) + leaf.size
    return zero.train_step(loss, TX).plan(state, tokens), elements


def row(name, trainable, stage):
    made, elements = plan(trainable, stage)
    frozen, trained = elements["frozen"], elements["trained"]
    predicted = (2 * frozen + 12 * trained) / 8
    explained = "no" if any(finding.wrong for finding in made.findings) else "yes"
    return [name, stage, f"{frozen / 1e6:,.1f}", f"{trained / 1e6:,.1f}", f"{predicted / MIB:,.1f}",
            f"{made.memory.state / MIB:,.1f}", f"{made.memory.state / predicted:.3f}",
            f"{sent(made, 'all-gather'):,.1f}",
            f"{sent(made, 'reduce-scatter', 'all-reduce'):,.1f}", explained]


def sent(made, *kinds):
    """Returns the MiB that each device sends per step in collectives of some kinds."""
    return sum(total.bytes for total in made.communication if total.kind in kinds) / MIB


def markdown() -> str:
    models = {"LoRA": ".*lora_.", "all": None}
    return table(COLUMNS, [row(name, trainable, stage) for name, trainable in models.items()
                           for stage in (2, 3)])


if __name__ == "__main__":
    print(markdown())
