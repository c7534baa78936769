"""A directory of checkpoints: a folder for each step, and the remains of killed runs."""

import contextlib
import os
import time
import uuid

from etils import epath

from zerojax.errors import CheckpointError
from zerojax.processes.exchange import Group

_RUN = ".zerojax-run"  # the file with the identity of the run whose snapshots count
WAIT = 5.0  # seconds; NFS may show the files of another host late


def located(directory: str | os.PathLike) -> epath.Path:
    """Returns the absolute path without links, by which locks and snapshots know a directory.

    A URL, such as gs://bucket/runs, stays as it is.
    """
    path = epath.Path(directory).expanduser()
    return path if "://" in str(directory) else epath.Path(os.path.realpath(path))


def steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps in a directory of checkpoints, lowest first."""
    path = located(directory)
    if not path.exists():
        return []
    return sorted(int(p.name) for p in path.iterdir() if _is_step(p.name) and p.is_dir())


def _is_step(name: str) -> bool:
    """Whether a name is a number without leading zeros."""
    return name.isdecimal() and str(int(name)) == name


def orbax_trees(path: epath.Path) -> list[epath.Path]:
    """Returns the directories of trees that Orbax wrote, at most two levels below a directory."""
    levels = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else []
    return sorted(level for level in levels
                  if (level / "_METADATA").exists() and "orbax-checkpoint-tmp" not in str(level))


def check_is_ours(path: epath.Path) -> None:
    """Checks that a directory does not hold a tree that Orbax wrote without zerojax.

    Orbax lists the parts of a step in a file, so that a step without its manifest is told apart
    from a step that never had one.

    Raises:
      CheckpointError: it does.
    """
    listed = path / "_CHECKPOINT_METADATA"
    is_ours = (path / "manifest").exists() or (listed.exists() and "manifest" in listed.read_text())
    if not is_ours and (found := orbax_trees(path)):
        raise CheckpointError(f"{path} was written by Orbax without zerojax: it has no manifest. "
                              f"Read it with zj.load_orbax({str(found[0])!r}, state), where state "
                              "is what zero.init returned.")


def step_path(directory: str | os.PathLike, step: int | None = None) -> epath.Path:
    """Returns the path of one step, by default the newest.

    Args:
      directory: a directory of steps, or the directory of a step itself.

    Raises:
      CheckpointError: there is no such step, or Orbax wrote the directory without zerojax.
    """
    path = located(directory)
    if step is None and path.name.isdecimal() and (path / "manifest").exists():
        return path
    if step is not None and (path / str(step)).is_dir():  # a file system may list it only later
        return path / str(step)
    found = steps(directory)
    if not found:
        check_is_ours(path)
    if step is not None or not found:
        wanted = "step" if step is None else f"step {step}"
        raise CheckpointError(f"{directory} has no {wanted}; it has {found or 'none'}.")
    return path / str(found[-1])


def check_shared(path: epath.Path, group: Group) -> None:
    """Checks that every process can write into a directory, and that it is the same for all.

    A save waits for the files of the other processes. The directory is created if it is missing.

    Raises:
      CheckpointError: it is not writable, or is not the directory of process 0.
    """
    name = group.of_first(f".zerojax-{uuid.uuid4().hex}")
    own = path / f"{name}_{group.process}"
    try:
        group.everywhere(lambda: _check_writable(own), [CheckpointError])
        group.everywhere(lambda: _check_visible(path / f"{name}_0", group), [CheckpointError])
    finally:
        with contextlib.suppress(OSError):  # it was not written
            own.unlink()


def check_writable(path: epath.Path) -> None:
    """Checks that files can be created in a directory now.

    Orbax's threads wait for 5 minutes for a step's directory that cannot be created.

    Raises:
      CheckpointError: they cannot.
    """
    probe = path / f".zerojax-{uuid.uuid4().hex}"
    _check_writable(probe)
    probe.unlink()


def _check_writable(probe: epath.Path):
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    except OSError as error:
        raise _not_writable(probe.parent, error) from error


def _not_writable(path: epath.Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} is not writable: {error}. Give a directory that is writable.")


def _check_visible(probe: epath.Path, group: Group):
    if not appears(probe):
        raise CheckpointError(f"{probe.parent} is not the same directory for process "
                              f"{group.process} as for process 0: {probe.name}, which process 0 "
                              "wrote, is missing. Give a directory that all hosts share.")


def appears(path: epath.Path) -> bool:
    """Whether a path that another process created appears within `WAIT`."""
    end = time.monotonic() + WAIT
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def run_of(path: epath.Path) -> str:
    """Returns the identity of the run whose snapshots count, or ""."""
    file = path / _RUN
    return file.read_text().strip() if file.exists() else ""


def set_run(path: epath.Path, run: str) -> None:
    """Writes the identity of the run whose snapshots count from now on; "" means none do.

    Raises:
      CheckpointError: the directory is not writable.
    """
    try:
        if not run:
            (path / _RUN).unlink(missing_ok=True)
            return
        new = path / f"{_RUN}-{uuid.uuid4().hex}"
        new.write_text(run)
        new.replace(path / _RUN)
    except OSError as error:
        raise _not_writable(path, error) from error


def set_aside(path: epath.Path, step: int) -> None:
    """Renames a step that does not load; its files stay, for the user to examine."""
    (path / str(step)).rename(path / f"{step}.unreadable-{uuid.uuid4().hex[:8]}")


def remove_unfinished(path: epath.Path) -> None:
    """Removes the files of saves that were not completed, except those that cannot be removed."""
    for unfinished in path.glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(OSError):
            unfinished.rmtree()
