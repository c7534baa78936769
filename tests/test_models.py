"""Models that keep something beside their parameters."""

import dataclasses

import jax
import numpy as np
import optax
from flax import nnx

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
