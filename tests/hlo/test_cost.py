"""The operations of products, convolutions and attention kernels, with values computed by hand."""

import pytest

from zerojax.hlo import cost, schedule
from zerojax.hlo.program import parse

OPERANDS = """
  %a = bf16[2,32,32,64]{3,2,1,0} parameter(0)
  %k = bf16[256,3,3,64]{3,2,1,0} parameter(1)
  %m = bf16[16,8]{1,0} parameter(2)
  %n = bf16[8,32]{1,0} parameter(3)
  %q = bf16[4,128,8,64]{3,2,1,0} parameter(4)
  %v = bf16[4,512,8,32]{3,2,1,0} parameter(5)
"""
FORWARD = ('%c = (bf16[4,8,128,32], f32[4,8,128], u8[0]) custom-call(%q, %q, %v), '
           'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": '
           '{"intermediate_tensor_shape": {"dimensions": ["4", "8", "128", "512"]}, '
           '"mask_type": "NO_MASK", "sliding_window_length": 0}}')
BACKWARD = FORWARD.replace("Softmax", "SoftmaxBackward")
WEIGHTS = 2 * 4 * 8 * 128 * 512  # batch, heads, queries, keys; two operations
CASES = {
    "a convolution": (
        '%c = (bf16[2,32,32,256], u8[0]) custom-call(%a, %k), window={size=3x3}, '
        'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"',
        2 * 2 * 32 * 32 * 256 * 64 * 9),
    "a product": (
        '%c = bf16[16,32] custom-call(%m, %n), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"]}}}',
        2 * 16 * 32 * 8),
    "attention": (FORWARD, WEIGHTS * (64 + 32)),
    "its gradient": (BACKWARD, WEIGHTS * (3 * 64 + 2 * 32)),
    "causal attention": (FORWARD.replace("NO_MASK", "CAUSAL"), WEIGHTS * (64 + 32) / 2),
    "attention in a window": (
        FORWARD.replace("NO_MASK", "CAUSAL").replace('length": 0', 'length": 64'),
        WEIGHTS * (64 + 32) / 8),
}


def program(line):
    return parse(f"HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {{{OPERANDS}  ROOT {line}\n}}\n")


@pytest.mark.parametrize("line, flops", CASES.values(), ids=CASES)
def test_calls_of_libraries_are_counted(line, flops):
    assert schedule.total_flops(program(line)) == {("bf16", False): flops}


def test_attention_is_as_fast_as_attention_kernels_are():
    speed = schedule.Speed(flops=lambda dtype: 1e9, bandwidth=1e30, link=1e6, network=1e5,
                           per_host=8, attention=0.25, launch=0.0)
    run = schedule.simulate(program(FORWARD), speed, ())["main"]
    assert run.seconds == pytest.approx(WEIGHTS * (64 + 32) / (1e9 * 0.25))


@pytest.mark.parametrize("target, known", [
    ("mosaic_gpu_v2", False), ("__gpu$xla.gpu.triton", False), ("__cublas$triangularSolve", False),
    ("__cublas$lt$matmul$f8", True), ("__cudnn$fmhaScaleBiasSoftmax", True),
    ("__gpu$TopK", True), ("AllocateBuffer", True),
])
def test_targets_whose_operations_are_not_known_are_named(target, known):
    (*_, call) = program(f'%c = f32[8] custom-call(%a), custom_call_target="{target}"'
                         ).computations["main"]
    assert cost.uncounted(call) == ("" if known else target)


FUSED = """HloModule m

%fused (p0: f32[48,64,8], p1: s32[]) -> bf16[8,1,64] {
  %p0 = f32[48,64,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %turned = f32[8,48,64]{0,2,1} bitcast(%p0)
  %narrow = bf16[8,48,64]{0,2,1} convert(%turned)
  ROOT %layer = bf16[8,1,64]{0,2,1} dynamic-slice(%narrow, %p1, %p1, %p1)
}

ENTRY %main (a: f32[48,64,8], i: s32[]) -> bf16[8,1,64] {
  %a = f32[48,64,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = bf16[8,1,64]{0,2,1} fusion(%a, %i), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_reads_one_layer_of_a_stack_that_it_turns_and_casts():
    read = parse(FUSED)
    (*_, fusion) = read.computations["main"]
    layer, index = 64 * 8, 4
    assert cost.touched(read, fusion, "main") == layer * 4 + index + layer * 2


def test_other_instructions_are_not_custom_calls():
    (*_, other) = program('%c = f32[8] negate(%a), metadata={op_name="custom-call"}'
                          ).computations["main"]
    assert cost.uncounted(other) == ""


def test_a_fusion_that_starts_early_touches_what_it_updates_in_place():
    program = parse("""HloModule m

%fused (s: bf16[32,4], i: s32[], u: bf16[1,4]) -> bf16[32,4] {
  %s = bf16[32,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = bf16[1,4]{1,0} parameter(2)
  ROOT %d = bf16[32,4]{1,0} dynamic-update-slice(%s, %u, %i, %i)
}

ENTRY %main (a: bf16[32,4], j: s32[], b: bf16[1,4]) -> bf16[32,4] {
  %a = bf16[32,4]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %b = bf16[1,4]{1,0} parameter(2)
  %f = ((bf16[32,4], s32[], bf16[1,4]), bf16[32,4], u32[]) fusion-start(%a, %j, %b), calls=%fused
  ROOT %g = bf16[32,4]{1,0} fusion-done(%f)
}
""")
    start, done = program.computations["main"][3:]
    assert cost.touched(program, start, "main") == 8 + 4 + 8  # the slice and index; the slice
    assert cost.touched(program, done, "main") == 0
