"""The textbook example: a 784-128-10 network with SGD over ten devices, five epochs."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import zerojax as zj

ROWS = 400
BATCH = 100
EPOCHS = 5
TX = optax.sgd(0.1)
X = np.zeros((1, 784), np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def _loss(variables, batch):
    logits = Net().apply(variables, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return zj.Loss(losses.sum(), losses.size)


def _batches():
    """Returns noisy examples around one centre per class."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(ROWS, 784)).astype(np.float32)
    centres = rng.normal(size=(10, 784)).astype(np.float32)
    y = rng.integers(0, 10, ROWS)
    x = noise + centres[y]
    return [{"x": x[i:i + BATCH], "y": y[i:i + BATCH]} for i in range(0, ROWS, BATCH)]


def _run(zero):
    """Returns (state, losses) after training."""
    state = zero.init(Net().init, TX, jax.random.key(0), X)
    step = zero.train_step(_loss, TX)
    losses = []
    for _ in range(EPOCHS):
        for batch in _batches():
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def ten():
    return zj.make_mesh(devices=jax.devices()[:10])


def test_ten_devices_hold_a_tenth_each_and_train_like_one(ten):
    zero = zj.Zero(ten, stage=3, uneven="pad", min_shard=1)
    state, losses = _run(zero)
    theirs, expected = _run(zj.Zero(zj.make_mesh(devices=jax.devices()[:1])))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < 0.2 * losses[0]
    ours = jax.tree.leaves(zj.logical(state.params))
    for a, b in zip(ours, jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    # rows of 784 x 128, 128, 128 x 10 and 10 numbers over ten devices, rounded up
    assert held == 4 * (79 * 128 + 13 + 128 + 1)
    assert held < 1.01 * 4 * (784 * 128 + 128 + 128 * 10 + 10) / 10
    rows = [row.bytes for row in zero.layout(state).rows if row.path.startswith("params")]
    assert sum(rows) == held


def test_warns_that_nothing_is_sharded_without_padding(ten):
    with pytest.warns(UserWarning, match="99% of the state's 397.6 KiB stay whole on every device, "
                                         "such as params/Dense_1/kernel"):
        zj.Zero(ten, stage=3).init(Net().init, TX, jax.random.key(0), X)
