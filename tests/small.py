"""A model of one matrix, its batch, and a policy over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zerojax as zj

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def zero(n=8, **settings):
    """Returns a policy over `n` CPU devices that shards every leaf that it can."""
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), **{"min_shard": 1, **settings})


def weights():
    return {"w": jnp.full((8, 16), 0.5)}
