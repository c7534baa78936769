"""Tokens/s and MFU of a GPT on one GPU: zerojax, hand-written jax, and PyTorch if it is installed.

    python benchmarks/gpu.py    # about 1 B parameters: 20 GB of GPU memory, five minutes

To try it on a CPU: `--width 64 --layers 2 --vocab 256 --seq 64 --batch 2 --steps 2`. It also
compares the compiled memory of one simulated GPU with that of the real executable (aim: 2 %), and
prints Markdown.
"""

import argparse
import importlib.util
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for PyTorch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import header, seconds, steps, table

import zerojax as zj
from zerojax.layout import gpus, topology

# dense bfloat16 FLOP/s, the vendor's figures
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
OPTIONS = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8}
HEAD = 128


class Block(nn.Module):
    attention: str

    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        head = min(HEAD, width)
        options = {"use_bias": False, "dtype": jnp.bfloat16}
        h = nn.LayerNorm(**options)(x)
        q, k, v = (nn.DenseGeneral((width // head, head), name=n, **options)(h) for n in "qkv")
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="o", **options)(a)
        h = nn.Dense(4 * width, name="up", **options)(nn.LayerNorm(**options)(x))
        return x + nn.Dense(width, name="down", **options)(nn.gelu(h)), None


class GPT(nn.Module):
    """int32[batch, seq] tokens to bfloat16[batch, seq, vocab] logits."""

    width: int
    layers: int
    vocab: int
    attention: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width, dtype=jnp.bfloat16, name="embed")(tokens)
        blocks = nn.scan(nn.remat(Block, prevent_cse=False), variable_axes={"params": 0},
                         split_rngs={"params": True}, length=self.layers)
        x, _ = blocks(self.attention)(x, None)
        x = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        return nn.Dense(self.vocab, use_bias=False, dtype=jnp.bfloat16, name="head")(x)


def build(args):
    """Returns init, the loss over a batch int32[B, seq + 1], and an optax transform."""
    model = GPT(args.width, args.layers, args.vocab, args.attention)

    def loss(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return zj.Loss(losses.sum(), losses.size)

    def init():
        return model.init(jax.random.key(0), jnp.zeros((1, args.seq), jnp.int32))

    return init, loss, optax.adam(**OPTIONS)


def zero_over(devices) -> zj.Zero:
    return zj.Zero(zj.make_mesh(devices=devices), 3, precision=zj.Precision(compute="bfloat16"))


def by_zerojax(args):
    """Returns the step and its state."""
    init, loss, tx = build(args)
    zero = zero_over(jax.devices()[:1])
    return zero.train_step(loss, tx), zero.init(init, tx)


def by_jax(args):
    """Returns a hand-written step and its state."""
    init, loss, tx = build(args)
    params = jax.jit(init)()

    def mean(params, tokens):
        result = loss(params, tokens)
        return result.total / result.weight

    def step(state, tokens):
        params, opt_state = state
        value, grads = jax.value_and_grad(mean)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0), (params, tx.init(params))


def flops_per_token(args, params: int) -> float:
    """Returns the FLOPs of the forward and backward pass.

    These are 6 per parameter of a matrix product, and 12 x layers x seq x width for attention,
    halved because it is causal.
    """
    return 6 * (params - args.vocab * args.width) + 6 * args.layers * args.seq * args.width


def speed(args, tokens, params) -> str:
    runs = {"zerojax, stage 3": steps(*by_zerojax(args), tokens, args.steps),
            "jax by hand": steps(*by_jax(args), tokens, args.steps)}
    if importlib.util.find_spec("torch"):
        import torch_gpt

        head = min(HEAD, args.width)
        runs["PyTorch, torch.compile"] = torch_gpt.training(args, head, tokens, OPTIONS)
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in PEAK.items() if name in kind), None)
    taken = seconds(list(runs.values()), args.rounds)
    rates = [args.steps * args.batch * args.seq / t for t in taken]
    rows = []
    for name, rate in zip(runs, rates, strict=True):
        mfu = f"{rate * flops_per_token(args, params) / peak:.1%}" if peak else ""
        rows.append([name, f"{rate:,.0f}", mfu, f"{rates[0] / rate:.3f}"])
    title = f"{kind}, {params / 1e6:,.1f} M parameters, {args.batch} x {args.seq} tokens"
    return table([title, "tokens/s", "MFU", "zerojax / this"], rows)


def memory(args, tokens) -> str:
    """Compares the compiler's figures for a simulated GPU with those for the real one."""
    kind = jax.devices()[0].device_kind
    gpu = next((name for name, known in gpus.GPUS.items() if known.name == kind), None)
    if gpu is None:
        return "(the memory figures were not compared: this machine has no known GPU)\n"
    real = compiled_memory(args, tokens, jax.devices()[:1])
    simulated = compiled_memory(args, tokens, topology.devices(f"{gpu}:1x1"))
    rows = []
    for name in ("argument", "temp", "output", "alias"):
        a, b = (getattr(found, f"{name}_size_in_bytes") / 2**20 for found in (real, simulated))
        rows.append([name, f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.3f}"])
    columns = ["MiB", f"this {gpu}", f"a simulated {gpu}", "ratio (aim 0.98 to 1.02)"]
    return table(columns, rows)


def compiled_memory(args, tokens, devices):
    init, loss, tx = build(args)
    zero = zero_over(devices)
    step = zero.train_step(loss, tx, compiler_options=topology.COMPILER_OPTIONS)
    batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
    return step.lower(zero.abstract(init, tx), batch).compile().memory_analysis()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = {"width": 2048, "layers": 16, "vocab": 50304, "seq": 1024, "batch": 8, "steps": 10,
                "rounds": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla",
                        help="implementation in jax; PyTorch chooses its own")
    return parser.parse_args()


def main():
    args = arguments()
    shape = (args.batch, args.seq + 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, args.vocab, shape, np.int32))
    params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(build(args)[0])))
    print(f"# One GPU\n\n{header()}; attention {args.attention}.\n")
    print(speed(args, tokens, params), flush=True)
    print(memory(args, tokens))


if __name__ == "__main__":
    main()
