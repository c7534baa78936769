"""What a plan costs: a scanned transformer of 24 layers and 7 B parameters, stage 3, for clusters of many sizes."""

import pathlib
import resource
import sys
import time

import jax
import optax
from machine import table

import zerojax as zj
from zerojax.hlo import collectives, liveness, schedule
from zerojax.hlo.program import parse
from zerojax.plan.plan import speed_of

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
import models

MODEL, SEQ, TX = models.Transformer(width=4096, layers=24, vocab=2**18), 2048, optax.adamw(1e-4)
CASE = models.language(MODEL)


def plan(gpus: int) -> tuple[float, float, zj.Plan]:
    """(seconds in all, of which tracing the model's shapes, the plan)."""
    start = time.perf_counter()
    zero = zj.Zero(zj.make_mesh(topology=f"h200:{max(1, gpus // 8)}x{min(8, gpus)}"), 3, precision=zj.Precision(compute="bfloat16"))
    state = zero.abstract(CASE.init, TX, *CASE.example)
    middle = time.perf_counter()
    made = zero.train_step(CASE.loss, TX).plan(state, jax.ShapeDtypeStruct((gpus, SEQ), "int32"), cache=False)
    return time.perf_counter() - start, middle - start, made.check()


def reading(made: zj.Plan) -> float:
    """Seconds to parse the program, find its collectives, simulate it and follow its buffers."""
    start = time.perf_counter()
    program = parse(made.hlo)
    found = collectives.of(program)
    schedule.simulate(program, speed_of(zj.Topology.parse("h200:8x8")), found)
    liveness.peak(program)
    return time.perf_counter() - start


def plans_table(sizes=(8, 64, 512, 4096)) -> str:
    rows = []
    for gpus in sizes:
        seconds, shapes, made = plan(gpus)
        read = reading(made)
        rows.append([gpus, f"{seconds:.1f}", f"{shapes:.1f}", f"{made.compile_seconds:.1f}", f"{read:.2f}",
                     f"{read / made.compile_seconds:.1%}", f"{made.memory.peak / 2**30:.2f}", f"{made.sent / 2**30:.1f}",
                     f"{made.zero_bytes / 2**30:.1f}"])
    peak = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    columns = ["GPUs", "plan, s (aim 60)", "shapes of the state, s", "compiler, s", "reading the program, s",
               "of the compiler's (aim 5 %)", "peak a GPU, GiB", "sent, GiB", "ZeRO's, GiB"]
    return table(columns, rows) + (f"\nMemory of this machine: {peak[0]:.2f} GiB in the planning process, {peak[1]:.2f} GiB in the "
                                   "largest compiling one (aim 4).\n")
