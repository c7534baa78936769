"""A user's own mesh axis beside ZeRO's: extended at rest, kept when gathered, and the result that of one device."""

import flax.linen as nn
import jax
import numpy as np
import oracle
import pytest
import zoo
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import zerojax as zj


class Split(nn.Module):
    """Megatron's pair: columns, then rows."""

    @nn.compact
    def __call__(self, x):
        part = lambda *names: nn.with_partitioning(nn.initializers.lecun_normal(), names)
        h = nn.relu(nn.Dense(64, use_bias=False, kernel_init=part(None, "model"))(x))
        return nn.Dense(10, kernel_init=part("model", None))(h)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("way", ["global", "per_device"])
def test_equals_one_device(stage, way):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    zero = zj.Zero(mesh, stage, gradients=way, min_shard=1)
    boxed = zoo._linen(Split(), zoo._labelled, zoo._digits)
    plain = zoo.dataclasses.replace(boxed, init=lambda: nn.meta.unbox(boxed.init()))
    tx, batches = zoo.OPTIMIZERS["adamw"](), [boxed.batch(16, seed) for seed in range(5)]
    theirs, _, losses = oracle.train(plain, tx, batches)
    state, step, ours = zero.init(boxed.init, tx), zero.train_step(boxed.loss, tx), []
    wanted = P("data" if stage else None, "model"), P("model")
    assert (state.params["Dense_0"]["kernel"].sharding.spec, state.params["Dense_1"]["kernel"].sharding.spec) == wanted
    for batch in batches:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
