"""What the GPU compiler makes of `Zero.whole_matrices`: two all-to-alls, and no product twice."""

import re

import jax
import models
import optax
import pytest
from flax.training.train_state import TrainState

import zerojax as zj
from zerojax.hlo import collectives, schedule
from zerojax.hlo.program import parse
from zerojax.layout import topology
from zerojax.plan import audit, budget

D = optax.contrib.MuonDimensionNumbers
HEADS = {".*/[qkv]/kernel": D(-3, (-2, -1)), ".*/o/kernel": D((-3, -2), -1)}
STEPS = 5  # of Newton-Schulz
N = 8


def newton_schulz(count, m, n):
    """Returns the operations of `count` matrices: x x^T, its square, and their product with x."""
    m, n = min(m, n), max(m, n)
    return count * STEPS * 2 * (2 * m * m * n + m**3)


def updated(shapes, dimensions=None, **settings):
    """Compiles an update of parameters by Muon; returns (large collectives, operations)."""
    mesh = zj.make_mesh(devices=topology.devices("h200:1x8"))
    zero = zj.Zero(mesh)
    tx = zero.whole_matrices(optax.contrib.muon(
        0.1, weight_decay=0.1, muon_weight_dimension_numbers=dimensions, **settings))
    state = zero.abstract(lambda: {name: jax.numpy.ones(s) for name, s in shapes.items()}, tx)

    def update(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    jitted = zero.jit(update, batch_argnums=(), compiler_options=topology.COMPILER_OPTIONS)
    program = parse(jitted.lower(state, state.params).compile().as_text())
    large = [c for c in collectives.of(program) if c.bytes > budget.SMALL // N]
    return large, sum(schedule.total_flops(program).values())


# shapes, dimension numbers, the number of matrices, and m and n of each
STACKS = {
    "a stack that divides": ({"w": (16, 256, 512)}, {"w": D(1, 2)}, 16, 256, 512),
    "one that does not": ({"w": (12, 256, 512)}, {"w": D(1, 2)}, 12, 256, 512),
    "one that a loop does not slice first": ({"w": (256, 16, 512)}, {"w": D(0, 2)}, 16, 256, 512),
    "heads": ({"w": (8, 256, 4, 64)}, {"w": D(1, (2, 3))}, 8, 256, 256),
    "alike": ({f"w_{i}": (512, 256) for i in range(8)}, None, 8, 512, 256),
    "alike, fewer than devices": ({f"w_{i}": (512, 256) for i in range(3)}, None, 3, 512, 256),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("heads", "alike")))
    for name in STACKS])
def test_each_matrix_moves_twice_and_is_multiplied_once(name):
    shapes, dimensions, count, m, n = STACKS[name]
    large, flops = updated(shapes, dimensions)
    each = -(-count // N)
    assert flops == newton_schulz(each, m, n)
    assert [c.kind for c in large] == ["all-to-all"] * 2
    assert all(c.axes({"data": N}) == ("data",) for c in large)
    assert all(audit.MATRICES in c.op_name.split("/") for c in large)
    shard = 4 * each * m * n
    assert [c.wire_bytes for c in large] == [shard * (N - 1) / N] * 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"preconditioning": "aol"}, {"preconditioning": "schatten"}, {"ns_coeffs": "dion"},
    {"consistent_rms": 0.2, "nesterov": False}], ids=str)
def test_muons_settings_move_no_more(settings):
    """They add branches, calls and a loop over coefficients to the products."""
    large, _ = updated({"w": (8, 256, 512)}, {"w": D(1, 2)}, **settings)
    assert [c.kind for c in large] == ["all-to-all"] * 2


def test_a_matrix_unlike_all_others_is_gathered_once():
    large, flops = updated({"w": (512, 256)})
    assert flops == newton_schulz(1, 512, 256)
    assert [(c.kind, c.wire_bytes) for c in large] == [("all-gather", 4 * 512 * 256 * (N - 1) / N)]


CASES = {
    "scanned": (lambda: models.language(models.Transformer(layers=8)), "blocks/.*", HEADS),
    "unrolled": (lambda: models.language(models.Transformer(scanned=False)), None, HEADS),
    "nnx": (models.CASES["nnx"], "blocks/.*", {}),
}
# MiB of whole matrices in float32, with what pads each stack to a multiple of 8
STACKED = {"scanned": 8 * 12, "unrolled": 2 * 8 + 8 + 2 * 8 * 4, "nnx": 2 * 8 * 4}


def planned(case, stage, hosts=None, **settings):
    make, stacked, rules = CASES[case]
    zero = zj.Zero(zj.make_mesh(topology=f"h200:{hosts or 1}x{N // (hosts or 1)}", hosts=hosts),
                   stage, precision=zj.Precision(compute="bfloat16"),
                   secondary="data" if hosts else None)
    dimensions = zj.muon_dimensions(stacked=stacked, rules=rules)
    tx = zero.whole_matrices(optax.contrib.muon(0.02, muon_weight_dimension_numbers=dimensions))
    state = zero.abstract(make().init, tx, *make().example)
    step = zero.train_step(make().loss, tx, **settings)
    return step.plan(state, make().batch(N * settings.get("accumulate", 1)))


@pytest.mark.slow
@pytest.mark.parametrize("case, stage, settings", [
    ("scanned", 3, {"accumulate": 2, "clip_norm": 1.0}), ("scanned", 2, {}), ("scanned", 1, {}),
    ("unrolled", 3, {}), ("nnx", 3, {})])
def test_a_step_sends_zeros_bytes_and_two_all_to_alls(case, stage, settings):
    plan = planned(case, stage, **settings).check()
    assert not any("float32, although" in f.what for f in plan.findings)
    finding, = [f for f in plan.findings if "the optimizer communicates" in f.what]
    moved = 2 * STACKED[case] * 2**20 / N * (N - 1) / N
    assert finding.bytes == sum(t.bytes for t in plan.communication if t.kind == "all-to-all")
    assert finding.bytes == pytest.approx(moved, rel=1e-6)
    assert re.search(r"in \d+ moves between shards and whole matrices", finding.what)
    wide = sum(t.bytes for t in plan.communication if t.dtype == "f32")
    assert wide == pytest.approx(moved, rel=1e-3)  # no gather of float32 parameters
    assert plan.sent - wide < 1.01 * plan.zero_bytes


@pytest.mark.slow
def test_with_two_hops_shards_are_not_permuted():
    plan = planned("scanned", 3, hosts=2).check()
    finding, = [f for f in plan.findings if "the optimizer communicates" in f.what]
    assert "all-to-all" in finding.what and "permute" not in finding.what
    assert finding.bytes == pytest.approx(2 * STACKED["scanned"] * 2**20 / N * (N - 1) / N,
                                          rel=1e-6)


@pytest.mark.slow
def test_a_loop_of_the_users_own_passes():
    make, stacked, rules = CASES["scanned"]
    case, zero = make(), zj.Zero(zj.make_mesh(topology="h200:1x8"), 3,
                                 precision=zj.Precision(compute="bfloat16"))
    dimensions = zj.muon_dimensions(stacked=stacked, rules=rules)
    tx = zero.whole_matrices(optax.contrib.muon(0.02, muon_weight_dimension_numbers=dimensions))

    def create():
        return TrainState.create(apply_fn=None, params=case.init(*case.example)["params"], tx=tx)

    @zero.jit
    def step(state, batch):
        def loss(params, batch):
            return case.loss({"params": params}, batch)

        _, grads = zero.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=grads)

    plan = step.plan(zero.create(create), case.batch(N)).check()
    assert any("whole matrices" in f.what for f in plan.findings)
