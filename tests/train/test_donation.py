"""Donated states: states that a step took, arrays that are in a state twice, values set by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zerojax as zj

X = np.ones((8, 4), np.float32)
TX = optax.inject_hyperparams(optax.sgd)(0.5)


def _zero():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), min_shard=1)


def _weights():
    return {"w": jnp.ones((4, 8))}


def _loss(p, x):
    return (x @ p["w"]).mean()


def _own_state(zero):
    """Returns a state of the user's own."""
    return zero.create(lambda: {"params": _weights()})


@pytest.fixture
def started():
    """A (zero, state, step)."""
    zero = _zero()
    return zero, zero.init(_weights, TX), zero.train_step(_loss, TX)


@pytest.mark.parametrize("verb", ["step", "eval_step", "save", "jit", "jit, kept"])
def test_every_verb_refuses_a_state_that_a_step_took(verb, started, tmp_path):
    zero, state, step = started
    step(state, X)
    verbs = {
        "step": lambda: step(state, X),
        "eval_step": lambda: zero.eval_step(_loss)(state, X),
        "save": lambda: zj.Checkpointer(tmp_path, zero=zero).save(state),
        "jit": lambda: zero.jit(lambda state, x: state)(state, X),
        "jit, kept": lambda: zero.jit(lambda state, x: x, donate=False)(state, X),
    }
    text = r"earlier step took for the state that it returned \(donation\): step and \d+ more"
    with pytest.raises(zj.StateError, match=text):
        verbs[verb]()


def test_move_refuses_a_state_that_a_step_took(started):
    zero, state, step = started
    step(state, X)
    with pytest.raises(zj.StateError, match="move was given a state"):
        zero.move(state, zj.Zero(zero.mesh, 1))


def test_jit_refuses_a_state_of_the_users_own_that_it_took():
    zero = _zero()
    state, step = _own_state(zero), zero.jit(lambda state, x: state)
    step(state, X)
    text = (r"zero.jit was given .*\(donation\): params/w[.] "
            r"Continue with the state that was returned last")
    with pytest.raises(zj.StateError, match=text):
        step(state, X)


def test_a_step_that_was_interrupted_took_the_state(started):
    """Ctrl-C in a notebook's cell has this effect: the step ran, but its result was not bound."""
    _, state, step = started

    def interrupted():
        step(state, X)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(zj.StateError, match="If that call was interrupted, restore a checkpoint"):
        step(state, X)


def test_an_array_may_be_in_a_state_of_the_users_own_twice():
    zero = _zero()

    @zero.jit
    def step(state, x):
        value, grads = zero.value_and_grad(_loss)(state["params"], x)
        new = jax.tree.map(lambda p, g: p - g, state["params"], grads)
        ema = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, new, state["ema"])
        return {"params": new, "ema": ema}, value

    params = _own_state(zero)["params"]
    state = {"params": params, "ema": params}
    for _ in range(2):
        state, value = step(state, X)
    np.testing.assert_allclose(value, 4 - 4 / 8)
    np.testing.assert_allclose(state["params"]["w"], 1 - 2 / 8)
    np.testing.assert_allclose(state["ema"]["w"], 1 - 1 / 8 - 1 / 32)


def test_an_array_may_be_in_a_train_state_twice():
    zero, tx = _zero(), optax.trace(0.9)
    state = zero.init(_weights, tx)
    state = state.replace(opt_state=state.opt_state._replace(trace=state.params))
    state, _ = zero.train_step(_loss, tx)(state, X)
    # w + gradient + 0.9 x trace, where w and the trace are 1 and the gradient is 8 / 64
    np.testing.assert_allclose(state.params["w"], 1 + 0.125 + 0.9, rtol=1e-6)


def test_a_donated_array_may_be_another_argument_as_well():
    zero = _zero()
    state = _own_state(zero)

    @zero.jit
    def step(state, x, old):
        return jax.tree.map(lambda a: a + 1, state), old["w"].sum()

    new, total = step(state, X, state["params"])
    np.testing.assert_allclose(new["params"]["w"], 2)
    assert float(total) == 32


RATES = [0.25, 1, np.float64(0.25), jnp.float32(0.25), jnp.asarray(0.25), np.asarray(0.25)]


@pytest.mark.parametrize("rate", RATES)
def test_a_learning_rate_set_by_hand_compiles_nothing(rate):
    traced, zero = [], _zero()

    def loss(p, x):
        traced.append(x.shape)
        return _loss(p, x)

    state, step = zero.init(_weights, TX), zero.train_step(loss, TX)
    state, _ = step(state, X)
    before, traces = np.asarray(state.params["w"]), len(traced)
    state.opt_state.hyperparams["learning_rate"] = rate
    state, _ = step(state, X)
    np.testing.assert_allclose(before - state.params["w"], np.float32(rate) / 8, rtol=1e-5)
    state, _ = step(state, X)
    assert len(traced) == traces


def test_a_floating_rate_set_to_an_integer_stays_floating(started):
    """Otherwise, after a rate of 1, a rate of 0.5 would become 0."""
    _, state, step = started
    for rate in (1, 0.5, 2):
        before = np.asarray(state.params["w"])
        state.opt_state.hyperparams["learning_rate"] = rate
        state, _ = step(state, X)
        np.testing.assert_allclose(before - state.params["w"], rate / 8, rtol=1e-5)
    assert state.opt_state.hyperparams["learning_rate"].dtype == np.float32
