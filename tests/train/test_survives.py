"""What survives the rewriting of a loss: effects, names and lines, values that are no arrays, what a module changes."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zerojax as zj

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
KEY = jax.random.key(0)
fit = lambda y: jnp.square(jnp.tanh(y) - 1).mean()


def _zero(stage):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1)


def _square():
    return {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.linspace(-1.0, 1.0, 8)}


def _apply(p, x):
    return jnp.tanh(x @ p["w"]) + p["b"][None]


def _linear():
    return nnx.Linear(8, 8, rngs=nnx.Rngs(0))


def test_effects_happen_once_in_their_order(capfd):
    def loss(p, x):
        jax.debug.print("first {}", p["b"][0], ordered=True)
        y = _apply(p, x)
        jax.debug.print("second {}", p["b"][7], ordered=True)
        return zj.Loss(y.sum(), x.shape[0])

    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))  # jax orders effects on one device alone
    _, metrics = zero.train_step(loss, optax.sgd(0.1))(zero.init(_square, optax.sgd(0.1)), X)
    jax.block_until_ready(metrics)
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["first", "-1.0", "second", "1.0"]


def test_unordered_prints_of_parts(capfd):
    """Per device, each device prints of its own part."""
    def loss(p, x):
        jax.debug.print("rows {}", x[:, 0] * 0 + len(x))
        return zj.Loss(_apply(p, x).sum(), x.shape[0])

    _, metrics = _zero(3).train_step(loss, optax.sgd(0.1))(_zero(3).init(_square, optax.sgd(0.1)), X)
    jax.block_until_ready(metrics)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("[2. 2.]") == 8


def test_a_loss_is_traced_once_or_once_more_for_a_part():
    calls = []

    def loss(how):
        def counted(p, x):
            calls.append(x.shape)
            return how(_apply(p, x))

        return counted

    for how, shapes in ((fit, [(16, 8)]), (lambda y: zj.Loss(y.sum(), len(y)), [(16, 8), (2, 8)])):
        calls.clear()
        zero = _zero(3)
        zero.train_step(loss(how), optax.sgd(0.1)).lower(zero.init(_square, optax.sgd(0.1)), X)
        assert calls == shapes


class Named2(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="inner")(jax.checkpoint(lambda x: x * 2)(x))


def test_names_of_modules_and_lines_of_the_model_survive():
    zero, model = _zero(3), Named2()
    step = zero.train_step(lambda v, x: jax.jit(lambda v, x: fit(model.apply(v, x)))(v, x), optax.sgd(0.1))
    text = step.lower(zero.init(model.init, optax.sgd(0.1), KEY, X), X).as_text(debug_info=True)
    products = "\n".join(line for line in text.splitlines() if "inner/dot_general" in line)
    assert re.search(r"/jvp\(.*Named2.*inner/dot_general", products) and re.search(r"/transpose\(jvp\(.*Named2.*inner", products)
    assert "sharding_constraint" in text and "linen/linear.py" in text


def test_values_that_are_no_arrays_pass_through_gathered():
    zero = _zero(3)
    run = zero.jit(lambda s, x, *, flag: zero.gathered(lambda p, x, flag: (x @ p["w"], flag, None))(s["params"], x, flag)[0],
                   donate=False, static_argnames="flag")
    np.testing.assert_allclose(run({"params": _square()}, X, flag=True), X @ np.asarray(_square()["w"]), rtol=1e-5)


def test_what_a_gathered_function_changes_in_a_module_is_changed():
    zero = _zero(3)

    class Counter(nnx.Module):
        def __init__(self):
            self.linear, self.calls = _linear(), nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.linear(x)

    @jax.jit
    def run(x):
        module = Counter()
        y = zero.gathered(lambda m, x: m(x))(module, x)
        return y, module.calls[...]

    assert int(run(X)[1]) == 1
