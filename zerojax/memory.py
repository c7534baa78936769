"""Bytes on each device of a compiled step, by what they are for, beside ZeRO's formula.

What lies there between steps is known from the layout. Of the compiler's temporaries, gathered parameters and gradients are those
alive at the fullest moment of the program's schedule (`liveness`); the rest are activations and scratch.
"""

import dataclasses
import math
from collections.abc import Mapping

from zerojax import liveness, theory
from zerojax.audit import Demand
from zerojax.hlo import Program
from zerojax.layout import Layout

MARGIN = 0.1  # of the GPU's memory: CUDA's context, NCCL's buffers, fragmentation
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
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
      peak: arguments, results that are not in their place, temporaries.
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
    peak = figures["argument"] + fresh + figures["temp"] + figures["generated_code"]
    alive = liveness.peak(program)
    scale = min(1.0, figures["temp"] / max(1, sum(alive.values())))  # the compiler may find more to reuse than one sees
    gathered, gradients = (scale * alive.get(kind, 0) for kind in (liveness.GATHERED, liveness.GRADIENTS))
    kinds = at_rest | {
        "batch": batch, "other arguments and results": figures["argument"] - sum(at_rest.values()) - batch + fresh,
        "gathered parameters": gathered, "gradients": gradients,
        "activations, other temporaries": figures["temp"] - gathered - gradients + figures["generated_code"]}
    host = sum(figures[f"host_{name}"] for name in ("argument", "output", "temp")) - figures["host_alias"]
    return Memory(kinds, formulas(demand, layout), peak, host, capacity, _paper(demand, layout))


def formulas(demand: Demand, layout: Layout) -> dict[str, float | None]:
    """ZeRO's bytes by kind, for all parameters: what leaves left whole keep beside is not in it."""
    p = demand.policy
    size, shards = _size(demand), p.shards if p.stage else 1
    whole_gradients = p.stage == 0 or (p.stage == 1 and demand.per_device)
    itemsize = ITEMSIZE[p.precision.accumulate if demand.accumulate > 1 else p.precision.params]
    gathered = {1: size * ITEMSIZE[p.precision.computes], 2: size * ITEMSIZE[p.precision.computes]}.get(p.stage)
    return {"parameters": theory.rest_bytes(size, p.shards, p.stage, param_bytes=ITEMSIZE[p.precision.params], optimizer=0),
            "optimizer state": _optimizer(layout) / shards, "gathered parameters": gathered,
            "gradients": size * itemsize / (1 if whole_gradients else p.shards)}


def _paper(demand: Demand, layout: Layout) -> float:
    size = _size(demand)
    return theory.paper_bytes(size, demand.policy.shards, demand.policy.stage, optimizer=4 + _optimizer(layout) / size)


def _size(demand: Demand) -> int:
    return sum(math.prod(demand.local(leaf, place)) for leaf, place in zip(demand.leaves, demand.places, strict=True))


def _optimizer(layout: Layout) -> float:
    """Bytes of the optimizer state if ZeRO left it whole; axes of the model's own still divide it."""
    return sum(row.gathered_bytes for row in layout.rows if kind_of(row.path) == KINDS["opt_state"])
