"""A checkpoint's parameters and model state, written leaf by leaf as safetensors files."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from etils import epath

from zerojax.checkpoint import directory, reading, safetensors
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.manifest import Manifest
from zerojax.checkpoint.target import MODEL, Target
from zerojax.errors import CheckpointError

Leaves = Mapping[str, Entry]  # the shape and dtype to write, by path
_PIECE = 2**24  # elements converted and written at once


def export_safetensors(checkpoint: str | os.PathLike, to: str | os.PathLike, *,
                       step: int | None = None, dtype: str | None = None, only: str = MODEL,
                       rename: Mapping[str, str] | None = None,
                       shard_bytes: int = 5 * 10**9) -> list[pathlib.Path]:
    """Writes a checkpoint's parameters and model state, after comparing each leaf's digest.

    The host needs memory for a few times the largest leaf, not for the model. The files get their
    final names only when all of them are complete.

    Args:
      checkpoint: a directory of steps, or the directory of one step.
      to: a path such as "model.safetensors". If the leaves have more than `shard_bytes` bytes, the
        files are "model-00001-of-00003.safetensors" and so on, and "model.safetensors.index.json".
      step: the step to export; by default, the newest.
      dtype: the dtype to convert floating leaves to; None converts none.
      only: a regex for the paths of the leaves to write. Random keys are never written.
      rename: from a regex to its replacement, applied to names such as "blocks.mlp.kernel".
      shard_bytes: the most bytes in one file, unless a single leaf has more.

    Returns:
      The files; the index is the last.

    Raises:
      CheckpointError: a file already exists, two leaves have the same name, safetensors does not
        support a dtype, or there is no such step.
      CorruptCheckpointError: a leaf differs from the saved one.
    """
    to = _destination(to)
    path = directory.step_path(checkpoint, step)
    manifest = reading.read_manifest(path)
    leaves = {p: _converted(entry, dtype) for p, entry in _chosen(manifest, only).items()}
    names = safetensors.names_of(list(leaves), rename or {})
    parts = _parts(leaves, shard_bytes)
    files, index = _file_names(to, len(parts))
    _check_free([*files, *index])
    with _all_or_none([*files, *index]) as temporary:
        for part, file in zip(parts, temporary, strict=False):
            with open(file, "xb") as out:
                _write(out, path, manifest, {p: leaves[p] for p in part}, names)
        if index:
            where = {names[p]: file.name for part, file in zip(parts, files, strict=True)
                     for p in part}
            temporary[-1].write_text(_index(leaves, where))
    return [*files, *index]


def _destination(to: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(to).expanduser().absolute()
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise CheckpointError(f"cannot export to {path}: name a file that ends in .safetensors, in "
                              "an existing directory.")
    return path


def _chosen(manifest: Manifest, only: str) -> dict[str, Entry]:
    """Returns the entries whose paths match a regex, without random keys."""
    chosen = Target(manifest.leaves, only).wanted
    if not chosen:
        some = ", ".join(list(manifest.leaves)[:3])
        raise CheckpointError(f"only={only!r} matches none of the {len(manifest.leaves)} leaves of "
                              f"step {manifest.step}, such as {some}.")
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


def _parts(leaves: Leaves, most: int) -> list[list[str]]:
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


def _file_names(to: pathlib.Path, n: int) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the paths of `n` files and of their index, named like those of huggingface_hub."""
    if n == 1:
        return [to], []
    files = [to.with_name(f"{to.stem}-{i:05}-of-{n:05}{to.suffix}") for i in range(1, n + 1)]
    return files, [to.with_name(f"{to.name}.index.json")]


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


def _index(leaves: Leaves, where: Mapping[str, str]) -> str:
    """Returns the text of an index, from the name of each tensor to that of its file."""
    total = sum(entry.bytes for entry in leaves.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)


def _write(out: BinaryIO, path: epath.Path, manifest: Manifest, leaves: Leaves,
           names: Mapping[str, str]):
    """Writes one file."""
    out.write(_header(manifest, {names[p]: entry for p, entry in leaves.items()}))
    for p, array in reading.arrays(path, manifest, list(leaves)):
        flat = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = _cast(p, flat[start:start + _PIECE], leaves[p].dtype)
            out.write(piece.view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())


def _header(manifest: Manifest, tensors: Mapping[str, Entry]) -> bytes:
    """Returns the bytes before the tensors."""
    fields: dict[str, Any] = {}
    end = 0
    for name, entry in tensors.items():
        begin, end = end, end + entry.bytes
        fields[name] = {"dtype": safetensors.DTYPES[entry.dtype], "shape": entry.shape,
                        "data_offsets": [begin, end]}
    fields["__metadata__"] = {"format": "flax", "step": str(manifest.step)}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _cast(path: str, x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if x.dtype != y.dtype and bool(np.any(np.isinf(y) & np.isfinite(x))):
        largest = np.abs(x[np.isfinite(x)]).max()
        raise CheckpointError(f"{path} has values that {dtype} cannot represent, such as "
                              f"{largest}; export as bfloat16.")
    return y
