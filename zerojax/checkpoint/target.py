"""What a checkpoint is restored into: whether it fits, what to read for each leaf, and how that lands."""

import contextlib
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from zerojax.checkpoint import manifest
from zerojax.checkpoint.manifest import Entry, Manifest
from zerojax.errors import CheckpointError
from zerojax.layout import padded

MODEL = r"(params|model_state|batch_stats)/.*"  # what of a state is the model


@dataclasses.dataclass(frozen=True)
class Target:
    """A state, or its shapes with shardings; of its leaves, those whose path `only` matches are restored."""

    tree: Any
    only: str | None = None

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        return manifest.flat(self.tree)

    @functools.cached_property
    def wanted(self) -> dict[str, Any]:
        try:
            return {p: x for p, x in self.leaves.items() if self.only is None or re.fullmatch(self.only, p)}
        except re.error as error:
            raise CheckpointError(f"only={self.only!r} is no regular expression: {error}.") from None

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        return {p: manifest.entry_of(x) for p, x in self.wanted.items()}

    def check(self, note: Manifest, where: str, cast: bool) -> None:
        """Raises `CheckpointError` unless what `note` describes can be restored, naming each leaf that differs."""
        self.check_asked(where)
        lines = manifest.differences(note, self.entries, all_of_it=self.only is None, cast=cast)
        if lines:
            some = lines[:manifest.MOST] + ["..."] * (len(lines) > manifest.MOST)
            raise CheckpointError(f"{where} does not fit the target: {len(lines)} leaves differ.{self._advice(note, lines)}\n  "
                                  + "\n  ".join(some))

    def check_asked(self, where: str) -> None:
        """Raises `CheckpointError` for a target that nothing can be restored into."""
        if not self.wanted:
            raise CheckpointError(f"only={self.only!r} matches none of the target's {len(self.leaves)} leaves, as "
                                  f"{', '.join(list(self.leaves)[:3])}.")
        shapes = {p: x for p, x in self.leaves.items() if isinstance(_kept(x), jax.ShapeDtypeStruct)}
        left = [p for p in shapes if p not in self.wanted]
        if left:
            raise CheckpointError(f"{where}: {len(left)} leaves that are not restored, as {left[0]}, would stay shapes; give a "
                                  "live state to restore into: zero.init(init_fn, tx, ...).")
        for p, x in self.wanted.items():
            _check_divides(where, p, x)
        adrift = [p for p, x in shapes.items() if not _on_devices(x.sharding)]
        if adrift:
            raise CheckpointError(f"{where}: the target names no devices for {len(adrift)} leaves, as {adrift[0]}; give what "
                                  "zero.abstract(init_fn, tx, ...) makes over a mesh of devices, or a live state.")

    def _advice(self, note, lines) -> str:
        ours, theirs = manifest.optimizer_of(self.tree), note.optimizer
        if ours != theirs and all(line.startswith("opt_state") for line in lines):
            return (f" It was saved with another optimizer: that one keeps {', '.join(theirs) or 'nothing'}, the target's "
                    f"{', '.join(ours) or 'nothing'}. For the parameters alone, restore into a live state with params_only=True.")
        cast = [p for p, e in self.entries.items() if p in note.leaves and manifest.castable(note.leaves[p], e)
                and note.leaves[p].shape == e.shape and note.leaves[p].dtype != e.dtype]
        return " For another floating dtype write cast=True." if cast else ""

    def sources(self, note: Manifest) -> dict[str, jax.ShapeDtypeStruct]:
        """What to read for each wanted leaf, in the dtype that it was saved in; without a sharding, into the host's memory."""
        return {p: note.leaves[p].source(getattr(x, "sharding", None), x.kept.shape if padded.is_padded(x) else None)
                for p, x in self.wanted.items()}

    def filled(self, read: dict[str, Any]) -> Any:
        """The target's tree with what was read; `read` is emptied on the way."""
        landed = {p: _land(read.pop(p), x) for p, x in self.wanted.items()}
        return padded.structure(self.tree).unflatten([landed.get(p, x) for p, x in self.leaves.items()])


def _kept(x):
    return x.kept if padded.is_padded(x) else x


def _check_divides(where, path, x):
    try:
        if getattr(x, "sharding", None) is not None:
            x.sharding.shard_shape(tuple(_kept(x).shape))
    except ValueError as error:
        raise CheckpointError(f"{where}: the target's {path} of shape {tuple(x.shape)} does not divide as its sharding says: "
                              f"{error}.") from None


def _on_devices(sharding) -> bool:
    return sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def _land(read, x):
    """What was read, as the target's leaf: its kind, dtype and sharding."""
    if padded.is_padded(x):
        read = read.kept if padded.is_padded(read) else np.asarray(padded.filled(read, x.kept.shape))
        return padded.Padded(_land(read, x.kept), x.shape)
    sharding = getattr(x, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():  # another one may be set
        if key := manifest.key_of(x):
            return jax.jit(lambda data: jax.random.wrap_key_data(data, impl=key), out_shardings=sharding)(read)
        if sharding is not None:
            return jax.device_put(read.astype(x.dtype), sharding)
    if not hasattr(x, "dtype"):
        return type(x)(read.item())
    return read.astype(x.dtype)[()] if isinstance(x, np.generic) else read.astype(x.dtype)
