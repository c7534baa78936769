"""Parameters and model state of a checkpoint or a live state, written as safetensors files."""

import contextlib
import dataclasses
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from zerojax.checkpoint import entries, safetensors, whole_leaves
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.target import MODEL, Target
from zerojax.checkpoint.whole_leaves import Leaves
from zerojax.errors import CheckpointError

_PIECE = 2**24  # elements converted and written at once


@dataclasses.dataclass(frozen=True)
class Export:
    """The files to write, and the leaves in each.

    Attributes:
      step: the step of the state, or None.
      written: the shape and dtype in which each leaf is written, by path.
      names: the tensor name of each leaf.
      parts: the paths of the leaves in each file.
      files: the files; with more than one part, the last is the index.
    """

    step: int | None
    written: Mapping[str, Entry]
    names: Mapping[str, str]
    parts: Sequence[Sequence[str]]
    files: Sequence[pathlib.Path]


def export_safetensors(source: str | os.PathLike | Any, to: str | os.PathLike, *,
                       step: int | None = None, dtype: str | None = None,
                       only: str | None = None, rename: Mapping[str, str] | None = None,
                       shard_bytes: int = 5 * 10**9) -> list[pathlib.Path]:
    """Writes the parameters and model state of a checkpoint or of a live state to files.

    The host needs memory for a few times the largest leaf, not for the model. The files get their
    final names only when all of them are complete. The digests of a checkpoint's leaves are
    compared. If several processes hold parts of a live state, all of them must call this function;
    the first of them writes.

    Args:
      source: a state, or another tree of arrays; or a directory of steps, or that of one step.
      to: a path such as "model.safetensors". If the leaves have more than `shard_bytes` bytes, the
        files are "model-00001-of-00003.safetensors" and so on, and "model.safetensors.index.json".
      step: the step of a directory to export; by default, the newest.
      dtype: the dtype to convert floating leaves to; None converts none.
      only: a regex for the paths of the leaves to write. By default, these are the parameters and
        the model state, or all leaves of a tree that is not a state. Random keys are never written.
      rename: from a regex to its replacement, applied to names such as "blocks.mlp.kernel".
      shard_bytes: the most bytes in one file, unless a single leaf has more.

    Returns:
      The files; the index is the last.

    Raises:
      CheckpointError: a file already exists, two leaves have the same name, safetensors does not
        support a dtype, or there is no such step.
      CorruptCheckpointError: a leaf of a checkpoint differs from the saved one.
      StateError: a step took the memory of the state.

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> [path.name for path in export_safetensors({"w": jnp.ones(4)}, file, dtype="bfloat16")]
    ['model.safetensors']
    """
    leaves = whole_leaves.of(source, step)
    only = only or (MODEL if leaves.is_of_state else ".*")
    group = leaves.group
    export = group.everywhere(lambda: _prepared(leaves, to, dtype, only, rename or {}, shard_bytes,
                                                group.first), [CheckpointError])
    arrays = leaves.arrays([p for part in export.parts for p in part])
    group.everywhere(lambda: _written(export, arrays, writes=group.first,
                                      is_gathered=group.size > 1), [CheckpointError])
    return list(export.files)


def _prepared(leaves: Leaves, to: str | os.PathLike, dtype: str | None, only: str,
              rename: Mapping[str, str], shard_bytes: int, writes: bool) -> Export:
    to = pathlib.Path(to).expanduser().absolute()
    written = {p: _converted(entry, dtype) for p, entry in _chosen(leaves, only).items()}
    names = safetensors.names_of(list(written), rename)
    parts = _parts(written, shard_bytes)
    files = _file_names(to, len(parts))
    if writes:
        _check_destination(to)
        _check_free(files)
    return Export(leaves.step, written, names, parts, files)


def _written(export: Export, arrays: Iterator[tuple[str, np.ndarray]], *, writes: bool,
             is_gathered: bool):
    """Writes the files; takes all of the arrays if several processes gather them together."""
    try:
        if writes:
            _write_all(export, arrays)
    finally:
        if is_gathered:
            for _ in arrays:
                pass


def _write_all(export: Export, arrays: Iterator[tuple[str, np.ndarray]]):
    with _all_or_none(export.files) as temporary:
        for part, file in zip(export.parts, temporary, strict=False):
            with open(file, "xb") as out:
                _write(out, export, part, arrays)
        if len(export.parts) > 1:
            temporary[-1].write_text(_index(export))


def _check_destination(to: pathlib.Path):
    if to.suffix != ".safetensors" or not to.parent.is_dir():
        raise CheckpointError(f"cannot export to {to}: name a file that ends in .safetensors, in "
                              "an existing directory.")


def _chosen(leaves: Leaves, only: str) -> dict[str, Entry]:
    """Returns the entries whose paths match a regex, without random keys."""
    chosen = Target(leaves.entries, only).wanted
    if not chosen:
        some = ", ".join(list(leaves.entries)[:3])
        raise CheckpointError(f"only={only!r} matches none of the {len(leaves.entries)} leaves of "
                              f"step {leaves.step}, such as {some}.")
    return {p: entry for p, entry in chosen.items() if not entry.key}


def _converted(entry: Entry, dtype: str | None) -> Entry:
    """Returns the shape and dtype in which a leaf is written."""
    if dtype and not (dtype in safetensors.DTYPES and _is_floating(dtype)):
        raise CheckpointError(f"dtype={dtype!r} is not a floating dtype of safetensors; write "
                              "float32, bfloat16, float16, or None.")
    name = dtype if dtype and _is_floating(entry.dtype) else entry.dtype
    if name not in safetensors.DTYPES:
        raise CheckpointError(f"safetensors has no dtype {name}; export as one of "
                              f"{', '.join(safetensors.DTYPES)}.")
    return Entry(entry.shape, name)


def _is_floating(dtype: str) -> bool:
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _parts(leaves: Mapping[str, Entry], most: int) -> list[list[str]]:
    """Returns the paths in each file, in order; a leaf of more than `most` bytes is alone in one.
    """
    parts: list[list[str]] = []
    room = 0
    for path, entry in leaves.items():
        if not parts or entry.bytes > room:
            parts.append([])
            room = most
        parts[-1].append(path)
        room -= entry.bytes
    return parts


def _file_names(to: pathlib.Path, n: int) -> list[pathlib.Path]:
    """Returns the paths of `n` files and of their index, named like those of huggingface_hub."""
    if n == 1:
        return [to]
    files = [to.with_name(f"{to.stem}-{i:05}-of-{n:05}{to.suffix}") for i in range(1, n + 1)]
    return [*files, to.with_name(f"{to.name}.index.json")]


def _check_free(files: Sequence[pathlib.Path]):
    for file in files:
        if file.exists() or file.is_symlink():
            raise CheckpointError(f"{file} already exists; remove it, or export under another "
                                  "name.")


@contextlib.contextmanager
def _all_or_none(files: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
    """Yields temporary paths, which are renamed to those of the files at the end.

    If an error occurs, they are removed instead.
    """
    temporary = [file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}") for file in files]
    try:
        yield temporary
        for path, file in zip(temporary, files, strict=True):
            os.replace(path, file)
    except OSError as error:
        for file in files:  # none of them existed before
            file.unlink(missing_ok=True)
        raise CheckpointError(f"the export to {files[0].parent} failed and left no files: "
                              f"{error}.") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _index(export: Export) -> str:
    """Returns the text of an index, from the name of each tensor to that of its file."""
    total = sum(entry.bytes for entry in export.written.values())
    where = {export.names[p]: file.name
             for part, file in zip(export.parts, export.files, strict=False) for p in part}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)


def _write(out: BinaryIO, export: Export, part: Sequence[str],
           arrays: Iterator[tuple[str, np.ndarray]]):
    """Writes one file."""
    out.write(_header(export, part))
    for p, (_, array) in zip(part, arrays, strict=False):  # leaves the rest for other files
        flat = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = entries.cast(p, flat[start:start + _PIECE], export.written[p].dtype)
            out.write(piece.view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())


def _header(export: Export, part: Sequence[str]) -> bytes:
    """Returns the bytes before the tensors."""
    fields: dict[str, Any] = {}
    end = 0
    for p in part:
        entry = export.written[p]
        begin, end = end, end + entry.bytes
        fields[export.names[p]] = {"dtype": safetensors.DTYPES[entry.dtype], "shape": entry.shape,
                                   "data_offsets": [begin, end]}
    step = {} if export.step is None else {"step": str(export.step)}
    fields["__metadata__"] = {"format": "flax", **step}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
