"""An estimate of when each instruction of a compiled program runs.

Instructions run in the order of the text, each as long as its operations or its bytes take,
whichever is longer. Collectives run beside them from their start to their done. Those that are open
at the same time share the bandwidth, but each has its latency beside the others.
Needs no devices and no jax.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from zerojax.hlo import cost, network
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Instruction, Program
from zerojax.hlo.speed import ATTENTION, BESIDE, LAUNCH, LINKS, MEMORY, PRODUCTS, Speed

ASSUMPTIONS = (
    f"products at {PRODUCTS:.0%} and cuDNN's attention at {ATTENTION:.0%} of the GPU's dense peak, "
    f"memory at {MEMORY:.0%} and links at {LINKS:.0%} of their bandwidth, {LAUNCH * 1e6:.0f} us "
    f"per kernel, NCCL's latencies, kernels at {BESIDE:.0%} of their speed while a collective runs")
_ENTERED = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Span:
    """The time of one instruction, in seconds from the start of its computation.

    Attributes:
      of: "compute", "memory" or "network".
    """

    name: str
    of: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution of a computation, including the loops in it.

    Attributes:
      seconds: the total time.
      busy: seconds by "compute" (limited by operations), "memory" (limited by bytes), "launch" of
        kernels, and "network" (exposed: nothing else runs).
      spans: those of this computation alone; a loop is one span.
      exposed: seconds for which the rest waits for each collective, by name, for one trip.
      beside: names of the instructions that run during each collective.
    """

    seconds: float
    busy: Mapping[str, float]
    spans: tuple[Span, ...]
    exposed: Mapping[str, float]
    beside: Mapping[str, tuple[str, ...]]


def transfer(speed: Speed, c: Collective) -> float:
    """Returns the seconds of one trip of a collective."""
    return network.transfer(speed, c).seconds


def simulate(program: Program, speed: Speed, found: tuple[Collective, ...]) -> dict[str, Run]:
    """Returns a `Run` for each computation with a schedule of its own.

    These are the entry, and the computations that loops, calls and conditionals enter.
    """
    known = {c.name: c for c in found}
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = _Clock(program, name, speed, known, run).all()
        return runs[name]

    run(program.entry)
    return runs


class _Clock:
    """The time in one computation.

    Attributes:
      now: seconds of the device.
      free: seconds at which the links are free again, within and between hosts.
      open: the end of each collective that has started and not been waited for.
    """

    def __init__(self, program: Program, name: str, speed: Speed, known: Mapping[str, Collective],
                 run: Callable[[str], Run]):
        self.program = program
        self.name = name
        self.speed = speed
        self.known = known
        self.run = run
        self.now = 0.0
        self.free = {"link": 0.0, "network": 0.0}
        self.open: dict[str, float] = {}
        self.busy: dict[str, float] = {"compute": 0.0, "memory": 0.0, "launch": 0.0, "network": 0.0}
        self.spans: list[Span] = []
        self.exposed: dict[str, float] = {}
        self.beside: dict[str, list[str]] = {}

    def all(self) -> Run:
        """Runs all instructions."""
        for inst in self.program.computations[self.name]:
            self._one(inst)
        beside = {name: tuple(names) for name, names in self.beside.items()}
        return Run(self.now, self.busy, tuple(self.spans), self.exposed, beside)

    def _one(self, inst: Instruction) -> None:
        if inst.name in self.known:
            self._start(self.known[inst.name])
        elif inst.op.endswith("-done") and inst.operands and inst.operands[0] in self.open:
            self._wait(inst.operands[0])
        elif inst.op in _ENTERED:
            self._inner(inst)
        elif inst.op not in cost.FREE:
            self._compute(inst)

    def _start(self, c: Collective) -> None:
        takes = network.transfer(self.speed, c)
        begin = max(self.now, self.free[takes.link])
        self.free[takes.link] = begin + takes.occupied
        self.open[c.name] = begin + takes.seconds
        self.beside[c.name] = []
        self.spans.append(Span(c.name, "network", begin, self.open[c.name]))
        if not c.asynchronous:
            self._wait(c.name)

    def _wait(self, name: str) -> None:
        end = self.open.pop(name)
        self.exposed[name] = max(0.0, end - self.now)
        self.busy["network"] += self.exposed[name]
        self.now = max(self.now, end)

    def _advance(self, name: str, parts: Mapping[str, float]) -> None:
        """Lets the seconds of an instruction pass, given by what limits them."""
        seconds = sum(parts.values())
        takes = self._slowed(seconds)
        for of, part in parts.items():
            self.busy[of] += part * takes / seconds if seconds else 0.0
        most = max((of for of in parts if of != "launch"), key=parts.__getitem__)
        self.spans.append(Span(name, most, self.now, self.now + takes))
        self.now += takes
        for running in self.open:
            self.beside[running].append(name)

    def _slowed(self, seconds: float) -> float:
        """Returns the seconds that something takes of which a part is beside a collective."""
        left = max(0.0, max(self.open.values(), default=0.0) - self.now)
        beside = min(seconds, left * self.speed.beside)
        return seconds + beside * (1 / self.speed.beside - 1)

    def _inner(self, inst: Instruction) -> None:
        runs = [self.run(name) for name in inst.called if name in self.program.computations]
        longest = max(runs, key=lambda run: run.seconds)
        self._advance(inst.name, {of: inst.trips * part for of, part in longest.busy.items()})

    def _compute(self, inst: Instruction) -> None:
        reached = {"product": self.speed.products, "attention": self.speed.attention}
        found = cost.products(self.program, inst, self.name)
        products = sum(p.flops / (self.speed.flops(p.dtype) * reached[p.kind]) for p in found)
        memory = (cost.touched(self.program, inst, self.name)
                  / (self.speed.bandwidth * self.speed.memory))
        of = "compute" if products > memory else "memory"
        self._advance(inst.name, {of: max(products, memory), "launch": self.speed.launch})


def total_flops(program: Program,
                wanted: Callable[[Instruction], Any] = bool) -> collections.Counter:
    """Returns the operations of the `wanted` instructions in one execution on one device.

    The keys are (dtype, whether rematerialization repeats them).
    """
    total = collections.Counter()
    for name in _executed(program):
        for inst in filter(wanted, program.computations[name]):
            for key, n in cost.flops(program, inst, name).items():
                total[key] += n * program.times[name]
    return total


def _executed(program: Program) -> list[str]:
    """Returns the computations with a schedule of their own: the entry, and those it enters."""
    names, queue = [], [program.entry]
    while queue:
        names.append(queue.pop())
        for inst in program.computations[names[-1]]:
            if inst.op in _ENTERED:
                queue += inst.called
    return list(dict.fromkeys(names))
