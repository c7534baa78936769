"""The spec of one leaf, by shape or by a user's rule: which dimension is sharded, or why none is.

Needs no devices. `shard` is the library's only default rule.
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

INDIVISIBLE = "no free dimension"  # the reason of an indivisible leaf starts with this
OVERWRITTEN = "_overwrite_with_gradient"  # flax.linen.fp8_ops


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The properties of a leaf that its layout depends on; known before any state exists.

    Attributes:
      path: keys joined by "/", as in "blocks/mlp/kernel"; rules match it.
      shape, dtype: those of the logical, whole array.
      base: mesh axes over which the user's model already shards the leaf (tensor parallelism), one
        entry per dimension.
      scanned: the dimension that a loop slices, which must therefore stay whole, or None.
      group: "trained"; "frozen", a parameter without gradient or optimizer state; or "state", a
        part of the model's state.
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
        """Whether the leaf's gradient is its next value, like flax's fp8 scales."""
        return OVERWRITTEN in self.path.split("/")

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of a leaf on the mesh.

    Attributes:
      spec: the leaf's spec at rest.
      whole: its spec once gathered.
      reason: why `spec` equals `whole`, or "".
      kept: the larger shape to which the leaf is padded, or None.
    """

    spec: P
    whole: P
    reason: str = ""
    kept: tuple[int, ...] | None = None

    @property
    def sharded(self) -> bool:
        return self.spec != self.whole


def full(spec: P, ndim: int) -> P:
    """Returns `spec` with one entry per dimension.

    >>> full(P("data"), 3)
    P('data', None, None)
    """
    return P(*spec, *[None] * (ndim - len(spec)))


def sharding(mesh: Mesh | AbstractMesh, spec: P) -> NamedSharding:
    """Returns `spec` over `mesh` in the form that jit returns, without trailing None.

    jit compiles again for an equivalent sharding in another form.
    """
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, P(*entries))


def drop(spec: P, index: int) -> P:
    """Returns the spec of an array's slices along dimension `index`."""
    return P(*spec[:index], *spec[index + 1:])


def axes_of(spec: P) -> tuple[str, ...]:
    """Returns the mesh axes that a spec names, in the order of its dimensions."""
    return tuple(axis for entry in spec if entry is not None
                 for axis in (entry if isinstance(entry, tuple) else (entry,)))


def keep(spec: P, wanted: Callable[[str], bool]) -> P:
    """Returns `spec` with only those of its axes for which `wanted` is true.

    >>> keep(P(("data", "model"), "data"), lambda axis: axis != "data")
    P('model', None)
    """
    return P(*(tuple(filter(wanted, axes_of(P(entry)))) for entry in spec))


def shard(leaf: Leaf, axes: tuple[str, ...], n: int, min_shard: int,
          pad: bool = False) -> Placement:
    """Returns the default placement: the largest free dimension divisible by `n` is sharded.

    The last of several such dimensions is chosen.

    Args:
      leaf: its `base` axes are kept; its `scanned` dimension stays whole.
      axes: the mesh axes of one copy of the state, `n` devices in total.
      min_shard: a leaf with fewer elements stays whole.
      pad: whether to pad the largest free dimension if none is divisible.

    >>> shard(Leaf("w", (10, 3), "float32", P(None, None)), ("data",), 8, 1, pad=True)
    Placement(spec=P('data', None), whole=P(None, None), reason='', kept=(16, 3))
    >>> shard(Leaf("w", (24, 1000, 4000), "float32", P(None, None, None), 0), ("data",), 8, 1).spec
    P(None, None, 'data')
    """
    if set(axes_of(leaf.base)) & set(axes):  # the model itself shards the leaf over ZeRO's axes
        return Placement(leaf.base, keep(leaf.base, lambda axis: axis not in axes))
    if n == 1 or leaf.size < min_shard:
        reason = "one device" if n == 1 else f"fewer than min_shard={min_shard} elements"
        return Placement(leaf.base, leaf.base, reason)
    free = [(d, i) for i, d in enumerate(leaf.shape)
            if leaf.base[i] is None and i != leaf.scanned and d > 0]
    even = [(d, i) for d, i in free if d % n == 0]
    if not even and (not pad or max(free, default=(0, 0))[0] < 2):
        reason = f"{INDIVISIBLE} of {leaf.shape} is divisible by {n}"
        return Placement(leaf.base, leaf.base, reason)
    size, index = max(even or free)
    kept = (*leaf.shape[:index], _round_up(size, n), *leaf.shape[index + 1:])
    spec = P(*leaf.base[:index], axes, *leaf.base[index + 1:])
    return Placement(spec, leaf.base, kept=None if even else kept)


def by_rule(leaf: Leaf, pattern: str, spec: P, axes: tuple[str, ...], sizes: Mapping[str, int],
            replica: str | None, pad: bool = False) -> Placement:
    """Returns the placement that a user's rule asks for.

    Args:
      leaf: the leaf whose path matches the rule.
      pattern, spec: the rule.
      axes: ZeRO's axes, which the placement's `whole` leaves out.
      sizes: the size of every mesh axis.
      replica: the axis of copies, or None.
      pad: whether to pad dimensions that are not divisible.

    Raises:
      LayoutError: the rule has more entries than the leaf has dimensions, names an axis that is
        missing or the axis of copies, or shards a dimension that is indivisible or scanned.
    """
    where = f"rule {pattern!r}: {spec} for {leaf.path} of shape {leaf.shape}"
    _check_names(where, leaf, spec, axes, sizes, replica)
    wanted = _ordered(full(spec, len(leaf.shape)), axes)
    counts = [math.prod(sizes[axis] for axis in axes_of(P(entry))) for entry in wanted]
    if not pad:
        _check_divisible(where, leaf, wanted, counts)
    if leaf.scanned is not None and set(axes_of(P(wanted[leaf.scanned]))) & set(axes):
        raise LayoutError(f"{where} shards dimension {leaf.scanned}, which a scan over layers "
                          "slices; name another dimension.")
    kept = tuple(map(_round_up, leaf.shape, counts))
    return Placement(wanted, keep(wanted, lambda axis: axis not in axes), f"rule {pattern!r}",
                     None if kept == leaf.shape else kept)


def _ordered(spec: P, axes: tuple[str, ...]) -> P:
    """Returns a spec with ZeRO's axes in their own order where one entry names all of them."""
    return P(*(axes if set(axes_of(P(entry))) == set(axes) else entry for entry in spec))


def _check_names(where: str, leaf: Leaf, spec: P, axes: tuple[str, ...], sizes: Mapping[str, int],
                 replica: str | None):
    if len(spec) > len(leaf.shape):
        raise LayoutError(f"{where} names {len(spec)} dimensions, but the leaf has "
                          f"{len(leaf.shape)}; drop the extra entries.")
    unknown = [axis for axis in axes_of(spec) if axis not in sizes]
    if unknown:
        raise LayoutError(f"{where} names axes {unknown}, but the mesh has {tuple(sizes)}; "
                          f"name one of these, such as jax.P({axes[0]!r}).")
    given = set(axes_of(spec)) & set(axes)
    if given and given != set(axes):
        entries = tuple(axes if set(axes_of(P(entry))) & set(axes) else entry for entry in spec)
        raise LayoutError(f"{where} names {sorted(given)}, but a state is sharded over all of "
                          f"{axes}; write {P(*entries)}, or P() to keep the leaf whole.")
    if replica in axes_of(spec):
        raise LayoutError(f"{where} names {replica!r}, the axis of copies, but a state is sharded "
                          f"only over {axes}; name one of these.")


def _check_divisible(where: str, leaf: Leaf, wanted: P, counts: Sequence[int]):
    for dim, (d, n, entry) in enumerate(zip(leaf.shape, counts, wanted, strict=True)):
        if d % n:
            raise LayoutError(f"{where}: dimension {dim} of size {d} is not divisible by {n}, the "
                              f"number of devices along {entry!r}; name another dimension, or "
                              "write P() to keep the leaf whole.")


def _round_up(d: int, n: int) -> int:
    return -(-d // n) * n


def find_rule(path: str, rules: Iterable[str]) -> str | None:
    """Returns the first rule whose regex matches the whole `path`, or None."""
    return next((pattern for pattern in rules if re.fullmatch(pattern, path)), None)


def check_patterns(what: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raises `LayoutError` for a regex that matches no path; the text has the nearest paths."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0) or list(paths[:3])
            prefix = " without params/" if pattern.startswith("params/") else ""
            raise LayoutError(f"{what} {pattern!r} matches none of {len(paths)} parameters (a "
                              f"regex must match the whole path{prefix}); "
                              f"the nearest are {', '.join(near)}.")


def check_axes(leaves: Sequence[Leaf], names: Sequence[str]) -> None:
    """Raises `LayoutError` for a leaf whose `base` has an axis that is not in `names`."""
    for leaf in leaves:
        if missing := [axis for axis in axes_of(leaf.base) if axis not in names]:
            rule = f"nn.logical_axis_rules([({missing[0]!r}, None)])"
            raise LayoutError(f"the model shards {leaf.path} of shape {leaf.shape} over "
                              f"{leaf.base}, but {missing} are not axes of the mesh "
                              f"{tuple(names)}. Use a mesh that has them, or map the names where "
                              f"the state is created: with {rule}: zero.init(...)")
