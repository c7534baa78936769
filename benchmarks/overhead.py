"""What `train_step` costs beside the same step written by hand with `jax.jit`: (a) a transformer, (b) 500 leaves, one device."""

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
NORM = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def by_hand(loss_fn, tx, *, bare: bool):
    """A jitted step over (params, opt_state); unless `bare`, with norms, and without effect where something is not finite."""

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: (r := loss_fn(p, batch)).total / r.weight)(params)
        updates, new_opt = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt
        if bare:
            return new, {"loss": loss}
        norm = NORM(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, {"loss": loss, "grad_norm": norm, "param_norm": NORM(new[0])}

    return jax.jit(step, donate_argnums=0)


def ratios(init, as_loss, tx, batch, n, rounds):
    """Milliseconds a step of zerojax, of the same by hand, and of the bare step by hand."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]), 0)
    ours = steps(zero.train_step(as_loss, tx), zero.init(init, tx), batch, n)
    params = jax.jit(init)()
    copy = lambda: jax.tree.map(jnp.copy, (params, tx.init(params)))
    runs = [ours, *(steps(by_hand(as_loss, tx, bare=bare), copy(), batch, n) for bare in (False, True))]
    return [1e3 * t / n for t in seconds(runs, rounds)]


def transformer():
    tokens = next(train_gpt.windows(train_gpt.read_text()[0], 16, seed=0))
    init = lambda: train_gpt.model.init(jax.random.key(0), jnp.zeros((1, train_gpt.SEQ), jnp.int32))
    # linen's dict of variables is trained whole by hand: it holds parameters alone
    return ratios(init, train_gpt.loss_fn, optax.adam(1e-3), jnp.asarray(tokens), n=5, rounds=21)


def leaves():
    init = lambda: {f"w{i}": jnp.full(8, 1.0 + i / LEAVES) for i in range(LEAVES)}
    loss = lambda params, x: zj.Loss((x * jnp.stack([jnp.asarray(w) for w in params.values()]).sum(0)).sum(), x.shape[0])
    return ratios(init, loss, optax.sgd(1e-6, momentum=0.9), jnp.asarray(np.ones((8, 8), np.float32)), n=50, rounds=21)


def markdown() -> str:
    cases = {"transformer, 0.3 M parameters (aim 1.02)": transformer, f"{LEAVES} leaves of 8 (aim 1.05)": leaves}
    rows = []
    for name, measure in cases.items():
        ours, same, bare = measure()
        rows.append([name, f"{ours:.2f}", f"{same:.2f}", f"{bare:.2f}", f"**{ours / same:.3f}**", f"{ours / bare:.3f}"])
    columns = ["stage 0, one CPU device", "zerojax ms/step", "same by hand", "bare by hand", "zerojax / same", "zerojax / bare"]
    return table(columns, rows)


if __name__ == "__main__":
    print(markdown())
