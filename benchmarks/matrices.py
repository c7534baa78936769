"""Muon on sharded parameters, with and without `Zero.whole_matrices`: bytes and FLOPs of the
optimizer."""

import functools
import pathlib
import sys

import jax
import optax
from machine import table

import zerojax as zj
from zerojax.hlo import schedule
from zerojax.plan import audit

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
import models

SEQ = 2048
CASE = models.language(models.Transformer(width=1536, layers=24, vocab=32000))
MIB, GIB = 2**20, 2**30
D = optax.contrib.MuonDimensionNumbers
HEADS = {".*/[qkv]/kernel": D(-3, (-2, -1)), ".*/o/kernel": D((-3, -2), -1)}
COLUMNS = ("", "GPUs", "parameters", "sent by the optimizer, MiB", "in collectives",
           "FLOPs of the optimizer, T per device", "sent by the step, MiB", "peak, GiB")


def muon():
    dimensions = zj.muon_dimensions(stacked="blocks/.*", rules=HEADS)
    return optax.contrib.muon(0.02, muon_weight_dimension_numbers=dimensions)


@functools.cache
def plan(gpus: int, is_whole: bool) -> tuple[zj.Plan, int]:
    """Returns the plan of a step, and the number of parameters."""
    zero = zj.Zero(zj.make_mesh(topology=f"h200:1x{gpus}"), 3,
                   precision=zj.Precision(compute="bfloat16"))
    tx = zero.whole_matrices(muon()) if is_whole else muon()
    state = zero.abstract(CASE.init, tx, *CASE.example)
    batch = jax.ShapeDtypeStruct((gpus, SEQ), "int32")
    made = zero.train_step(CASE.loss, tx).plan(state, batch, cache=False).check()
    return made, sum(x.size for x in jax.tree.leaves(state.params))


def of_optimizer(op_name: str) -> bool:
    return audit.OPTIMIZER in op_name.replace("(", "/").replace(":", "/").split("/")


def row(name: str, gpus: int, is_whole: bool) -> list:
    made, size = plan(gpus, is_whole)
    moved = [c for c in made.reading.collectives
             if of_optimizer(c.op_name) and c.bytes > audit.SMALL]
    flops = schedule.total_flops(made.program, lambda i: of_optimizer(i.attribute("op_name")))
    return [name, gpus, f"{size / 1e6:.0f} M", f"{sum(c.wire_bytes for c in moved) / MIB:.0f}",
            sum(c.trips for c in moved), f"{sum(flops.values()) / 1e12:.2f}",
            f"{made.sent / MIB:.0f}", f"{made.memory.peak / GIB:.2f}"]


def matrices_table() -> str:
    rows = [row("Muon, stage 3", 8, False), row("zero.whole_matrices(Muon), stage 3", 8, True),
            row("Muon, one device", 1, False)]
    return table(COLUMNS, rows)
