"""States of the user's own under `zero.create` and `zero.jit`: layout, arguments, results."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.train import planning

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _zero(n=8, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), **{"min_shard": 1, **settings})


def _weights():
    return {"w": jnp.full((8, 16), 0.5)}


def _make():
    return {"params": _weights()}


def test_create_keeps_the_models_own_axes():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, tx = nn.Dense(16, kernel_init=kernel_init), optax.adam(1e-3)

    def make():
        params = model.init(jax.random.key(0), X)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = zj.Zero(mesh, stage=3, min_shard=1).create(make)
    specs = [x.sharding.spec for x in jax.tree.leaves(state) if x.shape == (8, 16)]
    assert specs == [P("data", "model")] * 3


@pytest.mark.parametrize("shape", [lambda state, v: (v, state),
                                   lambda state, v: {"state": state, "loss": v}],
                         ids=["last", "dict"])
def test_a_returned_state_keeps_its_shardings_wherever_it_is_returned(shape):
    zero = _zero()

    def step(state, x):
        mean = zero.value_and_grad(lambda p, x: (x @ p["w"]).mean())
        value, grads = mean(state["params"], x)
        new = jax.tree.map(operator.sub, state["params"], grads)
        whole = jax.lax.with_sharding_constraint(new, jax.NamedSharding(zero.mesh, P()))
        return shape({"params": whole}, value)

    out = zero.jit(step)(zero.create(_make), X)
    state = out["state"] if isinstance(out, dict) else out[1]
    assert state["params"]["w"].sharding.spec == P(None, "data")


def test_one_jitted_function_follows_the_layout_of_each_state():
    step = _zero(stage=3).jit(lambda state, x: jax.tree.map(lambda p: p + 1, state))
    for stage, spec in ((3, P(None, "data")), (0, P()), (3, P(None, "data"))):
        state = step(_zero(stage=stage).create(_make), X)
        assert state["params"]["w"].sharding.spec == spec


def test_jit_takes_arguments_by_name_and_static_ones():
    zero = _zero()

    @functools.partial(zero.jit, donate=False, static_argnames="train")
    def run(state, x, *, scale, train):
        return x.sum() * scale if train else 0.0

    state = zero.create(_make)
    np.testing.assert_allclose(run(state, X, scale=2.0, train=True), 2 * X.sum(), rtol=1e-4)
    assert run(state, X, scale=2.0, train=False) == 0


def test_a_plan_counts_the_reads_with_its_own_static_argument(monkeypatch):
    monkeypatch.setattr(planning, "planned", lambda *args, uses, **options: uses)
    zero = _zero()

    @functools.partial(zero.jit, donate=False, static_argnames="calls")
    def run(state, x, *, calls):
        product = zero.gathered(lambda p, x: (x @ p["w"]).sum())
        return sum(product(state["params"], i * x) for i in range(calls))

    state = zero.create(_make)
    uses = [run.plan(state, X, calls=n) for n in (3, 5, 3)]
    assert [use.gathers for use, in uses] == [3, 5, 3]


def test_a_scalar_argument_is_not_split_as_a_batch():
    zero = _zero()
    assert zero.jit(lambda state, rate: rate * 2, donate=False)(zero.create(_make), 0.25) == 0.5


def test_a_batch_by_name_and_with_scalars_is_split_too():
    zero = _zero()
    state = zero.create(_make)

    @functools.partial(zero.jit, donate=False)
    def run(state, batch):
        return batch["x"] * batch["t"], batch["t"] * 2

    for out in (run(state, {"x": X, "t": 0.5}), run(state, batch={"x": X, "t": 0.5})):
        assert out[0].sharding.spec == P("data")
        assert float(out[1]) == 1.0
    with pytest.raises(zj.BatchError, match="3 examples"):
        run(state, batch={"x": X[:3], "t": 0.5})


def test_integer_leaves_of_parameters_are_not_changed():
    zero = _zero()

    def make():
        return {"params": {"w": jnp.arange(64.0).reshape(8, 8), "i": jnp.int32(3)}}

    @zero.gathered
    def pick(params, x):
        return params["w"][params["i"]] * x[0]

    run = zero.jit(lambda state, x: pick(state["params"], x), donate=False)
    np.testing.assert_allclose(run(zero.create(make), X), np.arange(24, 32) * X[0], rtol=1e-6)


def test_bfloat16_parameters_have_bfloat16_gradients():
    zero = _zero()

    def mean(p, x):
        return (x @ p["w"]).mean().astype(jnp.float32)

    @functools.partial(zero.jit, donate=False)
    def grads(state, x):
        return zero.value_and_grad(mean)(state["params"], x)[1]

    state = zero.create(lambda: {"params": {"w": jnp.ones((8, 16), jnp.bfloat16)}})
    assert grads(state, X)["w"].dtype == jnp.bfloat16


def _rows(zero, state):
    return {row.path: row for row in zero.layout(state).rows}


def test_layout_shows_the_shardings_that_arrays_have_under_another_policy():
    rules = {".*w": P("data")}
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    state = _zero(rules=rules).create(
        lambda: TrainState.create(apply_fn=None, params=_weights(), tx=tx))
    row = _rows(_zero(stage=0, rules=rules), state)["params/w"]
    assert (row.spec, row.reason) == (P("data", None), "")
    born = _zero().init(_weights, optax.sgd(0.1))
    assert _rows(_zero(stage=0), born)["params/w"].spec == P(None, "data")


def test_padded_arrays_are_measured_and_padded_again_by_move():
    def padded(n):
        return _zero(n, uneven="pad")

    born = padded(8).init(lambda: {"w": jnp.arange(51.0).reshape(17, 3)}, optax.sgd(0.1))
    own = {"params": born.params}
    assert _rows(padded(8), own)["params/w"].bytes == 24 * 3 * 4 // 8
    moved = padded(8).move(own, padded(4))["params"]["w"]
    assert moved.kept.shape == (20, 3)
    assert moved.sharding.spec == P("data")
    np.testing.assert_array_equal(moved, np.arange(51.0).reshape(17, 3))


def test_move_pads_no_array_that_was_not_padded():
    state = _zero(8).create(lambda: {"params": {"w": jnp.ones((17, 3))}})
    moved = _zero(8).move(state, _zero(4, uneven="pad"))["params"]["w"]
    assert isinstance(moved, jax.Array)
    assert moved.sharding.is_fully_replicated


def test_rules_place_the_parameters_of_an_nnx_state():
    zero = _zero(rules={"kernel": P("data")})
    state = zero.create(lambda: nnx.state(nnx.Linear(8, 16, rngs=nnx.Rngs(0))))
    assert state["kernel"].sharding.spec == P("data")


def _linear_in_model():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)


def _linear_in_optimizer():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    return nnx.ModelAndOptimizer(model, optax.adam(1e-3), wrt=nnx.Param)


@pytest.mark.parametrize("make, rule, kernels", [
    (_linear_in_model, "0/kernel", 2), (_linear_in_optimizer, "model/kernel", 3)])
def test_momenta_of_an_nnx_state_follow_the_rule_of_their_parameter(make, rule, kernels):
    state = _zero(rules={rule: P("data")}).create(lambda: nnx.state(make()))
    specs = [x.sharding.spec for x in jax.tree.leaves(state) if x.shape == (16, 16)]
    assert specs == [P("data")] * kernels


def test_layout_and_move_of_a_state_with_a_python_number():
    zero = _zero()
    state = {**zero.create(_make), "rate": 0.5}
    row = _rows(zero, state)["rate"]
    assert (row.shape, row.dtype, row.bytes) == ((), "float32", 4)
    assert float(zero.move(state, _zero(4))["rate"]) == 0.5
