"""What ZeRO explains, one collective at a time."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Frame, Shape
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit, provenance
from zerojax.plan.demand import Demand

MESH = AbstractMesh((2, 4, 2), ("replica", "data", "model"), (AxisType.Auto,) * 3)
DATA = tuple(tuple(r * 8 + d * 2 + m for d in range(4)) for r in range(2) for m in range(2))
REPLICA = tuple((i, i + 8) for i in range(8))
BATCH = tuple(tuple(r * 8 + d * 2 + m for r in range(2) for d in range(4)) for m in range(2))
MODEL = tuple((i, i + 1) for i in range(0, 16, 2))
NESTED = Leaf("nested", (5, 6, 96, 128), "float32", P(*[None] * 4))
UP, ODD = Leaf("blocks/up", (6, 1024, 4096), "float32", P(None, None, "model")), Leaf("odd", (333, 777), "float32", P(None, None))
LEAVES = (NESTED, UP, ODD)
PLACES = (Placement(P(None, None, "data", None), P(*[None] * 4)), Placement(P(None, "data", "model"), P(None, None, "model")),
          Placement(P(None, None), P(None, None), "indivisible"))


def demand(stage=3, accumulate=1, per_device=True, **policy):
    zero = zj.Zero(MESH, stage, precision=zj.Precision(compute="bfloat16", reduce="float32"), **policy)
    return Demand(zero, LEAVES, PLACES, accumulate, per_device)


PAIR = Frame(str(provenance.PAIR), 1, "top")


def moved(kind, dims, groups=DATA, dtype="bf16", trips=6, backward=False, ours=True, name=None):
    path = "jit(step)/transpose(jvp(M))/blocks/up" if backward else "jit(step)/jvp(M)/blocks/up"
    return Collective(name or kind, kind, (Shape(dtype, dims),), groups, trips, True, "body", path, (PAIR,) if ours else ())


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
    "gathered over the copies too": ([moved("all-gather", LAYER, BATCH)], r"over \['data', 'replica'\], not over \['data'\]"),
    "in groups that are no axis": ([moved("all-gather", LAYER, ((0, 3), (1, 2)))], "other groups"),
    "an all-to-all": ([moved("all-to-all", LAYER)], "moves nothing this way"),
    "a permutation": ([moved("collective-permute", LAYER)], "moves nothing this way"),
    "an activation gathered": ([moved("all-gather", (64, 512, 1024))], "no parameter has this shape"),
    "an activation summed": ([moved("all-reduce", (64, 512, 1024), BATCH)], "as in tensor parallelism"),
    "a gradient summed whole": ([moved("all-reduce", LAYER, BATCH, "f32")], "reduce-scatter would leave each its shard"),
    "whole gradients over the copies": ([moved("all-reduce", (6, *LAYER), REPLICA, "f32")], "only shards"),
    "in each of 100 turns": ([moved("all-gather", LAYER, trips=600)], "50 times as much as in stage 3"),
    "by the optimizer": ([dataclasses.replace(moved("all-reduce", LAYER, DATA, "f32", ours=False), op_name="jit(step)/muon/dot")],
                         "the optimizer"),
    "a gradient of another dtype": ([moved("all-reduce", LAYER, BATCH, "f32", backward=True)], "give its layers that dtype"),
    "small, in a long loop": ([moved("all-reduce", (128, 128), BATCH, trips=100_000)], "100000 x"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_zero_explains(name):
    assert audit.collectives_of(demand(), RIGHT[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_zero_does_not_explain(name):
    found, why = WRONG[name]
    finding, = audit.collectives_of(demand(), found)
    assert finding.wrong and finding.instruction == found[0].name
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(str(finding))


@pytest.mark.parametrize("stage, accumulate, found, right", [
    (1, 4, [moved("all-gather", LAYER)], True),
    (1, 4, [moved("all-gather", LAYER, trips=24)], False),
    (2, 4, [moved("all-gather", LAYER, backward=True, ours=False)], False),
    (1, 4, [moved("reduce-scatter", LAYER, dtype="f32", trips=24)], False),
    (2, 4, [moved("reduce-scatter", LAYER, dtype="f32", trips=24)], True),
    (3, 4, [moved("all-gather", LAYER, trips=24), moved("all-gather", LAYER, trips=24, backward=True)], True),
    (3, 1, [moved("all-gather", LAYER, trips=12)], True),  # a pipelined loop joins both passes
    (3, 1, [moved("all-gather", LAYER, trips=18)], False),
    (3, 1, [moved("all-gather", LAYER), moved("all-gather", LAYER, name="foreign", ours=False)], False),
])
def test_as_often_as_the_stage_says(stage, accumulate, found, right):
    assert (audit.collectives_of(demand(stage, accumulate), found) == []) is right


def test_of_two_of_a_shape_the_foreign_one_is_named():
    found = [moved("all-gather", LAYER), moved("all-gather", LAYER, trips=1, name="foreign", ours=False)]
    finding, = audit.collectives_of(demand(), found)
    assert ", 1 x," in finding.what


def test_the_total_is_shards_copies_and_leaves_left_whole():
    size, whole = 6 * 1024 * 2048 + 5 * 6 * 96 * 128, 333 * 777
    sent = size * (2 * 2 + 4) * 3 / 4 + 2 * 1 / 2 * size / 4 * 4 + 2 * whole * 4 * 7 / 8
    assert demand().total == pytest.approx(sent)
