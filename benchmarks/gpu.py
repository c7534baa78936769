"""One real GPU: tokens/s and MFU of a GPT in bfloat16, by zerojax, by hand in jax, and by PyTorch with `torch.compile`.

    python benchmarks/gpu.py                      # about 1 B parameters: some 20 GB of GPU memory, five minutes
    python benchmarks/gpu.py --width 64 --layers 2 --vocab 256 --seq 64 --batch 2 --steps 2    # to try it on a CPU

Also compares the compiled memory figures of one GPU that is not there with those of the real executable (aim: 2 %).
Prints Markdown.
"""

import argparse
import importlib.util
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants a share

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import header, seconds, steps, table

import zerojax as zj
from zerojax.layout import topology

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bfloat16 FLOP/s, vendor's figures
OPTIONS = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8}
HEAD = 128


class Block(nn.Module):
    attention: str

    @nn.compact
    def __call__(self, x, _):
        width, dtype = x.shape[-1], jnp.bfloat16
        head = min(HEAD, width)
        h = nn.LayerNorm(dtype=dtype, use_bias=False)(x)
        q, k, v = (nn.DenseGeneral((width // head, head), use_bias=False, dtype=dtype, name=n)(h) for n in "qkv")
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, dtype=dtype, name="o")(a)
        h = nn.Dense(4 * width, use_bias=False, dtype=dtype, name="up")(nn.LayerNorm(dtype=dtype, use_bias=False)(x))
        return x + nn.Dense(width, use_bias=False, dtype=dtype, name="down")(nn.gelu(h)), None


class GPT(nn.Module):
    """int32[batch, seq] tokens to bfloat16[batch, seq, vocab] logits."""

    width: int
    layers: int
    vocab: int
    attention: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width, dtype=jnp.bfloat16, name="embed")(tokens)
        block = nn.remat(Block, prevent_cse=False)
        x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)(self.attention)(x, None)
        return nn.Dense(self.vocab, use_bias=False, dtype=jnp.bfloat16, name="head")(nn.LayerNorm(dtype=jnp.bfloat16)(x))


def build(args):
    """(init, loss over a batch int32[B, seq + 1], optax transform)."""
    model = GPT(args.width, args.layers, args.vocab, args.attention)

    def loss(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return zj.Loss(losses.sum(), losses.size)

    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, args.seq), jnp.int32))
    return init, loss, optax.adam(**OPTIONS)


def zero_of(mesh) -> zj.Zero:
    return zj.Zero(mesh, 3, precision=zj.Precision(compute="bfloat16"))


def of_zerojax(args, tokens):
    init, loss, tx = build(args)
    zero = zero_of(zj.make_mesh(devices=jax.devices()[:1]))
    return zero.train_step(loss, tx), zero.init(init, tx)


def of_jax(args, tokens):
    init, loss, tx = build(args)
    params = jax.jit(init)()

    def step(state, tokens):
        mean, grads = jax.value_and_grad(lambda p: (r := loss(p, tokens)).total / r.weight)(state[0])
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), {"loss": mean, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0), (params, tx.init(params))


def torch_run(args, tokens):
    """The same model, weights of its own; blocks checkpointed as in jax's."""
    import torch
    from torch import nn as tnn
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = min(HEAD, args.width)

    class TorchBlock(tnn.Module):
        def __init__(self):
            super().__init__()
            linear = lambda a, b: tnn.Linear(a, b, bias=False)
            self.norm_1, self.norm_2 = tnn.LayerNorm(args.width, bias=False), tnn.LayerNorm(args.width, bias=False)
            self.qkv, self.o = linear(args.width, 3 * args.width), linear(args.width, args.width)
            self.up, self.down = linear(args.width, 4 * args.width), linear(4 * args.width, args.width)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (y.view(b, t, -1, head).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(a.transpose(1, 2).reshape(b, t, -1))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class TorchGPT(tnn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = tnn.Embedding(args.vocab, args.width), tnn.LayerNorm(args.width)
            self.blocks = tnn.ModuleList(TorchBlock() for _ in range(args.layers))
            self.head = tnn.Linear(args.width, args.vocab, bias=False)

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    model = torch.compile(TorchGPT().to(device))
    adam = torch.optim.Adam(model.parameters(), OPTIONS["learning_rate"], (OPTIONS["b1"], OPTIONS["b2"]), OPTIONS["eps"],
                            fused=device == "cuda")
    tokens = torch.tensor(np.asarray(tokens), dtype=torch.long, device=device)

    def run():
        for _ in range(args.steps):
            with torch.autocast(device, torch.bfloat16):
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # the norm, as the others report
            adam.step()
            adam.zero_grad(set_to_none=True)
        loss.item()

    run()
    return run


def flops_per_token(args, params: int) -> float:
    """Forward and backward: 6 for each parameter of a product, 12 layers x seq x width for attention, halved for causal."""
    return 6 * (params - args.vocab * args.width) + 6 * args.layers * args.seq * args.width


def speed(args, tokens, params) -> str:
    ways = {"zerojax, stage 3": of_zerojax, "jax by hand": of_jax}
    runs = {name: steps(*make(args, tokens), tokens, args.steps) for name, make in ways.items()}
    if importlib.util.find_spec("torch"):
        runs["PyTorch, torch.compile"] = torch_run(args, tokens)
    taken = seconds(list(runs.values()), args.rounds)
    kind = jax.devices()[0].device_kind
    peak = next((p for name, p in PEAK.items() if name in kind), None)
    rate = [args.steps * args.batch * args.seq / t for t in taken]
    rows = [[name, f"{r:,.0f}", f"{r * flops_per_token(args, params) / peak:.1%}" if peak else "", f"{rate[0] / r:.3f}"]
            for name, r in zip(runs, rate, strict=True)]
    title = f"{kind}, {params / 1e6:,.1f} M parameters, {args.batch} x {args.seq} tokens"
    return table([title, "tokens/s", "MFU", "zerojax / it"], rows)


def memory(args, tokens) -> str:
    """The figures of the compiler for a GPU that is not there, beside the real one's."""
    real = next((name for name in topology.GPUS if topology.GPUS[name].name == jax.devices()[0].device_kind), None)
    if real is None:
        return "(no known GPU here: the memory figures were not compared)\n"
    init, loss, tx = build(args)
    columns = []
    for mesh in (zj.make_mesh(devices=jax.devices()[:1]), zj.make_mesh(devices=topology.devices(f"{real}:1x1"))):
        zero = zero_of(mesh)
        state = zero.abstract(init, tx)
        batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
        compiled = zero.train_step(loss, tx, compiler_options=topology.COMPILER_OPTIONS).lower(state, batch).compile()
        columns.append(compiled.memory_analysis())
    rows = []
    for name in ("argument", "temp", "output", "alias"):
        there, absent = (getattr(m, f"{name}_size_in_bytes") / 2**20 for m in columns)
        rows.append([name, f"{there:,.1f}", f"{absent:,.1f}", f"{absent / there:.3f}"])
    return table(["MiB", f"this {real}", f"a {real} that is not there", "ratio (aim 0.98 to 1.02)"], rows)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"width": 2048, "layers": 16, "vocab": 50304, "seq": 1024, "batch": 8, "steps": 10, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="jax's; PyTorch's is its own choice")
    return parser.parse_args()


def main():
    args = arguments()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.seq + 1), np.int32))
    params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(build(args)[0])))
    print(f"# One GPU\n\n{header()}; attention {args.attention}.\n\n{speed(args, tokens, params)}", flush=True)
    print(memory(args, tokens))


if __name__ == "__main__":
    main()
