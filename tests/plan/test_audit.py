"""What ZeRO explains, one collective at a time."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P
from moves import (
    BATCH,
    DATA,
    GATHERED,
    LAYER,
    MESH,
    MODEL,
    NESTED,
    ODD,
    ONCE,
    OPTIMIZER,
    PLACES,
    REPLICA,
    SCATTERED,
    UP,
    demand,
    moved,
    program,
)

import zerojax as zj
from zerojax.hlo.program import Shape
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit
from zerojax.plan.demand import Demand

RIGHT = {
    "a layer gathered": [moved("all-gather", LAYER)],
    "and again backward": [moved("all-gather", LAYER), moved("all-gather", LAYER, backward=True)],
    "in another layout": [moved("all-gather", (2048, 1, 16, 64))],
    "its shards in a stack": [moved("all-gather", (256, 8192))],
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
    "no stack of shards": ([moved("all-gather", (512, 4096))], "no parameter has this shape"),
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


def test_small_arrays_may_be_a_hundredth_of_zeros_bytes_together():
    most = 0.01 * demand().total
    one = moved("all-to-all", (64, 128), trips=1)
    for times, wrong in ((0.9, False), (1.1, True)):
        found = dataclasses.replace(one, trips=int(times * most / one.wire_bytes))
        assert any(f.wrong for f in audit.communication(demand(), [found])) is wrong


def test_the_small_arrays_of_parameters_leave_others_their_hundredth():
    """Nearly all arrays of a small model are small."""
    small = [moved("all-gather", (96, 128), trips=30), moved("reduce-scatter", (96, 128), trips=30)]
    assert sum(c.wire_bytes for c in small) > 0.01 * demand().total
    few = moved("all-to-all", (96, 128), trips=30)
    assert 0.001 < few.wire_bytes / demand().total < 0.01
    assert audit.communication(demand(), [*small, few]) == []
    finding, = audit.communication(demand(), [*small, dataclasses.replace(few, trips=90)])
    assert finding.wrong and finding.instruction == "all-to-all"


def test_a_few_kibibytes_are_never_worth_a_finding():
    leaf = Leaf("w", (64, 64), "float32", P(None, None))
    tiny = Demand(demand().policy, (leaf,), (Placement(P("data", None), P(None, None)),))
    few = moved("all-to-all", (16, 16), trips=2)
    assert few.wire_bytes > 0.02 * tiny.total
    assert audit.communication(tiny, [few]) == []
    finding, = audit.communication(tiny, [dataclasses.replace(few, trips=20)])
    assert finding.wrong


def test_a_small_parameter_that_moves_too_often_is_a_fault():
    finding, = audit.communication(demand(), [moved("all-gather", (96, 128), trips=600)])
    assert finding.wrong and "10 times as much as" in finding.what


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


def test_an_instruction_is_named_once_with_all_its_bytes():
    both = dataclasses.replace(moved("all-to-all", LAYER),
                               shapes=(Shape("bf16", LAYER), Shape("f32", LAYER)))
    finding, = audit.communication(demand(), [both])
    assert "With 1 more arrays" in finding.what and finding.bytes == both.wire_bytes


def test_gradients_summed_over_the_models_axis_and_the_batch_have_a_remedy():
    everywhere = (tuple(range(16)),)
    for dims in (LAYER, (6 * 1024 * 4096 + 17,)):
        summed = moved("all-reduce", dims, everywhere, "f32", backward=True, ours=False)
        finding, = audit.communication(demand(per_device=False), [summed])
        assert finding.wrong and "not split over model are summed" in finding.what
        assert "Return zj.Loss" in finding.what


def test_a_padded_parameter_and_a_table_in_a_loop_have_reasons_of_their_own():
    place = Placement(P("data", None), P(None, None), kept=(336, 777))
    padded = dataclasses.replace(demand(per_device=False), places=(*PLACES[:2], place))
    whole = moved("all-reduce", (336, 777), BATCH, trips=1, backward=True)
    finding, = audit.communication(padded, [whole])
    assert "that of odd, which is padded" in finding.what
    table = moved("all-reduce", LAYER, BATCH, path="jit(step)/transpose(jvp(M))/scatter-add")
    finding, = audit.communication(demand(), [table])
    assert "looked up in a loop" in finding.what


def test_a_thousandth_of_zeros_bytes_is_reported_and_is_no_fault():
    once = moved("all-to-all", (260, 128), trips=1)
    assert 0.0005 < once.wire_bytes / demand().total < 0.001
    for trips, wrong in ((1, False), (2, True)):
        finding, = audit.communication(demand(), [moved("all-to-all", (260, 128), trips=trips)])
        assert finding.wrong is wrong


def test_findings_are_in_order_of_bytes():
    found = [moved("all-to-all", LAYER, trips=1, name="less"), moved("all-to-all", LAYER)]
    assert [f.instruction for f in audit.of(demand(), program(), [*GATHERED, *found])] == [
        "all-to-all", "less"]


def test_a_combined_instruction_names_its_first_module():
    long = "/".join(f"layer_{i}" for i in range(30))
    odd = moved("all-to-all", LAYER, path=f"jit(step)/jvp(M)/({long}/dot:other/dot)")
    finding, = audit.communication(demand(), [odd])
    assert f"; {long}/dot)" in finding.what


def test_small_arrays_of_a_small_model_are_no_excuse():
    """The gradient of a matrix of 64 KiB is summed whole: half of all that ZeRO sends."""
    leaf = Leaf("w", (128, 128), "float32", P(None, None))
    zero = zj.Zero(MESH, 3, precision=zj.Precision(compute="bfloat16"), min_shard=1)
    small = Demand(zero, (leaf,), (Placement(P("data", None), P(None, None)),), uses=(ONCE,))
    finding, = audit.communication(small, [moved("all-reduce", (128, 128), BATCH, "bf16", 1)])
    assert finding.wrong and "reduce-scatter would leave each its shard" in finding.what


def test_an_optimizers_sum_that_is_joined_to_scalars_is_its_own():
    muon = moved("all-reduce", (2**18 + 2,), DATA, "f32", ours=False,
                 path="jit(step)/(zerojax_optimizer/dot_general:reduce_sum)")
    assert [f.wrong for f in audit.communication(demand(), [*SCATTERED, muon])] == [False]
    assert [f.wrong for f in audit.communication(demand(), [muon])] == [True]
