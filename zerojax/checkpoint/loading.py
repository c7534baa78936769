"""Arrays of safetensors files on their devices, each of which reads only its own parts."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zerojax.checkpoint import entries, matching, tensor_files
from zerojax.checkpoint.matching import Transform
from zerojax.checkpoint.rearranging import View
from zerojax.checkpoint.target import MODEL, Target, is_state
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.layout import padded
from zerojax.processes import exchange


def load_safetensors(path: str | os.PathLike, target: Any, *,
                     rename: Mapping[str, str] | None = None,
                     transform: Mapping[str, Transform] | None = None, only: str | None = None,
                     cast: bool = False, follow_links: bool = False) -> Any:
    """Returns the target's tree with arrays from safetensors files, in the target's shardings.

    Each device reads its own parts, also of transposed, fused and stacked tensors, and at most the
    rows around them. The maps in `zerojax.hugging_face` are `rename` and `transform` for the models
    of Hugging Face. All processes that share the target's mesh must call this function.

    Args:
      path: a file, an index (.index.json), or a directory that has one of either.
      target: a tree of arrays, or of `ShapeDtypeStruct`s with shardings. In a `TrainState`, only
        parameters and model state are replaced. Integers of the model state that the files lack,
        such as the counters of NNX's random streams, stay as they are.
      rename: as for `export_safetensors`; it turns a leaf's name, such as "blocks.mlp.kernel", into
        its name in the files. A name with a `*` is that of several tensors, one for each index of
        the leaf's first dimension: "h.*.mlp.weight" stacks h.0.mlp.weight, h.1.mlp.weight, ...
      transform: from a regex, which is searched in the leaf's name before, between and after its
        renamings, to a pattern that turns each tensor into the leaf, such as "out in -> in out"
        (see `zerojax.checkpoint.rearranging`), or to a function of the tensor as a numpy array. The
        first regex that matches is used. Functions read whole tensors, on every process.
      only: a regex for the whole paths of the leaves to read; other leaves are the target's own.
      cast: whether floating leaves may have another dtype in the files.
      follow_links: whether the files of an index may be links that lead elsewhere, as in the cache
        of huggingface_hub.

    Raises:
      CheckpointError: a tensor is missing or has another shape or dtype; each is named. Or a square
        kernel would be read as PyTorch stores it, transposed.
      CorruptCheckpointError: a file is damaged, or an index names files in another directory.
      MissingExtraError: safetensors is not installed.

    >>> import tempfile, zerojax as zj
    >>> from safetensors.numpy import save_file
    >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> save_file({"h.0.qkv": np.arange(12, dtype=np.float32).reshape(6, 2)}, file)
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
    >>> params = zero.create(lambda: {"layers": {"key": jax.numpy.zeros((1, 2, 2))}})
    >>> print(load_safetensors(file, params, rename={r"^layers\\.key": "h.*.qkv"},
    ...                        transform={"key": "(1/3 out) in -> in out"})["layers"]["key"])
    [[[4. 6.]
      [5. 7.]]]
    """
    aim = Target(target, only or (MODEL if is_state(target) else None))
    aim.check_restorable(str(path))
    wanted = {p: entry for p, entry in aim.wanted_entries.items() if not entry.key}
    sources = matching.sources(wanted, rename or {}, transform or {})

    def read():
        with tensor_files.opened(pathlib.Path(path), follow_links) as tensors:
            found = matching.present(sources, tensors)
            views = matching.views(str(path), found, tensors, cast)
            matching.warn_of_unused(str(path), found, tensors)
            return {s.path: _loaded(s.path, views.pop(s.path), aim.leaves[s.path]) for s in found}

    kinds = (CorruptCheckpointError, CheckpointError)
    return aim.replaced(exchange.of_shardings(aim.wanted.values()).everywhere(read, kinds))


def _loaded(path: str, view: View, leaf: Any) -> Any:
    """Returns a view as a leaf of the target; parts that several devices hold are read once."""
    if getattr(leaf, "sharding", None) is None:
        array = _part(path, view, (slice(None),) * len(view.shape), np.asarray(leaf))
        return array if isinstance(leaf, np.ndarray) else type(leaf)(array.item())

    @functools.cache
    def part(bounds):
        return _part(path, view, tuple(slice(*bound) for bound in bounds), leaf)

    def read(index):
        return part(tuple((at.start, at.stop) for at in index))

    stored = padded.stored(leaf)
    array = jax.make_array_from_callback(tuple(stored.shape), leaf.sharding, read)
    return padded.Padded(array, leaf.shape) if padded.is_padded(leaf) else array


def _part(path: str, view: View, index: tuple[slice, ...], leaf: Any) -> np.ndarray:
    """Returns a part of a leaf in its dtype; beyond the view, a padded leaf has zeros."""
    if not padded.is_padded(leaf):
        return entries.cast(path, view.read(_bounded(index, leaf.shape)), leaf.dtype)
    rows = [range(size)[at] for size, at in zip(leaf.kept.shape, index, strict=True)]
    within = tuple(slice(min(r.start, size), min(r.stop, size))
                   for r, size in zip(rows, leaf.shape, strict=True))
    if any(at.start == at.stop for at in within):
        return np.zeros([len(r) for r in rows], leaf.dtype)
    part = entries.cast(path, view.read(within), leaf.dtype)
    return np.pad(part, [(0, len(r) - size) for r, size in zip(rows, part.shape, strict=True)])


def _bounded(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[slice, ...]:
    """Returns slices with a start and a stop."""
    return tuple(slice(*at.indices(size)[:2]) for at, size in zip(index, shape, strict=True))
