"""The collectives of compiled steps are exactly ZeRO's: kinds, bytes, dtypes, axes and counts."""

import itertools

import jax
import pytest
from harness import BY_PARTS, LARGE, Program, Spec, expected, program
from jax.sharding import PartitionSpec as P

from zerojax.hlo.program import parse
from zerojax.layout import placement, rules
from zerojax.layout.rules import Placement
from zerojax.plan import audit, theory
from zerojax.plan.demand import Demand

HLO_NAME = {"bfloat16": "bf16", "float32": "f32"}

DEFAULT = [
    Spec("scanned", 3, "per_device", 4, reduce="float32"),
    Spec("scanned", 2, "global", 4),
    Spec("scanned", 3, "per_device", replicas=2, reduce="float32", topology="h200:2x8"),
    Spec("tied", 3, "global", 4),
    Spec("rnn", 3, "global"),
    Spec("resnet", 3, "global", 4),
    Spec("nnx", 2, "per_device", 4),
]
MORE = [
    Spec("scanned", 1, "per_device", 4),
    Spec("scanned", 3, "own"),
    Spec("rnn", 2, "own"),
    Spec("scanned", 1, "own_sum", 4, reduce="float32"),
    Spec("scanned", 3, "global", replicas=2, topology="h200:2x8", rows=8),
    Spec("unrolled", 1, "per_device", reduce="float32"),
    Spec("rnn", 1, "per_device", 4, replicas=2, topology="h200:2x8"),
    Spec("tied", 3, "own"),
    Spec("scanned", 1, "own"),
]
BOTH = ("global", "per_device")
WAYS = {"resnet": ("global",)}
ALL = [Spec(case, stage, way, a, topology=t)
       for case in ("scanned", "unrolled", "tied", "rnn", "resnet", "nnx")
       for stage, way, a, t in itertools.product((1, 2, 3), WAYS.get(case, BOTH), (1, 4),
                                                 ("h200:1x8", "h200:8x8"))]
SPECS = DEFAULT + [pytest.param(s, marks=pytest.mark.slow) for s in MORE + ALL if s not in DEFAULT]


@pytest.fixture(params=SPECS, ids=str, scope="module")
def compiled(request) -> Program:
    return program(request.param)


def test_bytes_on_the_wire_are_zeros(compiled):
    for kind, bytes in expected(compiled).items():
        if kind == "all-reduce" and compiled.spec.replicas == 1:
            continue
        assert compiled.wire(kind) == pytest.approx(bytes, rel=0.02), kind


def test_the_plans_check_explains_everything(compiled):
    leaves = placement.describe(compiled.params)
    places = [Placement(rules.full(x.sharding.spec, x.ndim), P(*[None] * x.ndim))
              for x in jax.tree.leaves(compiled.params)]
    demand = Demand(compiled.zero, leaves, tuple(places), compiled.spec.accumulate,
                    compiled.spec.way in BY_PARTS)
    assert audit.of(demand, parse(compiled.text), compiled.collectives) == []


def test_gathers_move_the_compute_dtype_and_reductions_the_reduce_dtype(compiled):
    assert {s.dtype for _, s in compiled.large("all-gather")} == {"bf16"}
    reduce = HLO_NAME[compiled.spec.reduce]
    assert {s.dtype for kind in ("reduce-scatter", "all-reduce")
            for _, s in compiled.large(kind)} == {reduce}


def test_each_collective_runs_over_its_axis(compiled):
    assert {c.axes(compiled.mesh) for kind in ("all-gather", "reduce-scatter")
            for c, _ in compiled.large(kind)} == {("data",)}
    over = {c.axes(compiled.mesh) for c, _ in compiled.large("all-reduce")}
    assert over == ({("replica",)} if compiled.spec.replicas > 1 else set())


def test_nothing_but_parameters_is_moved(compiled):
    """Activations would have other sizes; a resharded batch would be integers, or an all-to-all."""
    sizes = {n for x in jax.tree.leaves(compiled.params) for n in (x.size, x.size // x.shape[0])}
    moved = [pair for kind in ("all-gather", "reduce-scatter") for pair in compiled.large(kind)]
    assert [(c.kind, s.dims) for c, s in moved if s.elements not in sizes] == []
    resharding = ("all-to-all", "collective-permute")
    assert [c.name for c in compiled.collectives if c.kind in resharding] == []
    integers = ("s32", "u32")
    assert [c.name for c in compiled.collectives for s in c.shapes
            if s.dtype in integers and s.dims] == []


def test_arguments_are_a_shard_of_the_state(compiled):
    leaves = jax.tree.leaves(compiled.params)
    whole = sum(x.size for x in leaves if x.sharding.is_fully_replicated)
    sharded = sum(x.size for x in leaves) - whole
    devices = compiled.mesh["data"] * compiled.spec.replicas
    state = compiled.memory.argument_size_in_bytes - compiled.batch_bytes / devices - 12 * whole
    assert state == pytest.approx(12 * sharded / compiled.mesh["data"], rel=0.02, abs=LARGE)
    donated = compiled.memory.alias_size_in_bytes
    assert donated >= 0.98 * 12 * sharded / compiled.mesh["data"]


@pytest.mark.slow
@pytest.mark.parametrize("way", BOTH)
def test_stage_0_reduces_whole_gradients(way):
    """Per device, once per step; with one loss, XLA chooses, at most once per microbatch."""
    compiled = program(Spec("scanned", 0, way, 4))
    size = sum(x.size for x in jax.tree.leaves(compiled.params))
    least, most = (theory.wire(0, 4, per_device=per_device).bytes(size, 8)
                   for per_device in (True, way == "per_device"))
    assert 0.98 * least <= compiled.wire("all-reduce") <= 1.02 * most
    assert compiled.large("all-gather") == compiled.large("reduce-scatter") == []


def test_with_replicas_and_one_loss_a_weight_that_a_loop_reads_is_reduced_after_the_loop():
    """It is reduced whole, over all devices: XLA would reduce shards in every iteration."""
    found = program(Spec("rnn", 3, "global", replicas=2, topology="h200:2x8")).collectives
    reductions = [c for c in found if c.kind in ("reduce-scatter", "all-reduce")]
    assert {c.trips for c in reductions if c.bytes > 2**16} == {1}
