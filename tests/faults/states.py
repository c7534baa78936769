"""Small states to save, and how to tell two of them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zerojax as zj

tx = optax.adamw(1e-2)


def init(key):
    """One leaf that eight devices divide, one that they do not, one of 16 bit, one of no size."""
    return {"w": jax.random.normal(key, (64, 32)), "odd": jnp.ones((3, 5)), "half": jnp.full(24, 1.5, jnp.bfloat16),
            "none": jnp.zeros((0, 3))}


def loss_fn(params, x):
    return ((x @ params["w"]) ** 2).mean() + sum((params[k].astype(jnp.float32) ** 2).sum() for k in ("odd", "half"))


def zero(devices=8, stage=3, replica=1, **options):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:devices], replica=replica), stage, min_shard=1, **options)


def state(policy=None, seed=0, step=0, tx=tx):
    made = (policy or zero()).init(init, tx, jax.random.key(seed))
    return made.replace(step=made.step + step)


def target(policy=None, tx=tx):
    return (policy or zero()).abstract(init, tx, jax.random.key(0))


def data_of(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def bits(tree):
    return {jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(data_of(x)).tobytes())
            for path, x in jax.tree.leaves_with_path(tree)}


def saved(directory, steps=(1,), **options):
    """A directory with a state for each step, of another seed each; returns their bits by step."""
    made = {}
    with zj.Checkpointer(directory, keep=None, **options) as checkpoints:
        for step in steps:
            given = state(seed=step, step=step)
            made[step] = bits(given)
            checkpoints.save(given, data_state={"next": step})
            checkpoints.wait()
    return made
