"""Meshes over devices that are there, and over GPUs that are not."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from zerojax.errors import PolicyError
from zerojax.layout.topology import Topology, check_installed


def make_mesh(*, replica: int = 1, devices=None, topology: str | Topology | None = None) -> Mesh | AbstractMesh:
    """A mesh for `Zero`: every device on the axis "data", or on ("replica", "data").

    Args:
      replica: number of copies of the state (hybrid sharding, HSDP); each is spread over devices / replica.
        With several hosts, devices of one host are neighbours on "data".
      devices: the devices to use, in order; None is all of them.
      topology: GPUs that are not there, to plan for, as "h200:8x8" (hosts x GPUs a host) or a `Topology`. The mesh is
        then an `AbstractMesh`: `Zero.abstract` and `plan` take it, nothing runs on it. Needs the extra `plan`.

    Raises:
      PolicyError: the number of devices does not divide by `replica`; devices and a topology; an unknown topology.
      MissingExtraError: a topology without the extra.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1}
    """
    if topology is not None and devices is not None:
        raise PolicyError(f"make_mesh(devices=..., topology={topology!r}): give one of the two.")
    axes = ("data",) if replica == 1 else ("replica", "data")
    if topology is not None:
        topology = Topology.parse(topology) if isinstance(topology, str) else topology
        if not isinstance(topology, Topology):
            raise PolicyError(f'make_mesh(topology={topology!r}): write text, as "h200:8x8", or a zj.Topology.')
        check_installed()
        shape = _shape(replica, topology.devices)
        return AbstractMesh(shape, axes, (AxisType.Auto,) * len(axes), abstract_device=topology.device())
    devices = np.array(jax.devices() if devices is None else devices)
    return Mesh(devices.reshape(_shape(replica, devices.size)), axes, axis_types=(AxisType.Auto,) * len(axes))


def _shape(replica: int, devices: int) -> tuple[int, ...]:
    if not isinstance(replica, int) or replica < 1 or devices % replica:
        raise PolicyError(f"make_mesh(replica={replica!r}): {devices} devices do not divide into {replica} copies; "
                          f"write a divisor of {devices}.")
    return (devices,) if replica == 1 else (replica, devices // replica)
