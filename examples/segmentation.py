"""Image segmentation with a small U-Net, in NNX.

    python examples/segmentation.py --picture masks.png       # half a minute on two cores
    python examples/segmentation.py --stage 0                 # the same losses
    zerojax plan examples/segmentation.py --topology h100:1x8 --min-shard 1024

The images are synthetic: a circle, a square and some lines on a noisy background. The model marks
the pixels of circle and square. Because of its convolutions, zerojax differentiates one loss over
the whole batch. `--picture` needs matplotlib. The lines that use zerojax are marked with <--.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import zerojax as zj

BATCH, TRAIN, HELD_OUT, SIDE = 32, 1024, 128, 32


def read_data():
    """Returns training and held-out data: float32[n, SIDE, SIDE, 1] images, bool[n, ...] masks."""
    rng = np.random.default_rng(0)
    drawn = [drawing(rng) for _ in range(TRAIN + HELD_OUT)]
    data = {"image": np.stack([image for image, _ in drawn])[..., None].astype(np.float32),
            "mask": np.stack([mask for _, mask in drawn])[..., None]}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:] for name, x in data.items()})


def drawing(rng):
    """Returns an image of a circle, a square and lines, and the mask of the first two."""
    image = rng.normal(0, 0.3, (SIDE, SIDE)) + np.linspace(-0.5, 0.5, SIDE)
    mask = np.zeros((SIDE, SIDE), bool)
    image[rng.integers(0, SIDE, 2)] += 1
    image[:, rng.integers(0, SIDE, 2)] += 1
    for distance in np.hypot, np.maximum:
        radius, center = rng.uniform(3, 7), rng.uniform(6, SIDE - 6, (2, 1, 1))
        mask |= distance(*np.abs(np.indices((SIDE, SIDE)) - center)) < radius
    image[mask] += 1
    return image, mask


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, TRAIN, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class Double(nnx.Module):
    """Two 3 x 3 convolutions, each with group normalization."""

    def __init__(self, features_in, features, rngs):
        self.conv_1 = nnx.Conv(features_in, features, (3, 3), use_bias=False, rngs=rngs)
        self.conv_2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.GroupNorm(features, 4, rngs=rngs)
        self.norm_2 = nnx.GroupNorm(features, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.norm_1(self.conv_1(x)))
        return nnx.silu(self.norm_2(self.conv_2(x)))


class UNet(nnx.Module):
    """float32[batch, SIDE, SIDE, 1] pixels to logits of the same shape."""

    def __init__(self, rngs):
        self.down_1 = Double(1, 8, rngs)
        self.down_2 = Double(8, 16, rngs)
        self.bottom = Double(16, 32, rngs)
        self.up_2 = Double(32 + 16, 16, rngs)
        self.up_1 = Double(16 + 8, 8, rngs)
        self.head = nnx.Conv(8, 1, (1, 1), rngs=rngs)

    def __call__(self, images):
        x = images.astype(self.head.kernel.dtype)  # computes in the dtype of the parameters
        fine = self.down_1(x)
        coarse = self.down_2(halved(fine))
        x = self.bottom(halved(coarse))
        x = self.up_2(jnp.concatenate([doubled(x), coarse], -1))
        x = self.up_1(jnp.concatenate([doubled(x), fine], -1))
        return self.head(x)


def halved(x):
    return nnx.max_pool(x, (2, 2), (2, 2))


def doubled(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def init():
    return UNet(nnx.Rngs(0))


def loss_fn(model, batch):
    losses = optax.sigmoid_binary_cross_entropy(model(batch["image"]), batch["mask"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.adam(1e-2)


def batch_shape(parts):
    """Returns a batch of 8 images for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((8 * parts, SIDE, SIDE, 1), jnp.float32),
            "mask": jax.ShapeDtypeStruct((8 * parts, SIDE, SIDE, 1), jnp.bool_)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(model, batch):
    return model(batch["image"])


def metric(logits, data):
    """Returns the intersection over union of the predicted and the true masks."""
    marked = np.asarray(logits) > 0
    return (marked & data["mask"]).sum() / (marked | data["mask"]).sum()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=60)
    add("--picture", metavar="FILE", help="where to save images with masks, before and after")
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
    before = evaluate(state, held_out)
    feed = zj.feed(batches(train, args.steps), zero)  # <-- to each device its part
    for batch in tqdm(feed, total=args.steps, unit="step"):
        state, metrics = step(state, batch)
    after = evaluate(state, held_out)
    if args.picture:
        save_picture(args.picture, held_out, before, after)
    print(f"IoU {metric(before, held_out):.1%} before, {metric(after, held_out):.1%} after "
          f"{args.steps} steps; last loss {float(metrics['loss']):.5f}")


def save_picture(path, data, before, after, rows=4):
    """Saves held-out images, their masks, and the predicted chances before and after training."""
    import matplotlib.pyplot as plt

    columns = {"image": data["image"], "truth": data["mask"],
               "before": jax.nn.sigmoid(before), "after": jax.nn.sigmoid(after)}
    figure, axes = plt.subplots(rows, len(columns), figsize=(7, 7), layout="constrained")
    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        for axis, image in zip(column, images, strict=False):
            limits = {} if title == "image" else {"vmin": 0, "vmax": 1}
            axis.imshow(image[..., 0], cmap="gray", **limits)
            axis.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    main()
