"""Snapshots of a state in the memory of the hosts, from which a run that was killed restarts.

Every process copies the parts that its devices hold, and writes them in the background into one of
its two slots. All must have a snapshot before any overwrites the one before, so that there is
always one that is whole. While they train, the devices exchange only a digest of each process's
position in the data. `warm` puts a state together from the parts.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from zerojax import errors
from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import entries, host_copies, json_values, restoring, warm, writing
from zerojax.checkpoint.manifest import Manifest, optimizer_kinds, sha256
from zerojax.checkpoint.restoring import Restored
from zerojax.checkpoint.slots import FORMAT, Slots, damaged, headers, is_open
from zerojax.errors import CheckpointError, ZeroError
from zerojax.layout import padded
from zerojax.policy import Policy
from zerojax.processes import monitor
from zerojax.processes.exchange import Group, Sent

_ALIGN = 64  # bytes


Found = list[tuple[int, bool, Callable[..., Restored]]]  # step, whether it is on disk, its reader


class NoSnapshots:
    """Keeps nothing in memory. `Snapshots` has the same methods.

    Args:
      directory: the directory of checkpoints.
      group: all processes of the job.
    """

    def __init__(self, directory: epath.Path, group: Group):
        self._directory, self.group = directory, group
        self.run = ""  # the identity of the run whose snapshots count
        self._is_new_run = True  # it does not continue from a snapshot

    def save(self, state: Any, step: int | None, data_state: Any, metrics: Any) -> int | None:
        """Returns the step that was given."""
        return step

    def found(self, on_disk: int) -> Found:
        """Returns the snapshots to restore from."""
        return []

    def restored(self, step: int, from_memory: bool) -> None:
        """Notes the step from which the run continues, and whether that is a snapshot."""

    def begin_run(self) -> None:
        """Writes the identity of a new run to disk, before its first step or snapshot.

        The snapshots of earlier runs, in the memory of any host, do not count from then on.

        Raises:
          CheckpointError: the directory is not writable.
        """
        if self._is_new_run:
            self._set_run("")

    def _set_run(self, run: str) -> None:
        self.group.everywhere(lambda: self._write_run(run), [CheckpointError])
        self.run, self._is_new_run = run, False

    def _write_run(self, run: str) -> None:
        """Writes an identity; none, only if no checkpointer of this process keeps snapshots."""
        are_kept = not run and is_open(str(self._directory), self.group.process)
        if self.group.first and not are_kept:
            folder.set_run(self._directory, run)

    def wait(self) -> None:
        """Waits for the snapshot in progress."""

    def raise_failure(self) -> None:
        """Raises the error of a snapshot that has failed."""

    def close(self, keep: bool) -> None:
        """Frees the memory, unless it is to be kept."""


class Snapshots(NoSnapshots):
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
        super().__init__(directory, group)
        self.every, self._zero = every, zero
        own = group.everywhere(lambda: folder.run_of(directory) if group.first else "")
        self.run, self._job = group.of_first([own, uuid.uuid4().hex])
        self._runs = 0  # that this job has begun
        self.slots = Slots(str(directory), group.process)
        try:
            group.everywhere(self.slots.open, [CheckpointError])
        except BaseException:
            self.slots.release()
            raise
        self.slots.find_left()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "zerojax snapshots")
        self._pending: concurrent.futures.Future | None = None
        self._step = -1  # of the last snapshot; -1 if the next begins a branch
        self._abandoned: float = math.inf  # snapshots from this step on are of another branch
        self._attempt = ""  # the branch: equal steps of two have different bits
        self._taken = 0
        self._about: Manifest | None = None  # of the shapes
        self._shapes: dict[str, Any] = {}
        self._on_disk = -1  # the newest step that was seen there
        self._has_warned = False

    def save(self, state: Any, step: int | None, data_state: Any, metrics: Any) -> int:
        """Starts a snapshot if the step is due; returns the step.

        The next step may reuse the memory of the state at once. Waits for the snapshot before, if
        it is still being written, and for a device only if no step is given.

        Raises:
          StateError: the state's arrays were deleted.
          CheckpointError: the state cannot be saved, the shared memory is full, or the snapshot
            before has failed.
        """
        step = writing.step_of(state, None) if step is None else writing.whole(step)
        if step % self.every == 0 and step != self._step:
            writing.check_arrays(state)
            self._take(step, state, data_state, metrics)
        return step

    def _take(self, step: int, state: Any, data_state: Any, metrics: Any) -> None:
        self._warn_if_busy(step)
        self.wait()
        leaves = entries.by_path(state)
        position = json_values.encoded("data_state", writing.position_of(data_state))
        arrays = writing.arrays(leaves)
        if step <= self._step or self._step < 0:
            self.begin_run()
            self._branch(min(step, self._abandoned))
        if not self._taken:
            _, total = _placed(arrays)
            self.group.everywhere(lambda: self.slots.allocate(total), [CheckpointError])
        about = self._described(step, state, leaves)
        header = {"format": FORMAT, "run": self.run, "attempt": self._attempt, "step": step,
                  "process": self.group.process, "processes": self.group.size,
                  "position": position}
        copies = host_copies.started(arrays)
        positions = self.group.send(np.frombuffer(bytes.fromhex(sha256(position)), np.uint32))
        metrics = host_copies.of_tree(metrics)
        self._step, self._taken = step, self._taken + 1
        self._pending = self._writer.submit(self._write, self._taken, header, about, metrics,
                                            copies, positions)

    def _warn_if_busy(self, step: int) -> None:
        if self._pending and not self._pending.done() and not self._has_warned:
            self._has_warned = True
            errors.warn(f"step {step} waits until the snapshot of step {self._step} is written; a "
                        f"snapshot_every of more than {self.every} would avoid that.")

    def _branch(self, first: float) -> None:
        """Removes snapshots from a step on, and gives those that follow another identity.

        So parts of both branches are never mixed.
        """
        self._attempt, self._abandoned = f"{self._job}/{self._taken}", math.inf
        self.slots.branch(self.run, first)

    def _described(self, step: int, state: Any, leaves: Mapping[str, Any]) -> Manifest:
        """Returns the manifest without digests, because the parts have their own."""
        shapes = {path: _shape(x) for path, x in leaves.items()}
        if self._about is None or self._shapes != shapes:
            zero, self._shapes = self._zero, shapes
            self._about = Manifest(
                step, {path: entries.of(x) for path, x in shapes.items()}, optimizer_kinds(state),
                writing.mesh_of(leaves), zero.stage if zero else None,
                zero.precision.as_dict() if zero else None)
        return dataclasses.replace(self._about, step=step)

    def _write(self, number: int, header: dict[str, Any], about: Manifest, metrics: Any,
               copies: dict[str, Any], positions: Sent) -> None:
        """Writes a snapshot over the older one, and waits until all processes have theirs.

        If one of them fails, it fails on all, so that all begin another branch.
        """
        # several checkpointers of a job may be at the same number
        tag = f"snapshot {number} of checkpointer {self._job[:8]}"
        try:
            header["is_alike"] = self._are_alike(positions)
            self._put(header, about, metrics, copies)
        except Exception:
            with contextlib.suppress(ZeroError):  # the own error says more
                monitor.barrier(tag, f"step {header['step']}, which failed")
            raise
        monitor.barrier(tag, f"step {header['step']}")
        with contextlib.suppress(OSError):  # a failure of one process alone would part them
            self.slots.remove_left()

    def _are_alike(self, positions: Sent) -> bool:
        """Whether all processes have the same data position, by the digests that they sent."""
        first, *others = self.group.received(positions).values()
        return all(np.array_equal(other, first) for other in others)

    def _put(self, header: dict[str, Any], about: Manifest, metrics: Any,
             copies: dict[str, Any]) -> None:
        """Writes a snapshot, and frees the copies, because other processes may take long."""
        _check_step(header["step"], copies)
        placed, total = _placed(copies)
        views = [_bytes(np.asarray(part)) for x in copies.values()
                 for _, part in host_copies.parts(x)]
        for part, view in zip(itertools.chain(*placed.values()), views, strict=True):
            part.append(zlib.crc32(view.data))
        manifest = dataclasses.replace(about, metrics=jax.device_get(metrics))
        with contextlib.suppress(OSError):  # a shared file system that does not answer now
            self._on_disk = max(folder.steps(self._directory), default=-1)
        header |= {"manifest": manifest.to_json(), "parts": placed, "on_disk": self._on_disk}
        offsets = [part[1] for part in itertools.chain(*placed.values())]
        self.slots.write(header, views, offsets, total)
        copies.clear()

    def found(self, on_disk: int) -> Found:
        """Returns the snapshots of which the hosts have parts, newest first.

        Args:
          on_disk: the newest step on disk, or -1.
        """
        for path in damaged(self.slots.folder):
            errors.warn(f"a snapshot in memory is left out: its header, {path}, was changed or "
                        "cannot be read.")
        here = headers(self.slots.folder, self.run)
        return [(s.step, False, functools.partial(restoring.from_memory, self.group, here, s))
                for s in warm.available(self.group, here, on_disk)]

    def restored(self, step: int, from_memory: bool) -> None:
        """See `NoSnapshots`."""
        self._is_new_run = not from_memory
        self._abandon(step + 1)

    def _abandon(self, step: int) -> None:
        """Notes that snapshots of this step and later ones are of a run that went back.

        The next save that takes a snapshot removes them first.
        """
        self._step, self._abandoned = -1, min(step, self._abandoned)

    def begin_run(self) -> None:
        """See `NoSnapshots`."""
        if self._is_new_run:
            self._runs += 1
            self._set_run(f"{self._job}/{self._runs}")

    def wait(self) -> None:
        """Waits until the snapshot that was started last is whole on all hosts.

        Raises:
          CheckpointError: it has failed.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])  # Ctrl-C leaves it pending
        error, self._pending = self._pending.exception(), None
        if error is None:
            return
        step = self._step
        self._abandon(step)
        if isinstance(error, ZeroError):
            raise error
        raise CheckpointError(f"the snapshot of step {step} in memory failed: {error}") from error

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
        try:
            self.raise_failure()
        except ZeroError as error:  # another error or a preemption ends the run
            errors.warn(str(error))
        if keep:
            self.slots.release()
        else:
            self.slots.remove()


def _check_step(step: int, copies: Mapping[str, Any]) -> None:
    """Checks, when the copies are there, that a step is the state's own."""
    own = copies.get("step")
    if own is not None and np.size(own) == 1 and int(np.asarray(own)) != step:
        raise CheckpointError(f"save was given step={step} and a state of step {int(own)}; give "
                              "the state's own step.")


def _shape(x: Any) -> Any:
    """Returns the shape of an array, so that its memory can be freed."""
    if padded.is_padded(x):
        return padded.Padded(_shape(x.kept), x.shape)
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.ShapeDtypeStruct(np.shape(x), entries.as_array(x).dtype)


def _placed(arrays: Mapping[str, Any]) -> tuple[dict[str, list[list[Any]]], int]:
    """Returns [bounds, offset, bytes] of each part by path, and the bytes of all."""
    placed: dict[str, list[list[Any]]] = {}
    end = 0
    for path, x in arrays.items():
        for bounds, part in host_copies.parts(x):
            placed.setdefault(path, []).append([bounds, end, part.nbytes])
            end += -(-part.nbytes // _ALIGN) * _ALIGN
    return placed, max(end, _ALIGN)


def _bytes(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array, uint8[n]."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
