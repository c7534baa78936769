"""One thing that a user should know about a compiled step."""

import dataclasses

from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Shape
from zerojax.plan import provenance
from zerojax.plan.demand import Demand
from zerojax.tables import size

_STRUCTURE = {"", "call_exported", "while", "body", "cond", "closed_call", "eval_jaxpr",
              "checkpoint", "rematted_computation"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
      what: a sentence that describes it, with advice.
      bytes: the bytes that each device sends or keeps because of it.
      instruction: its name in the compiled program; empty for a finding about the whole program.
      source: the user's line that causes it, "file:line"; empty if it is not known.
      wrong: whether ZeRO does not explain it, so that `Plan.check` raises.
    """

    what: str
    bytes: float = 0.0
    instruction: str = ""
    source: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        return self.what + (f" From {provenance.readable(self.source)}" if self.source else "")


def moved(demand: Demand, c: Collective, s: Shape, why: str) -> Finding:
    """Returns the finding about one array of a collective."""
    axes = c.axes(demand.policy.mesh.shape)
    over = f"over {', '.join(axes)}" if axes else f"in {len(c.groups)} groups of {c.size}"
    module = _module(c.op_name)
    what = f"{c.kind} of {s} {over}, {c.trips} x, {size(c.wire(s))} sent per step"
    what += f"; {module}" if module else ""
    return Finding(f"{c.name} ({what}): {why}.", c.wire(s), c.name,
                   provenance.source(c.frames), True)


def _module(op_name: str) -> str:
    """Returns the path of the module that asked for an operation; of the first, if several were
    combined.

    >>> _module("jit(step)/jvp(M)/while/body/blocks/up/dot_general")
    'blocks/up/dot_general'
    """
    first = op_name.replace("/(", "/").removesuffix(")").split(":")[0]
    return "/".join(part for part in first.split("/") if "(" not in part and part not in _STRUCTURE)
