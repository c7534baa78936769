"""`repr` of a policy, a state and the functions that a policy makes: a few lines, for any state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import zerojax as zj

TX = optax.adam(1e-3)
MODEL = nn.Dense(16)
ARGUMENTS = MODEL.init, TX, jax.random.key(0), jnp.ones((1, 8))
FROZEN = """TrainState, step {}
  params: 2 arrays, 576 bytes{}, 1 of them frozen
  opt_state: 3 arrays, 1.0 KiB{}
  model_state: no arrays"""
HELD = ", 72 bytes on each device", ", 132 bytes on each device"


@pytest.fixture(scope="module")
def zero():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), min_shard=1,
                   precision=zj.Precision(compute="bfloat16"))


def loss_fn(variables, x):
    return MODEL.apply(variables, x).mean()


def test_a_policy_shows_what_is_not_the_default(zero):
    text = ("Zero(mesh of data=8 (cpu), stage=3, precision=Precision(compute='bfloat16'), "
            "min_shard=1)")
    assert repr(zero) == text
    assert repr(zero.train_step(loss_fn, TX, accumulate=2, clip_norm=1.0)) == (
        "TrainStep(loss_fn, accumulate=2, clip_norm=1.0, max_skipped=50): (state, batch) -> "
        f"(state, metrics)\n  {text}")
    evaluate = "EvalStep(loss_fn): (state, batch) -> metrics"
    assert repr(zero.eval_step(loss_fn)) == f"{evaluate}\n  {text}"
    assert repr(zero.jit(loss_fn)) == f"zero.jit(loss_fn)\n  {text}"


def test_a_simulated_mesh():
    zero = zj.Zero(zj.make_mesh(topology="h200:2x8", replica=2), 1, rules={"w": jax.P("data")})
    assert repr(zero) == ("Zero(mesh of replica=2, data=8 (simulated), stage=1, "
                          "replica_axis='replica', rules={'w': P('data',)})")


def test_a_state(zero):
    state = zero.init(*ARGUMENTS, trainable=".*kernel")
    assert repr(state) == FROZEN.format(0, *HELD)
    traced = []
    jax.eval_shape(lambda state: traced.append(repr(state)), state)
    assert traced == [FROZEN.format("?", "", "")]
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert repr(state) == FROZEN.format("?", *HELD)  # deleted
    assert repr(zero.abstract(*ARGUMENTS)).startswith("TrainState, step ?\n  params: 2 arrays")
