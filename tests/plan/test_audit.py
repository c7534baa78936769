"""What ZeRO explains, one collective at a time."""

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Frame, Shape, parse
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit, provenance
from zerojax.plan.demand import Demand, Use

MESH = AbstractMesh((2, 4, 2), ("replica", "data", "model"), (AxisType.Auto,) * 3)
DATA = tuple(tuple(r * 8 + d * 2 + m for d in range(4)) for r in range(2) for m in range(2))
REPLICA = tuple((i, i + 8) for i in range(8))
BATCH = tuple(tuple(r * 8 + d * 2 + m for r in range(2) for d in range(4)) for m in range(2))
MODEL = tuple((i, i + 1) for i in range(0, 16, 2))
NESTED = Leaf("nested", (5, 6, 96, 128), "float32", P(*[None] * 4))
UP = Leaf("blocks/up", (6, 1024, 4096), "float32", P(None, None, "model"))
ODD = Leaf("odd", (333, 777), "float32", P(None, None))
LEAVES = (NESTED, UP, ODD)
PLACES = (Placement(P(None, None, "data", None), P(*[None] * 4)),
          Placement(P(None, "data", "model"), P(None, None, "model")),
          Placement(P(None, None), P(None, None), "indivisible"))


ONCE, AGAIN = Use(1, 1), Use(2, 1)  # read once; and gathered again in the backward pass


def demand(stage=3, accumulate=1, per_device=True, uses=(AGAIN, AGAIN, ONCE), **policy):
    precision = zj.Precision(compute="bfloat16", reduce="float32")
    zero = zj.Zero(MESH, stage, precision=precision, **policy)
    return Demand(zero, LEAVES, PLACES, accumulate, per_device, uses=uses)


def moved(kind, dims, groups=DATA, dtype="bf16", trips=6, backward=False, ours=True, name=None,
          path="jit(step)/jvp(M)/blocks/up"):
    path = "jit(step)/transpose(jvp(M))/blocks/up" if backward else path
    frames = (Frame(str(provenance.PAIR), 1, "top"),) if ours else ()
    return Collective(name or kind, kind, (Shape(dtype, dims),), groups, trips, True, "body",
                      path, frames)


OPTIMIZER = "jit(step)/zerojax_optimizer/dot"
LAYER = (1024, 2048)  # of 4096, half on each device of "model"
RIGHT = {
    "a layer gathered": [moved("all-gather", LAYER)],
    "and again backward": [moved("all-gather", LAYER), moved("all-gather", LAYER, backward=True)],
    "in another layout": [moved("all-gather", (2048, 1, 16, 64))],
    "the whole stack": [moved("all-gather", (6, *LAYER), trips=1)],
    "reduced": [moved("reduce-scatter", LAYER, dtype="f32")],
    "reduced in less than asked": [moved("reduce-scatter", LAYER, dtype="bf16")],
    "shards over the copies": [moved("all-reduce", (256, 2048), REPLICA, "f32")],
    "a layer of a stack of stacks": [moved("all-gather", (96, 128), trips=30)],
    "a leaf left whole": [moved("all-reduce", (333 * 777,), BATCH, "f32", 1)],
    "of the model's own axis": [moved("all-reduce", (64, 512, 4096), MODEL, "bf16", 100)],
    "norms and losses": [moved("all-reduce", (17,), BATCH, "f32", 1)],
}
WRONG = {
    "fp32 gathered": ([moved("all-gather", LAYER, dtype="f32")], "gathered as f32, not as bf16"),
    "fp64 reduced": ([moved("reduce-scatter", LAYER, dtype="f64")], "reduced as f64, not as f32"),
    "gathered over the copies too": ([moved("all-gather", LAYER, BATCH)],
                                     r"over \['data', 'replica'\], not over \['data'\]"),
    "in groups that are no axis": ([moved("all-gather", LAYER, ((0, 3), (1, 2)))], "other groups"),
    "an all-to-all": ([moved("all-to-all", LAYER)], "moves nothing this way"),
    "a permutation": ([moved("collective-permute", LAYER)], "moves nothing this way"),
    "an activation gathered": ([moved("all-gather", (64, 512, 1024))],
                               "no parameter has this shape"),
    "an activation summed": ([moved("all-reduce", (64, 512, 1024), BATCH)],
                             "as in tensor parallelism"),
    "a gradient summed whole": ([moved("all-reduce", LAYER, BATCH, "f32")],
                                "reduce-scatter would leave each its shard"),
    "whole gradients over the copies": ([moved("all-reduce", (6, *LAYER), REPLICA, "f32")],
                                        "only shards"),
    "in each of 100 turns": ([moved("all-gather", LAYER, trips=600)],
                             "50 times as much as in stage 3"),
    "outside of the loss": (
        [moved("all-reduce", LAYER, DATA, "f32", ours=False, path="jit(step)/muon/dot")],
        "something else in the step communicates"),
    "a whole gradient, under the optimizer's name": (
        [moved("all-reduce", LAYER, DATA, "f32", ours=False, path=OPTIMIZER)],
        "something else in the step"),
    "a ragged all-to-all": ([moved("ragged-all-to-all", LAYER)], "moves nothing this way"),
    "a broadcast": ([moved("collective-broadcast", LAYER)], "moves nothing this way"),
    "many small arrays": ([moved("all-reduce", (96, 128), BATCH, trips=6000)], "6000 x"),
    "a gradient of another dtype": ([moved("all-reduce", LAYER, BATCH, "f32", backward=True)],
                                    "give its layers that dtype"),
    "small, in a long loop": ([moved("all-reduce", (128, 128), BATCH, trips=100_000)], "100000 x"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_zero_explains(name):
    assert audit.communication(demand(), RIGHT[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_zero_does_not_explain(name):
    found, why = WRONG[name]
    finding, = audit.communication(demand(), found)
    assert finding.wrong and finding.instruction == found[0].name
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(str(finding))


@pytest.mark.parametrize("stage, accumulate, found, right", [
    (1, 4, [moved("all-gather", LAYER)], True),
    (1, 4, [moved("all-gather", LAYER, trips=24)], False),
    # the compiler gathers late
    (2, 4, [moved("all-gather", LAYER, backward=True, ours=False)], True),
    (1, 4, [moved("reduce-scatter", LAYER, dtype="f32", trips=24)], False),
    (2, 4, [moved("reduce-scatter", LAYER, dtype="f32", trips=24)], True),
    (3, 4, [moved("all-gather", LAYER, trips=24),
            moved("all-gather", LAYER, trips=24, backward=True)], True),
    (3, 1, [moved("all-gather", LAYER, trips=12)], True),  # a pipelined loop joins both passes
    (3, 1, [moved("all-gather", LAYER, trips=18)], False),
    (3, 1, [moved("all-gather", LAYER, trips=12), moved("all-gather", LAYER, ours=False)], False),
])
def test_as_often_as_the_stage_says(stage, accumulate, found, right):
    assert (audit.communication(demand(stage, accumulate), found) == []) is right


def test_of_two_of_a_shape_the_foreign_one_is_named():
    found = [moved("all-gather", LAYER),
             moved("all-gather", LAYER, trips=1, name="foreign", ours=False)]
    finding, = audit.communication(demand(uses=(ONCE, ONCE, ONCE)), found)
    assert ", 1 x," in finding.what


@pytest.mark.parametrize("uses, found, right", [
    (Use(1, 1), [moved("all-gather", LAYER), moved("all-gather", LAYER, ours=False)], False),
    (Use(3, 1), [moved("all-gather", LAYER, trips=18)], True),  # remat within remat
    # applied twice
    (Use(4, 2), [moved("all-gather", LAYER, trips=24),
                 moved("reduce-scatter", LAYER, trips=12)], True),
    (Use(2, 1), [moved("all-gather", LAYER, trips=12),
                 moved("reduce-scatter", LAYER, trips=12)], False),
    # never updated
    (Use(2, 0), [moved("all-gather", LAYER, trips=12), moved("reduce-scatter", LAYER)], False),
])
def test_as_often_as_the_program_reads(uses, found, right):
    assert (audit.communication(demand(uses=(AGAIN, uses, ONCE)), found) == []) is right


def test_where_the_program_is_not_known_the_formula_is_the_budget():
    twice = [moved("all-gather", LAYER, trips=12)]
    assert audit.communication(demand(uses=None), twice) == []
    more = [*twice, moved("all-gather", LAYER, trips=1)]
    assert audit.communication(demand(uses=None), more) != []


def test_an_optimizer_that_communicates_is_explained_once_gradients_are_scattered():
    """Muon multiplies matrices that are sharded."""
    muon = moved("all-reduce", LAYER, DATA, "f32", ours=False, path=OPTIMIZER)
    scattered = moved("reduce-scatter", LAYER, dtype="f32")
    finding, = audit.communication(demand(), [scattered, muon])
    assert not finding.wrong and finding.bytes == muon.wire_bytes
    assert "the optimizer communicates" in finding.what


def test_a_thousandth_of_zeros_bytes_is_reported_and_is_no_fault():
    once = moved("all-to-all", (260, 128), trips=1)
    assert 0.0005 < once.wire_bytes / demand().total < 0.001
    for trips, wrong in ((1, False), (2, True)):
        finding, = audit.communication(demand(), [moved("all-to-all", (260, 128), trips=trips)])
        assert finding.wrong is wrong


def test_scalars_that_the_compiler_joins_to_whole_gradients_are_no_excess():
    joined = moved("all-reduce", (333 * 777 + 3,), BATCH, "f32", 1)
    assert audit.communication(demand(), [joined]) == []


def _program(text=""):
    return parse("HloModule m, num_partitions=16\n\nENTRY %main (p: f32[]) -> f32[] {\n" + text
                 + "\n  ROOT %p = f32[] parameter(0)\n}\n")


def test_a_sharded_parameter_that_nothing_gathers_is_a_finding():
    """XLA computes with shards then: tensor parallelism, whose sums may be too small to be
    noticed."""
    both = [moved("all-gather", (96, 128), trips=30), moved("all-gather", LAYER)]
    assert list(audit.missing(demand(), _program(), both)) == []
    finding, = audit.missing(demand(), _program(), both[:1])
    assert finding.wrong and "blocks/up" in finding.what and "0 of 1 whole copies" in finding.what
    finding, = audit.missing(demand(), _program(), [both[0], moved("all-gather", LAYER, trips=3)])
    assert "0.5 of 1 whole copies" in finding.what
    unread = (AGAIN, Use(0, 0), ONCE)
    assert list(audit.missing(demand(uses=unread), _program(), both[:1])) == []


GATHERED = [moved("all-gather", (96, 128), trips=30), moved("all-gather", LAYER)]
UNREADABLE = {
    "a line": ("  %x = some new syntax", "could not be read, the first: '%x = some new syntax'"),
    "a dtype": ("  %x = f2e1[8]{0} copy(%p)", "x has the dtype f2e1, whose size is not known"),
    "an operation": ("  %x = f32[8]{0} all-shuffle(%p), replica_groups={{0,1}}",
                     r"x \(all-shuffle\) names groups"),
    "a channel": ("  %x = f32[8]{0} send(%p), channel_id=3", r"x \(send\) names groups"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_understood_is_a_finding(name):
    line, why = UNREADABLE[name]
    assert audit.of(demand(), _program(), GATHERED) == []
    finding, = audit.of(demand(), _program(line), GATHERED)
    assert finding.wrong
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(str(finding))


def test_a_combined_instruction_names_its_first_module():
    long = "/".join(f"layer_{i}" for i in range(30))
    assert audit._module(f"jit(step)/jvp(M)/({long}/dot:other/dot)") == f"{long}/dot"


def test_the_total_is_shards_copies_and_leaves_left_whole():
    size, whole = 6 * 1024 * 2048 + 5 * 6 * 96 * 128, 333 * 777
    sent = size * (2 * 2 + 4) * 3 / 4 + 2 * 1 / 2 * size / 4 * 4 + 2 * whole * 4 * 7 / 8
    assert demand().total == pytest.approx(sent)
