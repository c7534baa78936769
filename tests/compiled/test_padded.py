"""Padded parameters on the GPU compiler: gathered and reduced like others, plus some padding.

With one loss, their gradients are reduced whole.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
import quick

import zerojax as zj

TX = optax.adamw(1e-3)
VOCABULARY, WIDTH = 5003, 1021
KEPT = 5008 * WIDTH


def _init():
    return {"embed": jnp.ones((VOCABULARY, WIDTH)), "head": jnp.ones((WIDTH, VOCABULARY))}


def _outputs(params, tokens):
    return jnp.square(jnp.tanh(params["embed"][tokens]) @ params["head"])


LOSSES = {"one loss": lambda params, tokens: _outputs(params, tokens).mean(),
          "per device": lambda params, tokens: zj.Loss(_outputs(params, tokens).sum(), tokens.size)}


def _plan(stage, form, accumulate=1):
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), stage, uneven="pad",
                   precision=zj.Precision(compute="bfloat16"))
    tokens = jax.ShapeDtypeStruct((64 * accumulate, 64), "int32")
    step = zero.train_step(LOSSES[form], TX, accumulate=accumulate)
    return step.plan(zero.abstract(_init, TX), tokens)


def _sent(plan, kind):
    return sum(t.bytes for t in plan.communication if t.kind == kind and t.bytes > 2**12)


@pytest.mark.parametrize("stage, accumulate", quick.some(
    [(1, 2), (2, 1), (3, 1)], (2, 1).__ne__))
def test_per_device_the_communication_is_zeros(stage, accumulate):
    plan = _plan(stage, "per device", accumulate).check()
    gathered = {1: 2, 2: 2, 3: 2}[stage] * KEPT  # each is read once, and kept for its gradient
    assert _sent(plan, "all-gather") == pytest.approx(2 * gathered * 7 / 8, rel=0.01)
    assert _sent(plan, "reduce-scatter") == pytest.approx(2 * 2 * KEPT * 7 / 8, rel=0.01)
    assert plan.memory.state == pytest.approx(12 * 2 * KEPT / 8, rel=0.001)


def test_with_one_loss_the_gradient_is_reduced_whole_and_the_plan_says_why():
    plan = _plan(2, "one loss")
    assert plan.memory.state == pytest.approx(12 * 2 * KEPT / 8, rel=0.001)
    text = r"summed whole, for example that of embed, which is padded \(Zero\(uneven='pad'\)\)"
    with pytest.raises(zj.PlanError, match=text):
        plan.check()
