"""Text classification with a transformer encoder and masked mean pooling, in linen.

    python examples/text_classification.py                    # half a minute on two cores
    python examples/text_classification.py --stage 0          # the same losses
    zerojax plan examples/text_classification.py --topology h100:1x8 --min-shard 1024

The texts are about 1,500 docstrings of the standard library of the Python that runs the program.
The label is the package that a docstring comes from, one of eight. Docstrings are cut or padded to
48 words, and neither attention nor pooling sees the padding. The lines that use zerojax are marked
with <--.
"""

import argparse
import ast
import pathlib
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import zerojax as zj

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest",
            "xml")
BATCH, HELD_OUT = 128, 320
VOCAB, LENGTH, WIDTH, HEADS, LAYERS = 4096, 48, 64, 4, 2


def read_data():
    """Returns training data and held-out data: int32[n, LENGTH] words, int32[n] labels."""
    library = pathlib.Path(ast.__file__).parent
    found = [(text, label) for label, package in enumerate(PACKAGES)
             for text in docstrings(library / package)]
    order = np.random.default_rng(0).permutation(len(found))
    data = {"words": np.stack([words(found[i][0]) for i in order]),
            "label": np.array([found[i][1] for i in order], np.int32)}
    return ({name: x[HELD_OUT:] for name, x in data.items()},
            {name: x[:HELD_OUT] for name, x in data.items()})


def docstrings(folder):
    """Returns the different docstrings of at least eight words in a package's source files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for path in sorted(folder.rglob("*.py"))
             for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    texts = {ast.get_docstring(node) or "" for node in nodes}
    return sorted(text for text in texts if len(text.split()) >= 8)


def words(text):
    """Returns the first words as int32[LENGTH] numbers from 1 to VOCAB - 1; 0 is padding."""
    found = re.findall("[a-z]+", text.lower())[:LENGTH]
    numbers = [1 + zlib.crc32(word.encode()) % (VOCAB - 1) for word in found]
    return np.array(numbers + [0] * (LENGTH - len(numbers)), np.int32)


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, len(data["label"]), BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class Encoder(nn.Module):
    """int32[batch, LENGTH] words to logits[batch, packages]."""

    @nn.compact
    def __call__(self, words):
        present = words > 0
        mask = nn.make_attention_mask(present, present)
        x = nn.Embed(VOCAB, WIDTH)(words) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))[None]
        for _ in range(LAYERS):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
            h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH)(h)
        x = nn.LayerNorm()(x) * present[..., None]
        return nn.Dense(len(PACKAGES))(x.sum(1) / present.sum(1, keepdims=True))


model = Encoder()


def init():
    return model.init(jax.random.key(0), jnp.ones((1, LENGTH), jnp.int32))


def loss_fn(variables, batch):
    logits = model.apply(variables, batch["words"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.adam(2e-3)


def batch_shape(parts):
    """Returns a batch of 16 docstrings for each device and microbatch."""
    return {"words": jax.ShapeDtypeStruct((16 * parts, LENGTH), jnp.int32),
            "label": jax.ShapeDtypeStruct((16 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["words"])


def metric(logits, data):
    """Returns the accuracy."""
    return (np.argmax(logits, -1) == data["label"]).mean()


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
