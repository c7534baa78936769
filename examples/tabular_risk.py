"""Risk classification of tabular data with class weights, beside a logistic regression, in NNX.

    python examples/tabular_risk.py                           # ten seconds on two cores
    python examples/tabular_risk.py --stage 0                 # the same losses
    zerojax plan examples/tabular_risk.py --topology h100:1x8 --min-shard 1024

scikit-learn packages no table of credit risks, so this is its breast cancer set: 30 measurements of
each of 569 tumors, of which 37 % are malignant. In the loss, both classes have the same total
weight. The lines that use zerojax are marked with <--.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import zerojax as zj

BATCH, TRAIN, FEATURES, WIDTH = 64, 409, 30, 128


def read_data():
    """Returns training and held-out data: float32[n, 30] features, int32[n] risks, weights[n].

    The features are standardized with mean and deviation of the training data.
    """
    table = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(table.data))
    features, risk = table.data[order], (table.target == 0).astype(np.int32)[order]
    features = (features - features[:TRAIN].mean(0)) / features[:TRAIN].std(0)
    share = risk[:TRAIN].mean()
    data = {"features": features.astype(np.float32), "risk": risk,
            "weight": np.where(risk, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)}
    return ({name: x[:TRAIN] for name, x in data.items()},
            {name: x[TRAIN:] for name, x in data.items()})


def batches(data, steps):
    """Returns `steps` batches of random examples."""
    def make(number):
        rows = np.random.default_rng(number).integers(0, TRAIN, BATCH)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class MLP(nnx.Module):
    """float32[batch, 30] features to logits[batch] of the risk."""

    def __init__(self, rngs):
        self.layer_1 = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.layer_2 = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        x = x.astype(self.head.kernel.dtype)  # computes in the dtype of the parameters
        x = nnx.relu(self.layer_1(x))
        x = nnx.relu(self.layer_2(x))
        return self.head(x)[:, 0]


def init():
    return MLP(nnx.Rngs(0))


def loss_fn(model, batch):
    losses = optax.sigmoid_binary_cross_entropy(model(batch["features"]), batch["risk"])
    return zj.Loss((losses * batch["weight"]).sum(), batch["weight"].sum())


tx = optax.adamw(1e-3, weight_decay=0.1)


def batch_shape(parts):
    """Returns a batch of 8 patients for each device and microbatch."""
    return {"features": jax.ShapeDtypeStruct((8 * parts, FEATURES), jnp.float32),
            "risk": jax.ShapeDtypeStruct((8 * parts,), jnp.int32),
            "weight": jax.ShapeDtypeStruct((8 * parts,), jnp.float32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(model, batch):
    return model(batch["features"])


def metric(logits, data):
    """Returns the area under the ROC curve."""
    return roc_auc_score(data["risk"], np.asarray(logits))


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
    print(f"logistic regression: AUC {logistic_regression(train, held_out):.1%}")
    print(f"AUC {before:.1%} before, {after:.1%} after {args.steps} steps; "
          f"last loss {float(metrics['loss']):.5f}")


def logistic_regression(train, held_out):
    """Returns the metric of scikit-learn's logistic regression, with the same weights."""
    baseline = LogisticRegression().fit(train["features"], train["risk"], train["weight"])
    return metric(baseline.decision_function(held_out["features"]), held_out)


if __name__ == "__main__":
    main()
