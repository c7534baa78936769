"""The memory of a compiled step beside that of its arguments."""

import jax
import models
import optax
import pytest
import reference
from harness import Spec, program

import zerojax as zj
from zerojax.hlo import collectives
from zerojax.hlo.program import parse, shapes
from zerojax.layout import topology

WAYS = ("global", "per_device")

def _lowered(model, way, rows=8, seq=None):
    mesh = zj.make_mesh(devices=topology.devices("h200:1x8"))
    zero = zj.Zero(mesh, 3, gradients=way, precision=zj.Precision(compute="bfloat16"))
    case, tx = models.language(model), optax.adam(1e-3)
    state = zero.abstract(case.init, tx, *case.example)
    batch = jax.ShapeDtypeStruct((rows, seq or models.SEQ), "int32")
    return zero, state, batch, zero.train_step(case.loss, tx).lower(state, batch)


def _compile(lowered):
    return lowered.compile(compiler_options=topology.COMPILER_OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_stage_3_needs_no_more_than_fsdp_by_hand(way):
    """534 M parameters, 2048 tokens per GPU: 1018 MiB of weights in bfloat16."""
    model, seq = models.Transformer(width=2048, layers=8, vocab=32000), 2048
    zero, state, batch, ours = _lowered(model, way, seq=seq)
    by_hand = _compile(reference.lower(zero.mesh, state, batch))
    large = [c for c in collectives.of(parse(by_hand.as_text())) if c.bytes > 2**20]
    assert {c.kind for c in large} == {"all-gather", "reduce-scatter"}
    most = by_hand.memory_analysis().temp_size_in_bytes
    assert _compile(ours).memory_analysis().temp_size_in_bytes <= most


def _stacked_weights(text):
    """Returns the arrays that stack the whole `up` or `down` matrix of every layer."""
    wanted = sorted((models.LAYERS, models.WIDTH, 4 * models.WIDTH))
    return [s for s in shapes(text) if s.dtype == "bf16" and sorted(s.dims) == wanted]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_regather_keeps_gathered_weights_out_of_the_residuals(way):
    model = models.Transformer(policy=zj.remat.regather())
    compiled = _compile(_lowered(model, way)[3])
    assert _stacked_weights(compiled.as_text()) == []
    gathers = [c for c in collectives.of(parse(compiled.as_text()))
               if c.kind == "all-gather" and c.trips == models.LAYERS]
    assert len({c.computation for c in gathers}) == 2  # forward loop and backward loop


@pytest.mark.slow
def test_a_policy_that_saves_everything_saves_them_too():
    """`regather` prevents this, and the test above would detect it."""
    model = models.Transformer(policy=jax.checkpoint_policies.everything_saveable)
    assert _stacked_weights(_compile(_lowered(model, "global")[3]).as_text()) != []


@pytest.mark.slow
def test_each_stage_needs_less_memory_than_the_one_before():
    specs = [Spec("scanned", stage, "per_device", 4) for stage in (1, 2, 3)]
    temp = [program(spec).memory.temp_size_in_bytes for spec in specs]
    assert temp[0] > temp[1] > temp[2]
