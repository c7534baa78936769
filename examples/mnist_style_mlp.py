"""A training loop of your own, with flax's `TrainState`, changed to ZeRO in four lines.

    python examples/mnist_style_mlp.py                        # ten seconds on two cores
    python examples/mnist_style_mlp.py --stage 0              # the same losses
    zerojax plan examples/mnist_style_mlp.py --topology h100:1x8 --compute float32

The model (784-128-10, SGD) and the data (scikit-learn's digits, scaled to 28 x 28) are those of
textbook_mlp.py. The four lines are marked with <--. With `--devices 10`, no dimension of 784 x 128
is divisible, so this kernel stays whole, as the printed layout shows. (`Zero(uneven="pad")` pads
such parameters in states that `zero.init` makes, as in textbook_mlp.py.)
"""

import argparse
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import zerojax as zj

BATCH, HELD_OUT = 80, 197


def read_data():
    """Returns shuffled images float32[1797, 784] in 0..1 and their labels int32[1797]."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16.0, (len(digits.images), 28, 28), "linear")
    images = np.asarray(images, np.float32).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], digits.target.astype(np.int32)[order]


def batches(images, labels):
    """Yields shuffled batches without end."""
    rng = np.random.default_rng(0)
    while True:
        for rows in rng.permutation(len(images)).reshape(-1, BATCH):
            yield {"image": images[rows], "label": labels[rows]}


class MLP(nn.Module):
    """float32[batch, 784] pixels to logits[batch, 10]."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


model, tx = MLP(), optax.sgd(0.1)


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, 784)))["params"]


def create():
    return TrainState.create(apply_fn=model.apply, params=init(), tx=tx)


def loss_fn(params, batch):
    logits = model.apply({"params": params}, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


def batch_shape(parts):
    """Returns a batch of 8 images for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((8 * parts, 784), jnp.float32),
            "label": jax.ShapeDtypeStruct((8 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def accuracy(params, images, labels):
    logits = model.apply({"params": jax.device_get(params)}, images)
    return float((logits.argmax(-1) == labels).mean())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=100)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:args.devices]), args.stage)
    state = zero.create(create)  # <-- 1. instead of create()

    @zero.jit  # <-- 2. instead of jax.jit
    def train_step(state, batch):
        value, grads = zero.value_and_grad(loss_fn)(state.params, batch)  # <-- 3. instead of jax's
        return state.apply_gradients(grads=grads), value

    print(zero.layout(state))
    images, labels = read_data()
    held_out = images[:HELD_OUT], labels[:HELD_OUT]
    before = accuracy(state.params, *held_out)
    source = itertools.islice(batches(images[HELD_OUT:], labels[HELD_OUT:]), args.steps)
    for i, batch in enumerate(zj.feed(source, zero), 1):  # <-- 4. each part to its device
        state, loss = train_step(state, batch)
        if i % 20 == 0:
            print(f"step {i}: loss {float(loss):.6f}")
    print(f"accuracy {before:.1%} before, {accuracy(state.params, *held_out):.1%} after "
          f"{args.steps} steps; last loss {float(loss):.5f}")


if __name__ == "__main__":
    main()
