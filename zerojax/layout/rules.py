"""A leaf's spec, from its shape alone: which dimension is spread over the data axes, or why none is.

Needs no devices; `shard` is the one rule of the whole library.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.errors import LayoutError

INDIVISIBLE = "no free dimension"  # begins the reason
OVERWRITTEN = "_overwrite_with_gradient"  # flax.linen.fp8_ops


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the layout knows of a leaf before any state exists.

    Attributes:
      path: keys joined by "/", as in "blocks/mlp/kernel"; rules match on it.
      shape, dtype: logical, whole.
      base: mesh axes that the user's model already spreads it over (tensor parallelism), one entry a dimension.
      scanned: a dimension that a loop slices and that must therefore stay whole, or None.
      group: "trained"; "frozen", a parameter without gradient and optimizer state; or "state", of the model's.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    base: P
    scanned: int | None = None
    group: Literal["trained", "frozen", "state"] = "trained"

    @property
    def trained(self) -> bool:
        return self.group == "trained"

    @property
    def overwritten(self) -> bool:
        """Its gradient is its next value, as of flax's scales for fp8."""
        return OVERWRITTEN in self.path.split("/")

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a leaf lies. `spec`: at rest. `whole`: once gathered. `reason`: why `spec` adds nothing to `whole`, or "". `kept`: the
    larger shape that it is kept in, None for its own."""

    spec: P
    whole: P
    reason: str = ""
    kept: tuple[int, ...] | None = None

    @property
    def sharded(self) -> bool:
        return self.spec != self.whole


def full(spec: P, ndim: int) -> P:
    """`spec` with one entry a dimension.

    >>> full(P("data"), 3)
    P('data', None, None)
    """
    return P(*spec, *[None] * (ndim - len(spec)))


def sharding(mesh: Mesh | AbstractMesh, spec: P) -> NamedSharding:
    """`spec` over `mesh` as jit returns it, without trailing None: a second spelling of it would compile a second time."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, P(*entries))


def drop(spec: P, index: int) -> P:
    """`spec` of the slices along dimension `index`."""
    return P(*spec[:index], *spec[index + 1:])


def axes_of(spec: P) -> tuple[str, ...]:
    """The mesh axes a spec names, in order of dimensions."""
    return tuple(a for entry in spec if entry is not None for a in (entry if isinstance(entry, tuple) else (entry,)))


def shard(leaf: Leaf, axes: tuple[str, ...], n: int, min_shard: int, pad: bool = False) -> Placement:
    """The largest free dimension that `n` divides, the last of equals, is spread over `axes`.

    Args:
      leaf: its `base` axes are kept; its `scanned` dimension stays whole.
      axes: the mesh axes of one copy of the state, `n` devices in all.
      min_shard: a leaf of fewer elements stays whole.
      pad: where `n` divides none, the largest is made longer.

    >>> shard(Leaf("w", (10, 3), "float32", P(None, None)), ("data",), 8, 1, pad=True)
    Placement(spec=P('data', None), whole=P(None, None), reason='', kept=(16, 3))
    >>> shard(Leaf("w", (24, 1000, 4000), "float32", P(None, None, None), scanned=0), ("data",), 8, 1).spec
    P(None, None, 'data')
    """
    if set(axes_of(leaf.base)) & set(axes):  # the model says itself how it is spread over ZeRO's axes
        return Placement(leaf.base, keep(leaf.base, lambda axis: axis not in axes))
    if n == 1 or leaf.size < min_shard:
        why = "one device" if n == 1 else f"{leaf.size} elements < min_shard={min_shard}"
        return Placement(leaf.base, leaf.base, why)
    free = [(d, i) for i, d in enumerate(leaf.shape) if leaf.base[i] is None and i != leaf.scanned and d > 0]
    even = [(d, i) for d, i in free if d % n == 0]
    if not even and (not pad or max(free, default=(0, 0))[0] < 2):
        return Placement(leaf.base, leaf.base, f"{INDIVISIBLE} of {leaf.shape} divides by {n}")
    size, index = max(even or free)
    kept = None if even else (*leaf.shape[:index], -(-size // n) * n, *leaf.shape[index + 1:])
    return Placement(P(*leaf.base[:index], axes, *leaf.base[index + 1:]), leaf.base, kept=kept)


def by_rule(leaf: Leaf, pattern: str, spec: P, axes: tuple[str, ...], sizes: Mapping[str, int], replica: str | None,
            pad: bool = False) -> Placement:
    """The placement a user's rule asks for; `whole` keeps the axes of it that are not ZeRO's.

    Raises:
      LayoutError: more entries than dimensions, an axis the mesh lacks, that of copies, or a dimension it does not divide.
    """
    where = f"rule {pattern!r}: {spec} for {leaf.path} of shape {leaf.shape}"
    if len(spec) > len(leaf.shape):
        raise LayoutError(f"{where} names {len(spec)} dimensions, the leaf has {len(leaf.shape)}; drop the rest.")
    unknown = [a for a in axes_of(spec) if a not in sizes]
    if unknown:
        raise LayoutError(f"{where} names axes {unknown}; the mesh has {tuple(sizes)}.")
    if replica in axes_of(spec):
        raise LayoutError(f"{where} names {replica!r}, the axis of copies; the state is spread over {axes}.")
    wanted = full(spec, len(leaf.shape))
    counts = [math.prod(sizes[a] for a in axes_of(P(entry))) for entry in wanted]
    for dim, (d, n, entry) in enumerate(zip(leaf.shape, counts, wanted, strict=True)):
        if d % n and not pad:
            raise LayoutError(f"{where}: dimension {dim} of {d} does not divide by {n}, the devices of {entry!r}; "
                              "name another dimension, or P() to leave the leaf whole.")
    if leaf.scanned is not None and set(axes_of(P(wanted[leaf.scanned]))) & set(axes):
        raise LayoutError(f"{where} shards dimension {leaf.scanned}, which a scan over layers slices; name another.")
    kept = tuple(-(-d // n) * n for d, n in zip(leaf.shape, counts, strict=True))
    whole = keep(wanted, lambda axis: axis not in axes)
    return Placement(wanted, whole, f"rule {pattern!r}", None if kept == leaf.shape else kept)


def keep(spec: P, wanted: Callable[[str], bool]) -> P:
    """`spec` with those of its axes that are wanted.

    >>> keep(P(("data", "model"), "data"), lambda axis: axis != "data")
    P('model', None)
    """
    return P(*(tuple(filter(wanted, axes_of(P(entry)))) for entry in spec))


def find_rule(path: str, rules: Iterable[str]) -> str | None:
    """The first rule whose regex matches all of `path`, or None."""
    return next((pattern for pattern in rules if re.fullmatch(pattern, path)), None)


def check_patterns(what: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raises `LayoutError` for a regex that matches no path, with the nearest paths."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0) or list(paths[:3])
            raise LayoutError(f"{what} {pattern!r} matches none of {len(paths)} parameters (it is a regex for the whole path); "
                              f"the nearest are {', '.join(near)}.")


def check_axes(leaves: Sequence[Leaf], names: Sequence[str]) -> None:
    """Raises `LayoutError` for a leaf whose model names an axis that the mesh, with axes `names`, lacks."""
    for leaf in leaves:
        if odd := [a for a in axes_of(leaf.base) if a not in names]:
            raise LayoutError(f"{leaf.path} of shape {leaf.shape} is spread by the model over {leaf.base}; {odd} are no axes of "
                              f"the mesh {tuple(names)}. Take a mesh that has them, or map the names where the state is made: "
                              f"with nn.logical_axis_rules([({odd[0]!r}, None)]): zero.init(...)")
