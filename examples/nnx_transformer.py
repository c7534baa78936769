"""An NNX transformer with scanned blocks, remat and dropout, trained at ZeRO stage 3 on a toy task.

    python examples/nnx_transformer.py --stage 2 --accumulate 2
    python examples/nnx_transformer.py --trainable 'blocks/.*|head/.*'    # freezes the embeddings
    zerojax plan examples/nnx_transformer.py --topology h100:1x8 --min-shard 1024

Each sequence consists of random letters, followed by the same letters backwards. The model learns
to write the second half. The module is plain NNX. The loss receives it as `init_fn` created it, and
parameters are gathered where the module reads them.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zerojax as zj

LETTERS, HALF, WIDTH, HEADS, LAYERS = 16, 8, 64, 4, 2
SEQ = 2 * HALF


class Block(nnx.Module):
    """float32[batch, seq, WIDTH] to the same shape."""

    def __init__(self, rngs):
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, use_bias=False,
                                                rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_2(x)))))


class Transformer(nnx.Module):
    """int32[batch, seq] letters to logits[batch, seq, LETTERS]."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(LETTERS, WIDTH, rngs=rngs)
        self.position = nnx.Embed(SEQ, WIDTH, rngs=rngs)
        stack = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = stack(rngs)
        self.head = nnx.Linear(WIDTH, LETTERS, rngs=rngs)

    def __call__(self, letters):
        x = self.embed(letters) + self.position(jnp.arange(letters.shape[1]))[None]
        x = x.astype(self.head.kernel.dtype)  # in bfloat16 too, nnx.Embed returns float32
        block = nnx.remat(lambda block, x: block(x))
        through = nnx.scan(block, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(through(self.blocks, x))


def init():
    return Transformer(nnx.Rngs(0))


def loss_fn(model, letters):
    """Returns the loss over the second half, with the number of letters predicted correctly."""
    logits = model(letters[:, :-1])[:, HALF - 1:]
    target = letters[:, HALF:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    correct = (logits.argmax(-1) == target).sum()
    return zj.Loss(losses.sum(), losses.size, aux={"accuracy": correct})


def optimizer(steps):
    return optax.adam(optax.cosine_decay_schedule(3e-3, steps))


def batch_shape(parts):
    """Returns a batch of 8 sequences for each device and microbatch."""
    return jax.ShapeDtypeStruct((8 * parts, SEQ), jnp.int32)


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, optimizer(40), batch_shape)


def sequences(rows, seed):
    """Yields batches int32[rows, SEQ] without end."""
    rng = np.random.default_rng(seed)
    while True:
        half = rng.integers(0, LETTERS, (rows, HALF), np.int32)
        yield np.concatenate([half, half[:, ::-1]], 1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    parser.add_argument("--devices", type=int, default=8,
                        help="number of devices; simulated on a CPU")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches per step")
    parser.add_argument("--trainable", metavar="REGEX",
                        help="paths of the trained parameters; all others are frozen")
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage, min_shard=2**10)
    tx = optimizer(args.steps)
    state = zero.init(init, tx, trainable=args.trainable)
    step = zero.train_step(loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0)
    print(zero.layout(state))
    batches = itertools.islice(sequences(128, seed=0), args.steps)
    for i, letters in enumerate(zj.feed(batches, zero), 1):
        state, metrics = step(state, letters)
        if i % 10 == 0:
            loss, accuracy = float(metrics["loss"]), float(metrics["aux"]["accuracy"])
            print(f"step {i}: loss {loss:.3f}, {accuracy:.0%} of letters right")

    letters = next(sequences(zero.parts, seed=1))
    logits = zero.jit(zero.gathered(predict), donate=False)(state, letters)
    answer = np.asarray(logits)[0, HALF - 1:].argmax(-1)
    print(f"{text(letters[0, :HALF])} backwards is {text(answer)}")


def predict(model, letters):
    model.eval()  # turns dropout off
    return model(letters[:, :-1])


def text(letters):
    return "".join(chr(ord("a") + int(x)) for x in letters)


if __name__ == "__main__":
    main()
