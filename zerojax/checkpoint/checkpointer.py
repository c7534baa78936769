"""Checkpoints for any mesh and any stage, written and read by Orbax and checked by digests.

On disk are a step's logical arrays, one per leaf of the state, and its `Manifest`. Orbax is called
here and in `reading`.
"""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath

from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import entries, lock, reading, restoring, writing
from zerojax.checkpoint.manifest import Manifest
from zerojax.checkpoint.restoring import KINDS, Restored
from zerojax.checkpoint.snapshots import Found, NoSnapshots, Snapshots
from zerojax.checkpoint.target import MODEL
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.policy import Policy
from zerojax.processes import agreement, exchange


class Checkpointer:
    """Saves and restores training states, zerojax's or the user's own, in one directory.

    Only one job at a time can save into a directory, because its first save removes the remains of
    interrupted saves. Its first process locks the directory from the first save until `close`;
    URLs and file systems without locks are not protected. Others may restore from it meanwhile.
    All processes of a job must create the checkpointer, call its methods in the same order, and
    see the same directory.

    Args:
      directory: created if it is missing.
      keep: the number of newest steps to keep; None keeps all. An old step is removed after the new
        one is complete.
      every: `save` does nothing for steps that this does not divide.
      asynchronous: whether `save` returns as soon as the arrays are copied; files are then written
        in the background.
      memory: whether `save` also takes snapshots, which stay in the shared memory of the hosts
        (/dev/shm) when processes die, and from which `restore_latest` restores in seconds. They
        take twice the size of the state, and end with the host.
      snapshot_every: `save` takes snapshots of the steps that this divides.
      zero: the `Zero` whose stage and precision the manifest records.

    Raises:
      CheckpointError: the directory is not writable, a number is invalid, the host has no shared
        memory, or another job or checkpointer keeps snapshots for this directory in it.

    >>> import tempfile, jax, jax.numpy as jnp, optax, zerojax as zj
    >>> zero, tx = zj.Zero(zj.make_mesh(devices=jax.devices()[:2])), optax.sgd(0.1)
    >>> def init():
    ...     return {"w": jnp.ones((4, 2))}
    >>> with zj.Checkpointer(tempfile.mkdtemp(), every=10) as checkpoints:
    ...     checkpoints.save(zero.init(init, tx), data_state={"next": 0}, metrics={"loss": 1.5})
    ...     checkpoints.restore_latest(zero.abstract(init, tx)).data_state
    True
    {'next': 0}
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 3, every: int = 1,
                 asynchronous: bool = True, memory: bool = False, snapshot_every: int = 1,
                 zero: Policy | None = None):
        for name, n in (("keep", keep), ("every", every), ("snapshot_every", snapshot_every)):
            is_all = name == "keep" and n is None
            if not is_all and (type(n) is not int or n < 1):
                raise CheckpointError(f"Checkpointer({name}={n!r}): write a whole number, 1 or "
                                      "more.")
        self.directory, self.every, self.zero = folder.located(directory), every, zero
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True)
        self._manager: ocp.CheckpointManager | None = None
        self._begun: int | None = None  # the step that is being written
        self._skipped: set[int] = set()  # steps that did not load
        self._locked = self._closed = False
        self._group = exchange.everyone()
        folder.check_shared(self.directory, self._group)
        self._snapshots = (Snapshots(self.directory, self._group, snapshot_every, zero)
                           if memory else NoSnapshots(self.directory, self._group))

    def save(self, state: Any, *, step: int | None = None, data_state: Any = None,
             metrics: Any = None, force: bool = False) -> bool:
        """Saves a state, if `every` divides its step. Call it after each step.

        It also raises the error of an earlier save that failed in the background.

        Args:
          state: arrays of any sharding. The next step may reuse their memory at once.
          step: the state's step. By default it is read from the state, which waits for the device.
          data_state: JSON values or bytes, or an iterator with `get_state`, such as `zj.feed` of a
            source that has it.
          metrics: JSON values or scalars.
          force: whether to save even if `every` does not divide the step.

        Returns:
          Whether a save to the directory was started. A step that it has is not saved again.

        Raises:
          CheckpointError: this save or an earlier one failed, the directory has later steps,
            `step` is not the state's, another job is saving into the directory, or the checkpointer
            was closed.
          ClusterError: the states of the processes have different steps.
        """
        self._check_open()
        self._raise_earlier_failure()
        step = self._snapshots.save(state, step, data_state, metrics)
        if step is not None and not self._is_due(step, force):
            return False
        step = self._group.everywhere(
            lambda: self._ready(state, step, data_state, metrics, force), KINDS)
        agreement.check(self._group, "Checkpointer.save", {"step": step})
        if not self._is_due(step, force):
            return False
        self._set_aside_from(step)
        if not self._is_new(step):
            return False
        self._write(step, state, data_state, metrics)
        return True

    def _check_open(self):
        if self._closed:
            raise CheckpointError(f"this checkpointer of {self.directory} was closed; create "
                                  "another.")

    def _raise_earlier_failure(self):
        """Raises the error of a save that ended; several processes do so together in `_ready`."""
        # Orbax's own check_for_errors omits the errors of its last thread
        has_ended = self._manager and not self._manager.is_saving_in_progress()
        if has_ended and self._group.size == 1:
            self._wait()
        self._snapshots.raise_failure()

    def _ready(self, state: Any, step: int | None, data_state: Any, metrics: Any,
               force: bool) -> int:
        if self._group.size > 1:
            self._wait()
        step = writing.checked_step(state, step, data_state, metrics)
        if self._is_due(step, force) and self._group.first:
            self._lock()
            folder.check_writable(self.directory)
        return step

    def _lock(self):
        if not self._locked:
            lock.take(self.directory)
            self._locked = True

    def _unlock(self):
        if self._locked:
            lock.release(self.directory)
            self._locked = False

    def _is_due(self, step: int, force: bool) -> bool:
        return force or step % self.every == 0

    def _is_new(self, step: int) -> bool:
        """Whether the directory does not have a step; raises if it has later ones."""
        begun = [] if self._begun is None else [self._begun]
        existing = self._group.of_first([*self.steps(), *begun])
        if step in existing:
            return False
        if existing and max(existing) > step:
            raise CheckpointError(f"{self.directory} has step {max(existing)}, so step {step} "
                                  "cannot be saved: the newest step would belong to the abandoned "
                                  "run. Move the later steps away to continue here, or give "
                                  "another directory.")
        return True

    def _write(self, step: int, state: Any, data_state: Any, metrics: Any):
        leaves = entries.by_path(state)
        manifest = writing.manifest_of(step, state, leaves, self.zero, data_state, metrics)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(writing.arrays(leaves)),
                                  manifest=ocp.args.JsonSave(manifest.to_json()))
        self._wait()
        self._snapshots.begin_run()
        self._attempt(lambda: self._opened().save(step, args=args, force=True))
        self._begun = step
        if not self._options.enable_async_checkpointing:
            self.wait()

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        self._manager.reload()  # the user may have moved steps away
        return self._manager

    def _set_aside_from(self, step: int):
        """Renames skipped steps that a run from before them is about to reach, if still damaged."""
        for damaged in sorted(s for s in self._skipped if s >= step):
            self._skipped.remove(damaged)
            self._group.everywhere(lambda s=damaged: self._set_aside_if_damaged(s), KINDS)

    def _set_aside_if_damaged(self, step: int):
        if not self._group.first:
            return
        try:
            reading.verify(self._path(step))
        except CorruptCheckpointError:
            folder.set_aside(self.directory, step)

    def _attempt(self, act: Callable[[], Any]):
        """Calls a function that saves; if it fails, removes its files, and raises."""
        try:
            act()
        except Exception as error:
            self._begun = None
            self._end_failed()
            is_full = re.search("No space left|quota", str(error))
            advice = " Make room and save again." if is_full else ""
            raise CheckpointError(f"a save into {self.directory} failed: {reading.brief(error)}. "
                                  f"Steps {self.steps()} are intact; the remains of the failed "
                                  f"save were removed.{advice}") from error

    def _end_failed(self):
        """Removes the remains of this process's failed save.

        Those of other processes are removed when the manager is opened.
        """
        if self._manager:
            with contextlib.suppress(Exception):  # its threads may still be writing
                self._manager.wait_until_finished()
        folder.remove_unfinished(self.directory)
        if self._manager:
            self._manager.reload()

    def wait(self) -> None:
        """Waits until the save in progress is on disk, and the snapshot in progress in memory.

        Raises:
          CheckpointError: it failed.
        """
        self._group.everywhere(self._wait_for_all, KINDS)

    def _wait_for_all(self):
        self._wait()
        self._snapshots.wait()

    def _wait(self):
        if self._manager:
            self._attempt(self._manager.wait_until_finished)
        self._begun = None

    def steps(self) -> list[int]:
        """Returns the steps on disk, as this process sees them, lowest first.

        The step of a save in progress is not among them.
        """
        return folder.steps(self.directory)

    def restore(self, step: int, target: Any, *, only: str | None = None, params_only: bool = False,
                cast: bool = False) -> Restored:
        """Returns the state of a step, with the target's shardings.

        It may have been saved with another mesh, stage and number of devices.

        Args:
          step: one of `steps()`.
          target: `zero.abstract(init_fn, tx, ...)` or a state; its shapes must be those saved.
          only: a regex for whole paths, such as "params/.*". Other leaves are the target's own, and
            the checkpoint may have more leaves. The target must then be a state, not shapes.
          params_only: whether to restore only parameters and model state, for example because the
            optimizer is another one. The target must then be a state, not shapes.
          cast: whether floating leaves may have another dtype.

        Raises:
          CheckpointError: there is no such step, or it does not fit the target; leaves that differ
            are named.
          CorruptCheckpointError: the manifest or a leaf is unreadable, or differs from the saved
            one.
        """
        self._check_open()
        self.wait()
        found = restoring.from_disk(self._group, self.directory, step, target,
                                    MODEL if params_only else only, cast)
        self._snapshots.restored(step, from_memory=False)
        return found

    def restore_latest(self, target: Any, *, if_none: Literal["raise", "none"] = "raise",
                       only: str | None = None, params_only: bool = False,
                       cast: bool = False) -> Restored | None:
        """Returns the newest state that loads; skips newer steps that are damaged, with warnings.

        With `memory`, these include the snapshots of which the memory of the hosts has all parts.

        If there are several processes, the first decides which steps exist, and a step that does
        not load on one process is skipped on all.

        Args:
          target, only, params_only, cast: see `restore`.
          if_none: "none" returns None if the directory has no step, so that a first run can start.

        Raises:
          CheckpointError: the directory has no step, or the newest does not fit the target.
          CorruptCheckpointError: every step is damaged.
        """
        if if_none not in ("raise", "none"):
            raise CheckpointError(f'restore_latest(if_none={if_none!r}): write "raise" or "none".')
        self._check_open()
        self.wait()
        damaged = []
        for step, is_on_disk, read in self._candidates():
            try:
                found = read(target, MODEL if params_only else only, cast)
                self._snapshots.restored(step, not is_on_disk)
                return found
            except CorruptCheckpointError as error:
                what = f"step {step}" if is_on_disk else f"the snapshot of step {step} in memory"
                warnings.warn(f"skipped {what}: {error}", RuntimeWarning, stacklevel=2)
                if is_on_disk:
                    damaged.append(step)
                    self._skipped.add(step)
        if damaged:
            raise CorruptCheckpointError(f"{self.directory} has steps {sorted(damaged)}, and none "
                                         "of them loads (see the warnings). To start afresh, move "
                                         "them away or give another directory.")
        self._group.everywhere(lambda: folder.check_is_ours(self.directory), KINDS)
        if if_none == "raise":
            raise CheckpointError(f"{self.directory} has no checkpoint. If this may be the first "
                                  'run, write if_none="none", which returns None.')
        self._snapshots.restored(-1, from_memory=False)
        return None

    def _candidates(self) -> Found:
        """Returns the steps to restore from, newest first, whether each is on disk, and its reader.

        Memory is faster, so that snapshots come before the same step on disk.
        """
        steps = self._group.of_first(self.steps())
        found: Found = [(step, True, functools.partial(restoring.from_disk, self._group,
                                                       self.directory, step)) for step in steps]
        found += self._snapshots.found(max(steps, default=-1))
        return sorted(found, key=lambda one: (-one[0], one[1]))

    def verify(self, step: int) -> Manifest:
        """Reads every leaf and compares its digest; returns the step's manifest.

        The host needs memory for the largest leaf.

        Raises:
          CorruptCheckpointError: the manifest or a leaf is damaged; damaged leaves are named.
        """
        self.wait()
        return reading.verify(self._path(step))

    def _path(self, step: int) -> epath.Path:
        return folder.step_path(self.directory, step)

    def close(self) -> None:
        """Waits for the save in progress, and removes the snapshots in memory; ends the use.

        A context that is left by an error, or by `Preemption.exit`, keeps the snapshots.

        Raises:
          CheckpointError: the save failed. The snapshots are kept.
        """
        self._close(self.wait, keep=False)

    def _close(self, wait: Callable[[], None], keep: bool):
        try:
            wait()
        except BaseException:
            keep = True
            raise
        finally:
            with contextlib.ExitStack() as ends:  # each of them, whatever the others raise
                ends.callback(self._snapshots.close, keep)
                ends.callback(self._unlock)
                if self._manager:
                    ends.callback(self._manager.close)
                self._manager, self._closed = None, True
                self._snapshots = NoSnapshots(self.directory, self._group)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace):
        # an error may be this process's alone; the others would not wait with it
        self._close(self._wait if error else self.wait, keep=bool(error))
