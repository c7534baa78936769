"""A step on disk: its manifest and its arrays, read by Orbax and compared with their digests."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from zerojax.checkpoint import digest, directory
from zerojax.checkpoint.entries import MOST
from zerojax.checkpoint.manifest import Manifest
from zerojax.errors import CorruptCheckpointError
from zerojax.layout import padded
from zerojax.processes import exchange

_LARGEST_MANIFEST = 100 * 2**20  # bytes; safetensors allows its header as many
_BATCH = 2**26  # bytes read at once into the host's memory
# errors of the machine or the moment, which say nothing about the files
_TRANSIENT = (MemoryError, PermissionError, TimeoutError, ConnectionError,
              jax.errors.JaxRuntimeError)
_TRANSIENT_TEXT = re.compile("PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|Too many open files|"
                             "Stale file handle|Cannot allocate memory")


def read_manifest(path: epath.Path) -> Manifest:
    """Returns the manifest in a step's directory.

    Raises:
      CheckpointError: Orbax wrote the step without zerojax.
      CorruptCheckpointError: the manifest is missing, unreadable or not the saved one, or the
        directory contains a link.
    """
    directory.check_is_ours(path)
    try:
        _check_links(path)
        found = Manifest.from_json(_manifest_json(path))
        if str(found.step) != path.name:
            raise ValueError(f"it belongs to step {found.step}")
        return found
    except Exception as error:
        if is_transient(error):
            raise
        raise CorruptCheckpointError(f"step {path.name} in {path.parent}: its manifest is "
                                     f"unusable ({brief(error)}); {_alternative(path)}."
                                     ) from error


def _check_links(path: epath.Path):
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            if os.path.islink(link := os.path.join(folder, name)):
                raise ValueError(f"{link} is a link, and no checkpoint contains links")


def _manifest_json(path: epath.Path) -> dict:
    length = (path / "manifest" / "metadata").stat().length
    if length > _LARGEST_MANIFEST:
        raise ValueError(f"it has {length:,} bytes, more than {_LARGEST_MANIFEST:,}")
    handler = ocp.JsonCheckpointHandler()  # unlike a Checkpointer, it waits for no other process
    return dict(handler.restore(path / "manifest", args=ocp.args.JsonRestore()))


def checked(path: epath.Path, manifest: Manifest, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays by path, after comparing their digests with the manifest's.

    Processes that share a mesh of the shardings read the arrays together.

    Args:
      sources: the arrays to read by path; see `Entry.source`.

    Raises:
      CorruptCheckpointError: an array is unreadable or has another digest, on any of the processes.
    """
    shardings = [x.sharding for x in sources.values()]
    group = exchange.of_mesh(*(s.mesh for s in shardings if isinstance(s, NamedSharding)))
    arrays, unreadable = group.everywhere(lambda: _tried(path, sources))
    damaged = _of_all(group, unreadable) or _of_all(group, _with_other_digests(manifest, arrays))
    _raise_damaged(path, manifest, damaged)
    return arrays


def _of_all(group: exchange.Group, damaged: dict[str, str]) -> dict[str, str]:
    """Returns the damage that any process found."""
    return {p: why for found in group.shared(damaged).values() for p, why in found.items()}


def _raise_damaged(path: epath.Path, manifest: Manifest, damaged: Mapping[str, str]):
    if damaged:
        some = "".join(f"\n  {p}: {why}" for p, why in list(damaged.items())[:MOST])
        raise CorruptCheckpointError(f"step {manifest.step} in {path.parent}: at least "
                                     f"{len(damaged)} of {len(manifest.leaves)} leaves are "
                                     f"damaged; {_alternative(path)}.{some}")


def is_transient(error: Exception) -> bool:
    return isinstance(error, _TRANSIENT) or _TRANSIENT_TEXT.search(str(error)) is not None


def _alternative(path: epath.Path) -> str:
    others = [str(s) for s in directory.steps(path.parent) if str(s) != path.name]
    if not others:
        return "there is no other step; use a copy of this one"
    return f"use another step ({', '.join(others)}) or a copy of this one"


def _tried(path: epath.Path, sources: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns arrays by path, and why others are unreadable.

    If the error does not name the unreadable arrays, all are read again one by one.
    """
    try:
        return _read(path, sources), {}
    except Exception as error:
        if is_transient(error):
            raise
        text = str(error)
        named = [p for p in sources if re.search(f"[\"']{re.escape(p)}/", text)]
        if not named and len(sources) > 1:
            return _tried_singly(path, sources)
        return {}, dict.fromkeys(named or sources, brief(error))


def _tried_singly(path: epath.Path, sources: Mapping[str, Any]):
    arrays, unreadable = {}, {}
    for p, source in sources.items():
        if len(unreadable) < MOST:
            array, error = _tried(path, {p: source})
            arrays |= array
            unreadable |= error
    return arrays, unreadable


def _with_other_digests(manifest: Manifest, arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns the arrays whose digest is not the manifest's, with both digests."""
    digests = zip(arrays, digest.of(list(arrays.values())), strict=True)
    saved = {p: entry.digest for p, entry in manifest.leaves.items()}
    return {p: f"its digest is {d}, but the manifest has {saved[p]}"
            for p, d in digests if d != saved[p]}


def _read(path: epath.Path, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays by path; those of size zero are not on disk."""
    on_disk = {p: x for p, x in sources.items() if math.prod(x.shape)}
    read = _restored(path, on_disk) if on_disk else {}
    for p, source in on_disk.items():
        _check_read(read[p], source)
    return {p: cut(read[p], x) if p in on_disk else _zeros(x) for p, x in sources.items()}


def _restored(path: epath.Path, sources: Mapping[str, Any]) -> Mapping[str, Any]:
    arrays = {p: padded.stored(x) for p, x in sources.items()}
    options = {p: restore_args(x) for p, x in sources.items()}
    args = ocp.args.PyTreeRestore(arrays, options, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)


def restore_args(x: Any) -> ocp.RestoreArgs:
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    is_padded = padded.is_padded(x)  # then Orbax cuts rows off, or adds rows of zeros
    shape = x.kept.shape if is_padded else x.shape
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=shape, dtype=x.dtype,
                                strict=not is_padded)


def _check_read(array: Any, source: Any):
    if not isinstance(array, np.ndarray | jax.Array):  # Orbax returns its input for unknown names
        raise ValueError("it is in the manifest but not among the arrays")
    if not padded.is_padded(source) and array.shape != source.shape:
        raise ValueError(f"its shape is {array.shape} on disk and {source.shape} in the manifest")


def cut(array: Any, source: Any) -> Any:
    """Returns a padded array as the devices keep it, or in the host's memory without padding."""
    if not padded.is_padded(source):
        return array
    if isinstance(array, np.ndarray):
        return array[tuple(map(slice, source.shape))]
    return array if source.kept.shape == source.shape else padded.Padded(array, source.shape)


def _zeros(x: Any) -> Any:
    if x.sharding is None:
        return np.zeros(x.shape, x.dtype)
    return jax.numpy.zeros(x.shape, x.dtype, device=x.sharding)


def arrays(path: epath.Path, manifest: Manifest,
           paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields leaves of a step in the host's memory, which holds only a few of them at a time.

    Raises:
      CorruptCheckpointError: a leaf is unreadable or has another digest than the manifest.
    """
    for group in _groups(manifest, paths):
        yield from checked(path, manifest, _into_host(manifest, group)).items()


def verify(path: epath.Path) -> Manifest:
    """Compares all leaves of a step with their digests; returns the manifest.

    Raises:
      CorruptCheckpointError: the manifest or a leaf is damaged; each leaf is named.
    """
    manifest = read_manifest(path)
    damaged = {}
    for group in _groups(manifest, manifest.leaves):
        read, unreadable = _tried(path, _into_host(manifest, group))
        damaged |= unreadable | _with_other_digests(manifest, read)
    _raise_damaged(path, manifest, damaged)
    return manifest


def _into_host(manifest: Manifest, paths: Sequence[str]) -> dict[str, Any]:
    """Returns the sources that read leaves into the host's memory."""
    return {p: manifest.leaves[p].source() for p in paths}


def _groups(manifest: Manifest, paths: Iterable[str]) -> Iterator[list[str]]:
    """Yields groups of paths; a group is at most as large as the largest leaf or `_BATCH`."""
    sizes = {p: manifest.leaves[p].bytes for p in paths}
    room = max([_BATCH, *sizes.values()])
    group, total = [], 0
    for p, size in sizes.items():
        if group and total + size > room:
            yield group
            group, total = [], 0
        group.append(p)
        total += size
    if group:
        yield group


def brief(error: BaseException) -> str:
    """Returns an error's first line, without tensorstore's descriptions of drivers and options."""
    first = str(error).split("\n")[0]
    text = re.sub(r"\W*(See full TensorStore details|\[tensorstore_spec).*", "", first)
    text = re.sub(r'Error opening "\w+" driver: ', "", text) or type(error).__name__
    return text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
