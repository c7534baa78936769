"""Programs that move ZeRO's bytes in a way that the compiler chose pass `check`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import muon

import zerojax as zj

BF16 = jnp.bfloat16
WIDTH = 512


class Mlp(nn.Module):
    """Dense layers without a loop: the compiler gathers some of them only in the backward pass."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width, use_bias=False, dtype=BF16)(x))
        return x


class Routed(nn.Module):
    """Layers with a small float32 router each, whose gradients are summed whole, with scalars."""

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            weight = nn.Dense(48, use_bias=False, dtype=jnp.float32)(x.astype(jnp.float32))
            h = nn.gelu(nn.Dense(4 * WIDTH, use_bias=False, dtype=BF16)(x))
            h = nn.Dense(WIDTH, use_bias=False, dtype=BF16)(h)
            x = x + h * nn.softmax(weight)[..., :1].astype(BF16)
        return x


class Gated(nn.Module):
    """Two projections in one parameter, read by one product."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        w = self.param("gating", init, (2, WIDTH, 4 * WIDTH))
        gate, up = jnp.einsum("nd,gdf->gnf", x, w)
        return nn.Dense(WIDTH, use_bias=False, dtype=BF16)(nn.gelu(gate) * up)


class Block(nn.Module):
    """A residual MLP."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(4 * WIDTH, use_bias=False, dtype=BF16)(x))
        return x + nn.Dense(WIDTH, use_bias=False, dtype=BF16)(h)


class Pair(nn.Module):
    """Two rematerialised blocks."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.remat(Block)()(x)
        return x


class Nested(nn.Module):
    """Rematerialised pairs of rematerialised blocks: weights are gathered three times."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.remat(Pair)()(x)
        return x


class Twice(nn.Module):
    """One rematerialised block, applied twice: weights are gathered four times, reduced twice."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block)(name="shared")
        for _ in range(2):
            x = block(x)
        return x


class Normed(nn.Module):
    """Convolutions with batch norms, whose gradients are small arrays in float32."""

    @nn.compact
    def __call__(self, x):
        for width in (64, 128):
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=BF16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=BF16)(x))
        return nn.Dense(10, dtype=BF16)(x.mean((1, 2)))


CASES = {
    "two layers": (Mlp((2048, WIDTH)), 2, True, 1),
    "four layers": (Mlp((2048, WIDTH, 2048, WIDTH)), 1, False, 4),
    "a router": (Routed(), 2, False, 1),
    "a router, microbatches": (Routed(), 3, False, 4),
    "a stacked parameter": (Gated(), 2, False, 1),
    "remat within remat": (Nested(), 3, True, 1),
    "applied twice": (Twice(), 3, True, 1),
    "applied twice, one loss": (Twice(), 2, False, 1),
}
SLOW = {"four layers", "a router", "a router, microbatches", "a stacked parameter",
        "applied twice, one loss"}


def plan(model, stage, summed, accumulate, tx=None):
    """Returns the plan of a step on eight GPUs, for a batch `[rows, WIDTH]`."""
    tx = tx or optax.adamw(1e-3)
    shape = (4096, WIDTH)

    def loss(variables, x):
        squares = jnp.square(model.apply(variables, x)).astype(jnp.float32)
        return zj.Loss(squares.sum(), squares.size) if summed else squares.mean()

    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), stage,
                   precision=zj.Precision(compute="bfloat16"), min_shard=2**15)
    state = zero.abstract(model.init, tx, jax.random.key(0), jnp.zeros((1, *shape[1:]), BF16))
    step = zero.train_step(loss, tx, accumulate=accumulate)
    return step.plan(state, jax.ShapeDtypeStruct(shape, BF16))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_no_alarm(name):
    plan(*CASES[name]).check()


def test_small_statistics_in_float32_beside_small_parameters():
    """Nearly all arrays of a small model are small, if every parameter is sharded."""

    def loss(variables, x):
        out, stats = Normed().apply(variables, x, mutable=["batch_stats"])
        return zj.Loss(jnp.square(out).astype(jnp.float32).sum(), out.size, None, stats)

    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), 3,
                   precision=zj.Precision(compute="bfloat16"), min_shard=1)
    tx, images = optax.sgd(0.1), jax.ShapeDtypeStruct((64, 16, 16, 3), BF16)
    state = zero.abstract(Normed().init, tx, jax.random.key(0), jnp.zeros(images.shape, BF16))
    found = zero.train_step(loss, tx).plan(state, images)
    assert any("reduce-scatter" in c.kind for c in found.reading.collectives)
    found.check()


class Split(nn.Module):
    """Residual layers whose width is split over "model", as is the sequence of activations."""

    mesh: jax.sharding.AbstractMesh

    @nn.compact
    def __call__(self, x):
        def init(*axes):
            return nn.with_partitioning(nn.initializers.lecun_normal(), axes)

        for _ in range(2):
            h = nn.gelu(nn.Dense(512, use_bias=False, kernel_init=init(None, "model"))(x))
            h = nn.Dense(128, use_bias=False, kernel_init=init("model", None))(h)
            places = NamedSharding(self.mesh, P(P.UNCONSTRAINED, "model"))
            x = x + jax.lax.with_sharding_constraint(h, places)
        return x


def test_tensor_and_sequence_parallelism():
    """XLA gathers shards as a stack, and permutes it."""
    gpu = zj.make_mesh(topology="h200:1x8").abstract_device
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2,
                                     abstract_device=gpu)
    zero = zj.Zero(mesh, 3, axis="data", min_shard=1)

    def loss(variables, x):
        out = Split(mesh).apply(variables, x)
        return zj.Loss(jnp.square(out).sum(), out.size)

    tx, x = optax.sgd(0.1), jax.ShapeDtypeStruct((16, 64, 128), jnp.float32)
    state = zero.abstract(Split(mesh).init, tx, jax.random.key(0), jnp.zeros(x.shape))
    found = zero.train_step(loss, tx).plan(state, x).check()
    assert any(c.kind == "all-gather" and s.dims != (256, 128) and s.elements == 256 * 128
               for c in found.reading.collectives for s in c.shapes)


def test_what_moves_more_often_than_the_formula_is_reported():
    found = plan(Twice(), 3, True, 1)
    finding, = [f for f in found.findings if "more often than ZeRO's formula" in f.what]
    assert not finding.wrong and "gathered 4 and reduced 2 times per step" in finding.what
    assert found.sent / found.zero_bytes == pytest.approx(2, rel=0.02)


def test_the_formula_of_a_function_without_gradients_has_none():
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), 3,
                   precision=zj.Precision(compute="bfloat16"), min_shard=2**15)
    model, x = Mlp((2048, WIDTH)), jax.ShapeDtypeStruct((4096, WIDTH), BF16)
    state = zero.abstract(model.init, optax.sgd(0.1), jax.random.key(0), jnp.zeros(x.shape, BF16))
    apply = zero.gathered(lambda params, x: model.apply({"params": params}, x))
    found = zero.jit(lambda state, x: apply(state.params, x)).plan(state, x).check()
    assert found.sent == pytest.approx(found.zero_bytes, rel=0.01)
    assert found.memory.zero["gradients"] is None
    trained = plan(model, 3, True, 1)
    assert trained.zero_bytes > 2 * found.zero_bytes and trained.memory.zero["gradients"]


def test_an_optimizer_that_communicates_is_reported():
    """Muon orthogonalises whole matrices, of which each device holds a shard."""
    found = plan(Mlp((2048, WIDTH)), 3, True, 1, tx=muon(1e-3)).check()
    finding, = [f for f in found.findings if "the optimizer communicates" in f.what]
    assert finding.bytes > 0.1 * found.zero_bytes


def test_a_loop_of_the_users_own_that_calls_its_model_twice_passes():
    """Two functions gather the same parameters: an actor, and the teacher it is compared with."""
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), 3,
                   precision=zj.Precision(compute="bfloat16"), min_shard=2**15)
    model, tx = Mlp((2048, WIDTH)), optax.sgd(0.1)
    state = zero.abstract(model.init, tx, jax.random.key(0), jnp.zeros((1, WIDTH), BF16))

    @zero.jit
    def step(state, x):
        def loss(params, x, sign):
            squares = jnp.square(model.apply({"params": params}, sign * x)).astype(jnp.float32)
            return zj.Loss(squares.sum(), squares.size)

        value, grads = 0.0, None
        for sign in (-1, 1):
            one, new = zero.value_and_grad(loss)(state.params, x, sign)
            value += one
            grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates),
                             opt_state=opt_state), value

    found = step.plan(state, jax.ShapeDtypeStruct((4096, WIDTH), BF16)).check()
    assert any("reduced 2 times per step" in f.what for f in found.findings)
