"""The note about custom calls whose time the estimate does not have."""

from zerojax.layout.topology import Topology
from zerojax.plan import uncounted
from zerojax.plan.compiler import Compiled
from zerojax.plan.reading import Reading

TEXT = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2"
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %y)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} custom-call(%a), custom_call_target="te_norm"
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]{0}) tuple(%zero, %b)
  ROOT %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"32"}}')
H100S = Topology.parse("h100:1x8")


def notes(text, topology=H100S):
    return list(uncounted.of(Reading(None, None, 0.0, Compiled(text, {}, 0.0), topology)))


def test_targets_are_named_with_their_number_of_calls():
    (note,) = notes(TEXT)
    assert "mosaic_gpu_v2 (32 x per step), te_norm (1 x per step)" in note.what
    assert not note.wrong


def test_a_plan_whose_calls_are_all_counted_has_no_note():
    known = TEXT.replace("mosaic_gpu_v2", "__gpu$TopK").replace("te_norm", "AllocateBuffer")
    assert notes(known) == []


def test_a_plan_without_a_time_has_no_note():
    assert notes(TEXT, None) == []


def test_many_targets_are_shortened():
    calls = "\n".join(f'  %c{n} = f32[8] custom-call(%a), custom_call_target="mine_{n}"'
                      for n in range(9))
    (note,) = notes(TEXT.replace("  %zero = s32[]", f"{calls}\n  %zero = s32[]"))
    assert note.what.count("per step") == uncounted.MOST and "and 6 more" in note.what
