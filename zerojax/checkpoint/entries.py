"""The entries of a manifest: each leaf's shape, dtype and digest, and how two entries differ."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from zerojax import trees
from zerojax.errors import CheckpointError
from zerojax.layout import padded

MOST = 10  # paths in an error


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf as it is on disk.

    Attributes:
      shape: the logical shape; for typed random keys, that of their data.
      dtype: the dtype on disk.
      digest: see `digest.of`.
      spec: the `PartitionSpec` of the array that was saved, as text.
      key: the name of the generator of typed random keys, or "".
      kept: the shape on disk of a padded array, or None.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    spec: str = ""
    key: str = ""
    kept: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """The dtype and shape, such as "float32[64, 32]"."""
        return f"{self.key + ' key ' if self.key else ''}{self.dtype}{list(self.shape)}"

    @property
    def bytes(self) -> int:
        """The size of the logical array."""
        return trees.itemsize(self.dtype) * math.prod(self.shape)

    def source(self, sharding: Any = None, kept: tuple[int, ...] | None = None) -> Any:
        """Returns the shape and dtype to read, `Padded` if the array is padded or is to be padded.

        Args:
          sharding: where to read the array to; None means the host's memory. Arrays of 64-bit
            numbers are read into the host's memory if jax would truncate them to 32 bits.
          kept: the shape to pad the array to, or None.
        """
        dtype = np.dtype(self.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            sharding = None
        array = jax.ShapeDtypeStruct(kept or self.shape, dtype, sharding=sharding)
        return padded.Padded(array, self.shape) if kept or self.kept else array


def of(x: Any, digest: str = "") -> Entry:
    """Returns the entry of an array, a shape or a Python number."""
    spec = getattr(getattr(x, "sharding", None), "spec", None)
    key = trees.key_impl(x)
    kept = tuple(x.kept.shape) if padded.is_padded(x) else None
    array = jax.eval_shape(jax.random.key_data, x) if key else as_array(x)
    spec_text = "" if spec is None else f"P({', '.join(map(repr, spec))})"
    return Entry(tuple(array.shape), str(array.dtype), digest, spec_text, key, kept)


def as_array(x: Any) -> Any:
    """Returns a Python number as an array; integers have 32 bits if they fit, as in jax."""
    if hasattr(x, "dtype"):
        return x
    is_small = type(x) is int and abs(x) < 2**31
    return np.asarray(x, np.int32 if is_small else None)


def by_path(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by path; a padded array is one leaf.

    Raises:
      CheckpointError: two leaves have the same path.
    """
    flat = jax.tree.leaves_with_path(state, is_leaf=padded.is_padded)
    leaves = {trees.path_of(path): x for path, x in flat}
    if len(leaves) < len(flat):
        paths = [trees.path_of(path) for path, _ in flat]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        raise CheckpointError(f"the state has two leaves at each of {repeated[:MOST]}; rename the "
                              "keys that contain a '/'.")
    return leaves


def differences(saved: Mapping[str, Entry], wanted: Mapping[str, Entry], *, all_of_it: bool,
                cast: bool) -> list[str]:
    """Returns a line for each leaf that a checkpoint and a target do not have alike.

    Args:
      saved, wanted: the entries of the checkpoint and of the target, by path.
      all_of_it: whether leaves that only the checkpoint has are differences.
      cast: whether floating dtypes may differ.
    """
    lines = [_difference(path, saved.get(path), entry, cast) for path, entry in wanted.items()]
    extra = [f"{path}: {entry.text} in the checkpoint, not in the target"
             for path, entry in saved.items() if all_of_it and path not in wanted]
    return [line for line in lines if line] + extra


def _difference(path: str, saved: Entry | None, wanted: Entry, cast: bool) -> str:
    """Returns how two entries differ, or "" if they do not."""
    if saved is None:
        return f"{path}: not in the checkpoint, {wanted.text} in the target"
    is_alike = (saved.shape, saved.key) == (wanted.shape, wanted.key)
    if is_alike and (saved.dtype == wanted.dtype or (cast and can_cast(saved, wanted))):
        return ""
    return f"{path}: {saved.text} in the checkpoint, {wanted.text} in the target"


def cast(path: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns an array in another dtype.

    Raises:
      CheckpointError: the dtype cannot represent a finite value.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(dtype)
    if x.dtype == y.dtype or "float" not in str(y.dtype):
        return y
    lost = np.isfinite(x) & ~np.isfinite(y)
    if lost.any():
        raise CheckpointError(f"{path} has values that {y.dtype} cannot represent, such as "
                              f"{x[lost].flat[0]}; choose bfloat16.")
    return y


def can_cast(a: Entry, b: Entry) -> bool:
    """Whether one dtype may be cast to the other: floating to floating, nothing else."""
    return "float" in a.dtype and "float" in b.dtype
