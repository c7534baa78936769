"""Compiler options that hide the network: `zj.tune` for a scanned and for an unrolled transformer.

The estimates are those of plans, for 64 H100s in 8 hosts, with 2 sequences of 2048 on each GPU.
"""

import functools
import pathlib
import sys

import jax
import optax
from machine import table

import zerojax as zj
from zerojax.tuning import Attempt, Tuning

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
import models

TOPOLOGY, ROWS, SEQ = "h100:8x8", 2, 2048
SCANNED = models.Transformer(width=4096, layers=32, vocab=32_000)
UNROLLED = models.Transformer(scanned=False, width=3072, layers=8, vocab=32_000)
CASES = {  # with `min_shard`; at 2**18, the scanned norms stay whole
    "7 B parameters, 32 scanned layers": (SCANNED, 2**16),
    "the same with `min_shard=2**18`": (SCANNED, 2**18),
    "1 B parameters, 8 unrolled layers": (UNROLLED, 2**16),
}
AIM_EXPOSED, AIM_PEAK = 20e-3, 1.15  # for 7 B: seconds, and times the default's peak
COLUMNS = ("options", "exposed, ms", "of the network's, ms", "step, ms", "MFU", "peak, GiB",
           "of the default's peak")


def recipe(model: models.Transformer) -> zj.Recipe:
    case = models.language(model)

    def batch(parts: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS * parts, SEQ), "int32")

    return zj.Recipe(functools.partial(case.init, *case.example), case.loss, optax.adamw(1e-4),
                     batch)


def rows(found: Tuning) -> list[list[str]]:
    """Returns the attempts that have a plan, fastest first."""
    planned = sorted((a for a in found.tried if a.plan), key=lambda attempt: attempt.seconds)
    return [_row(attempt, found.tried[0]) for attempt in planned]


def _row(attempt: Attempt, default: Attempt) -> list[str]:
    plan = attempt.plan
    network = sum(t.seconds for t in plan.communication)
    return [attempt.name, f"{1e3 * attempt.exposed:.1f}", f"{1e3 * network:.0f}",
            f"{1e3 * attempt.seconds:.0f}", f"{plan.compute.mfu:.0%}",
            f"{plan.memory.peak / 2**30:.2f}", f"{plan.memory.peak / default.plan.memory.peak:.2f}"]


def tuning_table() -> str:
    parts = []
    for name, (model, min_shard) in CASES.items():
        found = zj.tune(recipe(model), TOPOLOGY, min_shard=min_shard)
        parts.append(f"### {name}\n\n{table(COLUMNS, rows(found))}")
    aims = (f"Aims for 7 B: at most {1e3 * AIM_EXPOSED:.0f} ms exposed, at most {AIM_PEAK} times "
            "the default's peak.")
    return "\n".join([*parts, aims, ""])
