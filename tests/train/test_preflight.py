"""The report of a call to the other processes, unless the call fails."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest

import zerojax as zj

TX = optax.sgd(0.1)


class Agreed:
    """Takes the place of `agreement.Once`."""

    def __init__(self):
        self.reported = 0

    def __call__(self, *_):
        pass

    @contextlib.contextmanager
    def calling(self):
        yield
        self.reported += 1


def loss(params, batch):
    return jnp.mean((batch @ params["w"]) ** 2)


def init():
    return {"w": jnp.ones((4, 2))}


def made(kind):
    """Returns a function that processes call together, and its first argument."""
    islands = 2 if kind == "islands" else 1
    zero = zj.Zero(zj.make_mesh(islands=islands, devices=jax.devices()[:2]))
    if kind == "islands":
        rounds = zero.islands(2, every=2)
        return rounds.train_step(loss, TX), rounds.init(init, TX)
    functions = {"train_step": lambda: zero.train_step(loss, TX),
                 "eval_step": lambda: zero.eval_step(loss),
                 "jit": lambda: zero.jit(lambda state, x: loss(state.params, x))}
    return functions[kind](), zero.init(init, TX)


@pytest.mark.parametrize("kind", ["train_step", "eval_step", "jit", "islands"])
def test_a_call_whose_trace_fails_is_not_reported(kind):
    function, state = made(kind)
    function._preflight._agreed = agreed = Agreed()
    with pytest.raises(TypeError):
        function(state, jnp.ones((8, 3)))
    assert agreed.reported == 0
    function(state, jnp.ones((8, 4)))
    assert agreed.reported == 1
