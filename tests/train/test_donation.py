"""States that a step has taken, arrays that are in a state twice, numbers set by hand."""

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


def _loss(p, x):
    return (x @ p["w"]).mean()


def _started():
    zero = _zero()
    state, step = zero.init(lambda: {"w": jnp.ones((4, 8))}, TX), zero.train_step(_loss, TX)
    return zero, state, step


@pytest.mark.parametrize("verb", ["step", "eval_step", "save", "jit", "jit, kept"])
def test_a_state_that_a_step_took_is_told(verb, tmp_path):
    zero, state, step = _started()
    step(state, X)
    again = {"step": lambda: step(state, X), "eval_step": lambda: zero.eval_step(_loss)(state, X),
             "save": lambda: zj.Checkpointer(tmp_path, zero=zero).save(state),
             "jit": lambda: zero.jit(lambda state, x: state)(state, X),
             "jit, kept": lambda: zero.jit(lambda state, x: x, donate=False)(state, X)}
    with pytest.raises(zj.StateError, match=r"earlier step took for the one that it returned \(donation\): step and \d+ more"):
        again[verb]()


def test_a_state_of_ones_own_that_zero_jit_took_is_told():
    zero = _zero()
    state, step = zero.create(lambda: {"params": {"w": jnp.ones((4, 8))}}), zero.jit(lambda state, x: state)
    step(state, X)
    with pytest.raises(zj.StateError, match=r"zero.jit was given .*donation.: params/w[.] Go on with the state returned last"):
        step(state, X)


def test_a_state_is_taken_again_after_an_interrupt():
    """As Ctrl-C in a cell does: the step ran, and its result was not bound."""
    _, state, step = _started()

    def interrupted():
        step(state, X)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(zj.StateError, match="If that call was interrupted, restore a checkpoint"):
        step(state, X)


def test_arrays_that_are_in_a_state_twice():
    zero = _zero()
    params = zero.create(lambda: {"params": {"w": jnp.ones((4, 8))}})["params"]
    decay = lambda new, old: jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, new, old)

    @zero.jit
    def step(state, x):
        value, grads = zero.value_and_grad(_loss)(state["params"], x)
        new = jax.tree.map(lambda p, g: p - g, state["params"], grads)
        return {"params": new, "ema": decay(new, state["ema"])}, value

    state = {"params": params, "ema": params}
    for _ in range(2):
        state, value = step(state, X)
    np.testing.assert_allclose(value, 4 - 4 / 8)
    np.testing.assert_allclose(state["params"]["w"], 1 - 2 / 8)
    np.testing.assert_allclose(state["ema"]["w"], 1 - 1 / 8 - 1 / 32)


def test_a_train_state_with_one_array_twice():
    zero, tx = _zero(), optax.trace(0.9)
    state = zero.init(lambda: {"w": jnp.ones((4, 8))}, tx)
    state = state.replace(opt_state=state.opt_state._replace(trace=state.params))
    state, _ = zero.train_step(_loss, tx)(state, X)
    assert np.isfinite(state.params["w"]).all()


@pytest.mark.parametrize("rate", [0.25, 1, np.float64(0.25), jnp.float32(0.25), jnp.asarray(0.25), np.asarray(0.25)])
def test_a_learning_rate_set_by_hand_compiles_nothing(rate):
    traced, zero = [], _zero()
    state = zero.init(lambda: {"w": jnp.ones((4, 8))}, TX)
    step = zero.train_step(lambda p, x: _loss(p, x) + 0 * len(traced.append(1) or "a"), TX)
    state, _ = step(state, X)
    before, traces = np.asarray(state.params["w"]), len(traced)
    state.opt_state.hyperparams["learning_rate"] = rate
    state, _ = step(state, X)
    np.testing.assert_allclose(before - state.params["w"], np.float32(rate) / 8, rtol=1e-5)
    state, _ = step(state, X)
    assert len(traced) == traces


def test_a_number_of_another_kind_is_not_cut_short():
    """A rate set to 1 stays floating, so that a later 0.5 is not 0."""
    _, state, step = _started()
    rates = (1, 0.5, 2)
    for rate in rates:
        before = np.asarray(state.params["w"])
        state.opt_state.hyperparams["learning_rate"] = rate
        state, _ = step(state, X)
        np.testing.assert_allclose(before - state.params["w"], rate / 8, rtol=1e-5)
    assert state.opt_state.hyperparams["learning_rate"].dtype == np.float32


def test_an_array_that_is_an_argument_too():
    zero = _zero()
    state = zero.create(lambda: {"params": {"w": jnp.ones((4, 8))}})
    step = zero.jit(lambda state, x, old: (jax.tree.map(lambda a: a + 1, state), old["w"].sum()))
    new, total = step(state, X, state["params"])
    np.testing.assert_allclose(new["params"]["w"], 2)
    assert float(total) == 32


def test_move_of_a_state_that_a_step_took_is_told():
    zero, state, step = _started()
    step(state, X)
    with pytest.raises(zj.StateError, match="move was given a state"):
        zero.move(state, zj.Zero(zero.mesh, 1))
