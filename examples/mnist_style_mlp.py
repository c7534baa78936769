"""The textbook MNIST loop (784-128-10, SGD, flax's `TrainState`), changed to ZeRO in four lines.

    python examples/mnist_style_mlp.py --stage 3 --devices 8

The images are scikit-learn's digits, scaled to 28 x 28. The four lines are marked with <--. With
`--stage 0` the program is plain data parallelism and prints the same losses. With `--devices 10`,
no dimension of 784 x 128 is divisible, so this kernel stays whole, as the printed layout shows.
(`Zero(uneven="pad")` pads such parameters in states that `zero.init` makes.)
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import zerojax as zj

BATCH, TEST = 80, 197


class MLP(nn.Module):
    """float32[batch, 784] pixels to logits[batch, 10]."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def read_digits():
    """Returns shuffled images float32[1797, 784] in 0..1 and their labels int32[1797]."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16.0, (len(digits.images), 28, 28), "linear")
    images = np.asarray(images, np.float32).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], digits.target.astype(np.int32)[order]


def batches(images, labels, seed):
    """Yields one epoch of shuffled batches."""
    order = np.random.default_rng(seed).permutation(len(images))
    for i in range(0, len(order) - BATCH + 1, BATCH):
        yield {"x": images[order[i:i + BATCH]], "y": labels[order[i:i + BATCH]]}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    parser.add_argument("--devices", type=int, default=8,
                        help="number of devices; simulated on a CPU")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:args.devices]), args.stage)
    images, labels = read_digits()
    model, tx = MLP(), optax.sgd(args.lr)

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = zero.create(create)  # <-- 1. creates the state sharded

    @zero.jit  # <-- 2. instead of jax.jit
    def train_step(state, batch):
        def loss(params, batch):
            logits = state.apply_fn({"params": params}, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        value, grads = zero.value_and_grad(loss)(state.params, batch)  # <-- 3. instead of jax's
        return state.apply_gradients(grads=grads), value

    print(zero.layout(state))
    size = len(images) - TEST
    for epoch in range(1, args.epochs + 1):
        data = zj.feed(batches(images[TEST:], labels[TEST:], epoch), zero)  # <-- 4. to the devices
        for i, batch in enumerate(data, 1):
            state, loss = train_step(state, batch)
            seen = i * BATCH
        done = f"{seen}/{size} ({100 * seen / size:.0f}%)"
        print(f"Train Epoch: {epoch} [{done}]\tLoss: {float(loss):.6f}")

    logits = model.apply({"params": jax.device_get(state.params)}, images[:TEST])
    correct = int((logits.argmax(-1) == labels[:TEST]).sum())
    print(f"Test set: accuracy: {correct}/{TEST} ({100 * correct / TEST:.0f}%)")


if __name__ == "__main__":
    main()
