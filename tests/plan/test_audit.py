"""What ZeRO explains, one collective at a time."""

import dataclasses

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
SCATTERED = [moved("reduce-scatter", LAYER, dtype="f32"),
             moved("reduce-scatter", (96, 128), dtype="f32", trips=30)]
RIGHT = {
    "a layer gathered": [moved("all-gather", LAYER)],
    "and again backward": [moved("all-gather", LAYER), moved("all-gather", LAYER, backward=True)],
    "in another layout": [moved("all-gather", (2048, 1, 16, 64))],
    "the whole stack": [moved("all-gather", (6, *LAYER), trips=1)],
    "reduced": [moved("reduce-scatter", LAYER, dtype="f32")],
    "reduced in less than asked": [moved("reduce-scatter", LAYER, dtype="bf16")],
    "shards over the copies": [moved("all-reduce", (256, 2048), REPLICA, "f32")],
    "whole leaves, and shards over the copies": [
        moved("all-reduce", (333 * 777,), BATCH, "f32", 1),
        moved("all-reduce", (256, 2048), REPLICA, "f32"),
        moved("all-reduce", (24, 128), REPLICA, "f32", 30)],
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


def test_where_the_program_is_not_known_the_formula_is_the_budget():
    twice = [moved("all-gather", LAYER, trips=12)]
    assert audit.communication(demand(uses=None), twice) == []
    more = [*twice, moved("all-gather", LAYER, trips=1)]
    assert audit.communication(demand(uses=None), more) != []


def test_an_optimizer_that_communicates_is_explained_once_gradients_are_scattered():
    """Muon multiplies matrices that are sharded."""
    muon = moved("all-reduce", LAYER, DATA, "f32", ours=False, path=OPTIMIZER)
    finding, = audit.communication(demand(), [*SCATTERED, muon])
    assert not finding.wrong and finding.bytes == muon.wire_bytes
    assert "the optimizer communicates" in finding.what
    gather = moved("all-gather", LAYER, dtype="f32", ours=False, path=OPTIMIZER)
    finding, = audit.communication(demand(), [gather])
    assert not finding.wrong and "the optimizer communicates" in finding.what


def test_the_optimizer_has_a_scope_of_its_own_and_may_sum_norms():
    model = moved("all-gather", LAYER, dtype="f32", path="jit(step)/my_zerojax_optimizer/dot")
    finding, = audit.communication(demand(), [model])
    assert finding.wrong and "gathered as f32" in finding.what
    for kind in ("all-reduce", "all-gather"):
        norms = moved(kind, (17,), BATCH, "f32", 1, ours=False, path=OPTIMIZER)
        findings = audit.communication(demand(), [*SCATTERED, norms])
        assert not any(f.wrong or "the optimizer communicates" in f.what for f in findings)


def test_too_many_gathers_are_named_by_those_of_the_longest_loop():
    found = [moved("all-gather", LAYER, trips=n, ours=False, name=f"of {n}") for n in (12, 6, 1)]
    finding, = audit.communication(demand(), found)
    assert finding.instruction == "of 12"


@pytest.mark.parametrize("dims, trips", [(LAYER, 5), ((6 * 1024 * 2048 + 5 * 6 * 96 * 128,), 1)])
def test_some_scattered_gradients_do_not_excuse_others_that_the_optimizer_sums(dims, trips):
    few = moved("reduce-scatter", LAYER, dtype="f32", trips=1)
    summed = moved("all-reduce", dims, DATA, "f32", trips, ours=False, path=OPTIMIZER)
    finding, = audit.communication(demand(), [few, summed])
    assert finding.wrong and finding.instruction == "all-reduce"


def test_each_array_of_a_combined_instruction_has_its_own_origin():
    """The compiler joins an optimizer's gather in float32 with one of the model in bfloat16."""
    names = "(zerojax_optimizer/dot:jvp(M)/blocks/up)"
    both = dataclasses.replace(moved("all-gather", LAYER, path=f"jit(step)/{names}"),
                               shapes=(Shape("f32", LAYER), Shape("bf16", LAYER)))
    finding, = audit.communication(demand(), [both])
    assert not finding.wrong and finding.bytes == both.wire(both.shapes[0])
    swapped = dataclasses.replace(both, shapes=both.shapes[::-1])
    wrong, = [f for f in audit.communication(demand(), [swapped]) if f.wrong]
    assert "gathered as f32" in wrong.what and wrong.bytes == both.wire(both.shapes[0])


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


def test_small_arrays_may_be_a_hundredth_of_zeros_bytes_together():
    most = 0.01 * demand().total
    one = moved("all-to-all", (64, 128), trips=1)
    for times, wrong in ((0.9, False), (1.1, True)):
        found = dataclasses.replace(one, trips=int(times * most / one.wire_bytes))
        assert any(f.wrong for f in audit.communication(demand(), [found])) is wrong


def test_the_widest_dtype_of_a_shape_is_no_fault_where_a_parameter_has_it():
    """`keep` computes one of two parameters of a shape in float32."""
    precision = zj.Precision(compute="bfloat16", reduce="float32", keep={"gate": "float32"})
    gate = dataclasses.replace(UP, path="gate")
    two = Demand(zj.Zero(MESH, 3, precision=precision), (UP, gate), (PLACES[1], PLACES[1]))
    found = [moved("all-gather", LAYER), moved("all-gather", LAYER, dtype="f32")]
    assert audit.communication(two, found) == []
    finding, = audit.communication(two, [moved("all-gather", LAYER, dtype="f64")])
    assert "not as bf16" in finding.what


def test_a_frozen_parameter_is_never_reduced():
    frozen = dataclasses.replace(demand(), leaves=(
        NESTED, dataclasses.replace(UP, group="frozen"), ODD), uses=None)
    assert audit.communication(frozen, [moved("all-gather", LAYER)]) == []
    finding, = audit.communication(frozen, [moved("reduce-scatter", LAYER, dtype="f32")])
    assert "blocks/up is frozen" in finding.what
    assert frozen.reductions(frozen.leaves[1]) == 0


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


def test_an_instruction_is_named_once_with_all_its_bytes():
    both = dataclasses.replace(moved("all-to-all", LAYER),
                               shapes=(Shape("bf16", LAYER), Shape("f32", LAYER)))
    finding, = audit.communication(demand(), [both])
    assert "With 1 more arrays" in finding.what and finding.bytes == both.wire_bytes


def test_a_padded_parameter_and_a_table_in_a_loop_have_reasons_of_their_own():
    place = Placement(P("data", None), P(None, None), kept=(336, 777))
    padded = dataclasses.replace(demand(per_device=False), places=(*PLACES[:2], place))
    whole = moved("all-reduce", (336, 777), BATCH, trips=1, backward=True)
    finding, = audit.communication(padded, [whole])
    assert "that of odd, which is padded" in finding.what
    table = moved("all-reduce", LAYER, BATCH, path="jit(step)/transpose(jvp(M))/scatter-add")
    finding, = audit.communication(demand(), [table])
    assert "looked up in a loop" in finding.what


def test_the_sums_over_copies_are_as_many_as_the_reductions():
    nested = moved("all-reduce", (24, 128), REPLICA, "f32", trips=30)
    for uses, trips, right in ((AGAIN, 6, True), (AGAIN, 12, False), (Use(4, 2), 12, True)):
        found = [nested, moved("all-reduce", (256, 2048), REPLICA, "f32", trips)]
        judged = audit.communication(demand(uses=(AGAIN, uses, ONCE)), found)
        assert (judged == []) is right


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
    finding, = audit.of(demand(), _program(), both[:1])
    assert "0 of 1 whole copies" in finding.what


def test_only_gathers_over_zeros_axes_and_outside_of_the_optimizer_are_of_parameters():
    nested = moved("all-gather", (96, 128), trips=30)
    for other in (moved("all-gather", LAYER, MODEL),
                  moved("all-gather", LAYER, ours=False, path=OPTIMIZER)):
        finding, = audit.missing(demand(), _program(), [nested, other])
        assert "blocks/up" in finding.what


def test_all_parameters_of_a_shape_are_gathered_as_far_as_they_are_read():
    twin = dataclasses.replace(UP, path="blocks/gate")
    state = dataclasses.replace(UP, path="statistics", shape=(7, 64, 4096), group="state")
    half = Use(0.5, 0.5)  # three of its six layers
    two = dataclasses.replace(demand(), leaves=(NESTED, UP, twin, state),
                              places=(*PLACES[:2], PLACES[1], PLACES[1]),
                              uses=(AGAIN, AGAIN, half, None))
    nested = moved("all-gather", (96, 128), trips=30)
    enough = [nested, moved("all-gather", LAYER, trips=9)]
    assert list(audit.missing(two, _program(), enough)) == []
    finding, = audit.missing(two, _program(), [nested, moved("all-gather", LAYER, trips=6)])
    assert "and 1 more of its shape" in finding.what and "1 of 1.5 whole" in finding.what


def test_a_loop_of_unknown_length_hides_how_much_is_gathered():
    nested = moved("all-gather", (96, 128), trips=30)
    unknown = _program("  %l = f32[] while(%p), condition=%c, body=%b")
    once = [nested, moved("all-gather", LAYER, trips=1)]
    assert list(audit.missing(demand(), unknown, once)) == []
    assert list(audit.missing(demand(), unknown, [nested])) != []


GATHERED = [moved("all-gather", (96, 128), trips=30), moved("all-gather", LAYER)]
UNREADABLE = {
    "a line": ("  %x = some new syntax", "could not be read, the first: '%x = some new syntax'"),
    "a dtype": ("  %x = f2e1[8]{0} copy(%p)", "x has the dtype f2e1, whose size is not known"),
    "an operation": ("  %x = f32[8]{0} all-shuffle(%p), replica_groups={{0,1}}",
                     r"x \(all-shuffle\) names groups"),
    "groups": ("  %x = f32[8]{0} all-gather(%p), replica_groups=rows<8>, dimensions={0}",
               "or its groups cannot be read"),
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


UNREACHED = """HloModule m, num_partitions=16

%body (q: f32[]) -> f32[] {
  ROOT %x = f32[8]{0} all-reduce(%q), replica_groups={{0,1}}
}

ENTRY %main (p: f32[]) -> f32[] {
  ROOT %c = f32[] custom-call(%p), some_new_attribute={%body}
}
"""


def test_a_collective_that_no_readable_call_reaches_is_a_finding():
    finding, = audit.of(demand(), parse(UNREACHED), GATHERED)
    assert finding.wrong and "x (all-reduce)" in finding.what and "calls its" in finding.what


def test_the_header_of_a_computation_that_can_not_be_read_is_a_finding():
    new = UNREACHED.replace("%body (q: f32[]) -> f32[] {", "%body<q: f32[]> {")
    assert any("'%body<q: f32[]> {'" in f.what for f in audit.unreadable(parse(new)))


def test_dtypes_in_a_computation_that_does_not_run_do_not_matter():
    dead = UNREACHED.replace("f32[8]{0} all-reduce(%q), replica_groups={{0,1}}",
                             "f2e1[8]{0} copy(%q)")
    assert list(audit.unreadable(parse(dead))) == []


def test_findings_are_in_order_of_bytes():
    found = [moved("all-to-all", LAYER, trips=1, name="less"), moved("all-to-all", LAYER)]
    assert [f.instruction for f in audit.of(demand(), _program(), [*GATHERED, *found])] == [
        "all-to-all", "less"]


def test_a_combined_instruction_names_its_first_module():
    long = "/".join(f"layer_{i}" for i in range(30))
    odd = moved("all-to-all", LAYER, path=f"jit(step)/jvp(M)/({long}/dot:other/dot)")
    finding, = audit.communication(demand(), [odd])
    assert f"; {long}/dot)" in finding.what


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


def test_small_arrays_of_a_small_model_are_no_excuse():
    """The gradient of a matrix of 64 KiB is summed whole: half of all that ZeRO sends."""
    leaf = Leaf("w", (128, 128), "float32", P(None, None))
    zero = zj.Zero(MESH, 3, precision=zj.Precision(compute="bfloat16"), min_shard=1)
    small = Demand(zero, (leaf,), (Placement(P("data", None), P(None, None)),), uses=(ONCE,))
    finding, = audit.communication(small, [moved("all-reduce", (128, 128), BATCH, "bf16", 1)])
    assert finding.wrong and "reduce-scatter would leave each its shard" in finding.what


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


def test_an_optimizers_sum_that_is_joined_to_scalars_is_its_own():
    muon = moved("all-reduce", (2**18 + 2,), DATA, "f32", ours=False,
                 path="jit(step)/(zerojax_optimizer/dot_general:reduce_sum)")
    assert [f.wrong for f in audit.communication(demand(), [*SCATTERED, muon])] == [False]
    assert [f.wrong for f in audit.communication(demand(), [muon])] == [True]
