"""A loss may do anything with its parameters, which are plain arrays to it.

In every stage, its value and gradient are those of one device. Each case is differentiated by
`value_and_grad`, as one loss and (if it is a mean over examples) per device, and by `train_step`.
"""

import itertools

import jax
import losses
import modules
import numpy as np
import optax
import oracle
import pytest
import quick
from flax import nnx
from losses import X

import zerojax as zj
from zerojax.gather.models import Nnx, Tree

CASES = losses.CASES | modules.CASES
NO_MEANS = ("penalty", "hessian", "names", "returned")  # they add a term that is no mean over rows


def _stage(name):
    return 1 + 2 * (len(name) % 2)


def _zero(stage):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1)


def one_device(case):
    """Returns (value, list of gradients) by plain jax."""
    model = case.init()
    kind, params, state, _ = (Nnx if isinstance(model, nnx.Module) else Tree).split(model)

    def mean(params):
        result = case.loss(kind.join(params, state), X)
        return result.total / result.weight if isinstance(result, zj.Loss) else result

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    return value, jax.tree.leaves(grads)


def as_sum(case):
    """Returns the loss as a sum over the rows."""
    return lambda model, x: zj.Loss(case.loss(model, x) * x.shape[0], x.shape[0])


def close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1e-3, np.abs(b).max()))


@pytest.mark.parametrize("name, stage", quick.some(
    itertools.product(CASES, range(4)), lambda case: case[1] == 4 - _stage(case[0])))
def test_value_and_grad_equals_one_device(name, stage):
    case, zero = CASES[name], _zero(stage)
    value, grads = one_device(case)
    forms = [case.loss]
    if not case.whole and not any(word in name for word in NO_MEANS):
        forms.append(as_sum(case))

    def run(state, x):
        return [zero.value_and_grad(loss)(state, x) for loss in forms]

    state = zero.init(case.init, optax.sgd(1.0))
    results = zero.jit(run, donate=False, compiler_options=oracle.QUICK)(state, X)
    for ours, gradients in results:
        np.testing.assert_allclose(ours, value, rtol=2e-5)
        close(gradients, grads)


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_one_device(name):
    case, zero = CASES[name], _zero(_stage(name))
    value, grads = one_device(case)
    state = zero.init(case.init, optax.sgd(1.0))
    born = jax.tree.map(np.asarray, jax.tree.leaves(state.params))
    step = zero.train_step(case.loss, optax.sgd(1.0), compiler_options=oracle.QUICK)
    state, metrics = step(state, X)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    close(state.params, [w - g for w, g in zip(born, grads, strict=True)])
