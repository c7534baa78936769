"""Unusual but plausible losses and models, under `zero.init` and `train_step`."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import zerojax as zj

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _zero(n=8, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), **{"min_shard": 1, **settings})


def _tensor_parallel(**settings):
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return zj.Zero(mesh, min_shard=1, **settings)


def _weights():
    return {"w": jnp.full((8, 16), 0.5)}


def _mean(p, x):
    return (x @ p["w"]).mean()


def _first(zero, init, loss, batch=X, tx=TX, **options):
    """Returns (state, metrics) after one step."""
    return zero.train_step(loss, tx, **options)(zero.init(init, tx), batch)


class Calls:
    def method(self, p, x):
        return _mean(p, x)

    def __call__(self, p, x, key):
        return _mean(p, x) + 0 * jax.random.uniform(key)


def _smoothed(p, x, smoothing=0.1):
    return _mean(p, x) * (1 if smoothing == 0.1 else jnp.nan)


def _keyword_only(p, x, *, rng):
    return _mean(p, x) + 0 * jax.random.uniform(rng)


def _with_default(p, x, rng=None):
    return _mean(p, x) + 0 * jax.random.uniform(rng)


def _scaled(scale, p, x):
    return scale * _mean(p, x)


def _of_bound(p, x, rng):
    return _mean(p, x) + (rng is not None)


LOSSES = {"a default": _smoothed, "keyword-only rng": _keyword_only,
          "rng with a default": _with_default, "a partial": functools.partial(_scaled, 1.0),
          "a partial with rng bound": functools.partial(_of_bound, rng=None),
          "a method": Calls().method, "a callable with a key": Calls()}


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_get_the_key(name):
    _, metrics = _first(_zero(), _weights, LOSSES[name])
    np.testing.assert_allclose(metrics["loss"], (X @ np.full((8, 16), 0.5)).mean(), rtol=1e-5)


def test_batch_norm_that_drops_its_statistics_still_sees_the_whole_batch():
    model = nn.BatchNorm(use_running_average=False)

    def init():
        return model.init(jax.random.key(0), X)

    def loss(variables, x):
        y, _ = model.apply(variables, x, mutable=["batch_stats"])
        return zj.Loss((y ** 4).sum(), x.shape[0])

    losses = [_first(_zero(n), init, loss)[1]["loss"] for n in (1, 8)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_16_bit_accumulation_divides_by_the_exact_weight_and_sums_in_its_dtype():
    ones = np.ones((8 * 257, 8), np.float32)

    def loss(p, x):  # each gradient is 1
        return zj.Loss((x @ p["w"]).sum(), x.shape[0])

    def grad_norm(dtype):
        precision = zj.Precision(compute="bfloat16", accumulate=dtype)
        _, metrics = _first(_zero(precision=precision), _weights, loss, ones, accumulate=257)
        return float(metrics["grad_norm"])

    exact = np.sqrt(8 * 16)
    np.testing.assert_allclose(grad_norm("float32"), exact, rtol=1e-5)
    # adding 1 does not change a bfloat16 sum of 256
    assert 0.5 * exact < grad_norm("bfloat16") < 1.001 * exact


@pytest.mark.parametrize("precision, dtype, rtol", [
    (zj.Precision(accumulate="bfloat16"), np.float32, 1e-5),
    (zj.Precision(params="bfloat16", compute="float16"), np.float16, 2e-3)],
    ids=["bfloat16 sums", "float16"])
def test_a_weight_that_16_bits_cannot_hold(precision, dtype, rtol):
    def loss(p, x):
        return zj.Loss((x @ p["w"]).sum(), 257.0)

    zero = _zero(gradients="global", precision=precision)
    _, metrics = _first(zero, _weights, loss, np.ones((16, 8), dtype))
    np.testing.assert_allclose(metrics["grad_norm"], 16 / 257 * np.sqrt(8 * 16), rtol=rtol)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.seen = nnx.Variable(jnp.int32(0))
        self.flag = nnx.Variable(jnp.bool_(False))
        self.key = nnx.Variable(jax.random.key(5))


def _counting():
    return Counting(nnx.Rngs(0))


def _counted(model, x):
    model.seen[...] += 1
    model.flag[...] = jnp.bool_(True)
    return zj.Loss(model.dense(x).sum(), x.shape[0])


@pytest.mark.parametrize("way", ["global", "per_device"])
def test_counts_and_flags_are_kept_whichever_the_way(way):
    state, _ = _first(_zero(gradients=way), _counting, _counted)
    assert int(state.model_state["seen"]) == 1
    assert bool(state.model_state["flag"])


def _splits_key(model, x):
    model.key[...], now = jax.random.split(model.key[...])
    return zj.Loss(model.dense(x).sum(), 1.0, {"u": jax.random.uniform(now)})


def test_a_key_that_the_module_splits_is_a_new_one_at_the_next_step():
    zero = _zero()
    state, step = zero.init(_counting, TX), zero.train_step(_splits_key, TX)
    state, first = step(state, X)
    _, second = step(state, X)
    assert float(first["aux"]["u"]) != float(second["aux"]["u"])


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x.mean())
        return self.dense(x)


def test_values_that_a_module_sows_are_dropped():
    state, metrics = _first(_zero(), lambda: Sows(nnx.Rngs(0)), lambda m, x: (m(x) ** 2).mean())
    assert metrics["loss"] == pytest.approx(float((Sows(nnx.Rngs(0))(X) ** 2).mean()), rel=1e-5)
    assert not [path for path, _ in jax.tree.leaves_with_path(state) if "seen" in str(path)]


class NormSows(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        self.sow("intermediates", "mean", x.mean())
        return nn.Dense(4)(x)


def test_collections_that_are_not_in_the_state_are_dropped():
    model = NormSows()

    def init():
        variables = model.init(jax.random.key(0), X)
        return {k: v for k, v in variables.items() if k != "intermediates"}

    def loss(variables, x):
        y, new = model.apply(variables, x, mutable=["batch_stats", "intermediates"])
        return zj.Loss((y ** 2).sum(), y.size, model_state=nn.FrozenDict(new))

    state, _ = _first(_zero(), init, loss)
    assert set(state.model_state) == {"batch_stats"}
    assert np.abs(np.asarray(state.model_state["batch_stats"]["BatchNorm_0"]["mean"])).max() > 0


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8)(x)), None


def test_a_scan_over_the_last_dimension_of_parameters():
    scanned = nn.scan(Layer, variable_axes={"params": -1}, split_rngs={"params": True}, length=8)
    model = scanned()

    def init():
        return model.init(jax.random.key(0), X, None)

    def loss(variables, x):
        return (model.apply(variables, x, None)[0] ** 2).mean()

    state, metrics = _first(_zero(), init, loss)
    np.testing.assert_allclose(metrics["loss"], loss(init(), X), rtol=1e-5)
    # of (8, 8, 8), where the scan slices the last dimension
    assert state.params["Dense_0"]["kernel"].sharding.spec == P(None, "data")


def test_raw_keys_seed_the_state_too():
    def state_key(key):
        state = _zero().init(lambda key: _weights(), TX, key)
        return jax.random.key_data(state.rng).tolist()

    assert state_key(jax.random.PRNGKey(0)) != state_key(jax.random.PRNGKey(1))


def test_abstract_has_the_kind_of_key_that_init_makes():
    key = jax.random.key(0, impl="rbg")
    states = [make(lambda key: _weights(), TX, key) for make in (_zero().abstract, _zero().init)]
    assert states[0].rng.dtype == states[1].rng.dtype


def test_stage_0_keeps_the_other_axes_of_a_rule_and_checks_rules():
    state = _tensor_parallel(stage=0, rules={"w": P("data", "model")}).init(_weights, TX)
    assert state.params["w"].sharding.spec == P(None, "model")
    with pytest.raises(zj.LayoutError, match="3 dimensions"):
        _zero(stage=0, rules={"w": P(None, None, "data")}).init(_weights, TX)


def test_rules_are_for_parameters_and_not_for_factored_state():
    zero = _zero(rules={".*w": P(None, "data")})
    state = zero.init(_weights, optax.adafactor(1e-2, min_dim_size_to_factor=4))
    assert state.params["w"].sharding.spec == P(None, "data")
    factored = [x for x in jax.tree.leaves(state.opt_state) if x.shape in ((8,), (16,))]
    assert [x.sharding.spec for x in factored] == [P("data")] * 2


def test_a_model_that_names_zeros_axis_itself_is_gathered_over_it():
    make = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
    model = nn.Dense(16, kernel_init=make)

    def init():
        return model.init(jax.random.key(0), X)

    def loss(variables, x):
        return (model.apply(variables, x) ** 2).mean()

    state, metrics = _first(_zero(), init, loss)
    assert state.params["kernel"].sharding.spec == P("data")
    np.testing.assert_allclose(metrics["loss"], loss(nn.meta.unbox(init()), X), rtol=1e-5)


def test_a_cast_of_the_parameters_in_the_loss_is_kept():
    seen = []

    def loss(p, x):
        p = jax.tree.map(lambda q: q.astype(jnp.bfloat16), p)
        y = x.astype(jnp.bfloat16) @ p["w"]
        seen.append(y.dtype)
        return y.astype(jnp.float32).mean()

    _first(_zero(), _weights, loss)
    assert seen[-1] == jnp.bfloat16


class Scanned(nnx.Module):
    def __init__(self, rngs):
        def make(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        stack = nnx.vmap(make, in_axes=0, out_axes=0)
        self.drops = nnx.split_rngs(splits=3)(stack)(rngs)
        self.dense = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        def body(drop, x):
            return drop(x)

        scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.dense(scan(self.drops, x))


def test_scanned_dropout_is_differentiated_per_device_and_drops_other_units_each_step():
    # this precision is refused with one loss over the batch
    zero = _zero(precision=zj.Precision(compute="bfloat16", reduce="float32"))
    tx = optax.sgd(0.0)
    step = zero.train_step(lambda m, x: zj.Loss((m(x) ** 2).sum(), x.shape[0]), tx)
    state, first = step(zero.init(lambda: Scanned(nnx.Rngs(0)), tx), X)
    _, second = step(state, X)
    assert float(first["loss"]) != float(second["loss"])


def test_an_error_of_the_users_keeps_its_cause():
    def loss(p, x):
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as caught:
        _first(_zero(), _weights, loss)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_feed_brings_the_good_batches_before_the_bad_one(prefetch):
    fed, got = zj.feed([X, X, X[:12]], _zero(), prefetch=prefetch), []
    with pytest.raises(zj.BatchError, match="12 examples"):
        got.extend(fed)
    assert len(got) == 2


def test_an_update_that_is_not_finite_is_skipped():
    state, metrics = _first(_zero(), _weights, _mean, tx=optax.scale(jnp.nan))
    assert int(metrics["skipped"]) == 1
    assert float(state.params["w"].min()) == 0.5


def test_another_run_of_the_same_step_counts_anew_and_shapes_alone_are_not_counted():
    zero = _zero()
    step, state = zero.train_step(_mean, TX, max_skipped=2), zero.init(_weights, TX)
    jax.eval_shape(step, state, X)
    for _ in range(3):
        state, _ = step(state, X * np.nan)
    fresh, metrics = step(zero.init(_weights, TX), X)
    assert int(metrics["skipped"]) == 0
    assert int(fresh.step) == 1


def test_a_bare_mean_per_device_is_the_mean_of_means_even_with_unequal_weights():
    def masked(p, x):
        mask = x[:, 0] > 0
        return ((x @ p["w"]).sum(1) * mask).sum() / mask.sum()

    x = X.copy()
    x[::2, 0] = 1.0
    x[1, 0], x[5, 0] = 1.0, -1.0  # one or both of the two examples of each device count
    _, ours = _first(_zero(gradients="per_device"), _weights, masked, x)
    parts = [float(masked(_weights(), part)) for part in x.reshape(8, 2, 8)]
    np.testing.assert_allclose(ours["loss"], np.mean(parts), rtol=1e-5)
    assert abs(np.mean(parts) - float(masked(_weights(), x))) > 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Activated:
    weight: jax.Array
    act: Callable = dataclasses.field(metadata={"static": True})


def test_a_static_function_that_init_makes_again():
    def init():
        return Activated(jnp.ones((8, 16)), lambda x: jnp.maximum(x, 0))

    _, metrics = _first(_zero(), init, lambda m, x: m.act(x @ m.weight).mean())
    np.testing.assert_allclose(metrics["loss"], np.maximum(X.sum(1), 0).mean(), rtol=1e-5)


def test_precision_can_be_replaced_field_by_field():
    assert dataclasses.replace(zj.Precision(), compute="bfloat16").reduce_dtype == "bfloat16"
