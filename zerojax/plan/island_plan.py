"""The plan of islands: a step, in which no collective may cross them, and the average of a round.

Local SGD (arXiv 1808.07217) and DiLoCo (arXiv 2311.08105) send an all-reduce of the parameters
between islands once in a round, in place of one of the gradients in each step.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from zerojax import tables
from zerojax.hlo.collectives import Collective
from zerojax.plan import finding
from zerojax.plan.finding import Finding
from zerojax.plan.plan import Plan
from zerojax.tables import Sheet, size

SLACK, TINY = 1.02, 2**10  # an average may send this times the theory, and these bytes, more


@dataclasses.dataclass(frozen=True, repr=False)
class IslandsPlan(tables.Printed):
    """The cost of islands per device. Prints as tables; `check` raises if it is not ZeRO's and
    theirs.

    Attributes:
      step: the plan of a step, which each island makes alone.
      average: the plan of the average at the end of a round.
      axis: the mesh axis over which the islands are split.
      islands: their number.
      every: the number of steps in a round.
      round_bytes: the bytes that each device sends for an average in theory.
    """

    step: Plan
    average: Plan
    axis: str
    islands: int
    every: int
    round_bytes: float

    @classmethod
    def of(cls, step: Plan, average: Plan, axis: str, islands: int, every: int,
           round_bytes: float) -> "IslandsPlan":
        """Returns the plan of islands, with findings about what crosses them."""
        crossing, others = _crossing(step, axis), _others(average, axis, round_bytes)
        step = dataclasses.replace(step, findings=(*crossing, *step.findings))
        average = dataclasses.replace(average, findings=(*others, *average.findings),
                                      zero_bytes=round_bytes)
        return cls(step, average, axis, islands, every, round_bytes)

    @property
    def sent(self) -> float:
        """Bytes that each device sends per step, with its share of an average."""
        return self.step.sent + self.average.sent / self.every

    @property
    def fits(self) -> bool | None:
        """Whether both programs fit; None if the capacity is not known."""
        return None if self.step.fits is None else bool(self.step.fits and self.average.fits)

    def check(self, allow: str | None = None) -> "IslandsPlan":
        """Returns the plan if ZeRO explains a step and nothing else crosses islands.

        Args:
          allow: regex for findings to accept, as for `Plan.check`.

        Raises:
          PlanError: otherwise; a collective that crosses islands within a step is such a finding.
        """
        self.step.check(allow)
        self.average.check(allow)
        return self

    def parts(self) -> list:
        return [*self.step.parts(), "", *self._sheet().parts(),
                *(f"! {f}" for f in self.average.findings if f.wrong)]

    def _sheet(self) -> Sheet:
        rows = [(t.kind, t.dtype, ", ".join(t.axes or ("other groups",)), size(t.bytes),
                 "" if t.seconds is None else tables.seconds(t.seconds))
                for t in self.average.communication]
        rows.append(("in theory", "", "", size(self.round_bytes), ""))
        rows.append((f"per step, 1 / {self.every}", "", "",
                     size(self.average.sent / self.every), ""))
        return Sheet(f"sent by each device at the average of {self.islands} islands, every "
                     f"{self.every} steps", ("", "dtype", "over", "sent", "takes"), tuple(rows))


def _crossing(step: Plan, axis: str) -> Iterator[Finding]:
    for c in _between(step, axis):
        yield finding.moved(step.reading.demand, c, c.shapes[0],
                            "it crosses islands, which should train alone within a round")


def _others(average: Plan, axis: str, round_bytes: float) -> Iterator[Finding]:
    between = _between(average, axis)
    for c in between:
        if c.kind != "all-reduce":
            yield finding.moved(average.reading.demand, c, c.shapes[0],
                                "an average of islands needs only all-reduces")
    sent = sum(c.wire_bytes for c in between)
    if sent > SLACK * round_bytes + TINY:
        yield Finding(f"an average sends {size(sent)} between islands, not {size(round_bytes)}.",
                      sent - round_bytes, wrong=True)


def _between(made: Plan, axis: str) -> list[Collective]:
    """Returns the collectives with a group of devices of several islands."""
    mesh = made.reading.demand.policy.mesh.shape
    numbers = np.arange(math.prod(mesh.values()))
    island = np.unravel_index(numbers, tuple(mesh.values()))[list(mesh).index(axis)]
    return [c for c in made.reading.collectives
            if any(len(set(island[list(group)])) > 1 for group in c.groups)]
