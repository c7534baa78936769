"""A state from a step on disk, or from a snapshot in memory."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import reading, warm
from zerojax.checkpoint.manifest import Manifest
from zerojax.checkpoint.target import Target
from zerojax.checkpoint.warm import Header, Snapshot
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.processes.exchange import Group

KINDS = (CorruptCheckpointError, CheckpointError)


class Restored(NamedTuple):
    """The result of `Checkpointer.restore`.

    Attributes:
      state: the state, on its devices.
      step: the state's step.
      data_state: the data state from which this process continues; None if none was saved, or if
        only some leaves are restored and the processes saved different data states.
      metrics: the metrics that were saved with the state.
    """

    state: Any
    step: int
    data_state: Any
    metrics: Any


def from_disk(group: Group, directory: epath.Path, step: int, target: Any, only: str | None,
              cast: bool) -> Restored:
    """Returns the state of a step in a directory; see `Checkpointer.restore`."""

    def prepared() -> tuple[epath.Path, Manifest, Target]:
        if not group.first:  # the first process knows the step, which this one may see later
            folder.appears(directory / str(step))
        path = folder.step_path(directory, step)
        manifest = reading.read_manifest(path)
        return path, manifest, _fitting(manifest, str(directory), target, only, cast)

    path, manifest, aim = group.everywhere(prepared, KINDS)
    arrays = reading.checked(path, manifest, aim.sources(manifest.leaves))
    return _restored(group, manifest, aim, arrays, only)


def from_memory(group: Group, headers: Mapping[pathlib.Path, Header], snapshot: Snapshot,
                target: Any, only: str | None, cast: bool) -> Restored:
    """Returns the state of a snapshot; see `warm`."""
    manifest = warm.manifest_of(group, headers, snapshot)
    aim = group.everywhere(lambda: _fitting(manifest, "memory", target, only, cast), KINDS)
    arrays = warm.arrays(group, headers, snapshot, manifest, aim.sources(manifest.leaves))
    return _restored(group, manifest, aim, arrays, only)


def _fitting(manifest: Manifest, where: str, target: Any, only: str | None, cast: bool) -> Target:
    """Returns the target, after checking that a step fits it."""
    aim = Target(target, only)
    aim.check(manifest, f"step {manifest.step} in {where}", cast)
    return aim


def _restored(group: Group, manifest: Manifest, aim: Target, arrays: dict[str, Any],
              only: str | None) -> Restored:
    has_position = only is None or len(manifest.data_states) == 1
    position = manifest.data_of(group.process, group.size) if has_position else None
    return Restored(aim.filled(arrays), manifest.step, position, manifest.metrics)
