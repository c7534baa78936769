"""Contrastive training of an image encoder and a text encoder (a small CLIP), in linen.

    python examples/text_image.py                             # ten seconds on two cores
    python examples/text_image.py --stage 0                   # the same losses
    zerojax plan examples/text_image.py --topology h100:1x8 --min-shard 1024

The pairs are synthetic: a drawing, and its caption, such as "a small red circle at the top left".
Of 144 captions, 40 are held out with their drawings. The metric is the share of these drawings
whose own caption is the most similar of the 40. Each pair is compared with all others of its batch,
so the loss is one loss over the whole batch, and the devices exchange the vectors of their pairs. A
plan accepts this, because the vectors are small beside the parameters. The lines that use zerojax
are marked with <--.
"""

import argparse
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import zerojax as zj

BATCH, HELD_OUT, COPIES, SIDE, WIDTH = 48, 40, 16, 16, 128
SIZES = {"small": 2.5, "large": 4}
COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0),
          "purple": (1, 0, 1), "white": (1, 1, 1)}
SHAPES = {"circle": np.hypot, "square": np.maximum, "diamond": np.add}  # distances from the center
PLACES = {"top left": (4, 4), "top right": (4, 11), "bottom left": (11, 4),
          "bottom right": (11, 11)}
KINDS = list(itertools.product(SIZES, COLORS, SHAPES, PLACES))
CAPTIONS = ["a {} {} {} at the {}".format(*kind).split() for kind in KINDS]
VOCAB = sorted({word for caption in CAPTIONS for word in caption})


def read_data():
    """Returns training and held-out data: float32[n, SIDE, SIDE, 3] images, int32[n, 8] words.

    In the training data, COPIES drawings with the same caption follow each other.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(len(KINDS))
    return pairs(order[HELD_OUT:].repeat(COPIES), rng), pairs(order[:HELD_OUT], rng)


def pairs(kinds, rng):
    """Returns a drawing and a caption of each kind."""
    numbers = np.array([[VOCAB.index(word) for word in caption] for caption in CAPTIONS], np.int32)
    images = np.stack([drawing(*KINDS[kind], rng) for kind in kinds])
    return {"image": images.astype(np.float32), "words": numbers[kinds]}


def drawing(size, color, shape, place, rng):
    image = rng.normal(0, 0.1, (SIDE, SIDE, 3))
    center = np.reshape(PLACES[place], (2, 1, 1)) + rng.uniform(-1, 1, (2, 1, 1))
    distance = SHAPES[shape](*np.abs(np.indices((SIDE, SIDE)) - center))
    image[distance < SIZES[size]] += np.array(COLORS[color])
    return image


def batches(data, steps):
    """Returns `steps` batches of random examples with different captions."""
    def make(number):
        rng = np.random.default_rng(number)
        kinds = rng.permutation(len(KINDS) - HELD_OUT)[:BATCH]
        rows = kinds * COPIES + rng.integers(0, COPIES, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class ImageEncoder(nn.Module):
    """pixels[batch, SIDE, SIDE, 3] to vectors[batch, WIDTH]."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))
        return nn.Dense(WIDTH)(x)


class TextEncoder(nn.Module):
    """int32[batch, 8] words to vectors[batch, WIDTH]."""

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(len(VOCAB), 64)(words)
        x = nn.relu(nn.Dense(512)(x.reshape(len(words), -1)))
        return nn.Dense(WIDTH)(x)


class Clip(nn.Module):
    """Pixels and words to similarities[images, texts]."""

    @nn.compact
    def __call__(self, images, words):
        scale = self.param("scale", nn.initializers.constant(10), ())
        images = images.astype(scale.dtype)  # computes in the dtype of the parameters
        return scale * directions(ImageEncoder()(images)) @ directions(TextEncoder()(words)).T


def directions(x):
    """Returns vectors of length 1."""
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


model = Clip()


def init():
    images, words = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1, 8), jnp.int32)
    return model.init(jax.random.key(0), images, words)


def loss_fn(variables, batch):
    """Returns a mean, because the examples depend on each other."""
    similarity = model.apply(variables, batch["image"], batch["words"])
    own = jnp.arange(len(similarity))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, own)
              for x in (similarity, similarity.T)]
    return (losses[0] + losses[1]).mean() / 2


tx = optax.adam(3e-3)


def batch_shape(parts):
    """Returns a batch of 6 pairs for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((6 * parts, SIDE, SIDE, 3), jnp.float32),
            "words": jax.ShapeDtypeStruct((6 * parts, 8), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["image"], batch["words"])


def metric(similarity, data):
    """Returns the share of images whose own text is the most similar."""
    return (np.argmax(similarity, 1) == np.arange(len(data["image"]))).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--devices", type=int, default=8, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=60)
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
