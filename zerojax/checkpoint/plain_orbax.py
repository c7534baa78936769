"""Trees that Orbax wrote without zerojax: no manifest and no digests, so they are only read."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from zerojax import trees
from zerojax.checkpoint import directory, entries, matching, reading, safetensors
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.target import Target, misfit
from zerojax.errors import CheckpointError, CorruptCheckpointError
from zerojax.layout import padded
from zerojax.processes import exchange

T = TypeVar("T")


def load_orbax(path: str | os.PathLike, target: Any, *, only: str | None = None,
               rename: Mapping[str, str] | None = None, cast: bool = False) -> Any:
    """Returns the target's tree with arrays that Orbax wrote, in the target's shardings.

    It reads the trees of `ocp.StandardCheckpointer`, `ocp.PyTreeCheckpointer`, of an item of
    `ocp.CheckpointManager` and of `flax.training.checkpoints`. They have no digests, so damage is
    noticed only if Orbax notices it. All processes that share the target's mesh must call this
    function.

    Args:
      path: the directory of a tree, or one that contains a single tree, such as "run/100".
      target: a tree of arrays, or of `ShapeDtypeStruct`s with shardings, such as a state.
      only: a regex for whole paths in the target, such as "params/.*"; other leaves are the
        target's own. By default, all leaves are read.
      rename: from a regex to its replacement, which turn a leaf's path in the target, such as
        "params/blocks/kernel", into its path in the tree.
      cast: whether floating leaves may have another dtype in the tree.

    Raises:
      CheckpointError: there is no tree or there are several, or leaves are missing or have another
        shape or dtype; each is named.
      CorruptCheckpointError: an array is unreadable.

    >>> import pathlib, tempfile, zerojax as zj
    >>> path = pathlib.Path(tempfile.mkdtemp(), "old")
    >>> with ocp.StandardCheckpointer() as checkpointer:
    ...     checkpointer.save(path, {"params": {"w": np.arange(4.0, dtype=np.float32)}})
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
    >>> params = zero.create(lambda: {"w": jax.numpy.zeros(4)})
    >>> print(zj.load_orbax(path, params, rename={"^": "params/"})["w"])
    [0. 1. 2. 3.]
    """
    aim = Target(target, only)
    aim.check_restorable(str(path))
    group = exchange.of_shardings(aim.wanted.values())
    kinds = (CorruptCheckpointError, CheckpointError)
    return aim.filled(group.everywhere(lambda: _read(path, aim, rename or {}, cast), kinds))


def _read(path: str | os.PathLike, aim: Target, rename: Mapping[str, str],
          cast: bool) -> dict[str, Any]:
    """Returns the wanted arrays by their path in the target."""
    tree = _only_tree(directory.located(path))
    shapes = _opened(tree, lambda handler: handler.metadata(tree).tree)
    saved = {trees.path_of(at): _entry(x) for at, x in jax.tree.leaves_with_path(shapes)
             if hasattr(x, "shape") and hasattr(x, "dtype")}  # text has neither
    names = dict(zip(aim.wanted, safetensors.renamed(aim.wanted, rename), strict=True))
    given = {p: saved[name] for p, name in names.items() if name in saved}
    lines = entries.differences(given, aim.wanted_entries, all_of_it=False, cast=cast)
    if lines:
        absent = [name for name in names.values() if name not in saved]
        raise CheckpointError(misfit(str(tree), lines, matching.similar(absent, saved)))
    sources = aim.sources(given)
    arrays = _restored(tree, shapes, {names[p]: x for p, x in sources.items()})
    return {p: arrays[name] for p, name in names.items()}


def _entry(x: Any) -> Entry:
    """Returns the shape and dtype of an array, or of a Python number as jax would have it."""
    dtype = np.dtype(x.dtype)
    return Entry(tuple(x.shape), str(dtype if x.shape else jax.dtypes.canonicalize_dtype(dtype)))


def _restored(tree: epath.Path, shapes: Any, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays by their path in the tree, of which Orbax reads no others."""
    wanted = {path: padded.stored(x) for path, x in sources.items()}
    options = {path: reading.restore_args(x) for path, x in sources.items()}
    args = ocp.args.PyTreeRestore(_filled(shapes, wanted, ocp.PLACEHOLDER),
                                  _filled(shapes, options, ocp.RestoreArgs()))
    read = _opened(tree, lambda handler: handler.restore(tree, args=args))
    found = {trees.path_of(at): x for at, x in jax.tree.leaves_with_path(read)}
    return {path: reading.cut(found[path], x) for path, x in sources.items()}


def _opened(tree: epath.Path, act: Callable[[ocp.PyTreeCheckpointHandler], T]) -> T:
    """Returns the result of reading a tree with Orbax."""
    try:
        return act(ocp.PyTreeCheckpointHandler())
    except Exception as error:
        if reading.is_transient(error):
            raise
        raise CorruptCheckpointError(f"{tree} is unreadable: {reading.brief(error)}.") from error


def _filled(tree: Any, leaves: Mapping[str, Any], default: Any) -> Any:
    """Returns a tree with these leaves by path, and the default elsewhere."""
    return jax.tree.map_with_path(lambda at, _: leaves.get(trees.path_of(at), default), tree)


def _only_tree(path: epath.Path) -> epath.Path:
    found = directory.orbax_trees(path)
    if len(found) != 1:
        some = ", ".join(str(tree.relative_to(path)) for tree in found[:4]) or "none"
        raise CheckpointError(f"{path} has {len(found)} trees that Orbax wrote ({some}); give the "
                              "directory of one.")
    if (found[0].parent / "manifest").exists():
        raise CheckpointError(f"{path} was saved by zerojax; restore it with a zj.Checkpointer, "
                              "which also compares digests.")
    return found[0]
