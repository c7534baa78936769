"""The bytes of a plan by kind add up to its peak."""

import jax
import jax.numpy as jnp
import optax

import zerojax as zj


def test_state_that_a_program_does_not_read_is_counted():
    """jit leaves it out of the program's arguments, but it stays in memory."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
    state = zero.init(lambda: {"w": jnp.ones((8, 4))}, optax.adam(1e-3))

    @zero.jit(donate=False)
    def norm(state):
        return jnp.square(state.params["w"]).sum()

    memory = norm.plan(state, cache=False).memory
    assert memory.kinds["optimizer state"] == 2 * 8 * 4 * 4 / 2 + 4
    assert min(memory.kinds.values()) >= 0
    assert sum(memory.kinds.values()) == memory.peak
