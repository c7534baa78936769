"""A compiled step, read once: its program, collectives and simulated schedule, and the demand by
which it is judged."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from zerojax.hlo import collectives, schedule
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Program, parse
from zerojax.layout.report import Layout
from zerojax.layout.topology import Topology
from zerojax.plan import provenance
from zerojax.plan.compiler import Compiled
from zerojax.plan.demand import Demand


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A compiled step.

    Attributes:
      demand: the collectives that ZeRO allows it.
      layout: the layout of the state among its arguments.
      batch_bytes: the bytes of the batch on one device.
      compiled: the compiler's answer.
      topology: the GPUs that it was compiled for; None for other devices.
      options: the compiler options of the user.
    """

    demand: Demand
    layout: Layout
    batch_bytes: float
    compiled: Compiled
    topology: Topology | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def figures(self) -> Mapping[str, int]:
        """The compiler's bytes per device, by the names of `compiler.MEMORY`."""
        return self.compiled.memory

    @functools.cached_property
    def program(self) -> Program:
        return parse(self.compiled.text)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        return collectives.of(self.program, provenance.source)

    @functools.cached_property
    def speed(self) -> schedule.Speed | None:
        """The speed of the devices; None if it is not known."""
        return self.topology and speed_of(self.topology)

    @functools.cached_property
    def runs(self) -> Mapping[str, schedule.Run]:
        """The simulated schedule of each computation; empty for devices whose speed is not
        known."""
        return schedule.simulate(self.program, self.speed, self.collectives) if self.speed else {}


def speed_of(topology: Topology) -> schedule.Speed:
    gpu = topology.gpu
    return schedule.Speed(gpu.flops, gpu.bandwidth, gpu.link, gpu.network, topology.per_host)
