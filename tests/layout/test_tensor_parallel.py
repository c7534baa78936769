"""A user's own mesh axis beside ZeRO's: kept when parameters are sharded and gathered.

The result equals that of one device.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import oracle
import pytest
import zoo
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import zerojax as zj


def _partitioned(*names):
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


class Split(nn.Module):
    """Megatron's pair of layers: the first is split by columns, the second by rows."""

    @nn.compact
    def __call__(self, x):
        columns = nn.Dense(64, use_bias=False, kernel_init=_partitioned(None, "model"))
        rows = nn.Dense(10, kernel_init=_partitioned("model", None))
        return rows(nn.relu(columns(x)))


def _mesh():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("way", ["global", "per_device"])
def test_equals_one_device(stage, way):
    zero = zj.Zero(_mesh(), stage, gradients=way, min_shard=1)
    boxed = zoo._linen(Split(), zoo._labelled, zoo._digits)
    plain = dataclasses.replace(boxed, init=lambda: nn.meta.unbox(boxed.init()))
    tx = zoo.OPTIMIZERS["adamw"]()
    batches = [boxed.batch(16, seed) for seed in range(5)]
    theirs, _, losses = oracle.train(plain, tx, batches)
    state, step, ours = zero.init(boxed.init, tx), zero.train_step(boxed.loss, tx), []
    specs = [state.params[name]["kernel"].sharding.spec for name in ("Dense_0", "Dense_1")]
    assert specs == [P("data" if stage else None, "model"), P("model")]
    for batch in batches:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
