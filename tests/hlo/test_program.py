"""Instructions and collectives of HLO text, in the spellings of jax 0.10 to 0.12."""

import pytest

from zerojax.hlo import collectives
from zerojax.hlo.program import Frame, Shape, parse
from zerojax.plan import provenance

MESH = {"replica": 2, "data": 4}
OVER_DATA = ((0, 1, 2, 3), (4, 5, 6, 7))
OVER_REPLICA = ((0, 4), (1, 5), (2, 6), (3, 7))

SPELLINGS = [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}, use_global", OVER_DATA),
    ("replica_groups=[2,4]<=[8], dimensions={0}", OVER_DATA),
    ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", OVER_REPLICA),
    ("replica_groups=mesh['replica'=2,'data'=4] {'data'}, use", OVER_DATA),
    ("replica_groups=mesh['replica'=2,'data'=4] {'replica'}, use", OVER_REPLICA),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, use", OVER_DATA),
    ("replica_groups=mesh['a'=8] {'a':(2)4}, use", OVER_DATA),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, use", OVER_REPLICA),
    ("replica_groups={}, to_apply", (tuple(range(8)),)),
]


@pytest.mark.parametrize("text, expected", SPELLINGS)
def test_groups_of_every_spelling(text, expected):
    assert {frozenset(g) for g in collectives.groups(text, 8)} == {frozenset(g) for g in expected}


PROGRAM = """\
HloModule jit_step, num_partitions=8

FileNames
1 "/home/me/m.py"
2 "/usr/lib/python3/site-packages/flax/linen/linear.py"

FunctionNames
1 "Layer.__call__"
2 "Dense.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=300 end_line=300 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %x = bf16[16,8]{1,0} get-tuple-element(%p), index=1
  %ag = ((bf16[16,8]{1,0}), bf16[64,8]{1,0}) all-gather-start(%x), channel_id=1, GATHERED
  ROOT %agd = bf16[64,8]{1,0} all-gather-done(%ag)
}

%cond (p: (s32[], bf16[64,8])) -> pred[] {
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (w: bf16[16,8]) -> f32[2,8] {
  %loop = (s32[], bf16[64,8]) while(%t), condition=%cond, body=%body, TRIPS
  %rs = f32[16,8]{1,0} reduce-scatter(%g), channel_id=2, SCATTERED, to_apply=%sum
  ROOT %ar = f32[2,8]{1,0} all-reduce(%rs), channel_id=3, REDUCED, to_apply=%sum
}
"""
METADATA = 'metadata={op_name="jit(step)/layer/gather" stack_frame_id=2}'
TRIPS = 'backend_config={"known_trip_count":{"n":"5"}}'
for short, attributes in {
        "GATHERED": f"replica_groups=[2,4]<=[8], dimensions={{0}}, {METADATA}",
        "SCATTERED": "replica_groups=[2,4]<=[8], dimensions={0}",
        "REDUCED": "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        "TRIPS": TRIPS}.items():
    PROGRAM = PROGRAM.replace(short, attributes)


def test_collectives_of_a_program():
    gather, scatter, reduce = collectives.of(parse(PROGRAM), provenance.source)
    assert (gather.kind, gather.trips, gather.asynchronous) == ("all-gather", 5, True)
    assert gather.axes(MESH) == ("data",) and gather.shapes == (Shape("bf16", (64, 8)),)
    assert gather.op_name == "jit(step)/layer/gather"
    assert provenance.source(gather.frames) == "/home/me/m.py:7"
    assert (scatter.kind, scatter.trips, scatter.shapes[0].dims) == ("reduce-scatter", 1, (64, 8))
    assert (reduce.axes(MESH), reduce.size) == (("replica",), 2)


def test_wire_bytes_are_the_ring_algorithms():
    gather, scatter, reduce = collectives.of(parse(PROGRAM))
    assert gather.wire_bytes == 64 * 8 * 2 * 3 / 4 * 5
    assert scatter.wire_bytes == 64 * 8 * 4 * 3 / 4
    assert reduce.wire_bytes == 2 * 2 * 8 * 4 / 2


def test_groups_that_no_mesh_axes_have():
    odd = PROGRAM.replace("{{0,4},{1,5},{2,6},{3,7}}", "{{0,5},{1,4},{2,6},{3,7}}")
    assert collectives.of(parse(odd))[-1].axes(MESH) is None


def test_a_loop_inside_a_loop_multiplies():
    inner = """%outer (p: s32[]) -> s32[] {
  ROOT %w = (s32[]) while(%t), condition=%cond, body=%body, TRIPS
}

ENTRY %main""".replace("TRIPS", TRIPS.replace("5", "3"))
    text = PROGRAM.replace(f"body=%body, {TRIPS}", f"body=%outer, {TRIPS}")
    assert collectives.of(parse(text.replace("ENTRY %main", inner)))[0].trips == 15


def test_findings_know_where_zerojaxs_own_files_are():
    from zerojax.gather import pair
    from zerojax.plan import compiler

    assert provenance.PAIR.samefile(pair.__file__)
    assert provenance.ENTRY.samefile(compiler.__file__)
    assert not provenance.is_users(Frame(__file__.replace("tests", "zerojax"), 1, "f"))
    assert provenance.is_users(Frame(__file__, 1, "f"))


def test_a_line_outside_the_planned_function_is_not_its_source():
    files = (str(provenance.PAIR), str(provenance.ENTRY), "/home/me/script.py")
    assert provenance.source([Frame(file, 1, "f") for file in files]) == ""
