"""Errors for bad input: their class, and texts with what was given and what to write instead."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj

TX = optax.sgd(0.1)
X = np.ones((16, 8), np.float32)


def _mesh():
    return zj.make_mesh(devices=jax.devices()[:8])


def _zero(**settings):
    return zj.Zero(_mesh(), **{"min_shard": 1, **settings})


def _state(zero, shape=(8, 16)):
    return zero.init(lambda: {"w": jnp.ones(shape)}, TX)


def _step(loss, zero=None, shape=(8, 16), batch=X, **options):
    zero = zero or _zero()
    return zero.train_step(loss, TX, **options)(_state(zero, shape), batch)


def _mean(p, x):
    return (x @ p["w"]).mean()


def _constrains(p, x):
    h = jax.lax.with_sharding_constraint(x @ p["w"], NamedSharding(_mesh(), P("data")))
    return zj.Loss(h.sum(), x.shape[0])


def _writes_state(variables, x):
    y, new = nn.BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    return zj.Loss((y ** 2).sum(), y.size, model_state=new)


def _slices(p, x):
    return jax.lax.scan(lambda c, w: (c + w.sum(), None), jnp.float32(0), p["w"])[0] + x.sum()


def _batch_norm_per_device():
    zero = _zero(gradients="per_device")
    norm = nn.BatchNorm(use_running_average=False)
    return zero.train_step(_writes_state, TX)(zero.init(norm.init, TX, jax.random.key(0), X), X)


def _mesh_of(axis, kind):
    return jax.make_mesh((8,), (axis,), axis_types=(kind,), devices=jax.devices()[:8])


def _loss(loss):
    return lambda: _step(loss)


def _rule(pattern, spec, shape=(8, 16)):
    return lambda: _state(_zero(rules={pattern: spec}), shape)


MIXED = zj.Precision(compute="bfloat16", reduce="float32")

# name: (what provokes the error, its class, words of its text)
ERRORS = {
    "stage": (lambda: zj.Zero(_mesh(), 4), zj.PolicyError,
              ["stage=4", "0 (all whole)", "3 (parameters too)"]),
    "dtype": (lambda: zj.Precision(compute="bf61"), zj.PolicyError,
              ["compute='bf61'", 'zj.Precision(compute="bfloat16")']),
    "gradients": (lambda: _zero(gradients="both"), zj.PolicyError,
                  ["gradients='both'", '"per_device"', '"global"']),
    "explicit axes": (lambda: zj.Zero(_mesh_of("data", AxisType.Explicit)), zj.PolicyError,
                      ["['data'] are not of type Auto", "zj.make_mesh()"]),
    "mesh without the axis": (lambda: zj.Zero(_mesh_of("x", AxisType.Auto)), zj.PolicyError,
                              ["('x',)", "['data']", "Zero(mesh, axis=('x',))"]),
    "replicas": (lambda: zj.make_mesh(devices=jax.devices()[:8], replica=3), zj.PolicyError,
                 ["replica=3", "8 devices", "divisor of 8"]),
    "batch": (lambda: _step(_mean, accumulate=3), zj.BatchError,
              ["16 examples", "8 devices x 3 microbatches = 24", "batches of 24"]),
    "batch of scalars": (lambda: _step(_mean, batch=np.float32(1)), zj.BatchError,
                         ["batch has no dimension"]),
    "batch uneven": (lambda: _step(lambda p, b: _mean(p, b["x"]), batch={"x": X, "y": X[:8]}),
                     zj.BatchError, ["differ", "16", "8"]),
    "accumulate": (lambda: _zero().train_step(_mean, TX, accumulate=0), zj.PolicyError,
                   ["accumulate=0"]),
    "clip_norm": (lambda: _zero().train_step(_mean, TX, clip_norm=-1.0), zj.PolicyError,
                  ["clip_norm=-1.0"]),
    "loss a vector": (_loss(lambda p, x: (x @ p["w"]).mean(0)), zj.LossError,
                      ["shape (16,)", "loss.mean()"]),
    "loss an integer": (_loss(lambda p, x: _mean(p, x).astype(int)), zj.LossError,
                        ["int32", "floating"]),
    "loss a tuple": (_loss(lambda p, x: (_mean(p, x), 1)), zj.LossError, ["is a tuple", "aux="]),
    "weight 0": (_loss(lambda p, x: zj.Loss(_mean(p, x), 0)), zj.LossError,
                 ["Loss.weight is 0", "number of examples"]),
    "weight a vector": (_loss(lambda p, x: zj.Loss(_mean(p, x), jnp.ones(3))), zj.LossError,
                        ["shape (3,)", "mask.sum()"]),
    "aux a vector": (_loss(lambda p, x: zj.Loss(_mean(p, x), 1, {"a": jnp.ones(3)})),
                     zj.LossError, ["Loss.aux['a']", "(3,)"]),
    "nothing to train": (lambda: _zero().init(lambda: {"w": jnp.ones(8, int)}, TX), zj.ModelError,
                         ["nothing to train"]),
    "rule fits nothing": (_rule("v.*", P("data")), zj.LayoutError,
                          ["'v.*'", "none of 1", "nearest are w"]),
    "rule does not divide": (_rule("w", P("data"), (9, 16)), zj.LayoutError,
                             ["(9, 16)", "dimension 0 of size 9", "by 8"]),
    "rule too long": (_rule("w", P(None, None, "data")), zj.LayoutError, ["3 dimensions", "has 2"]),
    "rule of no axis": (_rule("w", P("fsdp")), zj.LayoutError, ["['fsdp']", "('data',)"]),
    "fp32 reduction of one loss": (lambda: _step(_mean, _zero(precision=MIXED)), zj.PolicyError,
                                   ["reduce='float32'", "bare mean", "zj.Loss(total, weight)",
                                    "reduce='bfloat16'"]),
    "state per device": (_batch_norm_per_device, zj.PolicyError,
                         ["per_device", "model state", 'gradients="global"']),
    "constraints per device": (lambda: _step(_constrains, _zero(gradients="per_device")),
                               zj.PolicyError, ["['data']", 'gradients="global"']),
    "other optimizer": (lambda: _zero().train_step(_mean, optax.adam(1.0))(_state(_zero()), X),
                        zj.ModelError, ["another optimizer", "mu/w"]),
    "not a state": (lambda: _zero().train_step(_mean, TX)({"w": X}, X), zj.ModelError,
                    ["zero.init", "dict", "zero.init(model, tx)"]),
    "unknown gpu": (lambda: zj.make_mesh(topology="h2000:1x8"), zj.PolicyError,
                    ["'h2000'", "h200"]),
    "topology shape": (lambda: zj.make_mesh(topology="h200:8"), zj.PolicyError,
                       ["hosts x GPUs", "h200:8x8"]),
    "feed": (lambda: list(zj.feed([X[:12]], _zero())), zj.BatchError, ["12 examples", "8 devices"]),
    "prefetch": (lambda: zj.feed([X], _zero(), prefetch=-1), zj.BatchError,
                 ["prefetch=-1", "with 0"]),
    "nothing gathered": (lambda: _zero().gathered(_mean, argnums=())({"w": X}, X),
                         zj.PolicyError, ["argnums=()", "names no argument"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_says_what_was_given_and_what_to_write(name):
    provoke, kind, words = ERRORS[name]
    with pytest.raises(kind) as caught:
        provoke()
    error = caught.value
    assert isinstance(error, zj.ZeroError) and isinstance(error, (ValueError, RuntimeError))
    assert [word for word in words if word not in str(error)] == [], str(error)


def test_a_scan_over_the_shards_says_what_to_write():
    """The result is right too, because all slices are gathered before the scan."""
    text = r"w: a scan slices its dimension 0.*Zero\(rules=\{'w': P\(None, 'data'\)\}\)"
    with pytest.warns(UserWarning, match=text):
        state, metrics = _step(_slices, shape=(8, 3, 3))
    np.testing.assert_allclose(metrics["loss"], 8 * 9 + X.sum())
    np.testing.assert_allclose(state.params["w"], np.full((8, 3, 3), 0.9), rtol=1e-6)


def test_nothing_is_half_done():
    """A rejected batch leaves the state usable: arrays are donated only when the step runs."""
    zero = _zero()
    step, state = zero.train_step(_mean, TX), _state(zero)
    with pytest.raises(zj.BatchError):
        step(state, X[:3])
    state, metrics = step(state, X)
    assert int(state.step) == 1 and np.isfinite(metrics["loss"])


def test_constraints_choose_one_loss():
    assert np.isfinite(_step(_constrains)[1]["loss"])
