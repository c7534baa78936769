"""The target of a restore: whether a checkpoint fits it, and how arrays become its leaves."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from zerojax import trees
from zerojax.checkpoint import entries
from zerojax.checkpoint.entries import MOST, Entry
from zerojax.checkpoint.manifest import Manifest, optimizer_kinds
from zerojax.errors import CheckpointError
from zerojax.layout import padded
from zerojax.tables import quantity

MODEL = r"(params|model_state|batch_stats)/.*"  # paths of the model's leaves in a state


def is_state(tree: Any) -> bool:
    """Whether a tree is a training state, of zerojax or of flax."""
    return hasattr(tree, "params") and hasattr(tree, "opt_state")


@dataclasses.dataclass(frozen=True)
class Target:
    """A state, or its shapes with shardings, into which a checkpoint is restored.

    Attributes:
      tree: the state.
      only: a regex; leaves are restored if it matches their whole path. None restores all.
    """

    tree: Any
    only: str | None = None

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """All leaves by path."""
        return entries.by_path(self.tree)

    @functools.cached_property
    def wanted(self) -> dict[str, Any]:
        """The leaves to restore by path."""
        try:
            return {p: x for p, x in self.leaves.items()
                    if self.only is None or re.fullmatch(self.only, p)}
        except re.error as error:
            raise CheckpointError(f"only={self.only!r} is not a regular expression: {error}."
                                  ) from None

    @functools.cached_property
    def wanted_entries(self) -> dict[str, Entry]:
        """The entries of the leaves to restore by path."""
        return {p: entries.of(x) for p, x in self.wanted.items()}

    def check(self, manifest: Manifest, where: str, cast: bool) -> None:
        """Checks that a step can be restored into the target.

        Args:
          where: the step and its directory, for errors.
          cast: whether floating dtypes may differ.

        Raises:
          CheckpointError: it cannot; leaves that differ are named.
        """
        self.check_restorable(where)
        lines = entries.differences(manifest.leaves, self.wanted_entries,
                                    all_of_it=self.only is None, cast=cast)
        if lines:
            raise CheckpointError(misfit(where, lines, self._advice(manifest, lines)))

    def check_restorable(self, where: str) -> None:
        """Checks that arrays can be restored into the target at all.

        Raises:
          CheckpointError: no leaf is wanted, some leaves would stay shapes, or a leaf's sharding
            has no devices or does not divide its shape.
        """
        self._check_wanted()
        shapes = {p: x for p, x in self.leaves.items()
                  if isinstance(padded.stored(x), jax.ShapeDtypeStruct)}
        left = [p for p in shapes if p not in self.wanted]
        if left:
            raise CheckpointError(f"{where}: {len(left)} leaves that are not restored, such as "
                                  f"{left[0]}, would stay shapes; give a live state to restore "
                                  "into: zero.init(init_fn, tx, ...).")
        for p, x in self.wanted.items():
            _check_divides(where, p, x)
        nowhere = [p for p, x in shapes.items() if not _has_devices(x.sharding)]
        if nowhere:
            raise CheckpointError(f"{where}: the target names no devices for {len(nowhere)} "
                                  f"leaves, such as {nowhere[0]}; give a live state, or the result "
                                  "of zero.abstract(init_fn, tx, ...) over a mesh of devices.")

    def _check_wanted(self):
        if not self.wanted:
            some = ", ".join(list(self.leaves)[:3])
            raise CheckpointError(f"only={self.only!r} matches none of the target's "
                                  f"{len(self.leaves)} leaves, such as {some}.")

    def _advice(self, manifest: Manifest, lines: Sequence[str]) -> str:
        """Returns a sentence on how to restore a checkpoint that differs, or ""."""
        ours, theirs = optimizer_kinds(self.tree), manifest.optimizer
        if ours != theirs and all(line.startswith("opt_state") for line in lines):
            return (" It was saved with another optimizer, which keeps "
                    f"{', '.join(theirs) or 'nothing'}; the target's keeps "
                    f"{', '.join(ours) or 'nothing'}. To restore the parameters alone, give a live "
                    "state and params_only=True.")
        return " For another floating dtype, write cast=True." if self._needs_cast(manifest) else ""

    def _needs_cast(self, manifest: Manifest) -> bool:
        """Whether a leaf differs from the checkpoint in its floating dtype alone."""
        pairs = [(manifest.leaves[p], entry) for p, entry in self.wanted_entries.items()
                 if p in manifest.leaves]
        return any(a.shape == b.shape and a.dtype != b.dtype and entries.can_cast(a, b)
                   for a, b in pairs)

    def sources(self, saved: Mapping[str, Entry]) -> dict[str, Any]:
        """Returns the array to read for each wanted leaf, in its dtype on disk.

        See `Entry.source`.
        """
        return {p: saved[p].source(getattr(x, "sharding", None),
                                   x.kept.shape if padded.is_padded(x) else None)
                for p, x in self.wanted.items()}

    def filled(self, arrays: dict[str, Any]) -> Any:
        """Returns the target's tree with arrays in place of the wanted leaves.

        The arrays are removed from the dict one by one, so that their memory can be freed.
        """
        restored = {p: _as_leaf(arrays.pop(p), x) for p, x in self.wanted.items()}
        return self.replaced(restored)

    def replaced(self, leaves: Mapping[str, Any]) -> Any:
        """Returns the target's tree with these leaves in place of its own."""
        return padded.structure(self.tree).unflatten(
            [leaves.get(p, x) for p, x in self.leaves.items()])


def misfit(where: str, lines: Sequence[str], advice: str) -> str:
    """Returns the text of an error about leaves that differ, of which it names the first ten."""
    some = [*lines[:MOST], *["..."] * (len(lines) > MOST)]
    some_differ = f"{quantity(len(lines), 'leaf')} differ{'s' * (len(lines) == 1)}"
    return "\n  ".join([f"{where} does not fit the target: {some_differ}.{advice}",
                        *some])


def _check_divides(where: str, path: str, x: Any):
    try:
        if getattr(x, "sharding", None) is not None:
            x.sharding.shard_shape(tuple(padded.stored(x).shape))
    except ValueError as error:
        raise CheckpointError(f"{where}: the target's sharding does not divide {path} of shape "
                              f"{tuple(x.shape)}: {error}.") from None


def _has_devices(sharding: Any) -> bool:
    return sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def _as_leaf(array: Any, leaf: Any) -> Any:
    """Returns an array with the type, dtype, sharding and padding of a leaf of the target."""
    if padded.is_padded(leaf):
        return padded.Padded(_as_leaf(_padded_like(array, leaf), leaf.kept), leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        with _mesh_of(sharding):
            return _placed(array, leaf, sharding)
    if not hasattr(leaf, "dtype"):
        return type(leaf)(array.item())
    array = array.astype(leaf.dtype)
    return array[()] if isinstance(leaf, np.generic) else array


def _padded_like(array: Any, leaf: Any) -> Any:
    """Returns an array in the shape in which a padded leaf is stored."""
    if padded.is_padded(array):
        return array.kept
    return np.asarray(padded.filled(array, leaf.kept.shape))


def _placed(array: Any, leaf: Any, sharding: Any) -> jax.Array:
    """Returns an array on devices; the data of keys becomes typed keys."""
    if not (impl := trees.key_impl(leaf)):
        return jax.device_put(array.astype(leaf.dtype), sharding)
    wrap = functools.partial(jax.random.wrap_key_data, impl=impl)
    return jax.jit(wrap, out_shardings=sharding)(array)


def _mesh_of(sharding: Any):
    """Returns a context with the mesh of a sharding, because the caller may have set another."""
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()
