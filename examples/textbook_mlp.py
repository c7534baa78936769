"""The textbook case: a 784-128-10 MLP, trained with plain SGD over ten devices.

    python examples/textbook_mlp.py                           # ten seconds on two cores
    python examples/textbook_mlp.py --stage 0 --devices 8     # the same losses
    zerojax plan examples/textbook_mlp.py --topology h100:1x8 --compute float32

The images are scikit-learn's digits (1,797 handwritten digits of 8 x 8 pixels), scaled to 28 x 28.
Neither 784 nor 128 is divisible by ten, so the first kernel is padded (`uneven="pad"`). The lines
that use zerojax are marked with <--. mnist_style_mlp.py trains the same model in a loop of its own.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import zerojax as zj

BATCH, TRAIN, HELD_OUT = 80, 1600, 160


def read_data():
    """Returns training data and held-out data: float32[n, 784] pixels in 0..1, int32[n] labels."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16.0, (len(digits.images), 28, 28), "linear")
    images = np.asarray(images, np.float32).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(images))
    data = {"image": images[order], "label": digits.target.astype(np.int32)[order]}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:TRAIN + HELD_OUT] for name, x in data.items()})


def batches(data, steps):
    """Returns `steps` batches; each epoch is a new order of the data."""
    def make(number):
        epoch, place = divmod(number, TRAIN // BATCH)
        order = np.random.default_rng(epoch).permutation(TRAIN)
        rows = order[place * BATCH:(place + 1) * BATCH]
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class MLP(nn.Module):
    """float32[batch, 784] pixels to logits[batch, 10]."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


model = MLP()


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, 784)))


def loss_fn(variables, batch):
    logits = model.apply(variables, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.sgd(0.1)


def batch_shape(parts):
    """Returns a batch of 8 images for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((8 * parts, 784), jnp.float32),
            "label": jax.ShapeDtypeStruct((8 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["image"])


def metric(logits, data):
    """Returns the accuracy."""
    return (np.argmax(logits, -1) == data["label"]).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=10, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=100)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage, uneven="pad")  # <-- the policy
    state = zero.init(init, tx)  # <-- creates the state sharded
    step = zero.train_step(loss_fn, tx)  # <-- gradients and update, according to the stage
    evaluate = zero.jit(zero.gathered(predict), donate=False)  # <-- the model, for evaluation
    print(zero.layout(state))

    train, held_out = read_data()
    before = metric(evaluate(state, held_out), held_out)
    for i, batch in enumerate(zj.feed(batches(train, args.steps), zero), 1):  # <-- to the devices
        state, metrics = step(state, batch)
        if i % 10 == 0:
            print(progress(i, float(metrics["loss"])))
    after = metric(evaluate(state, held_out), held_out)
    print(f"accuracy {before:.1%} before, {after:.1%} after {args.steps} steps; "
          f"last loss {float(metrics['loss']):.5f}")


def progress(i, loss):
    """Returns the line that PyTorch's MNIST example prints."""
    epoch, place = divmod(i - 1, TRAIN // BATCH)
    seen = (place + 1) * BATCH
    done = f"{seen}/{TRAIN} ({100 * seen / TRAIN:.0f}%)"
    return f"Train Epoch: {epoch + 1} [{done}]\tLoss: {loss:.6f}"


if __name__ == "__main__":
    main()
