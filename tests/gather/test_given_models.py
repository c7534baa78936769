"""Models that already exist, boxed parameters, and arguments in the wrong places."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from small import TX, X

import zerojax as zj


def _module():
    return nnx.Linear(8, 16, rngs=nnx.Rngs(0))


def _variables():
    return nn.Dense(16).init(jax.random.key(0), X)


def _equinox():
    return eqx.nn.MLP(8, 16, 8, 1, key=jax.random.key(0))


MODELS = {
    "nnx": (_module, lambda m, x: m(x).mean()),
    "variables": (_variables, lambda v, x: nn.Dense(16).apply(v, x).mean()),
    "tree": (small.weights, lambda p, x: (x @ p["w"]).mean()),
    "equinox": (_equinox, lambda m, x: jax.vmap(m)(x).mean()),
}


@pytest.mark.parametrize("name", MODELS)
def test_init_takes_an_existing_model(name):
    make, loss = MODELS[name]
    zero = small.zero()
    state, metrics = zero.train_step(loss, TX)(zero.init(make(), TX), X)
    theirs, expected = zero.train_step(loss, TX)(zero.init(make, TX), X)
    np.testing.assert_allclose(metrics["loss"], expected["loss"])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert a.sharding == b.sharding
    abstract = zero.abstract(make(), TX)
    assert jax.tree.structure(abstract.params) == jax.tree.structure(state.params)


def _boxed_state(model):
    params = model.init(jax.random.key(0), jnp.ones((1, 1024)))["params"]
    return TrainState.create(apply_fn=model.apply, tx=optax.adam(1e-3), params=params)


@pytest.mark.parametrize("mesh", ["real", "simulated"])
def test_boxed_parameters_in_a_train_state_are_planned_and_laid_out(mesh):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data"))
    model = nn.Dense(1024, kernel_init=boxed)
    given = {"devices": jax.devices()[:8]} if mesh == "real" else {"topology": "h200:1x8"}
    zero = zj.Zero(zj.make_mesh(**given))
    state = zero.create(lambda: _boxed_state(model))

    @zero.jit
    def step(state, x):
        def loss(params, x):
            return jnp.square(state.apply_fn({"params": params}, x)).mean()

        value, grads = zero.value_and_grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads), value

    kernel = 4 * 1024**2 / 8  # bytes per device
    rows = {row.path: row for row in zero.layout(state).rows}
    row = rows["params/kernel/value"]
    assert row.spec == P(None, "data") and row.bytes == kernel
    plan = step.plan(state, jax.ShapeDtypeStruct((8, 1024), "float32"))
    assert plan.memory.kinds["parameters"] == kernel + 4 * 1024
    if mesh == "real":
        assert np.isfinite(step(state, jnp.ones((8, 1024)))[1])
    else:
        plan.check()
