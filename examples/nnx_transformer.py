"""An NNX transformer: scanned blocks with remat and dropout, ZeRO stage 3, on a task whose answer is known.

    python examples/nnx_transformer.py --stage 2 --accumulate 2
    python examples/nnx_transformer.py --trainable 'blocks/.*|head/.*'    # the embeddings are frozen

Each sequence is random letters, then the same letters backwards; the model learns to write the second half. The module is
plain NNX: it is given back to the loss as `init_fn` made it, and parameters are gathered where it reads them.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zerojax as zj

LETTERS, HALF, WIDTH, HEADS, LAYERS = 16, 8, 64, 4, 2
SEQ = 2 * HALF


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_2(x)))))


class Transformer(nnx.Module):
    """int32[batch, seq] letters to logits[batch, seq, LETTERS]."""

    def __init__(self, rngs):
        self.embed, self.position = nnx.Embed(LETTERS, WIDTH, rngs=rngs), nnx.Embed(SEQ, WIDTH, rngs=rngs)
        stack = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = stack(rngs)
        self.head = nnx.Linear(WIDTH, LETTERS, rngs=rngs)

    def __call__(self, letters):
        x = self.embed(letters) + self.position(jnp.arange(letters.shape[1]))[None]
        through = nnx.scan(nnx.remat(lambda block, x: block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(through(self.blocks, x))


def loss_fn(model, letters):
    """Only the second half is to be foreseen: weight 1 for its letters, and how many were right beside the loss."""
    logits, target = model(letters[:, :-1])[:, HALF - 1:], letters[:, HALF:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return zj.Loss(losses.sum(), losses.size, aux={"accuracy": (logits.argmax(-1) == target).sum()})


def sequences(rows, seed):
    rng = np.random.default_rng(seed)
    while True:
        half = rng.integers(0, LETTERS, (rows, HALF), np.int32)
        yield np.concatenate([half, half[:, ::-1]], 1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO, 0 to 3")
    parser.add_argument("--devices", type=int, default=8, help="how many; on a CPU as many are simulated")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches a step")
    parser.add_argument("--trainable", metavar="REGEX", help="paths of the parameters that are trained; the others are frozen")
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:args.devices]), args.stage, min_shard=2**10)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, args.steps))
    state = zero.init(lambda: Transformer(nnx.Rngs(0)), tx, trainable=args.trainable)
    step = zero.train_step(loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0)
    print(zero.layout(state))
    for i, letters in zip(range(1, args.steps + 1), zj.feed(sequences(128, seed=0), zero), strict=False):
        state, metrics = step(state, letters)
        if i % 10 == 0:
            print(f"step {i}: loss {float(metrics['loss']):.3f}, {float(metrics['aux']['accuracy']):.0%} of letters right")

    letters = next(sequences(zero.parts, seed=1))
    logits = zero.jit(zero.gathered(predict), donate=False)(state, letters)
    text = lambda row: "".join(chr(ord("a") + int(x)) for x in row)
    print(f"{text(letters[0, :HALF])} backwards is {text(np.asarray(logits)[0, HALF - 1:].argmax(-1))}")


def predict(model, letters):
    model.eval()  # no dropout
    return model(letters[:, :-1])


if __name__ == "__main__":
    main()
