"""A padded parameter on the GPU compiler: gathered and reduced as any other, a row more at most; with one loss, reduced whole."""

import jax
import jax.numpy as jnp
import optax
import pytest

import zerojax as zj

TX = optax.adamw(1e-3)
VOCABULARY, WIDTH = 5003, 1021
KEPT = 5008 * WIDTH


def _plan(stage, form, accumulate=1):
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), stage, uneven="pad", precision=zj.Precision(compute="bfloat16"))
    outputs = lambda p, x: jnp.square(jnp.tanh(p["embed"][x]) @ p["head"])
    losses = {"one loss": lambda p, x: outputs(p, x).mean(), "per device": lambda p, x: zj.Loss(outputs(p, x).sum(), x.size)}
    init = lambda: {"embed": jnp.ones((VOCABULARY, WIDTH)), "head": jnp.ones((WIDTH, VOCABULARY))}
    tokens = jax.ShapeDtypeStruct((64 * accumulate, 64), "int32")
    return zero.train_step(losses[form], TX, accumulate=accumulate).plan(zero.abstract(init, TX), tokens)


def _sent(plan, kind):
    return sum(t.bytes for t in plan.communication if t.kind == kind and t.bytes > 2**12)


@pytest.mark.parametrize("stage, accumulate", [(1, 2), (2, 1), (3, 1)])
def test_per_device_it_is_zeros(stage, accumulate):
    plan = _plan(stage, "per device", accumulate).check()
    gathered = {1: 2, 2: 2, 3: 2}[stage] * KEPT  # each is read once, and kept for its gradient
    assert _sent(plan, "all-gather") == pytest.approx(2 * gathered * 7 / 8, rel=0.01)
    assert _sent(plan, "reduce-scatter") == pytest.approx(2 * 2 * KEPT * 7 / 8, rel=0.01)
    assert plan.memory.state == pytest.approx(12 * 2 * KEPT / 8, rel=0.001)


def test_with_one_loss_the_gradient_is_reduced_whole_and_the_plan_says_why():
    plan = _plan(2, "one loss")
    assert plan.memory.state == pytest.approx(12 * 2 * KEPT / 8, rel=0.001)
    with pytest.raises(zj.PlanError, match=r"summed whole, as that of embed is, which is padded \(Zero\(uneven='pad'\)\)"):
        plan.check()
