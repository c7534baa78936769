"""Snapshots of a state in the memory of the hosts, from which a run that was killed restarts.

Every process copies the parts that its devices hold, and writes them in the background into one of
its two slots. Nothing is sent between the processes while they train, except that all must have a
snapshot before any overwrites the one before: so there is always one that is whole. `warm` puts a
state together from the parts.
"""

import concurrent.futures
import pathlib
import uuid
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from zerojax import errors
from zerojax.checkpoint import entries, json_values, warm, writing
from zerojax.checkpoint.manifest import Manifest, optimizer_kinds, sha256
from zerojax.checkpoint.slots import Slots
from zerojax.checkpoint.warm import Bounds, bounds_of
from zerojax.errors import CheckpointError, ZeroError
from zerojax.policy import Policy
from zerojax.processes import monitor
from zerojax.processes.exchange import Group

_RUN = ".zerojax-run"  # the file in the directory of checkpoints that tells runs apart
_ALIGN = 64  # bytes


class Snapshots:
    """The snapshots of a job beside its directory of checkpoints.

    Args:
      directory: the directory of checkpoints.
      group: all processes of the job.
      every: the steps of which snapshots are taken.
      zero: recorded in the manifest.

    Raises:
      CheckpointError: the host has no shared memory, or another job uses it for this directory; the
        processes have not joined by `zj.initialize`.
    """

    def __init__(self, directory: epath.Path, group: Group, every: int, zero: Policy | None):
        if group.size > 1 and not monitor.is_running():
            raise CheckpointError("memory=True: several processes must join with zj.initialize() "
                                  "to keep snapshots; jax.distributed.initialize() alone does not "
                                  "connect them.")
        self.every, self.group, self._zero = every, group, zero
        self.run, self._attempt = group.of_first(
            [_run_id(directory) if group.first else "", uuid.uuid4().hex])
        self.slots = group.everywhere(lambda: Slots(str(directory), group.process),
                                      [CheckpointError])
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "zerojax snapshots")
        self._pending: concurrent.futures.Future | None = None
        self._step = -1  # of the last snapshot
        self._is_alike: bool | None = None  # whether all processes have the same data position
        self._has_warned = False

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 and step != self._step

    def take(self, step: int, state: Any, data_state: Any, metrics: Any, on_disk: int) -> None:
        """Starts a snapshot. The next step may reuse the memory of the state at once.

        Waits for the snapshot before, if it is still being written.

        Args:
          on_disk: the newest step on disk, or -1.

        Raises:
          CheckpointError: the shared memory is full, or the snapshot before has failed.
        """
        self._warn_if_busy(step)
        self.wait()
        leaves = entries.by_path(state)
        position = writing.position_of(data_state)
        header = {"run": self.run, "attempt": self._attempt, "step": step, "on_disk": on_disk,
                  "process": self.group.process, "processes": self.group.size,
                  "position": json_values.encoded("data_state", position),
                  "is_alike": self._agreed(position),
                  "manifest": self._manifest(step, state, leaves, metrics).to_json()}
        parts = [(path, bounds, x) for path, array in writing.arrays(leaves).items()
                 for bounds, x in parts_of(array)]
        header["parts"], total = _placed(parts)
        self.slots.allocate(total)
        number = self._slot_for(step)
        copies = _copied([x for _, _, x in parts])
        self._step = step
        self._pending = self._writer.submit(self._write, number, header, copies, total)

    def _warn_if_busy(self, step: int) -> None:
        if self._pending and not self._pending.done() and not self._has_warned:
            self._has_warned = True
            errors.warn(f"step {step} waits until the snapshot of step {self._step} is written; a "
                        f"snapshot_every of more than {self.every} would avoid that.")

    def _agreed(self, position: Any) -> bool:
        """Whether all processes have the same position, as found at the first snapshot."""
        if self._is_alike is None:
            positions = self.group.shared(json_values.encoded("data_state", position))
            self._is_alike = all(other == positions[0] for other in positions.values())
        return self._is_alike

    def _manifest(self, step: int, state: Any, leaves: Mapping[str, Any],
                  metrics: Any) -> Manifest:
        """Returns the manifest without digests: the parts have their own."""
        zero = self._zero
        return Manifest(step, {path: entries.of(x) for path, x in leaves.items()},
                        optimizer_kinds(state), writing.mesh_of(leaves),
                        zero.stage if zero else None, zero.precision.as_dict() if zero else None,
                        metrics=jax.device_get(metrics))

    def _slot_for(self, step: int) -> int:
        """Returns the slot to overwrite: an empty one, or that of the older snapshot.

        Snapshots of this step and later ones are of a run that was abandoned; they are removed.
        """
        steps = {0: -1, 1: -1}
        for number, header in self.slots.headers():
            if header.get("run") != self.run or header.get("step", step) >= step:
                self.slots.clear(number)
            else:
                steps[number] = header["step"]
        return min(steps, key=lambda number: steps[number])

    def _write(self, number: int, header: dict[str, Any], copies: list[Any], total: int) -> None:
        """Writes a snapshot, and waits until all processes have theirs."""
        offsets = [part[1] for parts in header["parts"].values() for part in parts]
        views = [_bytes(np.asarray(copy)) for copy in copies]
        checks = iter([zlib.crc32(view.data) for view in views])
        for parts in header["parts"].values():
            for part in parts:
                part.append(next(checks))
        header["digest"] = sha256(header)
        self.slots.write(number, header, views, offsets, total)
        monitor.barrier(f"snapshot {header['step']}")
        self.slots.remove_others(self.group.size)

    def headers(self, on_disk: int) -> Mapping[pathlib.Path, warm.Header]:
        """Returns the headers of the snapshots on this host; see `warm.here`."""
        return warm.here(self.slots.folder, self.run, on_disk)

    def wait(self) -> None:
        """Waits until the snapshot that was started last is whole on all hosts.

        Raises:
          CheckpointError: it has failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except ZeroError:
            raise
        except Exception as error:
            raise CheckpointError(f"the snapshot of step {self._step} in memory failed: {error}"
                                  ) from error

    def raise_failure(self) -> None:
        """Raises the error of a snapshot that has failed."""
        if self._pending and self._pending.done():
            self.wait()

    def close(self, keep: bool) -> None:
        """Ends the writer.

        Args:
          keep: whether the snapshots stay in memory for a restart.
        """
        self._writer.shutdown()
        if keep:
            self.slots.release()
        else:
            self.slots.remove()


def _run_id(directory: epath.Path) -> str:
    """Returns the identity of the run that saves into a directory, which a restart finds again."""
    path = directory / _RUN
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def parts_of(x: Any) -> Iterator[tuple[Bounds, Any]]:
    """Yields each part of an array that this process holds, once, with its place."""
    if not isinstance(x, jax.Array):
        yield tuple((0, n) for n in x.shape), x
        return
    seen = set()
    for shard in x.addressable_shards:
        bounds = bounds_of(shard.index, x.shape)
        if bounds not in seen:
            seen.add(bounds)
            yield bounds, shard.data


def _placed(parts: list[tuple[str, Bounds, Any]]) -> tuple[dict[str, list[list[Any]]], int]:
    """Returns [bounds, offset, bytes] of each part by path, and the bytes of all."""
    placed: dict[str, list[list[Any]]] = {}
    end = 0
    for path, bounds, x in parts:
        placed.setdefault(path, []).append([bounds, end, x.nbytes])
        end += -(-x.nbytes // _ALIGN) * _ALIGN
    return placed, max(end, _ALIGN)


def _copied(arrays: list[Any]) -> list[Any]:
    """Returns copies in the host's memory; those of devices are still under way."""
    on_devices = [x for x in arrays if isinstance(x, jax.Array)]
    host = [x.sharding.with_memory_kind("pinned_host") for x in on_devices]
    copies = iter(jax.device_put(on_devices, host, may_alias=False))
    return [next(copies) if isinstance(x, jax.Array) else np.array(x) for x in arrays]


def _bytes(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array, uint8[n]."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
