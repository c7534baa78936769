"""What the proof allows between hosts and within them, and which bytes leave a host."""

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Frame, Shape
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit, provenance
from zerojax.plan.demand import Demand, Use

MESH = AbstractMesh((2, 4), ("host", "data"), (AxisType.Auto,) * 2)
ALL = (tuple(range(8)),)
WITHIN = ((0, 1, 2, 3), (4, 5, 6, 7))
BETWEEN = tuple((i, i + 4) for i in range(4))
UP = Leaf("blocks/up", (1024, 4096), "float32", P(None, None))
HEAD = Leaf("head/kernel", (1024, 2048), "float32", P(None, None))
AXES = ("data", "host")
PLACES = (Placement(P(None, AXES), P(None, None)), Placement(P(None, AXES), P(None, None)))
WIRE = zj.Wire("int8", "int8", block=128)


def demand(per_device=True, **settings):
    zero = zj.Zero(MESH, 3, precision=zj.Precision(compute="bfloat16"), secondary="data",
                   **settings)
    return Demand(zero, (UP, HEAD), PLACES, 1, per_device,
                  uses=(Use(2, 1, again=1), Use(1, 1)))


def moved(kind, dims, groups, dtype="bf16", trips=1):
    frames = (Frame(str(provenance.PAIR), 1, "top"),)
    return Collective(f"{kind}.{dims[-1]}.{groups[0][1]}.{dtype}", kind, (Shape(dtype, dims),),
                      groups, trips, True, "body", "jit(step)/jvp(M)/blocks/up", frames)


def wrong(demand, *found):
    return [f.what for f in audit.communication(demand, found) if f.wrong]


GATHERS = (moved("all-gather", (1024, 1024), BETWEEN), moved("all-gather", (1024, 4096), WITHIN),
           moved("all-gather", (1024, 4096), WITHIN))
REDUCTIONS = (moved("reduce-scatter", (1024, 4096), WITHIN),
              moved("reduce-scatter", (1024, 1024), BETWEEN))


def test_two_hops_are_allowed():
    assert wrong(demand(), *GATHERS, *REDUCTIONS) == []


@pytest.mark.parametrize("more, text", [
    (moved("all-gather", (1024, 1024), BETWEEN), "move 2 times as much as"),
    (moved("all-gather", (1024, 4096), WITHIN), "move 1.5 times as much as"),
    (moved("reduce-scatter", (1024, 1024), BETWEEN), "move 2 times as much as"),
    (moved("all-gather", (1024, 4096), ALL), "moved over ['data', 'host'], not over ['data']"),
    (moved("all-gather", (1024, 1024), WITHIN), "moved over ['data'], not over ['host']"),
    (moved("reduce-scatter", (1024, 4096), ALL), "moved over ['data', 'host'], not over ['data']"),
    (moved("all-to-all", (1024, 4096), WITHIN), "ZeRO moves nothing this way"),
    (moved("all-gather", (1024, 1024), BETWEEN, "f32"), "is gathered as f32, not as bf16")])
def test_more_is_not(more, text):
    found = wrong(demand(), *GATHERS, *REDUCTIONS, more)
    assert len(found) == 1 and text in found[0], found


def test_with_one_loss_the_reduction_takes_one_hop_and_a_permutation():
    one = demand(per_device=False)
    flat = moved("reduce-scatter", (1024, 4096), ALL)
    permuted = moved("collective-permute", (1024, 512), ((1, 4), (4, 1), (0, 0)))
    assert wrong(one, *GATHERS, flat, permuted) == []
    again = wrong(one, *GATHERS, flat, permuted, permuted)
    assert len(again) == 1 and "move 2 times" in again[0]
    assert "moved over ['data'], not over ['data', 'host']" in wrong(one, *GATHERS, *REDUCTIONS)[0]


CODES = (moved("all-gather", (1024, 8, 128), BETWEEN, "s8"),
         moved("all-gather", (1024, 8), BETWEEN, "f32"),
         moved("all-gather", (1024, 32, 128), WITHIN, "s8", 2),
         moved("all-gather", (1024, 32), WITHIN, "f32", 2),
         moved("all-to-all", (1, 1024, 4, 8, 128), WITHIN, "s8"),
         moved("all-to-all", (1, 1024, 4, 8, 1), WITHIN, "f32"),
         moved("all-to-all", (1024, 2, 4, 128), BETWEEN, "s8"),
         moved("all-to-all", (1024, 2, 4), BETWEEN, "f32"))


def test_codes_and_scales_are_allowed_where_the_wire_has_a_format():
    assert wrong(demand(wire=WIRE), *CODES) == []
    assert len(wrong(demand(), *CODES)) >= 4
    head = moved("all-gather", (1024, 2048), WITHIN, "bf16")
    assert wrong(demand(wire=WIRE), *CODES, head) == []


@pytest.mark.parametrize("more, text", [
    (moved("all-gather", (1024, 4096), WITHIN), "is gathered as bf16, not as s8"),
    (moved("all-gather", (1024, 8, 128), BETWEEN, "s8"), "move 2 times"),
    (moved("reduce-scatter", (1024, 4096), WITHIN),
     "moved by reduce-scatter, where ZeRO's kinds are all-gather, all-to-all")])
def test_whole_arrays_are_not_allowed_beside_codes(more, text):
    found = wrong(demand(wire=WIRE), *CODES, more)
    assert len(found) == 1 and text in found[0], found


@pytest.mark.parametrize("kind, groups, share", [
    ("all-gather", ALL, 7 / 8 / 4), ("all-gather", WITHIN, 0), ("all-gather", BETWEEN, 1 / 2),
    ("all-reduce", ALL, 2 * 7 / 8 / 4), ("all-to-all", ALL, 4 / 8), ("all-to-all", BETWEEN, 1 / 2),
    ("collective-permute", ((0, 0), (1, 4), (4, 1), (7, 7)), 1 / 2),
    ("collective-permute", ((0, 1), (1, 0)), 0)])
def test_bytes_that_leave_a_host(kind, groups, share):
    c = moved(kind, (1024, 512), groups, "f32", 3)
    assert c.between(4) == pytest.approx(share * 1024 * 512 * 4 * 3)


def test_a_host_of_all_devices_is_never_left():
    assert moved("all-gather", (8, 8), ALL).between(8) == 0
