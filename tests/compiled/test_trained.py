"""Frozen parameters and large model state on the GPU compiler: gathered by stage, never reduced."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import quick
from flax import nnx

import zerojax as zj

TX = optax.adamw(1e-3)
KEY = jax.random.key(0)
WIDTH, RANK, LAYERS = 1024, 64, 4
X = jax.ShapeDtypeStruct((512, WIDTH), "bfloat16")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(WIDTH, use_bias=False, name="base", dtype=x.dtype, param_dtype="bfloat16")(x)
        a = self.param("lora_a", nn.initializers.normal(), (WIDTH, RANK)).astype(x.dtype)
        b = self.param("lora_b", nn.initializers.normal(), (RANK, WIDTH)).astype(x.dtype)
        return jnp.tanh(y + x @ a @ b), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Layer, policy=zj.remat.regather())
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                         length=LAYERS)
        return layers()(x, None)[0]


class Fixed(nnx.Module):
    """A layer after a large matrix that is not a parameter."""

    def __init__(self, rngs):
        self.table = nnx.Cache(jax.random.normal(KEY, (WIDTH, WIDTH)))
        self.layer = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.layer(jnp.tanh(x @ self.table[...].astype(x.dtype)))


def _zero(stage, **settings):
    return zj.Zero(zj.make_mesh(topology="h200:1x8"), stage, min_shard=2**14,
                   precision=zj.Precision(compute="bfloat16"), **settings)


def _mean(apply):
    return lambda model, x: jnp.square(apply(model, x).astype(jnp.float32)).mean()


def _sum(apply):
    return lambda model, x: zj.Loss(jnp.square(apply(model, x).astype(jnp.float32)).sum(),
                                    x.shape[0])


FORMS = {"one loss": _mean, "per device": _sum}


def _init():
    return Stack().init(KEY, jnp.ones((8, WIDTH), "bfloat16"))


def _lora(stage, form, accumulate=1):
    zero = _zero(stage)
    state = zero.abstract(_init, TX, trainable=".*lora_.")
    return zero.train_step(FORMS[form](Stack().apply), TX, accumulate=accumulate).plan(state, X)


def _sent(plan, kind):
    return sum(t.bytes for t in plan.communication if t.kind == kind and t.bytes > 2**12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage, accumulate", quick.some([(1, 1), (2, 4), (3, 1)], (2, 4).__ne__))
def test_nothing_of_a_frozen_leaf_is_reduced(stage, accumulate, form):
    plan = _lora(stage, form, accumulate).check()
    base, lora = LAYERS * WIDTH**2, LAYERS * 2 * WIDTH * RANK
    gathers = 1 if stage < 3 else 2
    reductions = 1 if stage == 1 and form == "per device" else accumulate
    assert _sent(plan, "all-gather") == pytest.approx(gathers * 2 * (base + lora) * 7 / 8, rel=0.02)
    assert _sent(plan, "reduce-scatter") == pytest.approx(reductions * 2 * lora * 7 / 8, rel=0.02)
    assert plan.zero_bytes == pytest.approx(plan.sent, rel=0.02)
    assert plan.memory.state == pytest.approx((2 * base + 12 * lora) / 8, rel=0.02)
    assert plan.memory.zero["parameters"] == pytest.approx((2 * base + 4 * lora) / 8)


def _labels(params):
    return jax.tree.map_with_path(lambda path, _: "lora" if "lora" in str(path) else "base", params)


@pytest.mark.parametrize("stage, accumulate, form", [
    pytest.param(2, 1, "per device", marks=pytest.mark.slow), (2, 4, "one loss"),
    (1, 4, "per device")])
def test_no_gradient_is_reduced_that_the_optimizer_never_uses(stage, accumulate, form):
    """No norm contains their gradients, so XLA removes them."""
    zero = _zero(stage)
    tx = optax.multi_transform({"lora": TX, "base": optax.set_to_zero()}, _labels)
    step = zero.train_step(FORMS[form](Stack().apply), tx, accumulate=accumulate, clip_norm=1.0)
    plan = step.plan(zero.abstract(_init, tx), X).check()
    reductions = 1 if stage == 1 else accumulate
    lora = LAYERS * 2 * WIDTH * RANK
    assert _sent(plan, "reduce-scatter") == pytest.approx(reductions * 2 * lora * 7 / 8, rel=0.02)


def test_a_plan_names_a_frozen_leaf_that_is_reduced():
    """The step differentiates with respect to frozen parameters too."""
    zero = _zero(2)
    state = zero.abstract(_init, TX, trainable=".*lora_.")

    def loss(params, x):
        return _mean(Stack().apply)({"params": params}, x)

    def step(state, x):
        _, grads = zero.value_and_grad(loss)(state.params, x)
        return state, grads

    text = r"base/kernel is frozen, but a gradient of it is reduced"
    with pytest.raises(zj.PlanError, match=text):
        zero.plan(zero.jit(step), state, X).check()


@pytest.mark.parametrize("form", FORMS)
def test_large_state_is_sharded_and_gathered(form):
    zero = _zero(3, gradients=None if form == "one loss" else "per_device")
    state = zero.abstract(lambda: Fixed(nnx.Rngs(0)), TX)
    plan = zero.train_step(FORMS[form](lambda m, x: m(x)), TX).plan(state, X).check()
    assert plan.memory.kinds["model state"] == pytest.approx(4 * WIDTH**2 / 8, rel=0.01)
    table, layer = 2 * WIDTH**2, 2 * WIDTH**2  # bfloat16; the table is cast before
    assert _sent(plan, "all-gather") == pytest.approx((table + layer) * 7 / 8, rel=0.02)
    assert _sent(plan, "reduce-scatter") == pytest.approx(2 * WIDTH**2 * 7 / 8, rel=0.02)


def test_arrays_that_the_loss_closes_over_are_reported_and_counted():
    zero, teacher = _zero(3), jax.random.normal(KEY, (2 * WIDTH, WIDTH))
    state = zero.abstract(lambda: {"w": jnp.ones((WIDTH, WIDTH))}, TX)

    def loss(params, x):
        return jnp.square(x @ params["w"] - x @ teacher.T @ teacher).mean()

    plan = zero.train_step(loss, TX).plan(state, X)
    assert plan.memory.kinds["constants"] >= teacher.nbytes
    assert plan.memory.peak >= sum(plan.figures[k] for k in ("argument", "temp")) + teacher.nbytes
    text = "MiB of constants are part of the program, the largest f32["
    assert any(text in str(finding) for finding in plan.findings)
    wide = [str(finding) for finding in plan.findings if "products are in float32" in str(finding)]
    assert len(wide) == 1 and "Give the layers dtype='bfloat16'" in wide[0]


class Counted(nnx.Module):
    """A layer with a large table that changes with every batch."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros((4 * WIDTH, WIDTH)))

    def __call__(self, x):
        self.seen[...] = 0.9 * self.seen[...] + 0.1
        return self.layer(x)


def test_large_state_that_changes_stays_in_shards():
    zero = _zero(3)
    state = zero.abstract(lambda: Counted(nnx.Rngs(0)), TX)
    plan = zero.train_step(_mean(lambda m, x: m(x)), TX, accumulate=4).plan(state, X)
    table = 4 * 4 * WIDTH**2
    assert plan.memory.kinds["model state"] == pytest.approx(table / 8, rel=0.01)
    assert plan.figures["temp"] < table  # never whole
