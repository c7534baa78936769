"""`Precision.keep`: parameters that have their own dtype, by path."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zerojax as zj

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
SGD = optax.sgd(0.1)
ROUTER = zj.Precision(compute="bfloat16", keep={"router/.*": "float32"})


def _zero(precision):
    mesh = zj.make_mesh(devices=jax.devices()[:8])
    return zj.Zero(mesh, 3, min_shard=1, precision=precision)


def _init():
    return {"router": jnp.eye(8), "w": jnp.eye(8)}


def _dtypes(params):
    return {name: x.dtype.name for name, x in params.items()}


def _routed(p, x):
    experts = jax.nn.softmax(x @ p["router"]).astype(p["w"].dtype)
    return jnp.square((experts @ p["w"]).astype(jnp.float32) - 1)


def _mean(p, x):
    return _routed(p, x).mean()


def _sum(p, x):
    return zj.Loss(_routed(p, x).sum(), 8 * x.shape[0])


@pytest.mark.parametrize("loss_fn", [_mean, _sum])
def test_a_kept_parameter_is_stored_and_read_in_its_dtype(loss_fn):
    zero = _zero(zj.Precision(params="bfloat16", compute="bfloat16", keep={"router": "float32"}))
    seen = {}

    def loss(p, x):
        seen.update(_dtypes(p))
        return loss_fn(p, x)

    state = zero.init(_init, SGD)
    assert _dtypes(state.params) == {"router": "float32", "w": "bfloat16"}
    zero.train_step(loss, SGD)(state, X)
    assert seen == {"router": "float32", "w": "bfloat16"}


@pytest.mark.parametrize("keep, error, text", [
    ({"routers": "float32"}, zj.LayoutError,
     "Precision.keep 'routers' matches none of 2 parameters"),
    ({"(": "float32"}, zj.PolicyError, r"Precision.keep '\(' is not a valid regular expression"),
    ({"router": "float8"}, zj.PolicyError, r"keep\['router'\]='float8'\): not a supported dtype"),
    ({"router": "float16"}, zj.PolicyError, "overflow"),
])
def test_invalid_patterns_and_dtypes_are_refused(keep, error, text):
    with pytest.raises(error, match=text):
        _zero(zj.Precision(keep=keep)).init(_init, SGD)


@pytest.mark.parametrize("is_linen", [True, False])
def test_value_and_grad_reads_a_kept_parameter_in_its_dtype(is_linen):
    zero = _zero(ROUTER)
    params = {"router": {"kernel": jnp.eye(8)}, "w": jnp.eye(8)}
    model = {"params": params} if is_linen else params
    seen = {}

    def loss(model, x):
        p = model["params"] if is_linen else model
        seen.update(_dtypes({"router": p["router"]["kernel"], "w": p["w"]}))
        return (x @ p["router"]["kernel"] @ p["w"]).mean()

    zero.jit(zero.value_and_grad(loss), donate=False)(model, X)
    assert seen == {"router": "float32", "w": "bfloat16"}


def test_create_refuses_a_pattern_that_matches_nothing():
    zero = _zero(zj.Precision(keep={"rooter": "float32"}))
    with pytest.raises(zj.LayoutError, match=r"Precision.keep 'rooter' matches none"):
        zero.create(lambda: {"params": {"router": jnp.eye(8)}})


def test_a_precision_is_a_plain_value():
    assert pickle.loads(pickle.dumps(ROUTER)) == ROUTER
    assert copy.deepcopy(ROUTER) == ROUTER
    assert hash(copy.deepcopy(ROUTER)) == hash(ROUTER)
    assert dataclasses.asdict(ROUTER)["keep"] == (("router/.*", "float32"),)
