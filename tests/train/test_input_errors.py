"""Errors of `zero.init`, `train_step` and the settings: each names the value that it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import zerojax as zj

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _zero(**settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), **{"min_shard": 1, **settings})


def _weights():
    return {"w": jnp.full((8, 16), 0.5)}


def _mean(p, x):
    return (x @ p["w"]).mean()


def _first(zero, init, loss):
    """Takes one step."""
    zero.train_step(loss, TX)(zero.init(init, TX), X)


class Constant(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.constant = jnp.arange(16.0)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.seen = nnx.Variable(jnp.int32(0))


def _counts_of_the_batch():
    def loss(model, x):
        model.seen[...] += (x > 0).sum()
        return zj.Loss(model.dense(x).sum(), x.shape[0])

    _first(_zero(gradients="per_device"), lambda: Counting(nnx.Rngs(0)), loss)


def _init(params):
    return lambda: _zero().init(lambda: params, TX)


def _train_step(**options):
    return lambda: _zero().train_step(lambda p, x: 0.0, TX, **options)


def _fp32_reduction():
    zero = _zero(precision=zj.Precision(compute="bfloat16", reduce="float32"))
    zero.value_and_grad(_mean)(_weights(), X)


def _rule_over_replicas():
    mesh = zj.make_mesh(devices=jax.devices()[:8], replica=2)
    zj.Zero(mesh, rules={"w": P("replica")}).init(_weights, TX)


def _other_collection():
    def loss(variables, x):
        total = (x * variables["params"]["scale"][None]).sum()
        return zj.Loss(total, 1.0, model_state={"mean": 1})

    model = nn.BatchNorm(use_running_average=False)
    _first(_zero(), lambda: model.init(jax.random.key(0), X), loss)


def _constant_weight():
    _first(_zero(), _weights, lambda p, x: zj.Loss((x @ p["w"]).sum(), np.float32(0)))


ERRORS = {
    "array as attribute": (lambda: _zero().init(lambda: Constant(nnx.Rngs(0)), TX),
                           zj.ModelError, ["plain attribute", "nnx.Variable"]),
    "complex": (_init({"w": jnp.ones(8, complex)}), zj.ModelError, ["parameter w", "complex64"]),
    "integers": (_init({"params": {"i": jnp.ones(8, int), "w": jnp.ones(8)}}),
                 zj.ModelError, ["parameter i", "int32"]),
    "counts of the batch": (_counts_of_the_batch, zj.PolicyError,
                            ["integers of the batch", 'gradients="global"']),
    "loop with fp32 reduction": (_fp32_reduction, zj.PolicyError,
                                 ["reduce='float32'", "bare mean", "zj.Loss"]),
    "accumulate in a loop": (lambda: _zero().value_and_grad(_mean, accumulate=0),
                             zj.PolicyError, ["accumulate=0"]),
    "float16 sums": (lambda: zj.Precision(accumulate="float16"),
                     zj.PolicyError, ["65504", "accumulate"]),
    "float64": (lambda: zj.Precision(params="float64"), zj.PolicyError, ["jax_enable_x64"]),
    "fp8": (lambda: zj.Precision(compute="fp8"), zj.PolicyError, ["'fp8'", "one of bfloat16"]),
    "replica rule": (_rule_over_replicas, zj.LayoutError, ["'replica'", "axis of copies"]),
    "one axis twice": (lambda: _zero(replica_axis="data"), zj.PolicyError, ["each once"]),
    "no axis": (lambda: _zero(axis=()), zj.PolicyError, ["one axis or more"]),
    "stage of bool": (lambda: _zero(stage=True), zj.PolicyError, ["stage=True"]),
    "rule of text": (lambda: _zero(rules={"w": "data"}), zj.PolicyError, ["jax.P('data')"]),
    "rule of no regex": (lambda: _zero(rules={"(": P()}),
                         zj.PolicyError, ["not a valid regular expression"]),
    "max_skipped": (_train_step(max_skipped=0), zj.PolicyError, ["max_skipped=0"]),
    "accumulate a float": (_train_step(accumulate=2.0), zj.PolicyError, ["accumulate=2.0"]),
    "model state of another name": (_other_collection, zj.LossError,
                                    ["['mean']", "['batch_stats']"]),
    "weight of numpy": (_constant_weight, zj.LossError, ["Loss.weight is 0"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_what_was_given(name):
    provoke, kind, words = ERRORS[name]
    with pytest.raises(kind) as caught:
        provoke()
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_settings_that_a_planned_function_has_itself_are_refused():
    zero = _zero()
    state, step = zero.init(_weights, TX), zero.train_step(_mean, TX)
    with pytest.raises(zj.PolicyError, match=r"zero.plan\(accumulate=...\) .* zero.train_step"):
        zero.plan(step, state, X, accumulate=2)
    jitted = zero.jit(lambda state, x: state)
    with pytest.raises(zj.PolicyError, match=r"zero.plan\(compiler_options=...\) .* zero.jit"):
        zero.plan(jitted, state, X, compiler_options={"xla_embed_ir_in_executable": True})
