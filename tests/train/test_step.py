"""Behaviour of a step beyond its gradients: skipping, scaling, randomness, metrics, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import zoo
from flax import nnx

import zerojax as zj
from zerojax.train.loss_scale import LossScale

TX = optax.adam(1e-2)
X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
W = np.full((8, 16), 0.5, np.float32)


def _zero(n=8, stage=3, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), stage, min_shard=1, **settings)


def _init():
    return {"w": jnp.asarray(W), "b": jnp.zeros(3)}


def _loss(p, x):
    return zj.Loss(((x @ p["w"]) ** 2).sum() + (p["b"] ** 2).sum(), x.shape[0])


def _started(zero, loss, tx=TX, **options):
    """Returns (state, step)."""
    return zero.init(_init, tx), zero.train_step(loss, tx, **options)


def _arrays(state):
    """Returns everything that a skipped step must not change, as numpy arrays."""
    def array(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(array, state.replace(step=None, skipped=None))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_non_finite_step_leaves_the_state_as_it_was_and_counts(stage):
    state, step = _started(_zero(stage=stage), _loss, accumulate=2)
    state, _ = step(state, X)
    before = _arrays(state)
    bad = X.copy()
    bad[5, 3] = np.nan  # one example of one device
    for n in (1, 2):
        state, metrics = step(state, bad)
        assert int(metrics["skipped"]) == n
        assert np.isnan(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, _arrays(state), before)
    state, metrics = step(state, X)
    assert int(metrics["skipped"]) == 0
    assert int(state.step) == 4
    assert np.abs(np.asarray(state.params["w"]) - before.params["w"]).max() > 0


def test_a_batch_of_weight_0_is_skipped():
    def loss(p, x):
        return zj.Loss((x @ p["w"]).sum(), (x[:, 0] > 99).sum())

    state, step = _started(_zero(), loss)
    assert int(step(state, X)[1]["skipped"]) == 1


def test_too_many_skipped_steps_raise_two_calls_late_and_leave_the_state_usable():
    state, step = _started(_zero(), _loss, max_skipped=3)
    for _ in range(4):
        state, _ = step(state, X * np.nan)
    with pytest.raises(zj.NonFiniteError, match=r"3 consecutive steps .* \(max_skipped=3\)"):
        step(state, X)
    state, metrics = step(state, X)
    assert int(metrics["skipped"]) == 0


def test_max_skipped_none_never_raises():
    state, step = _started(_zero(), _loss, max_skipped=None)
    for n in range(1, 8):
        state, metrics = step(state, X * np.nan)
        assert int(metrics["skipped"]) == n


def test_loss_scale_waits_for_hysteresis_and_window():
    scale = LossScale.start(2.0**10, window=2, hysteresis=2)
    exponents = []
    for finite in (False, False, False, True, False, True, True, False):
        scale = scale.update(finite)
        exponents.append(int(np.log2(scale.value)))
    # the window that doubles the scale also restores the hysteresis
    assert exponents == [10, 9, 8, 8, 7, 7, 8, 8]


def test_float16_overflow_halves_the_scale_and_training_continues():
    def loss(p, x):  # its gradient is 100: a scale of 2**16 is too large
        return zj.Loss((p["w"].sum() * 100 * x[:, 0] ** 0).sum(), x.shape[0])

    state, step = _started(_zero(precision=zj.Precision(compute="float16")), loss)
    skipped, scales = [], []
    for _ in range(12):
        state, metrics = step(state, X.astype(np.float16))
        skipped.append(int(metrics["skipped"]))
        scales.append(float(metrics["loss_scale"]))
    assert skipped[0] == 1 and skipped[-1] == 0
    assert scales[-1] < 2**10
    unscaled = 100 * np.sqrt(8 * 16)
    np.testing.assert_allclose(metrics["grad_norm"], unscaled, rtol=1e-2)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_float16_reduces_the_gradient_of_a_total_that_it_cannot_hold(stage, accumulate):
    def loss(p, x):  # the gradient of the mean is 1, that of the total 2**25
        y = (x @ p["w"]).astype(jnp.float32)
        return zj.Loss(y.sum() * 2**20, x.shape[0] * 2.0**20)

    zero = _zero(stage=stage, precision=zj.Precision(compute="float16"))
    state, step = _started(zero, loss, accumulate=accumulate)
    for _ in range(8):
        state, metrics = step(state, np.ones((32, 8), np.float16))
    assert int(metrics["skipped"]) == 0
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(8 * 16), rtol=1e-3)


def _draws(p, x, rng):
    u = jax.random.uniform(rng)
    return zj.Loss((x @ p["w"]).sum(), 1.0, {"u": u, "u2": u * u})


def _drawn(zero, steps=1, **options):
    """Returns the moments of the uniform numbers that were drawn in the last step."""
    state = zero.init(_init, TX, rng=jax.random.key(7))
    step = zero.train_step(_draws, TX, **options)
    for _ in range(steps):
        state, metrics = step(state, X)
    return {k: float(v) for k, v in metrics["aux"].items()}


def _variance(aux, name="u"):
    return float(aux[f"{name}2"] - aux[name] ** 2)


def test_randomness_of_one_loss_is_the_same_on_every_mesh():
    one, eight = (_drawn(_zero(n, gradients="global")) for n in (1, 8))
    assert one == eight
    assert one != _drawn(_zero(8, gradients="global"), steps=2)


def test_randomness_differs_between_parts_and_microbatches():
    assert _variance(_drawn(_zero(8, gradients="per_device"))) > 1e-3
    assert _variance(_drawn(_zero(8, gradients="global"), accumulate=4)) > 1e-3
    assert _variance(_drawn(_zero(8, gradients="global"))) < 1e-6


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("way", ["global", "per_device"])
def test_nnx_random_streams_advance_and_differ_between_parts(way):
    def loss(model, x):
        # the same fraction on every part, if the parts' keys were the same
        kept = (model.dropout(jnp.ones((4, 4096))) > 0).mean(1)[0]
        return zj.Loss((model.dense(x) ** 2).sum(), 1.0, {"kept": kept, "kept2": kept**2})

    zero = _zero(gradients=way)
    state, step = zero.init(lambda: Dropped(nnx.Rngs(0)), TX), zero.train_step(loss, TX)
    state, first = step(state, X)
    state, second = step(state, X)
    counts = [int(x) for x in jax.tree.leaves(state.model_state) if x.dtype == jnp.uint32]
    assert counts == [2]
    assert float(first["aux"]["kept"]) != float(second["aux"]["kept"])
    assert (_variance(first["aux"], "kept") > 1e-6) == (way == "per_device")


def test_metrics_are_of_the_whole_batch():
    def loss(p, x):
        return _loss(p, x).replace(aux={"positive": (x[:, 0] > 0).sum()})

    state, step = _started(_zero(), loss, accumulate=2)
    state, metrics = step(state, X)
    grad_norm = np.linalg.norm(2 * X.T @ (X @ W) / 32)
    np.testing.assert_allclose(metrics["loss"], ((X @ W) ** 2).sum() / 32, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], grad_norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(state.params["w"]), rtol=1e-5)
    assert float(metrics["weight"]) == 32
    np.testing.assert_allclose(metrics["aux"]["positive"], (X[:, 0] > 0).mean())


@pytest.mark.parametrize("name", quick.some(
    ["mlp", "resnet", "nnx"], "resnet".__eq__))
def test_evaluation_reports_the_training_loss_and_changes_nothing(name):
    model, zero = zoo.MODELS[name](), _zero(stage=3)
    state, batch = zero.init(model.init, TX), model.batch(16, 0)
    before = _arrays(state)
    metrics = zero.eval_step(model.loss)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, _arrays(state), before)
    _, trained = zero.train_step(model.loss, TX)(state, batch)
    np.testing.assert_allclose(metrics["loss"], trained["loss"], rtol=1e-5)
    assert float(metrics["weight"]) == float(trained["weight"])


def test_a_bare_mean_per_device_is_the_mean_of_the_devices_means():
    def metrics(zero):
        state, step = _started(zero, lambda p, x: ((x @ p["w"]) ** 2).mean())
        return step(state, X)[1]

    eight, one = metrics(_zero(gradients="per_device")), metrics(_zero(1))
    np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(eight["grad_norm"], one["grad_norm"], rtol=1e-5)


def test_an_optimizer_that_takes_the_loss_gets_it():
    plateau = optax.contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5, rtol=1.0)
    state, step = _started(_zero(), _loss, optax.chain(optax.sgd(0.1), plateau))
    for _ in range(4):
        state, _ = step(state, X)
    assert float(state.opt_state[1].scale) < 1.0


def test_feed_keeps_the_order_and_puts_each_part_on_its_device():
    source = ({"x": np.arange(8) + 8 * i} for i in range(5))
    out = list(zj.feed(source, _zero(4), prefetch=3))
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in out]), np.arange(40))
    assert [s.data.shape for s in out[0]["x"].addressable_shards] == [(2,)] * 4


def test_a_microbatch_takes_every_accumulate_th_example():
    def loss(p, x):
        return zj.Loss((p["w"] ** 2).sum(), 1.0, {"range": x.max() - x.min()})

    state, step = _started(_zero(2, gradients="global"), loss, accumulate=4)
    _, metrics = step(state, np.arange(16, dtype=np.float32))
    assert float(metrics["aux"]["range"]) == 12  # 0, 4, 8, 12; contiguous examples would span 3
