"""The cost of a plan: a scanned transformer of 24 layers and 7 B parameters at stage 3."""

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
from zerojax.plan.reading import speed_of

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
import models

SEQ = 2048
TX = optax.adamw(1e-4)
CASE = models.language(models.Transformer(width=4096, layers=24, vocab=2**18))
GIB = 2**30
COLUMNS = ("GPUs", "plan, s (aim 60)", "state shapes, s", "compiler, s", "program analysis, s",
           "analysis / compiler (aim 5 %)", "peak per GPU, GiB", "sent, GiB", "predicted, GiB")


def plan(gpus: int) -> tuple[float, float, zj.Plan]:
    """Returns the plan, with the seconds in total and those for the shapes of the state."""
    start = time.perf_counter()
    mesh = zj.make_mesh(topology=f"h200:{max(1, gpus // 8)}x{min(8, gpus)}")
    zero = zj.Zero(mesh, 3, precision=zj.Precision(compute="bfloat16"))
    state = zero.abstract(CASE.init, TX, *CASE.example)
    middle = time.perf_counter()
    batch = jax.ShapeDtypeStruct((gpus, SEQ), "int32")
    made = zero.train_step(CASE.loss, TX).plan(state, batch, cache=False)
    return time.perf_counter() - start, middle - start, made.check()


def analysis(made: zj.Plan) -> float:
    """Returns the seconds to parse and simulate the program, and to follow its buffers."""
    start = time.perf_counter()
    program = parse(made.hlo)
    found = collectives.of(program)
    schedule.simulate(program, speed_of(zj.Topology.parse("h200:8x8")), found)
    liveness.peak(program)
    return time.perf_counter() - start


def plans_table(sizes=(8, 64, 512, 4096)) -> str:
    rows = []
    for gpus in sizes:
        total, shapes, made = plan(gpus)
        analysed, compiled = analysis(made), made.compile_seconds
        rows.append([gpus, f"{total:.1f}", f"{shapes:.1f}", f"{compiled:.1f}", f"{analysed:.2f}",
                     f"{analysed / compiled:.1%}", f"{made.memory.peak / GIB:.2f}",
                     f"{made.sent / GIB:.1f}", f"{made.zero_bytes / GIB:.1f}"])
    return (f"{table(COLUMNS, rows)}\nPeak host memory: {_peak(resource.RUSAGE_SELF):.2f} GiB in "
            f"the planning process, {_peak(resource.RUSAGE_CHILDREN):.2f} GiB in the largest "
            "compiler process (aim 4).\n")


def _peak(who: int) -> float:
    """Returns the peak resident memory in GiB."""
    return resource.getrusage(who).ru_maxrss / 2**20
