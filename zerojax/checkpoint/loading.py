"""Arrays of safetensors files on their devices, each of which reads only its own parts."""

import contextlib
import difflib
import functools
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zerojax import trees
from zerojax.checkpoint import entries, reading, safetensors
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.target import MODEL, Target, misfit
from zerojax.errors import CheckpointError, CorruptCheckpointError, MissingExtraError
from zerojax.layout import padded

Files = dict[pathlib.Path, list[str] | None]  # the tensors to read of each file; None is all
_LARGEST_INDEX = 100 * 2**20  # bytes


def load_safetensors(path: str | os.PathLike, target: Any, *,
                     rename: Mapping[str, str] | None = None, cast: bool = False,
                     follow_links: bool = False) -> Any:
    """Returns the target's tree with arrays from safetensors files, in the target's shardings.

    Args:
      path: a file, an index (.index.json), or a directory that has one of either.
      target: a tree of arrays, or of `ShapeDtypeStruct`s with shardings. In a `TrainState`, only
        parameters and model state are replaced.
      rename: as for `export_safetensors`; it turns a leaf's name into its name in the files.
      cast: whether floating leaves may have another dtype in the files.
      follow_links: whether the files of an index may be links that lead elsewhere, as in the cache
        of huggingface_hub.

    Raises:
      CheckpointError: a tensor is missing or has another shape or dtype; each is named.
      CorruptCheckpointError: a file is damaged, or an index names files in another directory.
      MissingExtraError: safetensors is not installed.
    """
    path = pathlib.Path(path)
    is_state = hasattr(target, "params") and hasattr(target, "opt_state")
    aim = Target(target, MODEL if is_state else None)
    aim.check_restorable(str(path))
    paths = [p for p, x in aim.wanted.items() if not trees.key_impl(x)]
    names = safetensors.names_of(paths, rename or {})
    with _opened(_files(path, follow_links)) as tensors:
        _check_fit(path, tensors, {p: aim.wanted_entries[p] for p in paths}, names, cast)
        _warn_of_unused(path, tensors, names)
        return aim.replaced({p: _loaded(tensors[name], aim.leaves[p]) for p, name in names.items()})


def _files(path: pathlib.Path, follow_links: bool) -> Files:
    if path.is_dir():
        path = _only_file(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    return _indexed(path, follow_links) if path.name.endswith(".json") else {path: None}


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    found = indexes or sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        some = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"{directory} has {len(found)} safetensors files or indexes "
                              f"({some}); name one.")
    return found[0]


def _indexed(path: pathlib.Path, follow_links: bool) -> Files:
    """Returns the files of an index."""
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {_LARGEST_INDEX:,}")
        files: dict[pathlib.Path, Any] = {}
        for name, file in json.loads(path.read_text())["weight_map"].items():
            files.setdefault(_beside(path, file, follow_links), []).append(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is not a usable index: {reading.brief(error)}."
                                     ) from error


def _beside(index: pathlib.Path, file: Any, follow_links: bool) -> pathlib.Path:
    """Returns the path of a file that an index names, which must be in the same directory."""
    if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
        raise ValueError(f"it names the file {file!r}, which is not the name of a .safetensors "
                         "file in its own directory")
    path = index.parent / file
    if path.is_symlink() and not follow_links:
        raise ValueError(f"{file} is a link to {os.readlink(path)}; to allow links, write "
                         "follow_links=True")
    if not path.is_file():
        raise ValueError(f"it names {file}, which is not a file in its directory")
    return path


@contextlib.contextmanager
def _opened(files: Files) -> Iterator[dict[str, Any]]:
    """Yields slices by the names of tensors; a slice's bytes are read when it is indexed."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors files need the package safetensors: pip install "
                                "'zerojax[export]'.") from None
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file, names in files.items():
            try:
                opened = stack.enter_context(safe_open(str(file), "np"))
                wanted = opened.keys() if names is None else names
                tensors |= {name: opened.get_slice(name) for name in wanted}
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptCheckpointError(f"{file} is unreadable: {reading.brief(error)}."
                                             ) from error
        yield tensors


def _check_fit(path: pathlib.Path, tensors: Mapping[str, Any], wanted: Mapping[str, Entry],
               names: Mapping[str, str], cast: bool):
    found = {p: _entry(tensors[name]) for p, name in names.items() if name in tensors}
    lines = entries.differences(found, wanted, all_of_it=False, cast=cast)
    if lines:
        absent = [name for p, name in names.items() if p not in found]
        raise CheckpointError(misfit(str(path), lines, _similar(absent, tensors)))


def _entry(tensor: Any) -> Entry:
    dtypes = {code: dtype for dtype, code in safetensors.DTYPES.items()}
    code = tensor.get_dtype()
    return Entry(tuple(tensor.get_shape()), str(dtypes.get(code, code)))


def _similar(absent: Sequence[str], tensors: Mapping[str, Any]) -> str:
    """Returns a sentence with the names in the files that are most like the first absent ones."""
    if not absent:
        return ""
    closest = {name: difflib.get_close_matches(name, tensors, 1, 0) for name in absent[:3]}
    return f" The closest names in the files: {closest}; see rename."


def _warn_of_unused(path: pathlib.Path, tensors: Mapping[str, Any], names: Mapping[str, str]):
    unused = sorted(set(tensors) - set(names.values()))
    if unused:
        warnings.warn(f"the target has no leaf for {len(unused)} of the {len(tensors)} tensors in "
                      f"{path}, such as {', '.join(unused[:3])}.", stacklevel=3)


def _loaded(tensor: Any, leaf: Any) -> Any:
    """Returns a tensor as a leaf of the target; parts that several devices hold are read once."""
    if getattr(leaf, "sharding", None) is None:
        array = _slice(tensor, (), np.asarray(leaf))
        return array if isinstance(leaf, np.ndarray) else type(leaf)(array.item())

    @functools.cache
    def part(bounds):
        return _slice(tensor, tuple(slice(*bound) for bound in bounds), leaf)

    def read(index):
        return part(tuple((at.start, at.stop) for at in index))

    stored = leaf.kept if padded.is_padded(leaf) else leaf
    array = jax.make_array_from_callback(tuple(stored.shape), leaf.sharding, read)
    return padded.Padded(array, leaf.shape) if padded.is_padded(leaf) else array


def _slice(tensor: Any, index: tuple[slice, ...], leaf: Any) -> np.ndarray:
    """Returns a part of a tensor, in the dtype of a leaf."""
    if not math.prod(leaf.shape):  # safetensors cannot slice tensors of size zero
        return np.zeros(leaf.shape, leaf.dtype)
    if padded.is_padded(leaf):
        return _slice_of_padded(tensor, index, leaf)
    try:
        return np.asarray(tensor[index or ...]).astype(leaf.dtype)
    except AttributeError as error:
        raise CheckpointError(f"safetensors cannot make numpy arrays of {tensor.get_dtype()} "
                              f"({error}); save the file in bfloat16.") from None


def _slice_of_padded(tensor: Any, index: tuple[slice, ...], leaf: Any) -> np.ndarray:
    """Returns a part of a padded array: the part within the tensor, and zeros."""
    rows = [range(n)[at] for n, at in zip(leaf.kept.shape, index, strict=True)]
    part = np.zeros([len(r) for r in rows], leaf.dtype)
    within = tuple(slice(min(r.start, size), min(r.stop, size))
                   for r, size in zip(rows, leaf.shape, strict=True))
    if all(at.stop > at.start for at in within):
        logical = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        part[tuple(slice(at.stop - at.start) for at in within)] = _slice(tensor, within, logical)
    return part
