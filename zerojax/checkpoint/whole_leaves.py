"""The leaves of a checkpoint or a live state, one by one as whole arrays in the host's memory."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from zerojax.checkpoint import directory, entries, reading
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.manifest import Manifest
from zerojax.checkpoint.target import is_state
from zerojax.errors import CheckpointError
from zerojax.layout import padded
from zerojax.processes import exchange
from zerojax.train import donation


@dataclasses.dataclass(frozen=True)
class Saved:
    """The leaves of a step on disk. Each leaf's digest is compared with the saved one."""

    path: epath.Path

    @property
    def group(self) -> exchange.Group:
        """The processes that must read the leaves together."""
        return exchange.Alone()

    @functools.cached_property
    def manifest(self) -> Manifest:
        return reading.read_manifest(self.path)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The shape and dtype of each leaf, by path."""
        return self.manifest.leaves

    @property
    def step(self) -> int | None:
        """The step of the state; None for a tree without one."""
        return self.manifest.step

    @property
    def is_of_state(self) -> bool:
        """Whether these are the leaves of a state, rather than those of a tree of parameters."""
        return any(path.startswith("params/") for path in self.entries)

    def arrays(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields leaves with their paths, in the order of `paths`."""
        return reading.arrays(self.path, self.manifest, paths)


@dataclasses.dataclass(frozen=True)
class Live:
    """The leaves of a state on its devices, with the methods of `Saved`."""

    state: Any

    @functools.cached_property
    def leaves(self) -> Mapping[str, Any]:
        return entries.by_path(self.state)

    @functools.cached_property
    def entries(self) -> Mapping[str, Entry]:
        return {p: entries.of(x) for p, x in self.leaves.items()}

    @functools.cached_property
    def group(self) -> exchange.Group:
        """The processes that hold parts of the state."""
        return exchange.of_shardings(self.leaves.values())

    @property
    def is_of_state(self) -> bool:
        """Whether these are the leaves of a state, rather than those of a tree of parameters."""
        return is_state(self.state)

    @property
    def step(self) -> int | None:
        step = getattr(self.state, "step", None)
        return None if step is None else int(step)

    def arrays(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for p in paths:
            yield p, _whole(self.leaves[p])


Leaves = Saved | Live


def of(source: str | os.PathLike | Any, step: int | None) -> Leaves:
    """Returns the leaves of a checkpoint's directory, of one of its steps, or of a live state.

    Raises:
      CheckpointError: there is no such step, or the state consists of shapes.
      StateError: a step took the memory of the state.
    """
    if isinstance(source, (str, os.PathLike)):
        saved = Saved(directory.step_path(source, step))
        _check_one(saved.entries)
        return saved
    donation.check_alive("export_safetensors", source)
    live = Live(source)
    _check_one(live.entries)
    if step is not None:
        raise CheckpointError(f"step={step} is the step of a checkpoint, but the first argument is "
                              f"a {type(source).__name__}; leave `step` out.")
    shapes = [p for p, x in live.leaves.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if shapes:
        raise CheckpointError(f"{shapes[0]} and {len(shapes) - 1} more leaves are shapes without "
                              "values; give a state that zero.init returned.")
    return live


def _check_one(paths: Iterable[str]) -> None:
    """Raises `CheckpointError` for the leaves of islands, which have a dimension of islands."""
    if any(path.startswith("islands/") for path in paths):
        raise CheckpointError("a state of islands has each parameter once for every island; write "
                              "zj.export_safetensors(islands.average(state), path).")


def _whole(x: Any) -> np.ndarray:
    """Returns a leaf without padding; several processes gather its shards together."""
    stored = entries.as_array(padded.stored(x))
    if isinstance(stored, jax.Array) and not stored.is_fully_addressable:
        mesh: Any = getattr(stored.sharding, "mesh", None)
        with jax.set_mesh(mesh):  # the caller may have set another
            stored = _replicated(stored.sharding)(stored).addressable_data(0)
    elif isinstance(stored, jax.Array):  # jax keeps numpy's copy with the array: take an alias
        stored = jax.make_array_from_single_device_arrays(
            stored.shape, stored.sharding, [shard.data for shard in stored.addressable_shards])
    return np.asarray(stored)[tuple(map(slice, np.shape(x)))]


@functools.lru_cache
def _replicated(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
