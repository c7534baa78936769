"""Bytes on each device of a compiled step, by purpose, beside ZeRO's formula.

The layout gives the bytes between steps. Of the compiler's temporaries, gathered parameters and
gradients are those alive at the peak of the program's schedule (`liveness`); the rest are
activations and scratch.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping

from zerojax.hlo import liveness
from zerojax.hlo.program import Program
from zerojax.layout.placement import computed
from zerojax.layout.report import Layout
from zerojax.layout.rules import Leaf
from zerojax.plan import theory
from zerojax.plan.demand import Demand
from zerojax.plan.reading import Reading
from zerojax.trees import itemsize

MARGIN = 0.1  # of the GPU's memory: CUDA's context, NCCL's buffers, fragmentation
KINDS = {"params": "parameters", "opt_state": "optimizer state", "model_state": "model state"}


def kind_of(path: str) -> str | None:
    """Returns a leaf's kind by its path in a state, or in one of several states.

    >>> kind_of("critic/opt_state/0/mu/kernel")
    'optimizer state'
    """
    return next((KINDS[key] for key in path.split("/") if key in KINDS), None)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      kinds: compiled bytes by kind; they add up to `peak`.
      zero: the bytes by ZeRO's formula; None or missing for the kinds that have no formula.
      peak: arguments, results that do not take an argument's place, temporaries, constants.
      host: bytes in the host's memory.
      capacity: bytes of device memory; None if they are not known.
      paper: the ZeRO paper's bytes for this stage: 16-bit parameters and gradients, and optimizer
        state with an fp32 copy.
    """

    kinds: Mapping[str, float]
    zero: Mapping[str, float | None]
    peak: float
    host: float
    capacity: float | None
    paper: float

    @property
    def usable(self) -> float | None:
        """The capacity less `MARGIN`; None if the capacity is not known."""
        return None if self.capacity is None else (1 - MARGIN) * self.capacity

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the capacity less `MARGIN`; None if the capacity is not
        known."""
        return None if self.usable is None else self.peak <= self.usable

    @property
    def state(self) -> float:
        """Bytes of parameters and optimizer state between steps."""
        return self.kinds["parameters"] + self.kinds["optimizer state"]


def account(reading: Reading) -> Memory:
    """Returns the `Memory` of a compiled step."""
    figures, fixed = reading.figures, constants(reading.program)
    at_rest = _at_rest(reading.layout)
    known = sum(at_rest.values()) + reading.batch_bytes
    # the program leaves out the arguments that it does not read; they are in memory nonetheless
    arguments = max(figures["argument"], known)
    fresh = figures["output"] - figures["alias"]
    temporary = figures["temp"] + figures["generated_code"]
    moving = _alive(reading)
    kinds = at_rest | {
        "batch": reading.batch_bytes,
        "other arguments and results": arguments - known + fresh,
        **moving,
        # rounding can make the difference negative
        "activations, other temporaries": max(0.0, temporary - sum(moving.values())),
        "constants": fixed}
    host = sum(figures[f"host_{name}"] for name in ("argument", "output", "temp"))
    capacity = reading.topology and reading.topology.gpu.memory
    return Memory(kinds, formulas(reading.demand, reading.layout),
                  arguments + fresh + temporary + fixed, host - figures["host_alias"],
                  capacity, _paper(reading.demand, reading.layout))


def _at_rest(layout: Layout) -> dict[str, float]:
    kinds = dict.fromkeys(KINDS.values(), 0.0)
    for row in layout.rows:
        if kind := kind_of(row.path):
            kinds[kind] += row.bytes
    return kinds


def _alive(reading: Reading) -> dict[str, float]:
    """Returns the bytes of gathered parameters and gradients at the peak, never more than the
    compiler's total."""
    alive = liveness.peak(reading.program)
    scale = min(1.0, reading.figures["temp"] / max(1, sum(alive.values())))
    return {"gathered parameters": scale * alive.get(liveness.GATHERED, 0),
            "gradients": scale * alive.get(liveness.GRADIENTS, 0)}


def constants(program: Program) -> int:
    """Returns the bytes of the arrays that are written into the program, which the compiler's
    figures leave out."""
    return sum(shape.bytes for body in program.computations.values() for i in body
               if i.op == "constant" for shape in i.shapes)


def formulas(demand: Demand, layout: Layout) -> dict[str, float | None]:
    """Returns ZeRO's bytes by kind, as if every parameter were sharded."""
    p = demand.policy
    shards = p.shards if p.stage else 1
    whole_gradients = p.stage == 0 or (p.stage == 1 and demand.per_device)

    def read(leaf):
        return computed(p, leaf)

    def gradient(leaf):
        return p.precision.accumulate if demand.accumulate > 1 else leaf.dtype

    gradients = _bytes(demand, gradient, "trained") / (1 if whole_gradients else p.shards)
    return {"parameters": _bytes(demand, lambda leaf: leaf.dtype, "trained", "frozen") / shards,
            "optimizer state": _optimizer(layout) / shards,
            "gathered parameters":
                _bytes(demand, read, "trained", "frozen") if p.stage in (1, 2) else None,
            "gradients": gradients if demand.differentiates else None}


def _paper(demand: Demand, layout: Layout) -> float:
    """Returns the paper's bytes; frozen parameters count as 16-bit ones without a gradient."""
    p, size = demand.policy, _size(demand, "trained")
    frozen = 2 * _size(demand, "frozen") / (p.shards if p.stage == 3 else 1)
    optimizer = 4 + _optimizer(layout) / max(1, size)
    return frozen + theory.paper_bytes(size, p.shards, p.stage, optimizer=optimizer)


def _bytes(demand: Demand, dtype: Callable[[Leaf], str], *groups: str) -> int:
    return sum(n * itemsize(dtype(leaf)) for leaf, n in _sizes(demand, groups))


def _size(demand: Demand, *groups: str) -> int:
    return sum(n for _, n in _sizes(demand, groups))


def _sizes(demand: Demand, groups: Collection[str]) -> Iterator[tuple[Leaf, int]]:
    for leaf, place in zip(demand.leaves, demand.places, strict=True):
        if leaf.group in groups:
            yield leaf, math.prod(demand.local(leaf, place))


def _optimizer(layout: Layout) -> float:
    """Returns the bytes of the optimizer state if ZeRO left it whole; the model's own axes still
    divide it."""
    return sum(row.gathered_bytes for row in layout.rows if kind_of(row.path) == KINDS["opt_state"])
