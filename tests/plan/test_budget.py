"""How often a parameter moves at most, in a step of each stage."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P
from moves import AGAIN, BATCH, LAYER, LEAVES, MESH, ODD, ONCE, PLACES, REPLICA, demand, moved

import zerojax as zj
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit
from zerojax.plan.demand import Demand, Use


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
    (3, 100, [moved("all-gather", LAYER, trips=1212)], True),  # 1 % more
    (3, 100, [moved("all-gather", LAYER, trips=1236)], False),
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


def test_statistics_beyond_a_budget_leave_it_to_whole_gradients():
    """They are few bytes; the gradients that share their budget, joined with scalars, are right."""
    gradients = moved("all-reduce", (333 * 777 + 17,), BATCH, "f32", 1, ours=False)
    statistics = [moved("all-reduce", (100, 100), BATCH, "f32", 1, ours=False) for _ in range(5)]
    assert 1.02 * demand().summed < 333 * 777 + 5 * 100 * 100
    assert audit.communication(demand(), [*statistics, gradients]) == []
    activations = moved("all-reduce", (333 * 770,), BATCH, "f32", 2, name="activations", ours=False)
    finding, = audit.communication(demand(), [*statistics, gradients, activations])
    assert finding.wrong and finding.instruction == "activations"


BIASES = [Leaf(f"bias{n}", (16_000,), "float32", P(None)) for n in range(100)]
MANY = dataclasses.replace(demand(), leaves=(*LEAVES, *BIASES), uses=None,
                           places=(*PLACES, *[Placement(P(None), P(None))] * 100))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("elements", [150_000, 320_000])
def test_large_activations_do_not_use_the_budget_of_small_gradients(elements, ours):
    gradients = [moved("all-reduce", leaf.shape, BATCH, "f32", 1, name=leaf.path, ours=ours)
                 for leaf in (ODD, *BIASES)]
    foreign = moved("all-reduce", (elements,), BATCH, "f32", 1, name="foreign", ours=False)
    assert audit.communication(MANY, gradients) == []
    finding, = audit.communication(MANY, [*gradients, foreign])
    assert finding.wrong and finding.instruction == "foreign"


def test_statistics_are_right_where_they_fit_beside_what_is_left():
    statistics = [moved("all-reduce", (100, 100), BATCH, "f32", 1, ours=False) for _ in range(15)]
    assert sum(c.wire_bytes for c in statistics) > 0.01 * MANY.total
    right = [*statistics, moved("all-reduce", ODD.shape, BATCH, "f32", 1, ours=False)]
    foreign = moved("all-reduce", (1_700_000,), BATCH, "f32", 1, name="foreign", ours=False)
    assert audit.communication(MANY, right) == []
    finding, = audit.communication(MANY, [*right, foreign])
    assert finding.wrong and finding.instruction == "foreign"


def test_where_the_program_is_not_known_the_formula_is_the_budget():
    twice = [moved("all-gather", LAYER, trips=12)]
    assert audit.communication(demand(uses=None), twice) == []
    more = [*twice, moved("all-gather", LAYER, trips=1)]
    assert audit.communication(demand(uses=None), more) != []


def test_too_many_gathers_are_named_by_those_of_the_longest_loop():
    found = [moved("all-gather", LAYER, trips=n, ours=False, name=f"of {n}") for n in (12, 6, 1)]
    finding, = audit.communication(demand(), found)
    assert finding.instruction == "of 12"


def test_whole_gradients_share_one_budget():
    """One of the whole leaves has the shape of a layer that is sharded."""
    leaf = Leaf("head", (1024, 4096), "float32", P(None, "model"))
    whole = Placement(P(None, "model"), P(None, "model"), "rule")
    many = dataclasses.replace(demand(), leaves=(*LEAVES, leaf), places=(*PLACES, whole),
                               uses=None)
    mine = moved("all-reduce", LAYER, BATCH, "f32", 1)
    odd = moved("all-reduce", (333, 777), BATCH, "f32", 1)
    assert audit.communication(many, [mine, odd]) == []
    more = dataclasses.replace(mine, trips=2)
    finding, = audit.communication(many, [more, odd])
    assert finding.wrong and finding.instruction == "all-reduce"
    # with one loss, XLA reduces each use of a tied weight
    tied = dataclasses.replace(many, per_device=False)
    assert audit.communication(tied, [more]) == []


@pytest.mark.parametrize("per_device, trips, right", [
    (True, 1, True), (True, 4, False), (False, 8, True), (False, 12, False)])
def test_whole_leaves_are_reduced_once_per_device_and_else_per_microbatch(per_device, trips, right):
    found = [moved("all-reduce", (333 * 777,), BATCH, "f32", trips)]
    judged = audit.communication(demand(accumulate=4, per_device=per_device), found)
    assert (judged == []) is right


def test_functions_that_gather_a_parameter_each_do_so_once_in_stage_2():
    twice = Use(2, 1) + Use(2, 1)
    for trips, right in ((12, True), (18, False)):
        found = [moved("all-gather", LAYER, trips=trips)]
        judged = audit.communication(demand(2, uses=(AGAIN, twice, ONCE)), found)
        assert (judged == []) is right


@pytest.mark.parametrize("stage, per_device, trips, right", [
    (1, True, 6, True), (1, True, 12, False), (1, False, 12, True), (2, True, 12, True)])
def test_a_module_applied_twice_is_reduced_once_in_stage_1_per_device(stage, per_device, trips,
                                                                      right):
    found = [moved("reduce-scatter", LAYER, trips=trips)]
    judged = audit.communication(demand(stage, 1, per_device, (AGAIN, Use(4, 2), ONCE)), found)
    assert (judged == []) is right


def test_the_sums_over_copies_are_as_many_as_the_reductions():
    nested = moved("all-reduce", (24, 128), REPLICA, "f32", trips=30)
    for uses, trips, right in ((AGAIN, 6, True), (AGAIN, 12, False), (Use(4, 2), 12, True)):
        found = [nested, moved("all-reduce", (256, 2048), REPLICA, "f32", trips)]
        judged = audit.communication(demand(uses=(AGAIN, uses, ONCE)), found)
        assert (judged == []) is right


def test_scalars_that_the_compiler_joins_to_whole_gradients_are_no_excess():
    joined = moved("all-reduce", (333 * 777 + 3,), BATCH, "f32", 1)
    assert audit.communication(demand(), [joined]) == []


def test_the_total_is_shards_copies_and_leaves_left_whole():
    size, whole = 6 * 1024 * 2048 + 5 * 6 * 96 * 128, 333 * 777
    sent = size * (2 * 2 + 4) * 3 / 4 + 2 * 1 / 2 * size / 4 * 4 + 2 * whole * 4 * 7 / 8
    assert demand().total == pytest.approx(sent)


def test_a_parameter_has_one_budget_for_all_the_shapes_in_which_it_moves():
    """A layer, the whole stack, and a layer in another layout: each is within the budget alone."""
    shapes = [moved("all-gather", LAYER), moved("all-gather", (6, *LAYER), trips=1),
              moved("all-gather", (2048, 16, 64))]
    once = demand(uses=(ONCE, ONCE, ONCE))
    for one in shapes:
        assert audit.communication(once, [one]) == []
    findings = audit.communication(once, shapes)
    assert sum(f.bytes for f in findings) == 2 * shapes[0].wire_bytes
    assert all(f.wrong and "3 times as much" in f.what for f in findings)


def test_two_parameters_of_a_small_shape_have_the_budget_of_both():
    """An embedding and a head of 48 KiB each, in a model whose small arrays are judged as well."""
    leaves = tuple(Leaf(name, shape, "float32", P(None, None))
                   for name, shape in (("embed", (256, 96)), ("head", (96, 256))))
    zero = zj.Zero(MESH, 3, precision=zj.Precision(compute="bfloat16"), min_shard=1)
    place = Placement(P("data", None), P(None, None))
    small = Demand(zero, leaves, (place, place), uses=(ONCE, ONCE))
    gather = moved("all-gather", (256, 96), trips=1)
    assert audit.communication(small, [gather, gather]) == []
    assert audit.communication(small, [gather] * 3) != []
