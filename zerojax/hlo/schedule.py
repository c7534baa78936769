"""An estimate of when each instruction of a compiled program runs.

Instructions run in the order of the text, each as long as its operations or its bytes take,
whichever is longer. Collectives run beside them from their start to their done, one at a time.
Needs no devices and no jax.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from zerojax.hlo import cost
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Instruction, Program

PRODUCTS = 0.7  # of the dense peak
MEMORY = 0.85  # of the memory's bandwidth
LINKS = 0.8  # of the bandwidth of links
LAUNCH = 2e-6  # s per kernel
LATENCY = 10e-6  # s per collective
ASSUMPTIONS = (f"products at {PRODUCTS:.0%} of the GPU's dense peak, memory at {MEMORY:.0%} and "
               f"links at {LINKS:.0%} of their bandwidth, {LAUNCH * 1e6:.0f} us per kernel, "
               f"{LATENCY * 1e6:.0f} us per collective, collectives one at a time")
_ENTERED = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one GPU.

    Attributes:
      flops: the operations/s of a dtype.
      bandwidth: bytes/s of its memory.
      link, network: bytes/s that it sends within a host, and between hosts.
      per_host: the number of GPUs in a host.
    """

    flops: Callable[[str], float]
    bandwidth: float
    link: float
    network: float
    per_host: int


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
    """Returns the seconds of one trip of a collective: a ring over its group, all links in use.

    Between hosts, a group has the network bandwidth of all its members in one host, but at most
    that of a link.
    """
    group = c.groups[0] if c.groups else (0,)
    here = max(collections.Counter(d // speed.per_host for d in group).values())
    rate = speed.link if here == len(group) else min(speed.link, speed.network * here)
    return c.wire_bytes / c.trips / (rate * LINKS) + LATENCY


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
      network: seconds at which the last collective ends.
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
        self.network = 0.0
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
        begin = max(self.now, self.network)
        self.network = begin + transfer(self.speed, c)
        self.open[c.name] = self.network
        self.beside[c.name] = []
        self.spans.append(Span(c.name, "network", begin, self.network))
        if not c.asynchronous:
            self._wait(c.name)

    def _wait(self, name: str) -> None:
        end = self.open.pop(name)
        self.exposed[name] = max(0.0, end - self.now)
        self.busy["network"] += self.exposed[name]
        self.now = max(self.now, end)

    def _advance(self, name: str, of: str, seconds: float) -> None:
        self.spans.append(Span(name, of, self.now, self.now + seconds))
        self.now += seconds
        for running in self.open:
            self.beside[running].append(name)

    def _inner(self, inst: Instruction) -> None:
        runs = [self.run(name) for name in inst.called if name in self.program.computations]
        longest = max(runs, key=lambda run: run.seconds)
        for of, seconds in longest.busy.items():
            self.busy[of] += inst.trips * seconds
        most = max(longest.busy, key=longest.busy.__getitem__)
        self._advance(inst.name, most, inst.trips * longest.seconds)

    def _compute(self, inst: Instruction) -> None:
        counts = cost.flops(self.program, inst, self.name)
        products = sum(n / (self.speed.flops(dtype) * PRODUCTS)
                       for (dtype, _), n in counts.items())
        touched = cost.touched(self.program, inst, self.name)
        memory = touched / (self.speed.bandwidth * MEMORY)
        of = "compute" if products > memory else "memory"
        self.busy[of] += max(products, memory)
        self.busy["launch"] += LAUNCH
        self._advance(inst.name, of, max(products, memory) + LAUNCH)


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
