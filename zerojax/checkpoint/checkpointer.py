"""Checkpoints for any mesh and any stage: Orbax writes and reads, a digest of each leaf says whether it read what it wrote.

On disk are logical arrays, one for each leaf of the state by its path, and a `Manifest`. Orbax is called here and in `store`.
"""

import contextlib
import os
import re
import uuid
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from zerojax.checkpoint import digest, manifest, reading
from zerojax.checkpoint.manifest import Manifest
from zerojax.checkpoint.target import MODEL, Target
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.layout import padded
from zerojax.policy import Policy
from zerojax.processes import agreement, exchange
from zerojax.train import donation

_KINDS = (CorruptCheckpointError, CheckpointError)


class Restored(NamedTuple):
    """What `restore` returns: the state on its devices, and what was saved beside it."""

    state: Any
    step: int
    data_state: Any
    metrics: Any


class Checkpointer:
    """Saves and restores training states, of zerojax or your own, in one directory.

    The first save removes what interrupted saves left there: one process at a time may save into a directory, and while it does
    others may restore from it. The processes of one job make it and call its methods alike; all of them see the directory.

    Args:
      directory: made if it is not there.
      keep: so many of the newest stay; None keeps all. An old one goes when the new one is whole.
      every: `save` does nothing for steps that this does not divide.
      asynchronous: `save` returns when the arrays are copied, and files are written in the background.
      zero: its stage and precision go into the manifest.

    Raises:
      CheckpointError: the directory can't be written.

    >>> import tempfile, jax.numpy as jnp, optax, zerojax as zj
    >>> zero, tx = zj.Zero(zj.make_mesh(devices=jax.devices()[:2])), optax.sgd(0.1)
    >>> state = zero.init(lambda: {"w": jnp.ones((4, 2))}, tx)
    >>> with zj.Checkpointer(tempfile.mkdtemp(), every=10) as checkpoints:
    ...     checkpoints.save(state, data_state={"next": 0}, metrics={"loss": 1.5})
    ...     checkpoints.restore_latest(zero.abstract(lambda: {"w": jnp.ones((4, 2))}, tx)).data_state
    True
    {'next': 0}
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 3, every: int = 1, asynchronous: bool = True,
                 zero: Policy | None = None):
        for name, n in (("keep", keep), ("every", every)):
            if n is not None and (type(n) is not int or n < 1):
                raise CheckpointError(f"Checkpointer({name}={n!r}): write a whole number, 1 or more.")
        self.directory, self.every, self.zero = reading.located(directory), every, zero
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=asynchronous,
                                                     cleanup_tmp_directories=True)
        self._manager, self._begun, self._passed_over = None, None, set()
        self._devices = exchange.everyone()
        agreement.everywhere(self._devices, lambda: _check_writable(self.directory), _KINDS)
        if self._devices:
            self._check_shared()

    def save(self, state: Any, *, step: int | None = None, data_state: Any = None, metrics: Any = None,
             force: bool = False) -> bool:
        """Saves, if the step is one to be saved. To be called after each step: it also tells of an earlier save that failed.

        Args:
          state: arrays, of any sharding. They may be donated to the next step at once.
          step: the state's; reading it off the state would wait for the device at every call.
          data_state: JSON values or bytes, or an iterator with `get_state`, as `zj.feed` of a source that has it.
          metrics: JSON values or scalars.
          force: also where `every` does not divide the step.

        Returns:
          Whether a save was begun. A step that is there already is not saved again.

        Raises:
          CheckpointError: this save, or one before it, failed; the directory has later steps; `step` is not the state's.
        """
        idle = self._manager and not self._manager.is_saving_in_progress()  # of its last thread, Orbax's check_for_errors is silent
        if idle and not self._devices:  # of several processes, all have to tell of it, or none
            self._wait()
        if step is not None and not self._due(step, force):
            return False
        step = agreement.everywhere(self._devices, lambda: self._ready(state, step, data_state, metrics), _KINDS)
        if not self._due(step, force):
            return False
        self._set_aside(step)
        there = self._first_says([*self.steps(), *([] if self._begun is None else [self._begun])])
        if step in there:
            return False
        if there and max(there) > step:
            raise CheckpointError(f"{self.directory} has step {max(there)}, and is to get step {step}: the newest would be of the "
                                  "run that was left. Move the later steps away to go on here, or give another directory.")
        self._write(step, state, data_state, metrics)
        return True

    def _ready(self, state, step, data_state, metrics) -> int:
        """The step; raises what stands in the way of saving it."""
        if self._devices:
            self._wait()
        donation.check_alive("save", state)
        step = _step_of(state, step)
        _check_arrays(manifest.flat(state))
        manifest.plain("data_state", _position_of(data_state))
        manifest.plain("metrics", jax.device_get(metrics))
        return step

    def _due(self, step, force) -> bool:
        return force or step % self.every == 0

    def _write(self, step, state, data_state, metrics):
        leaves = manifest.flat(state)
        note = _note(step, state, leaves, self.zero, data_state, metrics).to_json()
        arrays = {path: _stored(x) for path, x in leaves.items() if np.size(x)}  # Orbax refuses arrays of no size
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(note))
        self._wait()
        self._raise_failed(lambda: self._opened().save(step, args=args, force=True))
        self._begun = step
        if not self._options.enable_async_checkpointing:
            self.wait()

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        self._manager.reload()  # steps may have been moved away
        return self._manager

    def _first_says(self, value: Any) -> Any:
        """JSON values of process 0, on every process: hosts may see a directory in different states."""
        return exchange.shared(self._devices, value)[0] if self._devices else value

    def _check_shared(self):
        """All processes have to see one directory: a save waits for what the others write into it."""
        mark = self.directory / self._first_says(f".zerojax-{uuid.uuid4().hex}")
        agreement.everywhere(self._devices, lambda: jax.process_index() or mark.write_text(""), _KINDS)
        try:
            agreement.everywhere(self._devices, lambda: _check_there(mark), _KINDS)
        finally:
            if jax.process_index() == 0:
                mark.unlink()

    def _set_aside(self, step):
        """Steps that did not load, do not still, and that a run from before them is about to reach: renamed, not removed."""
        for bad in sorted(s for s in self._passed_over if s >= step):
            self._passed_over.remove(bad)
            agreement.everywhere(self._devices, lambda bad=bad: self._rename_if_bad(bad), _KINDS)

    def _rename_if_bad(self, step):
        if jax.process_index():
            return
        try:
            reading.verify(self._path(step))
        except CorruptCheckpointError:
            (self.directory / str(step)).rename(self.directory / f"{step}.unreadable-{uuid.uuid4().hex[:8]}")

    def _raise_failed(self, act):
        try:
            act()
        except Exception as error:
            self._begun = None
            self._end_failed()
            full = "; make room for it, and save again" if re.search("No space left|quota", str(error)) else ""
            raise CheckpointError(f"a save into {self.directory} failed: {reading.brief(error)}. Steps {self.steps()} are whole, "
                                  f"what the failed save left is removed{full}.") from error

    def _end_failed(self):
        """Removes what a failed save of this process left; the manager cleans up after others when it is opened."""
        if self._manager:
            with contextlib.suppress(Exception):  # threads of it may still write
                self._manager.wait_until_finished()
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                path.rmtree()
        if self._manager:
            self._manager.reload()

    def wait(self) -> None:
        """Until the save under way is on disk.

        Raises:
          CheckpointError: it failed.
        """
        agreement.everywhere(self._devices, self._wait, _KINDS)

    def _wait(self):
        if self._manager:
            self._raise_failed(self._manager.wait_until_finished)
        self._begun = None

    def steps(self) -> list[int]:
        """The steps on disk, as this process sees them, lowest first; that of a save under way is not among them."""
        return reading.steps(self.directory)

    def restore(self, step: int, target: Any, *, only: str | None = None, params_only: bool = False,
                cast: bool = False) -> Restored:
        """A state of one step, where the target's shardings say; the mesh, stage and number of devices that saved it may differ.

        Args:
          step: one of `steps()`.
          target: `zero.abstract(init_fn, tx, ...)` or a state; its shapes must be those saved.
          only: regex for whole paths, as "params/.*": other leaves are the target's own, and the checkpoint may have more.
          params_only: parameters and model state, as with another optimizer. The target is a state, not shapes.
          cast: floating leaves may be of another dtype.

        Raises:
          CheckpointError: no such step, or one that does not fit the target; each leaf is named.
          CorruptCheckpointError: a leaf that can't be read, or is not what was saved.
        """
        self.wait()
        return self._restore(step, target, only, params_only, cast)

    def restore_latest(self, target: Any, *, if_none: Literal["raise", "none"] = "raise", only: str | None = None,
                       params_only: bool = False, cast: bool = False) -> Restored | None:
        """The newest state that loads, by step. Each newer one that is damaged is passed over with a warning.

        Of several processes, the first decides which steps there are; what does not load on one is passed over on all.

        Args:
          target, only, params_only, cast: as for `restore`.
          if_none: "none" returns None from a directory that holds no checkpoint, for you to start afresh.

        Raises:
          CheckpointError: there is none, or it does not fit the target.
          CorruptCheckpointError: there are some, and none loads.
        """
        if if_none not in ("raise", "none"):
            raise CheckpointError(f'restore_latest(if_none={if_none!r}): write "raise" or "none".')
        self.wait()
        failed = []
        for step in reversed(self._first_says(self.steps())):
            try:
                return self._restore(step, target, only, params_only, cast)
            except CorruptCheckpointError as error:
                failed.append(step)
                self._passed_over.add(step)
                warnings.warn(f"passed over step {step}: {error}", RuntimeWarning, stacklevel=2)
        if failed:
            raise CorruptCheckpointError(f"{self.directory} has steps {sorted(failed)}, and none of them loads (see the warnings); "
                                         "to start afresh, move them away or give another directory.")
        if if_none == "raise":
            raise CheckpointError(f'{self.directory} holds no checkpoint; in a first run write if_none="none": it returns None.')
        return None

    def verify(self, step: int) -> Manifest:
        """Reads every leaf and compares its digest; returns what the step says of itself. Needs the memory of its largest leaves.

        Raises:
          CorruptCheckpointError: naming the leaves that are not what was saved.
        """
        self.wait()
        return reading.verify(self._path(step))

    def _restore(self, step, target, only, params_only, cast) -> Restored:
        prepared = lambda: _prepared(self._path(step), target, MODEL if params_only else only, cast)
        note, aim = agreement.everywhere(self._devices, prepared, _KINDS)
        arrays = reading.checked(self._path(step), note, aim.sources(note))
        whole = aim.only is None or len(note.data_states) == 1
        position = note.data_of(jax.process_index(), jax.process_count()) if whole else None
        return Restored(aim.filled(arrays), note.step, position, note.metrics)

    def _path(self, step: int) -> epath.Path:
        return reading.step_path(self.directory, step)

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed.
        """
        self._close(self.wait)

    def _close(self, wait):
        try:
            wait()
        finally:
            if self._manager:
                self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace):
        self._close(self._wait if error else self.wait)  # an error may be of this process alone


def _check_writable(directory: epath.Path):
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".zerojax-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{directory} can't be written: {error}; give a directory that can.") from error


def _check_there(mark: epath.Path):
    if not mark.exists():
        raise CheckpointError(f"{mark.parent} of process {jax.process_index()} is not that of process 0, whose {mark.name} is not "
                              "there; give a directory that all hosts share.")


def _step_of(state, step) -> int:
    own: Any = state.get("step") if isinstance(state, Mapping) else getattr(state, "step", None)
    if step is None and own is None:
        raise CheckpointError(f"save was given a state ({type(state).__name__}) without a `step`; write save(state, step=...).")
    if isinstance(own, jax.ShapeDtypeStruct):
        raise CheckpointError("save was given shapes, not arrays; give the state that a step returned.")
    step = int(own) if step is None else step
    if type(step) is not int or step < 0:
        raise CheckpointError(f"save was given step={step!r}; write a whole number, 0 or more.")
    if own is not None and int(own) != step:
        raise CheckpointError(f"save was given step={step} and a state of step {int(own)}; give the state's own.")
    return step


def _check_arrays(leaves):
    if not leaves:
        raise CheckpointError("save was given a state that holds no array.")
    odd = [p for p, x in leaves.items() if not isinstance(x, jax.Array | padded.Padded) and np.asarray(x).dtype.kind in "OUSMm"]
    if odd:
        raise CheckpointError(f"save was given a state whose leaves {odd[:manifest.MOST]} are neither arrays nor numbers; keep "
                              "functions and text out of it, as eqx.filter(model, eqx.is_array) does.")


def _stored(x):
    """As it is on disk: of typed keys, their data; of padded arrays, all of it, for devices can't write shards of the rest."""
    x = x.kept if padded.is_padded(x) else x
    if isinstance(x, jax.Array):
        return jax.random.key_data(x) if manifest.key_of(x) else x
    x = x if hasattr(x, "dtype") else manifest.number(x)
    return np.asarray(x, x.dtype.newbyteorder("="))


def _note(step, state, leaves, zero, data_state, metrics) -> Manifest:
    digests = digest.of([x if hasattr(x, "dtype") else manifest.number(x) for x in leaves.values()])
    entries = {path: manifest.entry_of(x, d) for (path, x), d in zip(leaves.items(), digests, strict=True)}
    meshes = [x.sharding.mesh for x in leaves.values() if isinstance(getattr(x, "sharding", None), NamedSharding)]
    precision = None if zero is None else zero.precision.as_dict()
    return Manifest(step, entries, manifest.optimizer_of(state), dict(meshes[0].shape) if meshes else {},
                    zero.stage if zero else None, precision, _positions(data_state), jax.device_get(metrics))


def _position_of(data_state):
    return data_state.get_state() if hasattr(data_state, "get_state") else data_state


def _positions(data_state) -> tuple[Any, ...]:
    """In their data, of every process; one if they are the same."""
    data_state = _position_of(data_state)
    if not (devices := exchange.everyone()):
        return (data_state,)
    all_of_them = [said for _, said in sorted(exchange.shared(devices, manifest.plain("data_state", data_state)).items())]
    alike = all(said == all_of_them[0] for said in all_of_them)
    return (data_state,) if alike else tuple(map(manifest.restored, all_of_them))


def _prepared(path: epath.Path, target: Any, only: str | None, cast: bool) -> tuple[Manifest, Target]:
    """What a step says of itself, and the target that it fits."""
    note, aim = reading.read_manifest(path), Target(target, only)
    aim.check(note, f"step {note.step} in {path.parent}", cast)
    return note, aim
