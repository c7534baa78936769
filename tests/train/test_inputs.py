"""Unusual but plausible things that users write."""

import dataclasses
import functools
import operator
from collections.abc import Callable

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

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _zero(n=8, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), **{"min_shard": 1, **settings})


def _tp():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return functools.partial(zj.Zero, mesh, min_shard=1)


def _weights():
    return {"w": jnp.full((8, 16), 0.5)}


def _first(zero, init, loss, batch=X, tx=TX, **options):
    """(state, metrics) after one step."""
    return zero.train_step(loss, tx, **options)(zero.init(init, tx), batch)


class Calls:
    def method(self, p, x):
        return (x @ p["w"]).mean()

    def __call__(self, p, x, key):
        return (x @ p["w"]).mean() + 0 * jax.random.uniform(key)


LOSSES = {
    "a default": lambda p, x, smoothing=0.1: (x @ p["w"]).mean() * (1 if smoothing == 0.1 else jnp.nan),
    "keyword-only rng": lambda p, x, *, rng: (x @ p["w"]).mean() + 0 * jax.random.uniform(rng),
    "rng with a default": lambda p, x, rng=None: (x @ p["w"]).mean() + 0 * jax.random.uniform(rng),
    "a partial": functools.partial(lambda scale, p, x: scale * (x @ p["w"]).mean(), 1.0),
    "a partial with rng bound": functools.partial(lambda p, x, rng: (x @ p["w"]).mean() + (rng is not None), rng=None),
    "a method": Calls().method,
    "a callable with a key": Calls(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_who_is_given_the_key(name):
    _, metrics = _first(_zero(), _weights, LOSSES[name])
    np.testing.assert_allclose(metrics["loss"], (X @ np.full((8, 16), 0.5)).mean(), rtol=1e-5)


def test_batch_norm_that_drops_its_statistics_still_sees_the_whole_batch():
    model = nn.BatchNorm(use_running_average=False)
    loss = lambda v, x: zj.Loss((model.apply(v, x, mutable=["batch_stats"])[0] ** 4).sum(), x.shape[0])
    losses = [_first(_zero(n), lambda: model.init(jax.random.key(0), X), loss)[1]["loss"] for n in (1, 8)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_16_bit_accumulation_divides_by_the_exact_weight_and_sums_in_the_dtype_asked_for():
    ones, n = np.ones((8 * 257, 8), np.float32), 257
    loss = lambda p, x: zj.Loss((x @ p["w"]).sum(), x.shape[0])
    norms = {dtype: float(_first(_zero(precision=zj.Precision(compute="bfloat16", accumulate=dtype)), _weights, loss, ones,
                                 accumulate=n)[1]["grad_norm"]) for dtype in ("float32", "bfloat16")}
    whole = np.sqrt(8 * 16)  # each gradient is 1
    np.testing.assert_allclose(norms["float32"], whole, rtol=1e-5)
    assert 0.5 * whole < norms["bfloat16"] < 1.001 * whole  # sums above 256 ones stand still in it


def test_a_weight_that_16_bits_can_not_hold():
    loss = lambda p, x: zj.Loss((x @ p["w"]).sum(), 257.0)
    zero = _zero(gradients="global", precision=zj.Precision(accumulate="bfloat16"))
    _, metrics = _first(zero, _weights, loss, np.ones((16, 8), np.float32))
    np.testing.assert_allclose(metrics["grad_norm"], 16 / 257 * np.sqrt(8 * 16), rtol=1e-5)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.seen, self.flag = nnx.Variable(jnp.int32(0)), nnx.Variable(jnp.bool_(False))
        self.key = nnx.Variable(jax.random.key(5))


def _counted(model, x):
    model.seen[...] += 1
    model.flag[...] = jnp.bool_(True)
    return zj.Loss(model.dense(x).sum(), x.shape[0])


@pytest.mark.parametrize("way", ["global", "per_device"])
def test_counts_and_flags_go_on_whichever_the_way(way):
    state, _ = _first(_zero(gradients=way), lambda: Counting(nnx.Rngs(0)), _counted)
    assert int(state.model_state["seen"]) == 1 and bool(state.model_state["flag"])


def _counts_batch(model, x):
    model.seen[...] += (x > 0).sum()
    return zj.Loss(model.dense(x).sum(), x.shape[0])


def _keeps_key(model, x):
    model.key[...], now = jax.random.split(model.key[...])
    u = jax.random.uniform(now)
    return zj.Loss(model.dense(x).sum(), 1.0, {"u": u})


def test_a_key_that_the_module_moves_on_moves_on():
    zero = _zero()
    state, step = zero.init(lambda: Counting(nnx.Rngs(0)), TX), zero.train_step(_keeps_key, TX)
    (state, a), (_, b) = (m := step(state, X)), step(m[0], X)
    assert float(a["aux"]["u"]) != float(b["aux"]["u"])


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x.mean())
        return self.dense(x)


def test_what_a_module_sows_is_dropped():
    _, metrics = _first(_zero(), lambda: Sows(nnx.Rngs(0)), lambda m, x: (m(x) ** 2).mean())
    assert np.isfinite(metrics["loss"])


def test_collections_that_the_state_has_not_are_dropped():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(x)
            self.sow("intermediates", "mean", x.mean())
            return nn.Dense(4)(x)

    model = Model()

    def loss(variables, x):
        y, new = model.apply(variables, x, mutable=["batch_stats", "intermediates"])
        return zj.Loss((y ** 2).sum(), y.size, model_state=nn.FrozenDict(new))

    init = lambda: {k: v for k, v in model.init(jax.random.key(0), X).items() if k != "intermediates"}
    state, _ = _first(_zero(), init, loss)
    assert set(state.model_state) == {"batch_stats"}
    assert np.abs(np.asarray(state.model_state["batch_stats"]["BatchNorm_0"]["mean"])).max() > 0


def test_a_scan_over_the_last_dimension_of_parameters():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8)(x)), None

    model = nn.scan(Layer, variable_axes={"params": -1}, split_rngs={"params": True}, length=8)()
    init = lambda: model.init(jax.random.key(0), X, None)
    loss = lambda v, x: (model.apply(v, x, None)[0] ** 2).mean()
    state, metrics = _first(_zero(), init, loss)
    np.testing.assert_allclose(metrics["loss"], loss(init(), X), rtol=1e-5)
    assert state.params["Dense_0"]["kernel"].sharding.spec == P(None, "data")  # of (8, 8, 8), scanned along the last


def test_keys_of_the_old_kind_seed_the_state_too():
    of = lambda key: jax.random.key_data(_zero().init(lambda key: _weights(), TX, key).rng).tolist()
    assert of(jax.random.PRNGKey(0)) != of(jax.random.PRNGKey(1))


def test_abstract_has_the_key_that_init_makes():
    key, init = jax.random.key(0, impl="rbg"), lambda key: _weights()
    assert _zero().abstract(init, TX, key).rng.dtype == _zero().init(init, TX, key).rng.dtype


def test_create_keeps_the_models_own_axes():
    zero = _tp()(stage=3)
    model = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    tx = optax.adam(1e-3)
    state = zero.create(lambda: TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx))
    kept = [x for x in jax.tree.leaves(state) if x.shape == (8, 16)]
    assert len(kept) == 3 and {x.sharding.spec for x in kept} == {P("data", "model")}


def test_stage_0_keeps_a_rules_other_axes_and_checks_rules():
    rules = {"w": P("data", "model")}
    assert _tp()(stage=0, rules=rules).init(_weights, TX).params["w"].sharding.spec == P(None, "model")
    with pytest.raises(zj.LayoutError, match="3 dimensions"):
        _zero(stage=0, rules={"w": P(None, None, "data")}).init(_weights, TX)


def test_rules_are_for_parameters_not_for_factored_state():
    zero = _zero(rules={".*w": P(None, "data")})
    state = zero.init(_weights, optax.adafactor(1e-2, min_dim_size_to_factor=4))
    assert state.params["w"].sharding.spec == P(None, "data")


def test_a_model_that_names_zeros_axis_itself_is_gathered_over_it():
    model = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None)))
    init = lambda: model.init(jax.random.key(0), X)
    loss = lambda v, x: (model.apply(v, x) ** 2).mean()
    state, metrics = _first(_zero(), init, loss)
    assert state.params["kernel"].sharding.spec == P("data")
    np.testing.assert_allclose(metrics["loss"], loss(nn.meta.unbox(init()), X), rtol=1e-5)


def test_a_cast_of_the_parameters_in_the_loss_is_the_users_own():
    seen = []

    def loss(p, x):
        y = x.astype(jnp.bfloat16) @ jax.tree.map(lambda q: q.astype(jnp.bfloat16), p)["w"]
        seen.append(y.dtype)
        return y.astype(jnp.float32).mean()

    _first(_zero(), _weights, loss)
    assert seen[-1] == jnp.bfloat16


@pytest.mark.parametrize("shape", [lambda state, v: (v, state), lambda state, v: {"state": state, "loss": v}], ids=["last", "dict"])
def test_a_state_lies_where_it_lay_wherever_it_is_returned(shape):
    zero = _zero()

    def step(state, x):
        value, grads = zero.value_and_grad(lambda p, x: (x @ p["w"]).mean())(state["params"], x)
        new = jax.tree.map(operator.sub, state["params"], grads)
        whole = jax.lax.with_sharding_constraint(new, jax.NamedSharding(zero.mesh, P()))
        return shape({"params": whole}, value)

    out = zero.jit(step)(zero.create(lambda: {"params": _weights()}), X)
    state = out["state"] if isinstance(out, dict) else out[1]
    assert state["params"]["w"].sharding.spec == P(None, "data")


def test_one_jitted_function_follows_each_states_layout():
    step = _zero(stage=3).jit(lambda state, x: jax.tree.map(lambda p: p + 1, state))
    for stage, spec in ((3, P(None, "data")), (0, P()), (3, P(None, "data"))):
        state = step(_zero(stage=stage).create(lambda: {"params": _weights()}), X)
        assert state["params"]["w"].sharding.spec == spec


def test_jit_takes_arguments_by_name_and_static_ones():
    zero = _zero()
    run = zero.jit(lambda state, x, *, scale, train: (x.sum() * scale if train else 0.0), donate=False, static_argnames="train")
    state = zero.create(lambda: {"params": _weights()})
    np.testing.assert_allclose(run(state, X, scale=2.0, train=True), 2 * X.sum(), rtol=1e-4)
    assert run(state, X, scale=2.0, train=False) == 0
    assert zero.jit(lambda state, rate: rate * 2, donate=False)(state, 0.25) == 0.5  # the second argument is no batch


def test_integer_leaves_of_ones_own_parameters_are_left_alone():
    zero = _zero()
    state = zero.create(lambda: {"params": {"w": jnp.arange(64.0).reshape(8, 8), "i": jnp.int32(3)}})
    pick = zero.jit(lambda s, x: zero.gathered(lambda p, x: p["w"][p["i"]] * x[0])(s["params"], x), donate=False)
    np.testing.assert_allclose(pick(state, X), np.arange(24, 32) * X[0], rtol=1e-6)


def test_bfloat16_parameters_of_ones_own_have_gradients_of_their_dtype():
    zero = _zero()
    mean = lambda p, x: (x @ p["w"]).mean().astype(jnp.float32)
    grad = zero.jit(lambda s, x: zero.value_and_grad(mean)(s["params"], x)[1], donate=False)
    state = zero.create(lambda: {"params": {"w": jnp.ones((8, 16), jnp.bfloat16)}})
    assert grad(state, X)["w"].dtype == jnp.bfloat16


class Scanned(nnx.Module):
    def __init__(self, rngs):
        make = lambda rngs: nnx.Dropout(0.5, rngs=rngs)
        self.drops = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
        self.dense = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.scan(lambda drop, x: drop(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.drops, x))


def test_scanned_dropout_is_differentiated_per_device_and_drops_anew_each_step():
    zero = _zero(precision=zj.Precision(compute="bfloat16", reduce="float32"))  # refused with one loss
    step = zero.train_step(lambda m, x: zj.Loss((m(x) ** 2).sum(), x.shape[0]), optax.sgd(0.0))
    state, first = step(zero.init(lambda: Scanned(nnx.Rngs(0)), optax.sgd(0.0)), X)
    _, second = step(state, X)
    assert float(first["loss"]) != float(second["loss"])


def test_a_batch_by_name_and_with_scalars_is_split_too():
    zero = _zero()
    state = zero.create(lambda: {"params": _weights()})
    run = zero.jit(lambda state, batch: (batch["x"] * batch["t"], batch["t"] * 2), donate=False)
    for out in (run(state, {"x": X, "t": 0.5}), run(state, batch={"x": X, "t": 0.5})):
        assert out[0].sharding.spec == P("data") and float(out[1]) == 1.0
    with pytest.raises(zj.BatchError, match="3 examples"):
        run(state, batch={"x": X[:3], "t": 0.5})


def test_layout_of_ones_own_state_says_where_it_lies():
    make = lambda: TrainState.create(apply_fn=None, params=_weights(), tx=optax.adafactor(1e-2, min_dim_size_to_factor=4))
    state = _zero(rules={".*w": P("data")}).create(make)
    rows = {row.path: row for row in _zero(stage=0, rules={".*w": P("data")}).layout(state).rows}
    assert rows["params/w"].spec == P("data", None) and rows["params/w"].reason == ""
    born = _zero().init(_weights, TX)
    assert {row.path: row.spec for row in _zero(stage=0).layout(born).rows}["params/w"] == P(None, "data")


def test_a_users_own_error_keeps_its_cause():
    def loss(p, x):
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as caught:
        _first(_zero(), _weights, loss)
    assert isinstance(caught.value.__cause__, KeyError)


def test_float16_keeps_a_weight_that_16_bits_can_not_hold():
    zero = _zero(gradients="global", precision=zj.Precision(params="bfloat16", compute="float16"))
    _, metrics = _first(zero, _weights, lambda p, x: zj.Loss((x @ p["w"]).sum(), 257.0), np.ones((16, 8), np.float16))
    np.testing.assert_allclose(metrics["grad_norm"], 16 / 257 * np.sqrt(8 * 16), rtol=2e-3)


def test_feed_brings_the_good_batches_before_the_bad_one():
    for prefetch in (0, 1, 4):
        fed, got = zj.feed([X, X, X[:12]], _zero(), prefetch=prefetch), []
        with pytest.raises(zj.BatchError, match="12 examples"):
            got.extend(fed)
        assert len(got) == 2


def test_an_update_that_is_not_finite_is_skipped():
    zero, tx = _zero(), optax.scale(jnp.nan)
    state, metrics = _first(zero, _weights, lambda p, x: (x @ p["w"]).mean(), tx=tx)
    assert int(metrics["skipped"]) == 1 and float(state.params["w"].min()) == 0.5


def test_another_run_of_the_same_step_starts_to_count_anew_and_shapes_alone_leave_no_trace():
    zero, loss = _zero(), lambda p, x: (x @ p["w"]).mean()
    step, state = zero.train_step(loss, TX, max_skipped=2), zero.init(_weights, TX)
    jax.eval_shape(step, state, X)
    for _ in range(3):
        state, _ = step(state, X * np.nan)
    fresh, metrics = step(zero.init(_weights, TX), X)
    assert int(metrics["skipped"]) == 0 and int(fresh.step) == 1


def test_a_bare_mean_per_device_is_the_mean_of_means_even_if_parts_weigh_unequally():
    masked = lambda p, x: ((x @ p["w"]).sum(1) * (x[:, 0] > 0)).sum() / (x[:, 0] > 0).sum()
    x = X.copy()
    x[::2, 0], x[1, 0], x[5, 0] = 1.0, 1.0, -1.0  # one or two of the two examples of each device count
    _, ours = _first(_zero(gradients="per_device"), _weights, masked, x)
    parts = [float(masked(_weights(), part)) for part in x.reshape(8, 2, 8)]
    np.testing.assert_allclose(ours["loss"], np.mean(parts), rtol=1e-5)
    assert abs(np.mean(parts) - float(masked(_weights(), x))) > 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Activated:
    weight: jax.Array
    act: Callable = dataclasses.field(metadata={"static": True})


def test_a_static_function_that_init_makes_anew():
    init = lambda: Activated(jnp.ones((8, 16)), lambda x: jnp.maximum(x, 0))
    _, metrics = _first(_zero(), init, lambda m, x: m.act(x @ m.weight).mean())
    np.testing.assert_allclose(metrics["loss"], np.maximum(X.sum(1), 0).mean(), rtol=1e-5)


class Constant(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.constant = nnx.Linear(8, 16, rngs=rngs), jnp.arange(16.0)


def test_precision_can_be_replaced_field_by_field():
    assert dataclasses.replace(zj.Precision(), compute="bfloat16").reduce_dtype == "bfloat16"


ERRORS = {
    "array as attribute": (lambda: _zero().init(lambda: Constant(nnx.Rngs(0)), TX),
                           zj.ModelError, ["plain attribute", "nnx.Variable"]),
    "complex": (lambda: _zero().init(lambda: {"w": jnp.ones(8, complex)}, TX), zj.ModelError, ["parameter w", "complex64"]),
    "integers": (lambda: _zero().init(lambda: {"params": {"i": jnp.ones(8, int), "w": jnp.ones(8)}}, TX),
                 zj.ModelError, ["parameter i", "int32"]),
    "counts of the batch": (lambda: _first(_zero(gradients="per_device"), lambda: Counting(nnx.Rngs(0)), _counts_batch),
                            zj.PolicyError, ["integers of the batch", 'gradients="global"']),
    "loop with fp32 reduction": (lambda: _zero(precision=zj.Precision(compute="bfloat16", reduce="float32")).value_and_grad(
        lambda p, x: (x @ p["w"]).mean())(_weights(), X), zj.PolicyError, ["reduce='float32'", "bare mean", "zj.Loss"]),
    "accumulate in a loop": (lambda: _zero().value_and_grad(lambda p, x: 0.0, accumulate=0), zj.PolicyError, ["accumulate=0"]),
    "float16 sums": (lambda: zj.Precision(accumulate="float16"), zj.PolicyError, ["65504", "accumulate"]),
    "float64": (lambda: zj.Precision(params="float64"), zj.PolicyError, ["jax_enable_x64"]),
    "fp8": (lambda: zj.Precision(compute="fp8"), zj.PolicyError, ["'fp8'", "one of bfloat16"]),
    "replica rule": (lambda: zj.Zero(zj.make_mesh(devices=jax.devices()[:8], replica=2), rules={"w": P("replica")}).init(
                        _weights, TX),
                     zj.LayoutError, ["'replica'", "axis of copies"]),
    "one axis twice": (lambda: _zero(replica_axis="data"), zj.PolicyError, ["each once"]),
    "no axis": (lambda: _zero(axis=()), zj.PolicyError, ["one axis or more"]),
    "stage of bool": (lambda: _zero(stage=True), zj.PolicyError, ["stage=True"]),
    "rule of text": (lambda: _zero(rules={"w": "data"}), zj.PolicyError, ["jax.P('data')"]),
    "rule of no regex": (lambda: _zero(rules={"(": P()}), zj.PolicyError, ["no regular expression"]),
    "max_skipped": (lambda: _zero().train_step(lambda p, x: 0.0, TX, max_skipped=0), zj.PolicyError, ["max_skipped=0"]),
    "accumulate a float": (lambda: _zero().train_step(lambda p, x: 0.0, TX, accumulate=2.0), zj.PolicyError, ["accumulate=2.0"]),
    "model state of another name": (lambda: _first(
        _zero(), lambda: nn.BatchNorm(use_running_average=False).init(jax.random.key(0), X),
        lambda v, x: zj.Loss((x * v["params"]["scale"][None]).sum(), 1.0, model_state={"mean": 1})),
        zj.LossError, ["['mean']", "['batch_stats']"]),
    "weight of numpy": (lambda: _first(_zero(), _weights, lambda p, x: zj.Loss((x @ p["w"]).sum(), np.float32(0))),
                        zj.LossError, ["Loss.weight is 0"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_says_what_was_given(name):
    provoke, kind, words = ERRORS[name]
    with pytest.raises(kind) as caught:
        provoke()
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)
