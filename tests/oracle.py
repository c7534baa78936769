"""The judge: a plain trainer on one device, whole parameters, no zerojax but for the `Loss` that a loss may return."""

import jax
import jax.numpy as jnp
import optax

import zerojax as zj


def _as_loss(result):
    return result if isinstance(result, zj.Loss) else zj.Loss(result, 1.0)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _microbatch(batch, index, accumulate):
    return jax.tree.map(lambda x: x[index::accumulate], batch)


def _step(model, tx, accumulate, clip_norm, compute):
    def total(params, state, batch):
        loss = _as_loss(model.loss(model.join(_cast(params, compute), state), batch))
        return jnp.float32(loss.total), loss

    @jax.jit
    def step(params, state, opt_state, batch):
        parts = []
        for i in range(accumulate):
            grads, loss = jax.grad(total, has_aux=True)(params, state, _microbatch(batch, i, accumulate))
            state = state if loss.model_state is None else loss.model_state
            parts.append((grads, jnp.float32(loss.total), jnp.float32(loss.weight)))
        grads, value, weight = jax.tree.map(lambda *xs: sum(xs), *parts)
        grads = jax.tree.map(lambda g: g / weight, grads)
        if clip_norm:
            norm = optax.global_norm(grads)
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / norm), grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value / weight

    return step


def train(model, tx, batches, *, accumulate=1, clip_norm=None, compute="float32"):
    """(params, model state, losses) of a zoo model after one step a batch."""
    params, state = model.split(jax.jit(model.init)() if model.jits else model.init())
    opt_state, losses = tx.init(params), []
    step = _step(model, tx, accumulate, clip_norm, compute)
    for batch in batches:
        params, state, opt_state, loss = step(params, state, opt_state, batch)
        losses.append(loss)
    return params, state, losses
