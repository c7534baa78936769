"""Trains a byte-level GPT at ZeRO stage 3 on eight CPU devices, and samples from it.

    python examples/train_gpt.py                                  # two minutes on two cores
    python examples/train_gpt.py --stage 1 --devices 4 --accumulate 4 --compute bfloat16
    python examples/train_gpt.py --checkpoint runs/gpt            # if killed, run again to resume
    zerojax plan examples/train_gpt.py --topology h200:8x8        # what 64 GPUs would need

The text is the Python language reference, `pydoc_data.topics` of the standard library (0.5 MB). The
lines that use zerojax are marked with <--.
"""

import argparse
import contextlib
import math
import pydoc_data.topics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import zerojax as zj

VOCAB, WIDTH, HEADS, LAYERS, SEQ = 256, 96, 4, 2, 64


class Block(nn.Module):
    """A transformer block, float32[batch, seq, WIDTH] to the same shape, for `nn.scan`."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_1")(x), mask=nn.make_causal_mask(x[..., 0]))
        h = nn.Dense(4 * WIDTH, use_bias=False, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.gelu(h)), None


class GPT(nn.Module):
    """int32[batch, seq] bytes to logits[batch, seq, VOCAB] of the next bytes."""

    @nn.compact
    def __call__(self, tokens):
        position = nn.Embed(SEQ, WIDTH, name="position")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens) + position[None]
        policy = zj.remat.regather()  # <-- does not keep gathered weights for the backward pass
        block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                         length=LAYERS)
        x, _ = layers(name="blocks")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


model = GPT()


def loss_fn(variables, tokens):
    """Returns the sum over tokens int32[batch, SEQ + 1], which is right for any split of them."""
    logits = model.apply(variables, tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return zj.Loss(losses.sum(), losses.size)


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, SEQ), jnp.int32))


def optimizer(steps):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 6e-3, steps // 10, steps)
    return optax.adamw(schedule, b2=0.98, weight_decay=0.01)


def batch_shape(parts):
    """Returns a batch of 4 sequences for each device and microbatch."""
    return jax.ShapeDtypeStruct((4 * parts, SEQ + 1), jnp.int32)


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, optimizer(1000), batch_shape)


def read_text():
    """Returns training bytes and held-out bytes; every tenth topic is held out."""
    topics = sorted(pydoc_data.topics.topics.items())
    held_out = topics[::10]
    return joined([topic for topic in topics if topic not in held_out]), joined(held_out)


def joined(topics):
    return np.frombuffer("\n\n".join(text for _, text in topics).encode(), np.uint8)


def windows(text, rows, seed, stop=None):
    """Returns batches int32[rows, SEQ + 1] from places of the text that depend on their number."""
    def window(i):
        starts = np.random.default_rng((seed, i)).integers(0, len(text) - SEQ, (rows, 1))
        return text[starts + np.arange(SEQ + 1)].astype(np.int32)

    return zj.Indexed(window, stop)


def bits_per_byte(evaluate, zero, state, text, rows, preemption, batches=8):
    fed = preemption.until(zj.feed(windows(text, rows, 1, batches), zero))
    losses = [evaluate(state, tokens)["loss"] for tokens in fed]
    return float(np.mean(losses)) / math.log(2) if losses else math.nan


def sampler(zero, length, temperature=0.7):
    """Returns a function of (state, prompts int32[rows, SEQ], key) that adds `length` bytes."""

    @zero.jit(donate=False)  # <-- keeps the state, which is used again
    def sample(state, tokens, key):
        def one(tokens, key):
            logits = zero.gathered(model.apply)(state, tokens)[:, -1].astype(jnp.float32)  # <--
            byte = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
            return jnp.concatenate([tokens[:, 1:], byte[:, None]], 1), byte

        return jax.lax.scan(one, tokens, jax.random.split(key, length))[1].T

    return sample


def continued(zero, state, prompt, length=240):
    """Returns the text with which the model continues the prompt."""
    row = np.frombuffer(prompt.encode(), np.uint8)[-SEQ:].astype(np.int32)
    row = np.concatenate([np.full(SEQ - len(row), ord("\n"), np.int32), row])
    rows = np.tile(row, (zero.parts, 1))  # one for each device
    sampled = sampler(zero, length)(state, rows, jax.random.key(0))
    return bytes(np.asarray(sampled[0], np.uint8)).decode(errors="replace")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--accumulate", type=int, default=1, help="microbatches per step")
    add("--compute", default="float32", help="dtype of the model and of communication")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=32, help="sequences per step, on all devices together")
    add("--checkpoint", metavar="DIR", help="directory to save to and to resume from")
    add("--every", type=int, default=100, help="steps between checkpoints")
    add("--resume", action="store_true", help="raise an error if there is no checkpoint")
    return parser.parse_args()


def opened(args, zero):
    """Returns a `Checkpointer`, or a context that does nothing if checkpoints are not wanted."""
    if not args.checkpoint:
        return contextlib.nullcontext()
    return zj.Checkpointer(args.checkpoint, every=args.every, zero=zero)  # <--


def resumed(checkpoints, zero, tx, resume):
    """Returns the state and data position of the last checkpoint, or those of a new run."""
    if checkpoints:
        if_none = "raise" if resume else "none"
        # <-- may have been saved at another stage or on another number of devices
        found = checkpoints.restore_latest(zero.abstract(init, tx), if_none=if_none)
        if found:
            return found.state, found.data_state
    return zero.init(init, tx), {"next": 0}  # <-- creates the state sharded


class Progress:
    """A progress bar that shows the loss of the previous step, so that no device has to wait."""

    def __init__(self, batches, first, steps, tokens, title):
        self.bar = tqdm(batches, initial=first, total=steps, desc=title, dynamic_ncols=True,
                        bar_format="{desc}: {n}/{total} |{bar}| {remaining} left{postfix}")
        self.tokens, self.last, self.started, self.timed = tokens, None, None, 0

    def __iter__(self):
        return iter(self.bar)

    def show(self, loss):
        previous, self.last = self.last, loss
        if previous is None:
            return
        value = float(previous)  # its step has finished by now
        self.started = self.started or time.perf_counter()
        rate = self.timed * self.tokens / max(time.perf_counter() - self.started, 1e-9)
        self.timed += 1
        self.bar.set_postfix_str(f"loss {value:.3f}, {rate:,.0f} tokens/s")


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])  # <--
    zero = zj.Zero(mesh, args.stage, precision=zj.Precision(compute=args.compute),
                   min_shard=2**10, uneven="pad")  # <-- the policy
    with zj.Preemption() as preemption, opened(args, zero) as checkpoints:  # <--
        train(args, zero, checkpoints, preemption)


def train(args, zero, checkpoints, preemption):
    tx = optimizer(args.steps)
    step = zero.train_step(loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0)  # <--
    evaluate = zero.eval_step(loss_fn)  # <--
    state, position = resumed(checkpoints, zero, tx, args.resume)
    print(zero.layout(state))

    text, held_out = read_text()
    batches = zj.feed(windows(text, args.batch, 0, args.steps), zero)  # <-- to the devices
    batches.set_state(position)
    before = bits_per_byte(evaluate, zero, state, held_out, args.batch, preemption)
    first = int(state.step)
    progress = Progress(preemption.until(batches), first, args.steps, args.batch * SEQ,
                        f"stage {args.stage}")
    for i, tokens in enumerate(progress, first + 1):
        state, metrics = step(state, tokens)
        progress.show(metrics["loss"])
        if checkpoints:
            checkpoints.save(state, step=i, data_state=batches)  # <-- in the background
    after = bits_per_byte(evaluate, zero, state, held_out, args.batch, preemption)
    if checkpoints:
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
    if preemption.requested:
        preemption.exit()  # <-- with status 75
    print(f"held-out text: {before:.3f} bits per byte before, {after:.3f} after {args.steps} steps")

    prompt = 'The "try" statement\n*******************\n\nThe "try" statement '
    print(f"\n{prompt}|{continued(zero, state, prompt)}")


if __name__ == "__main__":
    main()
