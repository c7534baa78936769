"""Groups of processes, which exchange a few words with a collective over the devices that train.

All processes of a group must make the same calls in the same order, like training steps, and from
their main threads: the collective is one more program in the queue of each device, and all queues
must have the same order.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.errors import ClusterError
from zerojax.processes import monitor, naming

T = TypeVar("T")
Devices = tuple[jax.Device, ...]
Words = Sequence[int] | np.ndarray  # of 32 bits
Sent = jax.Array | np.ndarray  # words of all processes, perhaps still under way


def of_mesh(*meshes: Mesh | AbstractMesh) -> "Group":
    """Returns the group of all processes that have a device in one of these meshes."""
    real = {mesh for mesh in meshes if not isinstance(mesh, AbstractMesh)}
    processes = {device.process_index for mesh in real for device in mesh.devices.flat}
    return _group(d for d in everyone().devices if d.process_index in processes)


def of_shardings(arrays: Iterable[Any]) -> "Group":
    """Returns the group of all processes that have a device in the mesh of one of these arrays."""
    shardings = [getattr(x, "sharding", None) for x in arrays]
    return of_mesh(*(s.mesh for s in shardings if isinstance(s, NamedSharding)))


def everyone() -> "Group":
    """Returns the group of all processes; does not initialize the devices of a single process."""
    return _group(jax.devices() if jax.distributed.is_initialized() else ())


def _group(devices: Iterable) -> "Group":
    group = Group(tuple(sorted(devices, key=lambda device: (device.process_index, device.id))))
    others = {device.process_index for device in group.devices} - {Alone().process}
    return group if others else Alone()


@dataclasses.dataclass(frozen=True)
class Group:
    """Several processes of a job, seen from one of them.

    `Alone` has the same methods, and exchanges nothing.

    Attributes:
      devices: all devices of these processes, in the order of the processes.
    """

    devices: Devices

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.members) or jax.process_count()

    @property
    def process(self) -> int:
        """The index of this process in the job."""
        return jax.process_index()

    @property
    def first(self) -> bool:
        """Whether this process is the first of the group."""
        return self.process == self.devices[0].process_index

    @functools.cached_property
    def members(self) -> tuple[int, ...]:
        """The indices of the processes; () if they are all."""
        members = tuple(dict.fromkeys(device.process_index for device in self.devices))
        return () if len(members) == jax.process_count() else members

    def _checked_members(self) -> tuple[int, ...]:
        """Returns `members`.

        Raises:
          ClusterError: this process is not one of them.
        """
        if self.members and self.process not in self.members:
            raise ClusterError(f"process {self.process} has no device in the mesh, whose devices "
                               f"are those of {naming.named(self.members)}; only these may make "
                               "this call. Make a mesh with devices of all processes, or call it "
                               "on these alone.")
        return self.members

    def calling(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Reports a call that all processes of the group make; see `monitor.calling`."""
        return monitor.calling(self._checked_members(), key)

    def send(self, words: Words) -> Sent:
        """Starts to send words, the same number from every process; `received` takes the result."""
        monitor.called(self._checked_members(), "")
        return self._started(words)

    def _started(self, words: Words) -> Sent:
        sharding, copy = _line(self.devices)
        mine = sum(device.process_index == self.process for device in self.devices)
        local = np.tile(np.asarray(words, np.uint32), (mine, 1))
        shape = (len(self.devices), local.shape[1])
        with jax.set_mesh(sharding.mesh):  # the caller may have set another mesh  # pyright: ignore
            return copy(jax.make_array_from_process_local_data(sharding, local, shape))

    def received(self, sent: Sent) -> dict[int, np.ndarray]:
        """Waits for the words of all processes; returns uint32[words] by process, in order."""
        rows = np.asarray(sent.addressable_data(0))  # pyright: ignore[reportAttributeAccessIssue]
        return {d.process_index: row for d, row in zip(self.devices, rows, strict=True)}

    def words(self, mine: Words) -> dict[int, np.ndarray]:
        """Sends words, and waits for those of all processes.

        Raises:
          ClusterError: other processes are at another call, or have ended; this process is not one
            of the group.
        """
        monitor.meet(self._checked_members())
        return self.received(self._started(mine))

    def texts(self, mine: str) -> dict[int, str]:
        """Returns the text of each process. If all are empty, the cost is that of one word."""
        data = np.frombuffer(mine.encode(), np.uint8)
        sizes = {process: int(n[0]) for process, n in self.words([data.size]).items()}
        longest = -(-max(sizes.values()) // 4)  # words
        if not longest:
            return dict.fromkeys(sizes, "")
        padded = np.zeros(4 * longest, np.uint8)
        padded[:data.size] = data
        rows = self.words(padded.view(np.uint32))
        return {process: row.tobytes()[:sizes[process]].decode() for process, row in rows.items()}

    def shared(self, mine: Any) -> dict[int, Any]:
        """Returns the JSON value of each process."""
        return {process: json.loads(text) for process, text in self.texts(json.dumps(mine)).items()}

    def of_first(self, mine: Any) -> Any:
        """Returns the JSON value of the first process, on every process."""
        return next(iter(self.shared(mine).values()))

    def everywhere(self, act: Callable[[], T], kinds: Sequence[type[Exception]] = ()) -> T:
        """Returns what `act` returns on this process, after it has succeeded on all.

        Raises:
          The first of `kinds` that any process raised, else ClusterError. A process whose own error
          is of that kind raises its own.
        """
        result, own = _tried(act)
        rank = next((i for i, kind in enumerate(kinds) if isinstance(own, kind)), len(kinds))
        reports = self.shared(None if own is None else [rank, f"{type(own).__name__}: {own}"])
        failed = {process: report for process, report in reports.items() if report}
        if not failed:
            return result  # pyright: ignore[reportReturnType]
        worst = min(rank for rank, _ in failed.values())
        if own is not None and rank == worst:
            raise own
        first, text = next((p, text) for p, (rank, text) in failed.items() if rank == worst)
        raise (*kinds, ClusterError)[worst](f"{naming.named(failed)} of {len(reports)} failed; "
                                            f"process {first} reports: {text}") from own


@dataclasses.dataclass(frozen=True)
class Alone(Group):
    """A group of one process: nothing is sent, and no device runs a program.

    >>> Alone().shared({"lr": 0.1}), Alone().first
    ({0: {'lr': 0.1}}, True)
    """

    devices: Devices = ()

    @property
    def size(self) -> int:
        return 1

    @property
    def process(self) -> int:
        """The index of this process, which is not 0 if another process of the job is."""
        return jax.process_index() if jax.distributed.is_initialized() else 0

    @property
    def first(self) -> bool:
        return True

    def calling(self, key: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def send(self, words: Words) -> Sent:
        return np.asarray(words, np.uint32)

    def words(self, mine: Words) -> dict[int, np.ndarray]:
        return self.received(self.send(mine))

    def received(self, sent: Sent) -> dict[int, np.ndarray]:
        return {self.process: np.asarray(sent)}

    def everywhere(self, act: Callable[[], T], kinds: Sequence[type[Exception]] = ()) -> T:
        return act()


def words_to_all(x: jax.Array) -> jax.Array:
    """Returns its argument; profiles and logs show the name of this function."""
    return x


@functools.cache
def _line(devices: Devices):
    """Returns the sharding of the words, and the program that copies them to every device."""
    mesh = Mesh(np.array(devices), ("device",))
    copy = jax.jit(words_to_all, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("device")), copy


def _tried(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns the result of `act`, or its error."""
    try:
        return act(), None
    except Exception as error:
        return None, error
