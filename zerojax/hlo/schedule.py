"""A compiled program's schedule: an estimate of what runs when.

Instructions run in the order of the text, each as long as its operations or its bytes take, whichever is longer; collectives
run beside them from their start to their done, one after the other. Needs no devices and no jax.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping

from zerojax.hlo import cost
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Instruction, Program

PRODUCTS, MEMORY, LINKS, LAUNCH, LATENCY = 0.7, 0.85, 0.8, 2e-6, 10e-6
ASSUMPTIONS = (f"products at {PRODUCTS:.0%} of the GPU's dense peak, memory at {MEMORY:.0%} and links at {LINKS:.0%} of theirs, "
               f"{LAUNCH * 1e6:.0f} us a kernel, {LATENCY * 1e6:.0f} us a collective, these one at a time")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of one GPU: operations/s by dtype, bytes/s of its memory, and bytes/s it sends within a host and between hosts."""

    flops: Callable[[str], float]
    bandwidth: float
    link: float
    network: float
    per_host: int


@dataclasses.dataclass(frozen=True)
class Span:
    """One instruction's time, in seconds from the start of its computation; `of` is "compute", "memory" or "network"."""

    name: str
    of: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution of a computation, loops in it included.

    Attributes:
      seconds: all of it.
      busy: seconds by "compute" (bound by operations), "memory" (by bytes), "launch" of kernels, and "network" (exposed:
        nothing else runs).
      spans: of this computation alone, loops as one span.
      exposed: seconds each collective keeps the rest waiting, once, by name.
      beside: of each collective, names of what runs while it does.
    """

    seconds: float
    busy: Mapping[str, float]
    spans: tuple[Span, ...]
    exposed: Mapping[str, float]
    beside: Mapping[str, tuple[str, ...]]


def transfer(speed: Speed, c: Collective) -> float:
    """Seconds that one execution of a collective takes by a ring over its group, links all in use.

    Between hosts a group is as fast as the network of its members in one host together, and never faster than a link.
    """
    group = c.groups[0] if c.groups else (0,)
    here = max(collections.Counter(d // speed.per_host for d in group).values())
    rate = speed.link if here == len(group) else min(speed.link, speed.network * here)
    return c.wire_bytes / c.trips / (rate * LINKS) + LATENCY


def simulate(program: Program, speed: Speed, found: tuple[Collective, ...]) -> dict[str, Run]:
    """A `Run` for each computation that the program executes in its own right: the entry, and what loops and branches call."""
    known, runs = {c.name: c for c in found}, {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = _Clock(program, name, speed, known, run).all()
        return runs[name]

    run(program.entry)
    return runs


class _Clock:
    """Time in one computation: of the device, and until when the network is taken."""

    def __init__(self, program: Program, name: str, speed: Speed, known: Mapping[str, Collective], run: Callable[[str], Run]):
        self.program, self.name, self.speed, self.known, self.run = program, name, speed, known, run
        self.now = self.network = 0.0
        self.busy: dict[str, float] = {"compute": 0.0, "memory": 0.0, "launch": 0.0, "network": 0.0}
        self.spans, self.exposed, self.open, self.beside = [], {}, {}, {}

    def all(self) -> Run:
        for inst in self.program.computations[self.name]:
            self._one(inst)
        return Run(self.now, self.busy, tuple(self.spans), self.exposed, {k: tuple(v) for k, v in self.beside.items()})

    def _one(self, inst: Instruction) -> None:
        if inst.name in self.known:
            self._start(self.known[inst.name])
        elif inst.op.endswith("-done") and inst.operands and inst.operands[0] in self.open:
            self._wait(inst.operands[0])
        elif inst.op in ("while", "call", "conditional"):
            self._inner(inst)
        elif inst.op not in cost.FREE:
            self._compute(inst)

    def _start(self, c: Collective) -> None:
        begin = max(self.now, self.network)
        self.network = self.open[c.name] = begin + transfer(self.speed, c)
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
        inner = max((self.run(called) for called in inst.called if called in self.program.computations), key=lambda r: r.seconds)
        for of, seconds in inner.busy.items():
            self.busy[of] += inst.trips * seconds
        self._advance(inst.name, max(inner.busy, key=inner.busy.__getitem__), inst.trips * inner.seconds)

    def _compute(self, inst: Instruction) -> None:
        products = sum(n / (self.speed.flops(t) * PRODUCTS) for (t, _), n in cost.flops(self.program, inst, self.name).items())
        memory = cost.touched(self.program, inst, self.name) / (self.speed.bandwidth * MEMORY)
        of = "compute" if products > memory else "memory"
        self.busy[of] += max(products, memory)
        self.busy["launch"] += LAUNCH
        self._advance(inst.name, of, max(products, memory) + LAUNCH)


def total_flops(program: Program) -> collections.Counter:
    """Operations of one execution, on one device, by (dtype, whether a rematerialised block does them again)."""
    total = collections.Counter()
    for name in _executed(program):
        for inst in program.computations[name]:
            for key, n in cost.flops(program, inst, name).items():
                total[key] += n * program.times[name]
    return total


def _executed(program: Program) -> list[str]:
    """The entry, and the bodies of loops and branches: what is scheduled by itself."""
    names, queue = [], [program.entry]
    while queue:
        names.append(queue.pop())
        queue += [c for i in program.computations[names[-1]] if i.op in ("while", "call", "conditional") for c in i.called]
    return list(dict.fromkeys(names))
