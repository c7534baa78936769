"""A step on disk: its manifest and its arrays, read through Orbax and compared with their digests."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from zerojax.checkpoint import digest, manifest
from zerojax.checkpoint.manifest import Manifest
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.layout import padded
from zerojax.processes import agreement, exchange

_LARGEST_MANIFEST = 100 * 2**20  # bytes; safetensors allows its header as many
_BATCH = 2**26  # bytes read at once where nothing but the host's memory is wanted
# of the machine or the moment, not of the files
_PASSING = (MemoryError, PermissionError, TimeoutError, ConnectionError, jax.errors.JaxRuntimeError)
_PASSING_TEXT = re.compile("PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|Too many open files|Stale file handle|"
                           "Cannot allocate memory")


def located(directory) -> epath.Path:
    path = epath.Path(directory).expanduser()
    return path if "://" in str(directory) else epath.Path(os.path.abspath(path))


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps in a directory of checkpoints, lowest first."""
    path = located(directory)
    if not path.exists():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal() and str(int(p.name)) == p.name and p.is_dir())


def step_path(directory: str | os.PathLike, step: int | None = None) -> epath.Path:
    """Of one step, or the newest; `directory` may be a step's itself.

    Raises:
      CheckpointError: no such step.
    """
    path = located(directory)
    if step is None and path.name.isdecimal() and (path / "manifest").exists():
        return path
    there = steps(directory)
    if step is not None and (path / str(step)).is_dir():  # a file system may list it later
        return path / str(step)
    if not there or step is not None:
        raise CheckpointError(f"{directory} has no step{'' if step is None else f' {step}'}; it has {there or 'none'}.")
    return path / str(there[-1])


def read_manifest(path: epath.Path) -> Manifest:
    """Of a step's directory.

    Raises:
      CorruptCheckpointError: it is not there, can't be read or is not what was saved; a link where none belongs.
    """
    file = path / "manifest" / "metadata"
    try:
        _check_links(path)
        if (length := file.stat().length) > _LARGEST_MANIFEST:
            raise ValueError(f"it has {length:,} bytes, more than {_LARGEST_MANIFEST:,}")
        values = ocp.JsonCheckpointHandler().restore(path / "manifest", args=ocp.args.JsonRestore())  # waits for no other process
        found = Manifest.from_json(dict(values))
        if str(found.step) != path.name:
            raise ValueError(f"it is that of step {found.step}")
        return found
    except Exception as error:
        if _passing(error):
            raise
        raise CorruptCheckpointError(f"step {path.name} in {path.parent}: its manifest can't be used ({brief(error)}); "
                                     f"{_instead(path)}.") from error


def _check_links(path):
    links = [os.path.join(folder, name) for folder, folders, files in os.walk(path) for name in folders + files
             if os.path.islink(os.path.join(folder, name))]
    if links:
        raise ValueError(f"{links[0]} is a link, and checkpoints have none")


def checked(path, note: Manifest, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays, each with the digest it was saved with. Processes that share some of them read them together."""
    meshes = [x.sharding.mesh for x in wanted.values() if isinstance(x.sharding, NamedSharding)]
    devices = next(filter(None, map(exchange.devices_of, meshes)), ())
    read, bad = agreement.everywhere(devices, lambda: _tried(path, wanted))
    _raise_damaged(path, note, _of_all(devices, bad) or _of_all(devices, _differing(note, read)))
    return read


def _of_all(devices, bad: dict[str, str]) -> dict[str, str]:
    """What any process found."""
    return {p: why for found in exchange.shared(devices, bad).values() for p, why in found.items()}


def _raise_damaged(path, note, bad: Mapping[str, str]):
    if bad:
        some = "".join(f"\n  {p}: {why}" for p, why in list(bad.items())[:manifest.MOST])
        raise CorruptCheckpointError(f"step {note.step} in {path.parent}: {len(bad)} or more of {len(note.leaves)} leaves are "
                                     f"not what was saved; {_instead(path)}.{some}")


def _passing(error: Exception) -> bool:
    return isinstance(error, _PASSING) or _PASSING_TEXT.search(str(error)) is not None


def _instead(path) -> str:
    others = [s for s in steps(path.parent) if str(s) != path.name]
    return f"use another step ({', '.join(map(str, others))}) or a copy" if others else "there is no other step; use a copy"


def _tried(path, wanted) -> tuple[dict[str, Any], dict[str, str]]:
    """(arrays, what is wrong with each that can't be read)."""
    try:
        return _read(path, wanted), {}
    except Exception as error:
        if _passing(error):
            raise
        named = [p for p in wanted if re.search(f"[\"']{re.escape(p)}/", str(error))]
        if named or len(wanted) == 1:
            return {}, {p: brief(error) for p in named or wanted}
        return _tried_singly(path, wanted)


def _tried_singly(path, wanted):
    read, bad = {}, {}
    for p, x in wanted.items():
        if len(bad) < manifest.MOST:
            one, wrong = _tried(path, {p: x})
            read, bad = read | one, bad | wrong
    return read, bad


def _differing(note, read: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each that has another digest than was saved."""
    digests = dict(zip(read, digest.of(list(read.values())), strict=True))
    return {p: f"its digest is {d}, saved was {note.leaves[p].digest}" for p, d in digests.items() if d != note.leaves[p].digest}


def _read(path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    empty = {p: _zeros(x) for p, x in wanted.items() if not math.prod(x.shape)}
    item = {p: x for p, x in wanted.items() if p not in empty}
    like = {p: x.kept if isinstance(x, padded.Padded) else x for p, x in item.items()}
    args = ocp.args.PyTreeRestore(like, {p: _restore_args(x) for p, x in item.items()}, partial_restore=True)
    read = ocp.PyTreeCheckpointHandler().restore(path / "state", args=args) if item else {}
    for p, x in item.items():
        if not isinstance(read[p], np.ndarray | jax.Array):  # Orbax returns what it was given for a name that it does not find
            raise ValueError("it is in the manifest and not among the arrays")
        if not padded.is_padded(x) and read[p].shape != x.shape:
            raise ValueError(f"its shape is {read[p].shape} on disk and {x.shape} in the manifest")
    return {p: empty[p] if p in empty else _cut(read[p], x) for p, x in wanted.items()}


def _cut(read, x):
    """Of what may be padded on disk, the logical array in the host's memory, or as the devices keep it."""
    if not padded.is_padded(x):
        return read
    if isinstance(read, np.ndarray):
        return read[tuple(map(slice, x.shape))]
    return read if x.kept.shape == x.shape else padded.Padded(read, x.shape)


def _zeros(x):
    return np.zeros(x.shape, x.dtype) if x.sharding is None else jax.numpy.zeros(x.shape, x.dtype, device=x.sharding)


def _restore_args(x):
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    if isinstance(x, padded.Padded):  # Orbax cuts off rows, or adds rows of zeros
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.kept.shape, dtype=x.dtype, strict=False)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def arrays(path: epath.Path, note: Manifest, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves of a step in the host's memory, a few at a time, each with the digest it was saved with.

    Raises:
      CorruptCheckpointError: at the first that has another.
    """
    for group in _groups(note, paths):
        yield from checked(path, note, _host(note, group)).items()


def verify(path: epath.Path) -> Manifest:
    """See `Checkpointer.verify`; of a step's directory."""
    note, bad = read_manifest(path), {}
    for group in _groups(note, list(note.leaves)):
        read, unread = _tried(path, _host(note, group))
        bad |= unread | _differing(note, read)
    _raise_damaged(path, note, bad)
    return note


def _host(note, paths):
    """What to read into the host's memory."""
    return {p: note.leaves[p].source() for p in paths}


def _groups(note, paths) -> Iterator[list[str]]:
    """Together at most as large as the largest leaf, or `_BATCH`."""
    most, group, total = max([_BATCH, *(note.leaves[p].bytes for p in paths)]), [], 0
    for p in paths:
        if group and total + note.leaves[p].bytes > most:
            yield group
            group, total = [], 0
        group.append(p)
        total += note.leaves[p].bytes
    if group:
        yield group


def brief(error: BaseException) -> str:
    """Its first line, without tensorstore's description of every driver and option."""
    text = re.sub(r"\W*(See full TensorStore details|\[tensorstore_spec).*", "", str(error).split("\n")[0])
    text = re.sub(r'Error opening "\w+" driver: ', "", text) or type(error).__name__
    return text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
