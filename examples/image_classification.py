"""Image classification with a small vision transformer or a small ResNet, in NNX.

    python examples/image_classification.py                   # half a minute on two cores
    python examples/image_classification.py --model resnet --stage 0
    zerojax plan examples/image_classification.py --topology h100:1x8 --min-shard 1024
    zerojax plan examples/image_classification.py:resnet --topology h100:1x8 --min-shard 1024

The images are scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels. The ResNet has
batch statistics: zerojax keeps them as model state and differentiates one loss over the whole
batch. The lines that use zerojax are marked with <--.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import zerojax as zj

BATCH, TRAIN, HELD_OUT = 128, 1440, 320
PATCH, WIDTH, HEADS, LAYERS = 2, 64, 4, 2


def read_data():
    """Returns training data and held-out data: float32[n, 8, 8, 1] in 0..1, int32[n] labels."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    data = {"image": images[order], "label": digits.target.astype(np.int32)[order]}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:TRAIN + HELD_OUT] for name, x in data.items()})


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, TRAIN, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class Block(nnx.Module):
    """A transformer block, float32[batch, patches, WIDTH] to the same shape."""

    def __init__(self, rngs):
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class ViT(nnx.Module):
    """float32[batch, 8, 8, 1] pixels to logits[batch, 10]."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(PATCH * PATCH, WIDTH, rngs=rngs)
        positions = (1, (8 // PATCH)**2, WIDTH)
        self.position = nnx.Param(jax.random.normal(rngs.params(), positions))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        side = 8 // PATCH
        x = images.astype(self.position.dtype)  # computes in the dtype of the parameters
        x = x.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3)
        x = self.embed(x.reshape(-1, side * side, PATCH * PATCH)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Residual(nnx.Module):
    """Two convolutions with batch normalization; the image's height and width are halved."""

    def __init__(self, features_in, features, rngs):
        self.conv_1 = nnx.Conv(features_in, features, (3, 3), 2, use_bias=False, rngs=rngs)
        self.conv_2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.skip = nnx.Conv(features_in, features, (1, 1), 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        # in bfloat16 too, nnx.BatchNorm returns float32
        y = nnx.silu(self.norm_1(self.conv_1(x)).astype(x.dtype))
        return nnx.silu(self.skip(x) + self.norm_2(self.conv_2(y)).astype(x.dtype))


class ResNet(nnx.Module):
    """float32[batch, 8, 8, 1] pixels to logits[batch, 10]."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Residual(16, 32, rngs), Residual(32, 64, rngs)])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = self.stem(images.astype(self.stem.kernel.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def init():
    return ViT(nnx.Rngs(0))


def init_resnet():
    return ResNet(nnx.Rngs(0))


def loss_fn(model, batch):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.adam(3e-3)


def batch_shape(parts):
    """Returns a batch of 16 images for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((16 * parts, 8, 8, 1), jnp.float32),
            "label": jax.ShapeDtypeStruct((16 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)
resnet = zj.Recipe(init_resnet, loss_fn, tx, batch_shape)


def predict(model, batch):
    model.eval()  # uses the batch statistics of the training
    return model(batch["image"])


def metric(logits, data):
    """Returns the accuracy."""
    return (np.argmax(logits, -1) == data["label"]).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=["vit", "resnet"], default="vit")
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=60)
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage, min_shard=2**10)  # <-- the policy
    chosen = {"vit": init, "resnet": init_resnet}[args.model]
    state = zero.init(chosen, tx)  # <-- creates the state sharded
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
