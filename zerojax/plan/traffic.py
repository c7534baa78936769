"""The collectives of a compiled step as rows: kind, dtype, axes and place, with bytes and time."""

import collections
import dataclasses
from collections.abc import Callable

from zerojax.hlo import schedule
from zerojax.hlo.collectives import Collective
from zerojax.plan.reading import Reading


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, dtype, mesh axes and place.

    Attributes:
      kind: the kind of collective, such as "all-gather".
      dtype: HLO's name of the dtype, such as "bf16".
      axes: the mesh axes that the groups of devices span; None if the groups match no axes.
      trips: the number of times that each instruction runs per step; more than 1 in a loop.
      backward: whether the place belongs to the backward pass.
      count: the number of instructions.
      bytes: the bytes that each device sends per step.
      between: those of `bytes` that it sends to other hosts; None if the hosts are not known.
      asynchronous: how many of the instructions have a start and a done.
      seconds: the time per step at the topology's bandwidths; None if they are not known.
      exposed: the part of `seconds` in which nothing else runs, or None.
      beside: names of the instructions that run at the same time.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...] | None
    trips: int
    backward: bool
    count: int
    bytes: float
    between: float | None
    asynchronous: int
    seconds: float | None
    exposed: float | None
    beside: tuple[str, ...]


def rows(reading: Reading) -> tuple[Traffic, ...]:
    """Returns the rows, most bytes first.

    An instruction that moves several dtypes counts in a row of each, with its time divided by
    bytes.
    """
    groups = collections.defaultdict(list)
    for c in reading.collectives:
        for dtype in dict.fromkeys(s.dtype for s in c.shapes):
            axes = c.axes(reading.demand.policy.mesh.shape)
            groups[c.kind, dtype, axes, c.trips, c.backward].append(c)
    made = [_row(reading, key, found) for key, found in groups.items()]
    return tuple(sorted(made, key=lambda t: -t.bytes))


def _row(reading: Reading, key: tuple, found: list[Collective]) -> Traffic:
    kind, dtype, axes, trips, backward = key
    shares = [sum(s.bytes for s in c.shapes if s.dtype == dtype) / max(c.bytes, 1) for c in found]

    def total(of: Callable[[Collective], float]) -> float:
        return sum(share * of(c) for share, c in zip(shares, found, strict=True))

    seconds, exposed = _times(reading, total)
    topology = reading.topology
    between = topology and total(lambda c: c.between(topology.per_host))
    beside = [name for c in found for name in _beside(reading, c)]
    return Traffic(kind, dtype, axes, trips, backward, len(found), total(lambda c: c.wire_bytes),
                   between, sum(c.asynchronous for c in found), seconds, exposed,
                   tuple(dict.fromkeys(beside)))


def _times(reading: Reading, total: Callable) -> tuple[float | None, float | None]:
    speed, runs = reading.speed, reading.runs
    if not speed:
        return None, None
    return (total(lambda c: schedule.transfer(speed, c) * c.trips),
            total(lambda c: runs[c.computation].exposed.get(c.name, 0.0) * c.trips))


def _beside(reading: Reading, c: Collective) -> tuple[str, ...]:
    return reading.runs[c.computation].beside.get(c.name, ()) if reading.speed else ()
