"""The time of a collective by its size and its group, as NCCL estimates it.

NCCL chooses the fastest of two algorithms and three protocols by such an estimate (its file
src/graph/tuning.cc, from which the latencies and shares of bandwidth are). A ring has a step for
each member of the group, a tree, for all-reduces only, one for each level. Protocols of low latency
have less bandwidth. Needs no devices and no jax.
"""

import collections
import dataclasses
import math

from zerojax.hlo.collectives import Collective
from zerojax.hlo.speed import Speed


@dataclasses.dataclass(frozen=True)
class _Way:
    """An algorithm with a protocol.

    Attributes:
      share: the part of the bandwidth that it has.
      base, within, between: us to begin, per step within a host, per step between hosts.
    """

    share: float
    base: float
    within: float
    between: float


_RINGS = (_Way(1 / 4, 3.6, 0.47, 2.7), _Way(0.92, 10.0, 1.9, 4.0), _Way(1.0, 8.4, 3.4, 9.6))
_TREES = (_Way(0.24, 4.4, 0.52, 5.0), _Way(0.82, 4.4, 1.2, 8.5), _Way(0.9, 0.0, 28.0, 50.0))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The time of one trip of a collective.

    Attributes:
      link: "link" within a host, "network" between hosts.
      occupied: seconds for which its bytes occupy the links.
      latency: seconds of its steps beyond that.
    """

    link: str
    occupied: float
    latency: float

    @property
    def seconds(self) -> float:
        return self.occupied + self.latency


def transfer(speed: Speed, c: Collective) -> Transfer:
    """Returns the time of one trip.

    It is bound by the bytes that a device sends over its links, or by those that leave the host
    through its share of the network.
    """
    group = c.groups[0] if c.groups else (0,)
    hosts = collections.Counter(d // speed.per_host for d in group)
    here = max(hosts.values())
    between = c.between(speed.per_host)
    if c.kind == "collective-permute" and between:  # the others wait for the slowest pair
        between = c.wire_bytes
    ideal = max(c.wire_bytes / speed.link, between / speed.network) / c.trips / speed.links
    ways = [(ideal / way.share, _ring_latency(way, c, len(hosts))) for way in _RINGS]
    if c.kind == "all-reduce":
        ways += [(ideal / way.share, _tree_latency(way, here, len(hosts))) for way in _TREES]
    occupied, latency = min(ways, key=sum)
    return Transfer("network" if between else "link", occupied, latency)


def _ring_latency(way: _Way, c: Collective, hosts: int) -> float:
    """Returns the seconds of the steps around the ring: two rounds for an all-reduce.

    The pairs of a permute and of an all-to-all do not wait for each other.
    """
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}.get(c.kind, 0)
    between = rounds * (hosts - 1) or min(1, hosts - 1)
    within = rounds * (c.size - hosts) if rounds else 1 - between
    return (way.base + within * way.within + between * way.between) * 1e-6


def _tree_latency(way: _Way, here: int, hosts: int) -> float:
    """Returns the seconds up and down a tree of hosts, with a chain in each host."""
    steps = (here - 1) * way.within + math.log2(hosts) * way.between
    return (way.base + 2 * steps) * 1e-6
