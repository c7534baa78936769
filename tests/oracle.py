"""The reference: a plain trainer on one device with whole parameters.

It uses nothing of zerojax but the `Loss` that a loss function may return.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zerojax as zj

OF_VALUE = {"float32": 1e-5}  # tolerance relative to the largest value of a leaf
OF_MOVE = {"bfloat16": 6e-2, "float16": 1e-2}  # relative to the distance that training moved a leaf
# These save time in compiling, not in running.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _as_loss(result):
    return result if isinstance(result, zj.Loss) else zj.Loss(result, 1.0)


def path_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _merged(trained, frozen):
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen,
                        is_leaf=lambda x: x is None)


def _gradients(model, compute, keep, scale):
    def cast(path, x):
        return x.astype(keep.get(path_of(path), compute))

    def total(trained, frozen, state, batch):
        params = jax.tree.map_with_path(cast, _merged(trained, frozen))
        loss = _as_loss(model.loss(model.join(params, state), batch))
        return jnp.float32(loss.total) * scale / jax.lax.stop_gradient(loss.weight), loss

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(trained, frozen, state, batch):
        """Returns (gradient of the total, new model state, total, weight)."""
        grads, loss = jax.grad(total, has_aux=True)(trained, frozen, state, batch)
        grads = jax.tree.map(lambda g: g * (loss.weight / scale), grads)
        new = state if loss.model_state is None else loss.model_state
        return grads, new, loss.total, jnp.float32(loss.weight)

    return gradients


def _update(tx, clip_norm):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def update(parts, opt_state, params):
        """Returns (new parameters, new opt_state, loss) from (gradient, total, weight) of each."""
        grads, total, weight = jax.tree.map(lambda *xs: sum(xs), *parts)
        grads = jax.tree.map(lambda g: g / weight, grads)
        if clip_norm:
            norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / norm), grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / weight

    return update


def train(model, tx, batches, *, accumulate=1, clip_norm=None, compute="float32", scale=1.0,
          trained=lambda path: True, keep=None):
    """Returns (params, model state, losses) of a zoo model after one step per batch.

    Args:
      scale: a loss scale, which float16 needs.
      trained: whether the parameter with a path is trained.
      keep: path to the dtype in which a parameter is computed instead of `compute`.
    """
    whole, state = model.born
    params = _only(whole, trained, True)
    frozen = _only(whole, trained, False)
    gradients = _gradients(model, compute, keep or {}, scale)
    update = _update(tx, clip_norm)
    opt_state = jax.jit(tx.init)(params)
    losses = []
    for batch in batches:
        parts = []
        for i in range(accumulate):  # microbatch i: examples i, i + accumulate, ...
            part = jax.tree.map(lambda x, i=i: x[i::accumulate], batch)
            grads, state, *counts = gradients(params, frozen, state, part)
            parts.append((grads, *counts))
        params, opt_state, loss = update(parts, opt_state, params)
        losses.append(loss)
    return _merged(params, frozen), state, losses


def _only(params, trained, wanted):
    return jax.tree.map_with_path(
        lambda path, x: x if trained(path_of(path)) == wanted else None, params)


def assert_close(ours, theirs, born, dtype):
    """Compares parameters after training; `born` are those before it."""
    for (path, a), b, c in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs),
                               jax.tree.leaves(born), strict=True):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        if dtype in OF_VALUE:
            atol = OF_VALUE[dtype] * max(1e-3, np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))
        else:
            moved = np.linalg.norm(b - c)
            assert np.linalg.norm(a - b) <= OF_MOVE[dtype] * moved + 1e-6, path
