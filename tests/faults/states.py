"""Small states to save, and their bits to compare."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zerojax as zj

tx = optax.adamw(1e-2)


def init(key):
    """Parameters that eight devices divide, that they do not divide, of 16 bits, and of size 0."""
    return {"w": jax.random.normal(key, (64, 32)), "odd": jnp.ones((3, 5)),
            "half": jnp.full(24, 1.5, jnp.bfloat16), "none": jnp.zeros((0, 3))}


def loss_fn(params, x):
    small = sum((params[k].astype(jnp.float32) ** 2).sum() for k in ("odd", "half"))
    return ((x @ params["w"]) ** 2).mean() + small


def zero(devices=8, stage=3, replica=1, **options):
    mesh = zj.make_mesh(devices=jax.devices()[:devices], replica=replica)
    return zj.Zero(mesh, stage, min_shard=1, **options)


def state(policy=None, seed=0, step=0, tx=tx):
    made = (policy or zero()).init(init, tx, jax.random.key(seed))
    return made.replace(step=made.step + step)


def target(policy=None, tx=tx):
    return (policy or zero()).abstract(init, tx, jax.random.key(0))


def data_of(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def bits(tree):
    """Returns the dtype, shape and bytes of each leaf by path."""
    return {jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(data_of(x)).tobytes())
            for path, x in jax.tree.leaves_with_path(tree)}


def saved(directory, steps=(1,), **options):
    """Saves a state for each step, each of another seed; returns their bits by step."""
    made = {}
    with zj.Checkpointer(directory, keep=None, **options) as checkpoints:
        for step in steps:
            given = state(seed=step, step=step)
            made[step] = bits(given)
            checkpoints.save(given, data_state={"next": step})
            checkpoints.wait()
    return made
