"""Models that keep something beside their parameters."""

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

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


@dataclasses.dataclass
class Config:
    """With == and without a hash, as tunix's and openpi's."""

    width: int = 8
    sizes: list = dataclasses.field(default_factory=lambda: [8, 16])


class Configured(nnx.Module):
    def __init__(self, config, rngs):
        self.config, self.dense = config, nnx.Linear(config.width, config.sizes[1], rngs=rngs)


def test_modules_that_keep_an_ordinary_config():
    calls, zero = [], zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), min_shard=1)

    def loss(module, x):
        calls.append(module.config.width)
        return module.dense(x).mean()

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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("form", ["mean", "sum"])
def test_fp8_scales_are_overwritten_by_their_gradients(form, accumulate):
    """As flax documents, in the order of the microbatches; and no device differentiates its own part."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    mean = lambda variables, x: jnp.square(Fp8().apply(variables, x) - 1).mean()
    of_examples = lambda variables, x: zj.Loss(mean(variables, x) * x.shape[0], x.shape[0])
    zero, tx = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, min_shard=1), optax.sgd(0.1)
    state = zero.init(Fp8().init, tx, jax.random.key(0), x)
    theirs = Fp8().init(jax.random.key(0), x)
    step = zero.train_step(mean if form == "mean" else of_examples, tx, accumulate=accumulate)
    for _ in range(3):
        new, grads = theirs, []
        for micro in range(accumulate):
            g = jax.grad(mean)(new, x[micro::accumulate])
            new = {**theirs, "_overwrite_with_gradient": g["_overwrite_with_gradient"]}
            grads.append(g["params"])
        mean_grads = jax.tree.map(lambda *g: sum(g) / accumulate, *grads)
        theirs = {**new, "params": jax.tree.map(lambda p, g: p - 0.1 * g, theirs["params"], mean_grads)}
        state, _ = step(state, x)
    scales = state.model_state["_overwrite_with_gradient"]
    assert float(scales["Dense_0"]["Fp8DirectDotGeneralOp_0"]["input_amax_history"].max()) > 1
    ours = {"_overwrite_with_gradient": scales, "params": state.params}
    outputs = "output_grad" if form == "sum" else "nothing"  # those of a sum are as many times larger
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs), strict=True):
        if outputs not in str(path):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3, err_msg=str(path))


def test_fp8_scales_in_a_loop_of_ones_own():
    """Their gradients are new values: as jax's of a bare mean, refused where they would be divided."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    mean = lambda variables, x: jnp.square(Fp8().apply(variables, x) - 1).mean()
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, min_shard=1)
    variables = Fp8().init(jax.random.key(0), x)
    grads = zero.jit(lambda v, x: zero.value_and_grad(mean)(v, x)[1], donate=False)(variables, x)
    theirs = jax.grad(mean)(variables, x)
    ours, expected = (g["_overwrite_with_gradient"]["Dense_0"]["Fp8DirectDotGeneralOp_0"] for g in (grads, theirs))
    np.testing.assert_allclose(ours["input_amax_history"], expected["input_amax_history"], rtol=2e-2)
    of_examples = lambda v, x: zj.Loss(mean(v, x) * x.shape[0], x.shape[0])
    for loss, accumulate in ((of_examples, 1), (mean, 2)):
        with pytest.raises(zj.LossError, match="are new values, not to be divided by a weight"):
            zero.jit(lambda v, x, f=loss, a=accumulate: zero.value_and_grad(f, accumulate=a)(v, x), donate=False)(variables, x)
