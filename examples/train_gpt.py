"""Trains a byte-level GPT on the Python language reference, ZeRO stage 3 over eight CPU devices, and samples from it.

    python examples/train_gpt.py                                  # two minutes on two cores
    python examples/train_gpt.py --stage 1 --devices 4 --accumulate 4 --compute bfloat16
    python examples/train_gpt.py --checkpoint runs/gpt            # kill it, and run it again: it goes on
    zerojax plan examples/train_gpt.py --topology h200:8x8        # what it would need on 64 GPUs

The text is `pydoc_data.topics`, which every CPython has (0.5 MB). What makes it ZeRO is marked with <--.
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
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_1")(x), mask=nn.make_causal_mask(x[..., 0]))
        h = nn.Dense(4 * WIDTH, use_bias=False, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.gelu(h)), None


class GPT(nn.Module):
    """int32[batch, seq] bytes to logits[batch, seq, VOCAB] for the next ones."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens) + nn.Embed(SEQ, WIDTH, name="position")(jnp.arange(tokens.shape[1]))[None]
        block = nn.remat(Block, prevent_cse=False, policy=zj.remat.regather())  # <-- whole weights are not kept for backward
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(name="blocks")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


model = GPT()


def loss_fn(variables, tokens):
    """tokens: int32[batch, SEQ + 1]. A sum over tokens and their number: right under any split of the batch."""
    logits = model.apply(variables, tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return zj.Loss(losses.sum(), losses.size)


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, SEQ), jnp.int32))


def optimizer(steps):
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 6e-3, steps // 10, steps), b2=0.98, weight_decay=0.01)


# what `zerojax plan`, `advise` and `show` take: 4 sequences for each device and microbatch
recipe = zj.Recipe(init, loss_fn, optimizer(1000), lambda parts: jax.ShapeDtypeStruct((4 * parts, SEQ + 1), jnp.int32))


def read_text():
    """(training bytes, held-out bytes), whole topics each."""
    topics = sorted(pydoc_data.topics.topics.items())
    join = lambda part: np.frombuffer("\n\n".join(text for _, text in part).encode(), np.uint8)
    held_out = topics[::10]
    return join([t for t in topics if t not in held_out]), join(held_out)


def windows(text, rows, seed, stop=None):
    """int32[rows, SEQ + 1] at random places of the text, which are a function of the batch's number."""
    def window(i):
        starts = np.random.default_rng((seed, i)).integers(0, len(text) - SEQ, (rows, 1))
        return text[starts + np.arange(SEQ + 1)].astype(np.int32)

    return zj.Indexed(window, stop)


def bits_per_byte(evaluate, zero, state, text, rows, preemption, batches=8):
    fed = preemption.until(zj.feed(windows(text, rows, 1, batches), zero))
    losses = [evaluate(state, tokens)["loss"] for tokens in fed]
    return float(np.mean(losses)) / math.log(2) if losses else math.nan


def sampler(zero, length, temperature=0.7):
    """A function of (state, prompts int32[rows, SEQ], key) that continues each by `length` bytes."""

    @zero.jit(donate=False)  # <-- the state's shards, read as the stage says
    def sample(state, tokens, key):
        def one(tokens, key):
            logits = zero.gathered(model.apply)(state, tokens)[:, -1]
            byte = jax.random.categorical(key, logits.astype(jnp.float32) / temperature).astype(jnp.int32)
            return jnp.concatenate([tokens[:, 1:], byte[:, None]], 1), byte

        return jax.lax.scan(one, tokens, jax.random.split(key, length))[1].T

    return sample


def continued(zero, state, prompt, length=240):
    rows = np.tile(np.frombuffer(prompt.encode(), np.uint8)[-SEQ:].astype(np.int32), (zero.parts, 1))
    padded = np.concatenate([np.full((zero.parts, SEQ - rows.shape[1]), ord("\n"), np.int32), rows], 1)
    sampled = sampler(zero, length)(state, padded, jax.random.key(0))
    return bytes(np.asarray(sampled[0], np.uint8)).decode(errors="replace")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO, 0 to 3")
    parser.add_argument("--devices", type=int, default=8, help="how many; on a CPU as many are simulated")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches a step")
    parser.add_argument("--compute", default="float32", help="dtype of the model, and of what moves between devices")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step, over all devices and microbatches")
    parser.add_argument("--checkpoint", metavar="DIR", help="save there, and go on from what is there")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="it is an error if there is nothing to go on from")
    return parser.parse_args()


def resumed(checkpoints, zero, tx, resume):
    """What the checkpoint says, or a new state at the start of the data."""
    target, if_none = zero.abstract(init, tx), "raise" if resume else "none"
    found = checkpoints and checkpoints.restore_latest(target, if_none=if_none)  # <-- of any stage and number of devices
    return (found.state, found.data_state) if found else (zero.init(init, tx), {"next": 0})  # <-- born sharded


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage, precision=zj.Precision(compute=args.compute), min_shard=2**10,
                   uneven="pad")  # <-- the policy
    open_checkpoints = lambda: zj.Checkpointer(args.checkpoint, every=args.every, zero=zero)
    with zj.Preemption() as preemption, open_checkpoints() if args.checkpoint else contextlib.nullcontext() as checkpoints:
        train(args, zero, checkpoints, preemption)


def train(args, zero, checkpoints, preemption):
    tx = optimizer(args.steps)
    step, evaluate = zero.train_step(loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0), zero.eval_step(loss_fn)  # <--
    state, position = resumed(checkpoints, zero, tx, args.resume)
    print(zero.layout(state))

    text, held_out = read_text()
    batches = zj.feed(windows(text, args.batch, 0, args.steps), zero)  # <-- each part to its device
    batches.set_state(position)
    before = bits_per_byte(evaluate, zero, state, held_out, args.batch, preemption)
    first, last, started = int(state.step), None, None
    progress = tqdm(preemption.until(batches), initial=first, total=args.steps, unit="step",
                    desc=f"stage {args.stage}, {zero.parts} devices")
    for i, tokens in enumerate(progress, first + 1):
        state, metrics = step(state, tokens)
        if checkpoints:
            checkpoints.save(state, step=i, data_state=batches)  # <-- every so many steps, in the background
        if last is not None:  # the step before has run by now: reading its loss keeps no device waiting
            loss = float(last["loss"])
            started = started or (time.perf_counter(), i)
            rate = (i - started[1]) * args.batch * SEQ / max(time.perf_counter() - started[0], 1e-9)
            progress.set_postfix(loss=f"{loss:.3f}", bits_per_byte=f"{loss / math.log(2):.3f}", tokens_per_s=f"{rate:,.0f}")
        last = metrics
    after = bits_per_byte(evaluate, zero, state, held_out, args.batch, preemption)
    if checkpoints:
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
    if preemption.requested:
        preemption.exit()  # <-- its status is 75
    print(f"held-out text: {before:.3f} bits per byte before, {after:.3f} after {args.steps} steps")

    prompt = 'The "try" statement\n*******************\n\nThe "try" statement '
    print(f"\n{prompt}|{continued(zero, state, prompt)}")


if __name__ == "__main__":
    main()
