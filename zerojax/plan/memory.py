"""Bytes on each device of a compiled step, by what they are for, beside ZeRO's formula.

What lies there between steps is known from the layout. Of the compiler's temporaries, gathered parameters and gradients are those
alive at the fullest moment of the program's schedule (`liveness`); the rest are activations and scratch.
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
from zerojax.plan.demand import Demand, itemsize

MARGIN = 0.1  # of the GPU's memory: CUDA's context, NCCL's buffers, fragmentation
KINDS = {"params": "parameters", "opt_state": "optimizer state", "model_state": "model state"}


def kind_of(path: str) -> str | None:
    """A leaf's kind by its path in a state, also in one of several states.

    >>> kind_of("critic/opt_state/0/mu/kernel")
    'optimizer state'
    """
    return next((KINDS[key] for key in path.split("/") if key in KINDS), None)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      kinds: compiled bytes by kind; they add up to `peak`.
      zero: ZeRO's formula for some of the kinds; None where it says nothing.
      peak: arguments, results that are not in their place, temporaries, constants.
      host: bytes in the host's memory.
      capacity: of the device; None if it is not known.
      paper: what the ZeRO paper counts for this stage: 16-bit parameters and gradients, optimizer state beside an fp32 copy.
    """

    kinds: Mapping[str, float]
    zero: Mapping[str, float | None]
    peak: float
    host: float
    capacity: float | None
    paper: float

    @property
    def usable(self) -> float | None:
        return None if self.capacity is None else (1 - MARGIN) * self.capacity

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the capacity less `MARGIN`; None if the capacity is not known."""
        return None if self.usable is None else self.peak <= self.usable

    @property
    def state(self) -> float:
        """Bytes of parameters and optimizer state, as they lie between steps."""
        return self.kinds["parameters"] + self.kinds["optimizer state"]


def account(demand: Demand, layout: Layout, batch: float, figures: Mapping[str, int], program: Program,
            capacity: float | None) -> Memory:
    """The `Memory` of a step whose state lies as `layout` says, `batch` bytes of it on each device.

    Args:
      figures: the compiler's, as in `compiler.Compiled.memory`.
    """
    at_rest = dict.fromkeys(KINDS.values(), 0.0)
    for row in layout.rows:
        kind = kind_of(row.path)
        if kind:
            at_rest[kind] += row.bytes
    fresh = figures["output"] - figures["alias"]
    peak = figures["argument"] + fresh + figures["temp"] + figures["generated_code"] + constants(program)
    alive = liveness.peak(program)
    scale = min(1.0, figures["temp"] / max(1, sum(alive.values())))  # the compiler may find more to reuse than one sees
    gathered, gradients = (scale * alive.get(kind, 0) for kind in (liveness.GATHERED, liveness.GRADIENTS))
    kinds = at_rest | {
        "batch": batch, "other arguments and results": figures["argument"] - sum(at_rest.values()) - batch + fresh,
        "gathered parameters": gathered, "gradients": gradients,
        "activations, other temporaries": figures["temp"] - gathered - gradients + figures["generated_code"],
        "constants": constants(program)}
    host = sum(figures[f"host_{name}"] for name in ("argument", "output", "temp")) - figures["host_alias"]
    return Memory(kinds, formulas(demand, layout), peak, host, capacity, _paper(demand, layout))


def constants(program: Program) -> int:
    """Bytes of the arrays that are written into the program, which the compiler's figures leave out."""
    return sum(shape.bytes for body in program.computations.values() for i in body if i.op == "constant" for shape in i.shapes)


def formulas(demand: Demand, layout: Layout) -> dict[str, float | None]:
    """ZeRO's bytes by kind, for all parameters: what leaves left whole keep beside is not in it."""
    p = demand.policy
    shards, whole_gradients = p.shards if p.stage else 1, p.stage == 0 or (p.stage == 1 and demand.per_device)
    read = _bytes(demand, lambda leaf: computed(p, leaf), "trained", "frozen")
    return {"parameters": _bytes(demand, lambda leaf: leaf.dtype, "trained", "frozen") / shards,
            "optimizer state": _optimizer(layout) / shards, "gathered parameters": read if p.stage in (1, 2) else None,
            "gradients": _bytes(demand, lambda leaf: p.precision.accumulate if demand.accumulate > 1 else leaf.dtype,
                                "trained") / (1 if whole_gradients else p.shards)}


def _paper(demand: Demand, layout: Layout) -> float:
    """With frozen parameters as 16-bit ones that have no gradient."""
    p, size = demand.policy, _size(demand, "trained")
    frozen = 2 * _size(demand, "frozen") / (p.shards if p.stage == 3 else 1)
    return frozen + theory.paper_bytes(size, p.shards, p.stage, optimizer=4 + _optimizer(layout) / max(1, size))


def _bytes(demand: Demand, dtype: Callable[[Leaf], str], *groups: str) -> int:
    return sum(n * itemsize(dtype(leaf)) for leaf, n in _sizes(demand, groups))


def _size(demand: Demand, *groups: str) -> int:
    return sum(n for _, n in _sizes(demand, groups))


def _sizes(demand: Demand, groups: Collection[str]) -> Iterator[tuple[Leaf, int]]:
    for leaf, place in zip(demand.leaves, demand.places, strict=True):
        if leaf.group in groups:
            yield leaf, math.prod(demand.local(leaf, place))


def _optimizer(layout: Layout) -> float:
    """Bytes of the optimizer state if ZeRO left it whole; axes of the model's own still divide it."""
    return sum(row.gathered_bytes for row in layout.rows if kind_of(row.path) == KINDS["opt_state"])
