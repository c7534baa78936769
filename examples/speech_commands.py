"""Recognition of spoken commands from log-mel frames, with a recurrent network (GRU), in linen.

    python examples/speech_commands.py                        # half a minute on two cores
    python examples/speech_commands.py --stage 0              # the same losses
    zerojax plan examples/speech_commands.py --topology h100:1x8 --min-shard 1024 --compute float32

The recordings are synthetic, one second at 8 kHz. Each of the eight words is a sequence of three
sounds, which are steady, rising or falling tones with harmonics. Pitch, speed, start and noise
differ between recordings. The lines that use zerojax are marked with <--.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import zerojax as zj

BATCH, TRAIN, HELD_OUT = 128, 1024, 256
RATE, WINDOW, HOP, MELS, WIDTH = 8000, 256, 200, 32, 128
FRAMES = (RATE - WINDOW) // HOP + 1
SOUNDS = ((300, 300), (500, 500), (300, 500), (500, 300))  # Hz at the start and at the end
WORDS = ((0, 1, 2), (0, 2, 1), (1, 0, 3), (1, 3, 0), (2, 0, 1), (2, 3, 2), (3, 1, 0), (3, 2, 3))


def read_data():
    """Returns training and held-out data: float32[n, FRAMES, MELS] log-mel, int32[n] labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(WORDS), TRAIN + HELD_OUT, np.int32)
    frames = log_mel(np.stack([spoken(WORDS[label], rng) for label in labels]))
    frames = (frames - frames[:TRAIN].mean()) / frames[:TRAIN].std()
    data = {"frames": frames, "label": labels}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:] for name, x in data.items()})


def spoken(word, rng):
    """Returns a recording of a word, float64[RATE]."""
    pitch, length = rng.uniform(0.8, 1.25), int(rng.uniform(0.15, 0.3) * RATE)
    recording = rng.uniform(0.1, 1) * rng.normal(size=RATE)
    start = rng.integers(0, RATE - 3 * length)
    for i, sound in enumerate(word):
        phase = 2 * np.pi * pitch * np.cumsum(np.linspace(*SOUNDS[sound], length)) / RATE
        tone = sum(np.sin(k * phase) / k for k in (1, 2, 3)) * np.hanning(length)
        recording[start + i * length:start + (i + 1) * length] += tone
    return recording


def log_mel(recordings):
    """Returns the log-mel frames float32[n, FRAMES, MELS] of recordings [n, RATE]."""
    pieces = np.lib.stride_tricks.sliding_window_view(recordings, WINDOW, 1)[:, ::HOP]
    power = np.abs(np.fft.rfft(pieces * np.hanning(WINDOW))) ** 2
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)  # Hz
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return np.log(power @ filters + 1e-3).astype(np.float32)


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, TRAIN, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class Recognizer(nn.Module):
    """float32[batch, FRAMES, MELS] log-mel frames to logits[batch, words]."""

    @nn.compact
    def __call__(self, frames):
        x = nn.silu(nn.Dense(WIDTH)(frames))
        x = nn.RNN(nn.GRUCell(WIDTH))(x)
        return nn.Dense(len(WORDS))(x.max(1))


model = Recognizer()


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, FRAMES, MELS)))


def loss_fn(variables, batch):
    logits = model.apply(variables, batch["frames"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.adam(3e-3)


def batch_shape(parts):
    """Returns a batch of 16 recordings for each device and microbatch."""
    return {"frames": jax.ShapeDtypeStruct((16 * parts, FRAMES, MELS), jnp.float32),
            "label": jax.ShapeDtypeStruct((16 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["frames"])


def metric(logits, data):
    """Returns the accuracy."""
    return (np.argmax(logits, -1) == data["label"]).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=80)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage, min_shard=2**10)  # <-- the policy
    state = zero.init(init, tx)  # <-- creates the state sharded
    step = zero.train_step(loss_fn, tx)  # <-- gradients and update, according to the stage
    evaluate = zero.jit(zero.gathered(predict), donate=False)  # <-- the model, for evaluation

    train, held_out = read_data()
    before = metric(evaluate(state, held_out), held_out)
    feed = zj.feed(batches(train, args.steps), zero)  # <-- to each device its part
    for batch in tqdm(feed, total=args.steps, unit="step"):
        state, metrics = step(state, batch)
    after = metric(evaluate(state, held_out), held_out)
    print(f"accuracy {before:.1%} before, {after:.1%} after {args.steps} steps; "
          f"last loss {float(metrics['loss']):.5f}")


if __name__ == "__main__":
    main()
