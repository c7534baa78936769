"""Meshes over devices that are there."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from zerojax.errors import PolicyError


def make_mesh(*, replica: int = 1, devices=None, topology=None) -> Mesh:
    """A mesh for `Zero`: every device on the axis "data", or on ("replica", "data").

    Args:
      replica: number of copies of the state (hybrid sharding, HSDP); each is spread over devices / replica.
        With several hosts, devices of one host are neighbours on "data".
      devices: the devices to use, in order; None is all of them.
      topology: devices that are not there, to compile for, as "h200:8x8" (hosts x GPUs a host) or a `Topology`;
        needs the extra `plan`.

    Raises:
      PolicyError: the number of devices does not divide by `replica`; devices and a topology.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1}
    """
    if topology is not None and devices is not None:
        raise PolicyError(f"make_mesh(devices=..., topology={topology!r}): give one of the two.")
    if topology is not None:
        from zerojax import topology as absent  # needs a plugin that training does not

        devices = absent.devices(topology)
    devices = np.array(jax.devices() if devices is None else devices)
    if replica < 1 or devices.size % replica:
        raise PolicyError(f"make_mesh(replica={replica}): {devices.size} devices do not divide into {replica} copies; "
                          f"write a divisor of {devices.size}.")
    if replica == 1:
        return Mesh(devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    return Mesh(devices.reshape(replica, -1), ("replica", "data"), axis_types=(AxisType.Auto,) * 2)
