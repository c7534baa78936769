"""Models that keep something besides their parameters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops

import zerojax as zj
from zerojax.layout import rules

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
ROWS = jax.random.normal(jax.random.key(1), (16, 8))


def _zero(stage=3):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1)


@dataclasses.dataclass
class Config:
    """A config with == and without a hash, as in tunix and openpi."""

    width: int = 8
    sizes: list = dataclasses.field(default_factory=lambda: [8, 16])


class Configured(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.dense = nnx.Linear(config.width, config.sizes[1], rngs=rngs)


def test_modules_that_keep_an_ordinary_config():
    calls = []

    def loss(module, x):
        calls.append(module.config.width)
        return module.dense(x).mean()

    zero = _zero()
    step = zero.train_step(loss, TX)
    for _ in range(2):
        state = zero.init(lambda: Configured(Config(), nnx.Rngs(0)), TX)
        state, metrics = step(state, X)
        state, metrics = step(state, X)
    assert calls == [8] and np.isfinite(metrics["loss"])


class Fp8(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.tanh(nn.Dense(8, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)(x))
        return x


def fp8_mean(variables, x):
    return jnp.square(Fp8().apply(variables, x) - 1).mean()


def fp8_sum(variables, x):
    return zj.Loss(fp8_mean(variables, x) * x.shape[0], x.shape[0])


def fp8_step(variables, accumulate):
    """Returns the variables after a step of SGD by plain jax.

    As flax documents, the gradient of each microbatch replaces the scales.
    """
    new, grads = variables, []
    for micro in range(accumulate):
        g = jax.grad(fp8_mean)(new, ROWS[micro::accumulate])
        new = {**variables, rules.OVERWRITTEN: g[rules.OVERWRITTEN]}
        grads.append(g["params"])
    mean = jax.tree.map(lambda *g: sum(g) / accumulate, *grads)
    return {**new, "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], mean)}


def scales_of_first_layer(overwritten):
    return overwritten["Dense_0"]["Fp8DirectDotGeneralOp_0"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("form", ["mean", "sum"])
def test_fp8_scales_are_overwritten_by_their_gradients(form, accumulate):
    """In the order of the microbatches; no device differentiates its own part."""
    zero = _zero()
    state = zero.init(Fp8().init, TX, jax.random.key(0), ROWS)
    theirs = Fp8().init(jax.random.key(0), ROWS)
    step = zero.train_step(fp8_mean if form == "mean" else fp8_sum, TX, accumulate=accumulate)
    for _ in range(3):
        theirs = fp8_step(theirs, accumulate)
        state, _ = step(state, ROWS)
    scales = state.model_state[rules.OVERWRITTEN]
    assert float(scales_of_first_layer(scales)["input_amax_history"].max()) > 1
    ours = jax.tree.leaves_with_path({rules.OVERWRITTEN: scales, "params": state.params})
    skipped = "output_grad" if form == "sum" else "nothing"  # 16 times larger in a sum over rows
    for (path, a), b in zip(ours, jax.tree.leaves(theirs), strict=True):
        if skipped not in str(path):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3, err_msg=str(path))


def test_value_and_grad_returns_fp8_scales_as_gradients():
    """These gradients are new values: those of a bare mean equal jax's."""
    zero, variables = _zero(), Fp8().init(jax.random.key(0), ROWS)

    def gradients(variables, x):
        _, grads = zero.value_and_grad(fp8_mean)(variables, x)
        return grads[rules.OVERWRITTEN]

    ours = scales_of_first_layer(zero.jit(gradients, donate=False)(variables, ROWS))
    theirs = jax.grad(fp8_mean)(variables, ROWS)[rules.OVERWRITTEN]
    np.testing.assert_allclose(ours["input_amax_history"],
                               scales_of_first_layer(theirs)["input_amax_history"], rtol=2e-2)


@pytest.mark.parametrize(("loss", "accumulate"), [(fp8_sum, 1), (fp8_mean, 2)])
def test_value_and_grad_refuses_fp8_scales_that_it_would_divide(loss, accumulate):
    zero, variables = _zero(), Fp8().init(jax.random.key(0), ROWS)
    gradients = zero.value_and_grad(loss, accumulate=accumulate)
    text = "are new values, which must not be divided by a weight"
    with pytest.raises(zj.LossError, match=text):
        zero.jit(gradients, donate=False)(variables, ROWS)
