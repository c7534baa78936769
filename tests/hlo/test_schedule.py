"""Costs, the simulated schedule and live buffers, on small programs with a known answer."""

import dataclasses

import pytest

from zerojax.hlo import collectives, cost, liveness, schedule
from zerojax.hlo.program import parse

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%stacking (p0: bf16[5,64,8], p1: bf16[64,8], p2: s32[]) -> bf16[5,64,8] {
  %p0 = bf16[5,64,8]{2,1,0} parameter(0)
  %p1 = bf16[64,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %one = bf16[1,64,8]{2,1,0} bitcast(%p1)
  ROOT %dus = bf16[5,64,8]{2,1,0} dynamic-update-slice(%p0, %one, %p2, %p2, %p2)
}

%product (p0: bf16[32,64], p1: bf16[64,8]) -> bf16[32,8] {
  %p0.1 = bf16[32,64]{1,0} parameter(0)
  %p1.1 = bf16[64,8]{1,0} parameter(1)
  ROOT %dot = bf16[32,8]{1,0} dot(%p0.1, %p1.1), CONTRACTED, metadata={op_name="OP"}
}

%body (p: SHAPES) -> SHAPES {
  %p = CARRY parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = bf16[5,64,8]{2,1,0} get-tuple-element(%p), index=1
  %x = bf16[32,64]{1,0} get-tuple-element(%p), index=2
  %shard = bf16[8,8]{1,0} get-tuple-element(%p), index=3
  %ag = (bf16[8,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%shard), channel_id=1, GROUPS
  %busy = bf16[32,64]{1,0} negate(%x)
  %agd = bf16[64,8]{1,0} all-gather-done(%ag)
  %mm = bf16[32,8]{1,0} fusion(%busy, %agd), kind=kCustom, calls=%product
  %stacked = bf16[5,64,8]{2,1,0} fusion(%stack, %agd, %i), kind=kLoop, calls=%stacking
  ROOT %out = CARRY tuple(%i, %stacked, %x, %shard)
}

%cond (p: SHAPES) -> pred[] {
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (w: bf16[8,8], x0: bf16[32,64]) -> f32[8,8] {
  %w = bf16[8,8]{1,0} parameter(0)
  %x0 = bf16[32,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %zeros = bf16[5,64,8]{2,1,0} broadcast(%zero), dimensions={}
  %t = CARRY tuple(%zero, %zeros, %x0, %w)
  %loop = SHAPES while(%t), condition=%cond, body=%body, TRIPS
  %saved = bf16[5,64,8]{2,1,0} get-tuple-element(%loop), index=1
  %grad = f32[64,8]{1,0} fusion(%saved), kind=kLoop, calls=%sum
  %rs = f32[8,8]{1,0} reduce-scatter(%grad), channel_id=2, GROUPS, to_apply=%sum
  ROOT %r = f32[8,8]{1,0} negate(%rs)
}
"""
for short, text in {
        "SHAPES": "(s32[], bf16[5,64,8], bf16[32,64], bf16[8,8])",
        "CARRY": "(s32[], bf16[5,64,8]{2,1,0}, bf16[32,64]{1,0}, bf16[8,8]{1,0})",
        "CONTRACTED": "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "GROUPS": "replica_groups=[1,8]<=[8], dimensions={0}",
        "TRIPS": 'backend_config={"known_trip_count":{"n":"5"}}'}.items():
    PROGRAM = PROGRAM.replace(short, text)
SPEED = schedule.Speed(flops=lambda dtype: 1e6, bandwidth=1e9, link=1e6, network=1e5, per_host=8)
RING = (8.4 + 7 * 3.4) * 1e-6  # s, the steps around a ring of 8 in a host

OVERLAP = """\
HloModule m, num_partitions=8

ENTRY %main (a: bf16[8,8], b: f32[100000000]) -> f32[8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = f32[100000000]{0} parameter(1)
  %g1 = (bf16[8,8], bf16[64,8]) all-gather-start(%a), channel_id=1, FIRST, dimensions={0}
  %g2 = (bf16[8,8], bf16[64,8]) all-gather-start(%a), channel_id=2, SECOND
  %busy = f32[100000000]{0} negate(%b)
  %d1 = bf16[64,8] all-gather-done(%g1)
  ROOT %d2 = bf16[64,8] all-gather-done(%g2)
}
"""


@pytest.fixture
def program():
    return parse(PROGRAM)


def test_a_multiply_add_is_two_operations_in_every_iteration(program):
    assert schedule.total_flops(program) == {("bf16", False): 5 * 2 * 32 * 8 * 64}
    again = parse(PROGRAM.replace("OP", "jvp/rematted_computation/dot"))
    assert set(schedule.total_flops(again)) == {("bf16", True)}


def test_a_fusion_is_charged_for_what_it_writes_in_place(program):
    stacked = program.names["body"]["stacked"]
    layer, index = 64 * 8 * 2, 4
    assert cost.touched(program, stacked, "body") == 2 * layer + index  # a layer read, and written


def test_a_gather_is_exposed_except_where_others_run_beside_it(program):
    found = collectives.of(program)
    gather = next(c for c in found if c.kind == "all-gather")
    run = schedule.simulate(program, SPEED, found)["body"]
    takes = gather.wire_bytes / 5 / (1e6 * SPEED.links) + RING
    hides = (2 * 32 * 64 * 2 / (1e9 * SPEED.memory) + SPEED.launch) / SPEED.beside
    assert run.beside["ag"] == ("busy",)
    assert run.exposed["ag"] == pytest.approx(takes - hides)


def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes(program):
    operations = 2 * 32 * 8 * 64 / (1e6 * SPEED.products)
    touched = 2 * (32 * 64 + 64 * 8 + 32 * 8) / (1e9 * SPEED.memory)
    slow_memory = dataclasses.replace(SPEED, bandwidth=1e3)
    assert _seconds_of_mm(program, SPEED) == pytest.approx(operations + SPEED.launch)
    assert _seconds_of_mm(program, slow_memory) == pytest.approx(touched * 1e6 + SPEED.launch)


def _seconds_of_mm(program, speed):
    spans = schedule.simulate(program, speed, ())["body"].spans
    return next(s.stop - s.start for s in spans if s.name == "mm")


def test_a_kernel_is_slower_only_for_as_long_as_a_collective_runs():
    program = parse("\n".join(line for line in OVERLAP.splitlines() if "g2" not in line))
    (first,) = found = collectives.of(program)
    run = schedule.simulate(program, SPEED, found)["main"]
    takes = first.wire_bytes / (1e6 * SPEED.links) + RING
    alone = 2 * 4 * 10**8 / (1e9 * SPEED.memory) + SPEED.launch
    assert takes < alone
    assert run.busy["memory"] + run.busy["launch"] == pytest.approx(
        alone + takes * (1 - SPEED.beside))
    assert run.exposed["g1"] == 0


@pytest.mark.parametrize("second, waits", [
    ("replica_groups=[2,4]<=[8], dimensions={0}", 1),  # the same links: one after the other
    ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 0),
])
def test_collectives_that_are_open_together_share_a_link_but_not_their_latency(second, waits):
    text = OVERLAP.replace("FIRST", "replica_groups=[2,4]<=[8]")
    program = parse(text.replace("SECOND", second))
    split = dataclasses.replace(SPEED, per_host=4)
    spans = {s.name: s for s in schedule.simulate(program, split, collectives.of(program))["main"]
             .spans}
    occupied = 64 * 8 * 2 * 3 / 4 / (1e6 * SPEED.links)
    assert spans["g2"].start == pytest.approx(waits * occupied)


def test_loops_multiply_and_synchronous_collectives_wait(program):
    found = collectives.of(program)
    runs = schedule.simulate(program, SPEED, found)
    assert runs["main"].seconds > 5 * runs["body"].seconds
    sent = 64 * 8 * 4 * 7 / 8
    seconds = sent / (1e6 * SPEED.links) + RING
    assert runs["main"].exposed["rs"] == pytest.approx(seconds)


def test_a_stack_of_gathered_weights_is_gathered(program):
    alive = liveness.peak(program)
    assert alive["gathered"] == (5 + 1) * 64 * 8 * 2  # the stack outside the loop, a layer in it
    no_gather = liveness.peak(parse(PROGRAM.replace("calls=%stacking", "calls=%sum")))
    assert no_gather["gathered"] == 64 * 8 * 2


def test_arguments_and_results_have_their_own_memory():
    text = """HloModule m

ENTRY %main (a: f32[1024]) -> f32[8192] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0} negate(%a)
  %c = f32[1024]{0} negate(%b)
  ROOT %d = f32[8192]{0} broadcast(%c), dimensions={0}
}
"""
    assert liveness.peak(parse(text)) == {"other": 2 * 4096}
