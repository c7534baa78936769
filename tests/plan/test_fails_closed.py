"""Findings about what is missing in a compiled program, or cannot be read."""

import dataclasses

import pytest
from moves import (
    AGAIN,
    GATHERED,
    LAYER,
    MODEL,
    NESTED,
    ONCE,
    OPTIMIZER,
    PLACES,
    UP,
    demand,
    moved,
    program,
)

from zerojax.hlo.program import parse
from zerojax.plan import audit
from zerojax.plan.demand import Use


def test_a_sharded_parameter_that_nothing_gathers_is_a_finding():
    """XLA computes with shards then: tensor parallelism, whose sums may be too small to be
    noticed."""
    both = [moved("all-gather", (96, 128), trips=30), moved("all-gather", LAYER)]
    assert list(audit.missing(demand(), program(), both)) == []
    finding, = audit.missing(demand(), program(), both[:1])
    assert finding.wrong and "blocks/up" in finding.what and "0 of 1 whole copies" in finding.what
    finding, = audit.missing(demand(), program(), [both[0], moved("all-gather", LAYER, trips=3)])
    assert "0.5 of 1 whole copies" in finding.what
    unread = (AGAIN, Use(0, 0), ONCE)
    assert list(audit.missing(demand(uses=unread), program(), both[:1])) == []
    finding, = audit.of(demand(), program(), both[:1])
    assert "0 of 1 whole copies" in finding.what


def test_only_gathers_over_zeros_axes_and_outside_of_the_optimizer_are_of_parameters():
    nested = moved("all-gather", (96, 128), trips=30)
    for other in (moved("all-gather", LAYER, MODEL),
                  moved("all-gather", LAYER, ours=False, path=OPTIMIZER)):
        finding, = audit.missing(demand(), program(), [nested, other])
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
    assert list(audit.missing(two, program(), enough)) == []
    finding, = audit.missing(two, program(), [nested, moved("all-gather", LAYER, trips=6)])
    assert "and 1 more of its shape" in finding.what and "1 of 1.5 whole" in finding.what


def test_a_loop_of_unknown_length_hides_how_much_is_gathered():
    nested = moved("all-gather", (96, 128), trips=30)
    unknown = program("  %l = f32[] while(%p), condition=%c, body=%b")
    once = [nested, moved("all-gather", LAYER, trips=1)]
    assert list(audit.missing(demand(), unknown, once)) == []
    assert list(audit.missing(demand(), unknown, [nested])) != []


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
    assert audit.of(demand(), program(), GATHERED) == []
    finding, = audit.of(demand(), program(line), GATHERED)
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
