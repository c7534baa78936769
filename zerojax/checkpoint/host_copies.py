"""Copies of a state's arrays in the memory of the host, which the devices make on their own.

A jitted program copies all arrays of a mesh at once: to start one copy after the other would hold
up the training step. The next step may take the memory of the state at once, because the runtime
orders it after the copies.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from zerojax.checkpoint.warm import Bounds, bounds_of


def started(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns copies of arrays by path, which are under way; those of numpy are complete.

    Of an array that is whole on every device, one device's copy is taken.
    """
    copies: dict[str, Any] = {path: np.array(x) for path, x in arrays.items()
                              if not isinstance(x, jax.Array)}
    held = {path: _one_of(x) for path, x in arrays.items() if path not in copies}
    for paths in _together(held):
        shardings = tuple(held[path].sharding for path in paths)
        made = _program(shardings)([held[path] for path in paths])
        copies.update(zip(paths, made, strict=True))
    return copies


def of_tree(tree: Any) -> Any:
    """Returns a tree with copies of its arrays, which are under way."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = {str(i): x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    copies = started(arrays)
    return structure.unflatten([copies.get(str(i), x) for i, x in enumerate(leaves)])


def _one_of(x: jax.Array) -> jax.Array:
    return x.addressable_shards[0].data if x.is_fully_replicated else x


def _together(arrays: Mapping[str, jax.Array]) -> list[list[str]]:
    """Returns the paths of arrays that one program can copy: those on the same devices."""
    groups: dict[Hashable, list[str]] = {}
    for path, x in arrays.items():
        is_named = isinstance(x.sharding, NamedSharding)
        key = x.sharding.mesh if is_named else x.sharding  # pyright: ignore
        groups.setdefault(key, []).append(path)
    return list(groups.values())


@functools.lru_cache(maxsize=8)
def _program(shardings: Sequence[Sharding]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Returns the program that copies arrays with these shardings."""
    host = [sharding.with_memory_kind("pinned_host") for sharding in shardings]
    return jax.jit(snapshot_to_host, out_shardings=host)


def snapshot_to_host(arrays: list[jax.Array]) -> list[jax.Array]:
    """Returns its argument; profiles and logs show the name of this function."""
    return arrays


def parts(x: Any) -> Iterator[tuple[Bounds, Any]]:
    """Yields each part of an array that this process holds, once, with its place."""
    if not isinstance(x, jax.Array):
        yield tuple((0, n) for n in x.shape), x
        return
    seen = set()
    for shard in x.addressable_shards:
        bounds = bounds_of(shard.index, x.shape)
        if bounds not in seen:
            seen.add(bounds)
            yield bounds, shard.data
