"""The cost of `train_step` relative to a hand-written `jax.jit` step, on one device.

There are two cases: (a) a transformer, (b) 500 small leaves.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import seconds, steps, table

import zerojax as zj

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import train_gpt

LEAVES = 500
COLUMNS = ("stage 0, one CPU device", "zerojax ms/step", "same by hand", "bare by hand",
           "zerojax / same", "zerojax / bare")


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def by_hand(loss_fn, tx, *, bare: bool):
    """Returns a jitted step over (params, opt_state).

    Unless it is `bare`, it computes norms and leaves the state unchanged after a non-finite step,
    as zerojax does.
    """

    def mean(params, batch):
        loss = loss_fn(params, batch)
        return loss.total / loss.weight

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(mean)(params, batch)
        updates, new_opt = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt
        if bare:
            return new, {"loss": loss}
        grad_norm = norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, {"loss": loss, "grad_norm": grad_norm, "param_norm": norm(new[0])}

    return jax.jit(step, donate_argnums=0)


def times(init, loss, tx, batch, n, rounds):
    """Returns ms per step of zerojax, of the same step by hand, and of the bare step by hand."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]), 0)
    params = jax.jit(init)()
    runs = [steps(zero.train_step(loss, tx), zero.init(init, tx), batch, n)]
    for bare in (False, True):
        state = jax.tree.map(jnp.copy, (params, tx.init(params)))
        runs.append(steps(by_hand(loss, tx, bare=bare), state, batch, n))
    return [1e3 * t / n for t in seconds(runs, rounds)]


def transformer():
    tokens = next(train_gpt.windows(train_gpt.read_text()[0], 16, seed=0))

    def init():
        return train_gpt.model.init(jax.random.key(0), jnp.zeros((1, train_gpt.SEQ), jnp.int32))

    # by hand, the whole dict of variables is trained: it holds parameters alone
    return times(init, train_gpt.loss_fn, optax.adam(1e-3), jnp.asarray(tokens), n=5, rounds=21)


def leaves():
    def init():
        return {f"w{i}": jnp.full(8, 1.0 + i / LEAVES) for i in range(LEAVES)}

    def loss(params, x):
        weights = jnp.stack([jnp.asarray(w) for w in params.values()]).sum(0)
        return zj.Loss((x * weights).sum(), x.shape[0])

    batch = jnp.asarray(np.ones((8, 8), np.float32))
    return times(init, loss, optax.sgd(1e-6, momentum=0.9), batch, n=50, rounds=21)


def markdown() -> str:
    cases = {"transformer, 0.3 M parameters (aim 1.02)": transformer,
             f"{LEAVES} leaves of 8 (aim 1.05)": leaves}
    rows = []
    for name, measure in cases.items():
        ours, same, bare = measure()
        rows.append([name, f"{ours:.2f}", f"{same:.2f}", f"{bare:.2f}", f"**{ours / same:.3f}**",
                     f"{ours / bare:.3f}"])
    return table(COLUMNS, rows)


if __name__ == "__main__":
    print(markdown())
