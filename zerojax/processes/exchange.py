"""A few words from each process to all of them, over the devices that train: the collective is one more program in their queue.

All processes of a mesh call these alike, in the same order, as they do steps; from the main thread, since the order of programs
has to be the same on each.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Devices = tuple[jax.Device, ...]


def devices_of(mesh: Mesh | AbstractMesh) -> Devices:
    """All those of the processes that share a mesh, in an order that no mesh decides; none if nothing has to be exchanged."""
    processes = set() if isinstance(mesh, AbstractMesh) else {d.process_index for d in mesh.devices.flat}
    return tuple(d for d in everyone() if d.process_index in processes) if len(processes) > 1 else ()


def everyone() -> Devices:
    """All devices, if there are several processes."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return tuple(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))) if several else ()


def send(devices: Devices, words: Sequence[int] | np.ndarray) -> jax.Array:
    """Starts to send words (32 bit, as many on every process); `received` waits for them."""
    sharding, copy = _line(devices)
    mine = sum(d.process_index == jax.process_index() for d in devices)
    local = np.tile(np.asarray(words, np.uint32), (mine, 1))
    with jax.set_mesh(sharding.mesh):  # another one may be set  # pyright: ignore[reportArgumentType]
        return copy(jax.make_array_from_process_local_data(sharding, local, (len(devices), local.shape[1])))


def received(devices: Devices, sent: jax.Array) -> dict[int, np.ndarray]:
    """uint32[words] of each process."""
    rows = np.asarray(sent.addressable_data(0))
    return {d.process_index: row for d, row in zip(devices, rows, strict=True)}


def words(devices: Devices, mine: Sequence[int] | np.ndarray) -> dict[int, np.ndarray]:
    """Sends, and waits; without devices, what this process alone has to say."""
    if not devices:
        return {jax.process_index(): np.asarray(mine, np.uint32)}
    return received(devices, send(devices, mine))


def texts(devices: Devices, mine: str) -> dict[int, str]:
    """Of any length. Where no process has anything to say, it costs as much as one word."""
    data = np.frombuffer(mine.encode(), np.uint8)
    sizes = {process: int(n[0]) for process, n in words(devices, [data.size]).items()}
    longest = -(-max(sizes.values()) // 4)
    if not longest:
        return dict.fromkeys(sizes, "")
    padded = np.zeros(4 * longest, np.uint8)
    padded[:data.size] = data
    got = words(devices, padded.view(np.uint32))
    return {process: row.tobytes()[:sizes[process]].decode() for process, row in got.items()}


def shared(devices: Devices, mine: Any) -> dict[int, Any]:
    """JSON values of each process."""
    return {process: json.loads(text) for process, text in texts(devices, json.dumps(mine)).items()}


def words_to_all(x: jax.Array) -> jax.Array:
    """What profiles and logs call the program."""
    return x


@functools.cache
def _line(devices: Devices):
    """(sharding of what each process brings, the program that copies it to all)."""
    mesh = Mesh(np.array(devices), ("device",))
    return NamedSharding(mesh, P("device")), jax.jit(words_to_all, out_shardings=NamedSharding(mesh, P()))
