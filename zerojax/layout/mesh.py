"""Meshes over the available devices, and over simulated GPUs for planning."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from zerojax.errors import PolicyError
from zerojax.layout.topology import Topology, check_installed


def make_mesh(*, replica: int = 1, islands: int | None = None, devices=None,
              topology: str | Topology | None = None) -> Mesh | AbstractMesh:
    """Returns a mesh for `Zero`, with the axis "data" or the axes ("replica", "data").

    Args:
      replica: number of copies of the state (hybrid sharding, HSDP); each copy is sharded over
        devices / replica. With several hosts, devices of one host are neighbours on "data".
      islands: number of groups of devices for `Zero.islands`, neighbours in each: the mesh has
        one more axis, "island", the first. None: no such axis.
      devices: the devices to use, in order; None means all.
      topology: simulated GPUs to plan for, such as "h200:8x8" (hosts x GPUs per host) or a
        `Topology`. The mesh is then an `AbstractMesh`, which `Zero.abstract` and `plan` accept;
        nothing runs on it. Requires the extra `plan`.

    Raises:
      PolicyError: the number of devices is not divisible by `replica` x `islands`; `devices` holds
        no devices; both devices and a topology were given; or the topology is unknown.
      MissingExtraError: a topology was given, but the extra is not installed.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1}
    """
    axes = ("data",) if replica == 1 else ("replica", "data")
    axes = axes if islands is None else ("island", *axes)
    types = (AxisType.Auto,) * len(axes)
    if topology is None:
        array = np.array(jax.devices() if devices is None else devices)
        _check_devices(devices, array)
        return Mesh(array.reshape(_shape(replica, islands, array.size)), axes, axis_types=types)
    if devices is not None:
        raise PolicyError(f"make_mesh(devices=..., topology={topology!r}): devices and a topology "
                          "exclude each other; give one of the two.")
    topology = _topology(topology)
    check_installed()
    return AbstractMesh(_shape(replica, islands, topology.devices), axes, types,
                        abstract_device=topology.device())


def _check_devices(given, array: np.ndarray) -> None:
    if not array.size or not all(hasattr(device, "device_kind") for device in array.flat):
        count = f"[:{given}]" if isinstance(given, int) else ""
        raise PolicyError(f"make_mesh(devices={given!r}): not devices of jax; write "
                          f"zj.make_mesh(devices=jax.devices(){count}), or zj.make_mesh() for all.")


def _topology(given: str | Topology) -> Topology:
    topology = Topology.parse(given) if isinstance(given, str) else given
    if not isinstance(topology, Topology):
        raise PolicyError(f"make_mesh(topology={given!r}): not a topology; "
                          'write text such as "h200:8x8", or a zj.Topology.')
    return topology


def _shape(replica: int, islands: int | None, devices: int) -> tuple[int, ...]:
    if islands is not None:
        if not isinstance(islands, int) or islands < 1 or devices % islands:
            raise PolicyError(f"make_mesh(islands={islands!r}): {devices} devices do not divide "
                              f"evenly into {islands} groups; write a divisor of {devices}.")
        return islands, *_shape(replica, None, devices // islands)
    if not isinstance(replica, int) or replica < 1 or devices % replica:
        raise PolicyError(f"make_mesh(replica={replica!r}): {devices} devices do not divide evenly "
                          f"into {replica} copies; write a divisor of {devices}.")
    return (devices,) if replica == 1 else (replica, devices // replica)
