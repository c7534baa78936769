"""Models that are given rather than made, boxed parameters, and arguments that are mixed up."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import zerojax as zj

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _zero():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), min_shard=1)


def _weights():
    return {"w": jnp.full((8, 16), 0.5)}


def _first(zero, init, loss):
    """(state, metrics) after one step."""
    return zero.train_step(loss, TX)(zero.init(init, TX), X)


def _module():
    return nnx.Linear(8, 16, rngs=nnx.Rngs(0))


AT_HAND = {
    "nnx": (_module, lambda m, x: m(x).mean()),
    "variables": (lambda: nn.Dense(16).init(jax.random.key(0), X), lambda v, x: nn.Dense(16).apply(v, x).mean()),
    "tree": (_weights, lambda p, x: (x @ p["w"]).mean()),
    "equinox": (lambda: eqx.nn.MLP(8, 16, 8, 1, key=jax.random.key(0)), lambda m, x: jax.vmap(m)(x).mean()),
}


@pytest.mark.parametrize("name", AT_HAND)
def test_a_model_at_hand_is_taken(name):
    make, loss = AT_HAND[name]
    zero = _zero()
    state, metrics = zero.train_step(loss, TX)(zero.init(make(), TX), X)
    theirs, expected = _first(zero, make, loss)
    np.testing.assert_allclose(metrics["loss"], expected["loss"])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert a.sharding == b.sharding
    assert jax.tree.structure(zero.abstract(make(), TX).params) == jax.tree.structure(state.params)


NOT_TAKEN = {
    "a linen module": (lambda z: z.init(nn.Dense(16), TX), zj.ModelError,
                       r"given a linen module \(Dense\), which holds no parameters; write zero.init\(model.init, tx, "),
    "a model with arguments": (lambda z: z.init(_module(), TX, X), zj.ModelError, "was given a Linear and arguments for it"),
    "text": (lambda z: z.init("model", TX), zj.ModelError, "was given a str; write a function that makes the model"),
    "no optimizer": (lambda z: z.init(nn.Dense(16).init, jax.random.key(0), X), zj.ModelError, "not an optax transform"),
    "precision by name": (lambda z: zj.Zero(z.mesh, precision="bf16"), zj.PolicyError, r'write zj.Precision\(compute="bfloat16"\)'),
    "no mesh": (lambda z: zj.Zero(stage=2), zj.PolicyError, r"first argument is a mesh; write Zero\(zj.make_mesh\(\), stage=2\)"),
    "a stage for a mesh": (lambda z: zj.Zero(2), zj.PolicyError, r"Zero\(mesh=2\).* write Zero\(zj.make_mesh\(\), stage=2\)"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_to_write_instead(name):
    call, error, text = NOT_TAKEN[name]
    with pytest.raises(error, match=text):
        call(_zero())


@pytest.mark.parametrize("mesh", ["there", "absent"])
def test_boxed_parameters_in_a_train_state_are_planned_and_laid_out(mesh):
    model = nn.Dense(1024, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data")))
    create = lambda: TrainState.create(apply_fn=model.apply, tx=optax.adam(1e-3),
                                       params=model.init(jax.random.key(0), jnp.ones((1, 1024)))["params"])
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]) if mesh == "there" else zj.make_mesh(topology="h200:1x8"))
    state = zero.create(create)

    @zero.jit
    def step(state, x):
        loss = lambda p, x: jnp.square(state.apply_fn({"params": p}, x)).mean()
        value, grads = zero.value_and_grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads), value

    rows = {row.path: row for row in zero.layout(state).rows}
    assert rows["params/kernel/value"].spec == P(None, "data") and rows["params/kernel/value"].bytes == 4 * 1024**2 / 8
    plan = step.plan(state, jax.ShapeDtypeStruct((8, 1024), "float32"))
    assert plan.memory.kinds["parameters"] == 4 * 1024**2 / 8 + 4 * 1024
    if mesh == "there":
        assert np.isfinite(step(state, jnp.ones((8, 1024)))[1])
    else:
        plan.check()
