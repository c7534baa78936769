"""A model's arrays as safetensors files, which the rest of the world loads: written leaf by leaf, read slice by slice.

The format: a length (8 bytes), a JSON header with dtype, shape and offsets of each tensor, and their bytes, row by row.
"""

import contextlib
import difflib
import json
import math
import os
import pathlib
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.checkpoint import manifest, reading
from zerojax.checkpoint.manifest import Entry, Manifest
from zerojax.checkpoint.target import MODEL, Target
from zerojax.errors import CheckpointError, CorruptCheckpointError, MissingExtraError
from zerojax.layout import padded

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
          "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
          "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
_LARGEST_INDEX = 100 * 2**20  # bytes
_PIECE = 2**24  # elements converted and written at once


def name_of(path: str, rename: Mapping[str, str]) -> str:
    """A leaf's tensor name: its path without "params" or "model_state", joined by dots, then each pattern replaced, in order.

    >>> name_of("params/blocks/kernel", {r"^blocks": "h", r"kernel$": "weight"})
    'h.weight'
    """
    name = re.sub(r"^(params|model_state)/", "", path).replace("/", ".")
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def _names(paths: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Path to name; no two alike."""
    try:
        names = {path: name_of(path, rename) for path in paths}
    except re.error as error:
        raise CheckpointError(f"rename={dict(rename)!r}: no regular expression or replacement: {error}.") from None
    if "__metadata__" in names.values():
        raise CheckpointError(f"rename={dict(rename)!r} names a leaf '__metadata__', which is no tensor's name.")
    owners = {name: path for path, name in names.items()}
    twice = [(path, owners[name], name) for path, name in names.items() if owners[name] != path]
    if twice:
        raise CheckpointError(f"{twice[0][0]} and {twice[0][1]} would both be named {twice[0][2]!r}; rename one of them.")
    return names


def export_safetensors(checkpoint: str | os.PathLike, to: str | os.PathLike, *, step: int | None = None,
                       dtype: str | None = None, only: str = MODEL, rename: Mapping[str, str] | None = None,
                       shard_bytes: int = 5 * 10**9) -> list[pathlib.Path]:
    """Writes a checkpoint's parameters and model state; each leaf's digest is compared on the way.

    The host needs memory for a few times the largest leaf, not for the model. Files appear under their names when all are
    whole.

    Args:
      checkpoint: a directory of steps, or of one step.
      to: "model.safetensors"; above `shard_bytes`, "model-00001-of-00003.safetensors", ... and "model.safetensors.index.json".
      step: the newest if None.
      dtype: of floating leaves; None keeps theirs.
      only: regex for the paths of the leaves that are written. Random keys are never.
      rename: regex to replacement, on names as "blocks.mlp.kernel".

    Returns:
      The files, the index last.

    Raises:
      CheckpointError: a file is there already, two leaves of one name, a dtype that safetensors does not have, no such step.
      CorruptCheckpointError: a leaf that is not what was saved.
    """
    to = _destination(to)
    path = reading.step_path(checkpoint, step)
    note = reading.read_manifest(path)
    chosen = Target(note.leaves, only).wanted
    if not chosen:
        raise CheckpointError(f"only={only!r} matches none of the {len(note.leaves)} leaves of step {note.step}, as "
                              f"{', '.join(list(note.leaves)[:3])}.")
    leaves = {p: _as(entry, dtype) for p, entry in chosen.items() if not entry.key}
    names = _names(list(leaves), rename or {})
    parts = _parts(leaves, shard_bytes)
    files, index = _file_names(to, len(parts))
    _check_free([*files, *index])
    with _whole_or_nothing([*files, *index]) as temporary:
        for part, file in zip(parts, temporary, strict=False):
            with open(file, "xb") as out:
                _write(out, path, note, {p: leaves[p] for p in part}, names)
        if index:
            where = {names[p]: file.name for part, file in zip(parts, files, strict=True) for p in part}
            total = sum(entry.bytes for entry in leaves.values())
            temporary[-1].write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    return [*files, *index]


def _file_names(to: pathlib.Path, n: int) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Of `n` files, and of their index if there are several; as huggingface_hub names them."""
    if n == 1:
        return [to], []
    files = [to.with_name(f"{to.stem}-{i:05}-of-{n:05}{to.suffix}") for i in range(1, n + 1)]
    return files, [to.with_name(f"{to.name}.index.json")]


def _destination(to) -> pathlib.Path:
    to = pathlib.Path(to).expanduser().absolute()
    if to.suffix != ".safetensors" or not to.parent.is_dir():
        raise CheckpointError(f"can't export to {to}: name a file that ends in .safetensors, in a directory that is there.")
    return to


def _check_free(files):
    there = [str(file) for file in files if file.exists() or file.is_symlink()]
    if there:
        raise CheckpointError(f"{there[0]} is there already; remove it, or export under another name.")


def _as(entry: Entry, dtype: str | None) -> Entry:
    """What is written for a leaf."""
    if dtype and not (dtype in DTYPES and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)):
        raise CheckpointError(f"dtype={dtype!r} is no floating dtype of safetensors; write float32, bfloat16, float16, or None.")
    floating = jnp.issubdtype(jnp.dtype(entry.dtype), jnp.floating)
    name = dtype if dtype and floating else entry.dtype
    if name not in DTYPES:
        raise CheckpointError(f"safetensors has no {name}; export as one of {', '.join(DTYPES)}.")
    return Entry(entry.shape, name)


def _parts(leaves: Mapping[str, Entry], most: int) -> list[list[str]]:
    """Paths file by file, in order; a leaf larger than `most` has a file of its own."""
    parts, room = [], 0
    for path, entry in leaves.items():
        if not parts or entry.bytes > room:
            parts.append([])
            room = most
        parts[-1].append(path)
        room -= entry.bytes
    return parts


@contextlib.contextmanager
def _whole_or_nothing(files: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
    """Names to write under, which become those of the files at the end, or are removed."""
    temporary = [file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}") for file in files]
    try:
        yield temporary
        for name, file in zip(temporary, files, strict=True):
            os.replace(name, file)
    except OSError as error:
        for file in files:  # none was there before
            file.unlink(missing_ok=True)
        raise CheckpointError(f"the export to {files[0].parent} failed, and left nothing: {error}.") from error
    finally:
        for name in temporary:
            name.unlink(missing_ok=True)


def _write(out: BinaryIO, path, note: Manifest, leaves: Mapping[str, Entry], names: Mapping[str, str]) -> None:
    """One file."""
    ends = np.cumsum([entry.bytes for entry in leaves.values()]).tolist()
    header: dict[str, Any] = {names[p]: {"dtype": DTYPES[e.dtype], "shape": e.shape, "data_offsets": [end - e.bytes, end]}
                              for (p, e), end in zip(leaves.items(), ends, strict=True)}
    header["__metadata__"] = {"format": "flax", "step": str(note.step)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for p, array in reading.arrays(path, note, list(leaves)):
        flat = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            out.write(_cast(p, flat[start:start + _PIECE], leaves[p].dtype).view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())


def _cast(path, x, dtype):
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if x.dtype != y.dtype and bool(np.any(np.isinf(y) & np.isfinite(x))):
        largest = np.abs(x[np.isfinite(x)]).max()
        raise CheckpointError(f"{path} has values that {dtype} can't hold, as {largest}; export as bfloat16.")
    return y


def load_safetensors(path: str | os.PathLike, target: Any, *, rename: Mapping[str, str] | None = None, cast: bool = False,
                     follow_links: bool = False) -> Any:
    """Arrays of safetensors files on their devices; of each, a device reads its own part.

    Args:
      path: a file, an index (.index.json), or a directory that has one of either.
      target: a tree of arrays, or of `ShapeDtypeStruct`s with shardings. Of a `TrainState`, parameters and model state are
        replaced, and the rest stays as it is.
      rename: as for `export_safetensors`: from a leaf's name to that in the files.
      cast: floating leaves may be of another dtype.
      follow_links: files of an index may be links that lead elsewhere, as in the cache of huggingface_hub.

    Raises:
      CheckpointError: tensors that are not there, or of another shape or dtype; each is named.
      CorruptCheckpointError: a file that is damaged, or an index that names files elsewhere.
      MissingExtraError: safetensors is not installed.
    """
    path, state = pathlib.Path(path), hasattr(target, "params") and hasattr(target, "opt_state")
    aim = Target(target, MODEL if state else None)
    aim.check_asked(str(path))
    names = _names([p for p, x in aim.wanted.items() if not manifest.key_of(x)], rename or {})
    with _opened(_files(path, follow_links)) as tensors:
        _check_fit(path, tensors, {p: (name, aim.entries[p]) for p, name in names.items()}, cast)
        read = {p: _placed(tensors[name], aim.leaves[p]) for p, name in names.items()}
    return padded.structure(target).unflatten([read.get(p, x) for p, x in aim.leaves.items()])


def _files(path: pathlib.Path, follow_links: bool) -> dict[pathlib.Path, list[str] | None]:
    """The files, and of those of an index the tensors that it says are in them."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            some = ", ".join(file.name for file in found[:4])
            raise CheckpointError(f"{path} has {len(found)} safetensors files or indexes ({some}); name one.")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    return _indexed(path, follow_links) if path.name.endswith(".json") else {path: None}


def _indexed(path, follow_links):
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {_LARGEST_INDEX:,}")
        where = json.loads(path.read_text())["weight_map"]
        files = {}
        for name, file in where.items():
            files.setdefault(_beside(path, file, follow_links), []).append(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is no index that can be used: {reading.brief(error)}.") from error


def _beside(index, file, follow_links) -> pathlib.Path:
    if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
        raise ValueError(f"it names the file {file!r}, which is not the name of one beside it")
    path = index.parent / file
    if path.is_symlink() and not follow_links:
        raise ValueError(f"{file} is a link to {os.readlink(path)}; if that is meant, write follow_links=True")
    if not path.is_file():
        raise ValueError(f"it names {file}, and there is no such file beside it")
    return path


@contextlib.contextmanager
def _opened(files) -> Iterator[dict[str, Any]]:
    """Tensor names to slices, whose bytes are read when they are indexed."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors files need safetensors: pip install 'zerojax[export]'.") from None
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file, names in files.items():
            try:
                opened = stack.enter_context(safe_open(str(file), "np"))
                tensors |= {name: opened.get_slice(name) for name in (opened.keys() if names is None else names)}
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptCheckpointError(f"{file} can't be read: {reading.brief(error)}.") from error
        yield tensors


def _check_fit(path, tensors, wanted: Mapping[str, tuple[str, Entry]], cast):
    known = {code: dtype for dtype, code in DTYPES.items()}
    there = {p: Entry(tuple(t.get_shape()), str(known.get(t.get_dtype(), t.get_dtype())))
             for p, (name, _) in wanted.items() if (t := tensors.get(name)) is not None}
    lines = manifest.differences(Manifest(0, there), {p: entry for p, (_, entry) in wanted.items()}, all_of_it=False, cast=cast)
    if lines:
        absent = [name for p, (name, _) in wanted.items() if p not in there]
        near = {name: difflib.get_close_matches(name, tensors, 1, 0) for name in absent[:3]}
        hint = f" Nearest names there: {near}; see rename." if absent else ""
        raise CheckpointError(f"{path} does not fit the target: {len(lines)} leaves differ.{hint}\n  "
                              + "\n  ".join(lines[:manifest.MOST]) + "\n  ..." * (len(lines) > manifest.MOST))
    unused = sorted(set(tensors) - {name for name, _ in wanted.values()})
    if unused:
        some = ", ".join(unused[:3])
        warnings.warn(f"{path} has {len(unused)} tensors that the target has no leaf for, as {some}.", stacklevel=4)


def _placed(tensor, x):
    """A leaf from a tensor: each part of it is read once, whether one device or several hold it."""
    sharding, kept = getattr(x, "sharding", None), {}
    if sharding is None:
        whole = _slice(tensor, (), np.asarray(x))
        return whole if isinstance(x, np.ndarray) else type(x)(whole.item())
    once = lambda index: kept[str(index)] if str(index) in kept else kept.setdefault(str(index), _slice(tensor, index, x))
    if padded.is_padded(x):
        return padded.Padded(jax.make_array_from_callback(tuple(x.kept.shape), sharding, once), x.shape)
    return jax.make_array_from_callback(tuple(x.shape), sharding, once)


def _slice_within(tensor, index, x):
    """A part of a padded array: what of it is within the tensor, and zeros."""
    rows = [range(n)[at] for n, at in zip(x.kept.shape, index, strict=True)]
    there = tuple(slice(min(r.start, d), min(r.stop, d)) for r, d in zip(rows, x.shape, strict=True))
    part = np.zeros([len(r) for r in rows], x.dtype)
    if all(at.stop > at.start for at in there):
        part[tuple(slice(at.stop - at.start) for at in there)] = _slice(tensor, there, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return part


def _slice(tensor, index, x):
    if not math.prod(x.shape):  # safetensors slices nothing of no size
        return np.zeros(x.shape, x.dtype)
    if padded.is_padded(x):
        return _slice_within(tensor, index, x)
    try:
        return np.asarray(tensor[index or ...]).astype(x.dtype)
    except AttributeError as error:
        raise CheckpointError(f"safetensors makes no numpy arrays of {tensor.get_dtype()} ({error}); write bfloat16.") from None
