"""Click prediction with large embedding tables (a small DLRM), in linen.

    python examples/recommender.py                            # twenty seconds on two cores
    python examples/recommender.py --stage 0                  # the same losses
    zerojax plan examples/recommender.py --topology h100:1x8

The clicks are synthetic: in a hidden model, each user, item and advertiser has an effect, and so
have eight numbers. Ids follow Zipf's law, so most of them are rare. The three tables of 100,000
rows are 99.8 % of the parameters, and a rule shards them by rows. ZeRO shards storage, not lookups:
a step at stage 3 gathers the whole tables, and each device then updates its own rows. The lines
that use zerojax are marked with <--.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import zerojax as zj

BATCH, TRAIN, HELD_OUT = 1024, 65_536, 8192
TABLES, ROWS, WIDTH, NUMBERS = ("user", "item", "advertiser"), 100_000, 8, 8


def read_data():
    """Returns training and held-out data: int32[n, 3] ids, float32[n, 8] numbers, int32[n] clicks.

    Held-out data also has the probabilities float64[n] of the hidden model.
    """
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, ROWS + 1)
    total = TRAIN + HELD_OUT
    ids = rng.choice(ROWS, (total, len(TABLES)), p=popularity / popularity.sum())
    numbers = rng.normal(size=(total, NUMBERS))
    effects = rng.normal(size=(len(TABLES), ROWS))[np.arange(len(TABLES)), ids]
    logits = effects.sum(1) + numbers @ rng.normal(size=NUMBERS) / 2 - 1.5
    chance = 1 / (1 + np.exp(-logits))
    data = {"ids": ids.astype(np.int32), "numbers": numbers.astype(np.float32),
            "click": (rng.random(total) < chance).astype(np.int32)}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:] for name, x in data.items()}, chance[TRAIN:])


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, TRAIN, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class DLRM(nn.Module):
    """int32[batch, 3] ids and float32[batch, 8] numbers to logits[batch] of a click."""

    @nn.compact
    def __call__(self, ids, numbers):
        looked_up = [nn.Embed(ROWS, WIDTH, name=name)(ids[:, i]) for i, name in enumerate(TABLES)]
        numbers = numbers.astype(looked_up[0].dtype)  # computes in the dtype of the parameters
        bottom = nn.Dense(WIDTH)(nn.relu(nn.Dense(64)(numbers)))
        vectors = jnp.stack([bottom, *looked_up], 1)
        products = vectors @ vectors.swapaxes(1, 2)  # of each pair of vectors
        rows, columns = np.triu_indices(vectors.shape[1], 1)
        x = jnp.concatenate([products[:, rows, columns], vectors.reshape(len(ids), -1)], 1)
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[:, 0]


model = DLRM()


def init():
    ids, numbers = jnp.zeros((1, len(TABLES)), jnp.int32), jnp.zeros((1, NUMBERS))
    return model.init(jax.random.key(0), ids, numbers)


def loss_fn(variables, batch):
    logits = model.apply(variables, batch["ids"], batch["numbers"])
    losses = optax.sigmoid_binary_cross_entropy(logits, batch["click"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.adam(1e-2)


def batch_shape(parts):
    """Returns a batch of 128 examples for each device and microbatch."""
    rows = 128 * parts
    return {"ids": jax.ShapeDtypeStruct((rows, len(TABLES)), jnp.int32),
            "numbers": jax.ShapeDtypeStruct((rows, NUMBERS), jnp.float32),
            "click": jax.ShapeDtypeStruct((rows,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["ids"], batch["numbers"])


def metric(logits, data):
    """Returns the area under the ROC curve."""
    return roc_auc_score(data["click"], np.asarray(logits))


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
    tables = "(user|item|advertiser)/embedding"
    zero = zj.Zero(mesh, args.stage, rules={tables: P("data")})  # <-- the policy
    state = zero.init(init, tx)  # <-- creates the state sharded
    step = zero.train_step(loss_fn, tx)  # <-- gradients and update, according to the stage
    evaluate = zero.jit(zero.gathered(predict), donate=False)  # <-- the model, for evaluation
    print(zero.layout(state))

    train, held_out, chance = read_data()
    before = metric(evaluate(state, held_out), held_out)
    feed = zj.feed(batches(train, args.steps), zero)  # <-- to each device its part
    for batch in tqdm(feed, total=args.steps, unit="step"):
        state, metrics = step(state, batch)
    after = metric(evaluate(state, held_out), held_out)
    print(f"the hidden model itself: AUC {metric(chance, held_out):.1%}")
    print(f"AUC {before:.1%} before, {after:.1%} after {args.steps} steps; "
          f"last loss {float(metrics['loss']):.5f}")


if __name__ == "__main__":
    main()
