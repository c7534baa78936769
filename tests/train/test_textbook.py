"""The textbook example: 784-128-10 with SGD over ten devices, five epochs."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import zerojax as zj

ROWS, BATCH, EPOCHS = 400, 100, 5
TX = optax.sgd(0.1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def _loss(variables, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(Net().apply(variables, batch["x"]), batch["y"])
    return zj.Loss(losses.sum(), losses.size)


def _batches():
    rng = np.random.default_rng(0)
    x, centres = rng.normal(size=(ROWS, 784)).astype(np.float32), rng.normal(size=(10, 784)).astype(np.float32)
    y = rng.integers(0, 10, ROWS)
    x += centres[y]
    return [{"x": x[i:i + BATCH], "y": y[i:i + BATCH]} for i in range(0, ROWS, BATCH)]


def _run(zero):
    state, step = zero.init(Net().init, TX, jax.random.key(0), np.zeros((1, 784), np.float32)), zero.train_step(_loss, TX)
    losses = []
    for _ in range(EPOCHS):
        for batch in _batches():
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def ten():
    return zj.make_mesh(devices=jax.devices()[:10])


def test_bytes_per_device_and_numbers_of_one_device(ten):
    zero = zj.Zero(ten, stage=3, uneven="pad", min_shard=1)
    state, losses = _run(zero)
    theirs, expected = _run(zj.Zero(zj.make_mesh(devices=jax.devices()[:1])))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < 0.2 * losses[0]
    for ours, their in zip(jax.tree.leaves(zj.logical(state.params)), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    assert held == 4 * (79 * 128 + 13 + 128 + 1)  # of 784 x 128, 128, 128 x 10 and 10 numbers, a tenth to within a row
    rows = [row.bytes for row in zero.layout(state).rows if row.path.startswith("params")]
    assert sum(rows) == held and held < 1.01 * 4 * (784 * 128 + 128 + 128 * 10 + 10) / 10


def test_without_padding_it_is_told_that_nothing_is_sharded(ten):
    with pytest.warns(UserWarning, match="99% of the state's 397.6 KiB stay whole on every device, as params/Dense_1/kernel"):
        zj.Zero(ten, stage=3).init(Net().init, TX, jax.random.key(0), np.zeros((1, 784), np.float32))
