"""What survives the rewriting of a loss.

Effects, names and source lines, values that are not arrays, and changes to a module.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zerojax as zj

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


def _zero(devices=8):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:devices]), 3, min_shard=1)


def _weights():
    return {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.linspace(-1.0, 1.0, 8)}


def _apply(p, x):
    return jnp.tanh(x @ p["w"]) + p["b"][None]


def _mean(y):
    return jnp.square(jnp.tanh(y) - 1).mean()


def _sum(y):
    return zj.Loss(y.sum(), len(y))


def _run(zero, loss):
    """Runs one step and waits for its effects."""
    _, metrics = zero.train_step(loss, SGD)(zero.init(_weights, SGD), X)
    jax.block_until_ready(metrics)
    jax.effects_barrier()


def test_effects_happen_once_and_in_order(capfd):
    def loss(p, x):
        jax.debug.print("first {}", p["b"][0], ordered=True)
        y = _apply(p, x)
        jax.debug.print("second {}", p["b"][7], ordered=True)
        return _sum(y)

    _run(_zero(devices=1), loss)  # jax orders effects on one device only
    assert capfd.readouterr().out.split() == ["first", "-1.0", "second", "1.0"]


def test_each_part_prints(capfd):
    """Per device, each device prints for its own part, here of two examples."""
    def loss(p, x):
        jax.debug.print("rows {}", x[:, 0] * 0 + len(x))
        return _sum(_apply(p, x))

    _run(_zero(), loss)
    assert capfd.readouterr().out.count("[2. 2.]") == 8


@pytest.mark.parametrize("result, shapes", [(_mean, [(16, 8)]), (_sum, [(16, 8), (2, 8)])])
def test_a_loss_is_traced_once_and_once_more_for_a_part(result, shapes):
    traced = []

    def loss(p, x):
        traced.append(x.shape)
        return result(_apply(p, x))

    zero = _zero()
    zero.train_step(loss, SGD).lower(zero.init(_weights, SGD), X)
    assert traced == shapes


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="inner")(jax.checkpoint(lambda x: x * 2)(x))


def test_names_of_modules_and_source_lines_survive():
    zero, model = _zero(), Outer()

    @jax.jit
    def loss(variables, x):
        return _mean(model.apply(variables, x))

    step = zero.train_step(loss, SGD)
    text = step.lower(zero.init(model.init, SGD, KEY, X), X).as_text(debug_info=True)
    products = "\n".join(line for line in text.splitlines() if "inner/dot_general" in line)
    assert re.search(r"/jvp\(.*Outer.*inner/dot_general", products)
    assert re.search(r"/transpose\(jvp\(.*Outer.*inner", products)
    assert "sharding_constraint" in text
    assert "linen/linear.py" in text


def test_values_that_are_not_arrays_pass_through_gathered():
    zero = _zero()

    def product(p, x, flag):
        return x @ p["w"], flag, None

    def run(state, x, *, flag):
        y, same, none = zero.gathered(product)(state["params"], x, flag)
        assert same is flag
        assert none is None
        return y

    jitted = zero.jit(run, donate=False, static_argnames="flag")
    y = jitted({"params": _weights()}, X, flag=True)
    np.testing.assert_allclose(y, X @ np.asarray(_weights()["w"]), rtol=1e-5)


class Counter(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(x)


def test_a_gathered_function_changes_the_module_it_is_given():
    zero = _zero()

    @jax.jit
    def run(x):
        module = Counter()
        y = zero.gathered(lambda m, x: m(x))(module, x)
        return y, module.calls[...]

    assert int(run(X)[1]) == 1
