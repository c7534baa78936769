"""The layout of a state as a table: specs, bytes per device, and why a leaf is whole."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from zerojax import tables, trees
from zerojax.layout import rules
from zerojax.layout.placement import describe, endings, param_name
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.tables import Sheet, quantity

_COLUMNS = ("leaf", "copies", "shape", "dtype", "spec", "bytes/device")


@dataclasses.dataclass(frozen=True)
class Row:
    """The placement of one leaf.

    Attributes:
      path: the leaf's path in the state, such as "params/embed/embedding".
      shape: the logical shape.
      dtype: the dtype's name.
      spec: how it is sharded between steps.
      bytes: bytes on each device between steps.
      gathered_bytes: bytes on a device that has gathered it, in the dtype in which it is stored.
      reason: why it is whole on every device; "" if it is sharded.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes: int
    gathered_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Layout(tables.Printed):
    """The placement of each leaf. Prints as a table, largest first.

    Attributes:
      rows: one `Row` per leaf.
      devices: the number of devices.
    """

    rows: tuple[Row, ...]
    devices: int

    @property
    def bytes(self) -> int:
        """The bytes of all leaves on one device."""
        return sum(row.bytes for row in self.rows)

    @property
    def whole(self) -> tuple[Row, ...]:
        """The leaves that every device holds in full, each with the reason."""
        return tuple(row for row in self.rows if row.reason)

    def sheet(self, most: int = 24) -> Sheet:
        """Returns a table of the `most` largest parameters.

        Optimizer state with a parameter's shape and spec is counted in that parameter's line.
        """
        groups = sorted(_alike(self.rows), key=lambda group: -_total(group))
        rows = [_cells(group) for group in groups[:most]]
        notes = [group[0].reason and f"whole on every device: {group[0].reason}"
                 for group in groups[:most]]
        if rest := [row for group in groups[most:] for row in group]:
            rows.append((f"... {len(groups) - most} smaller", str(len(rest)), "", "", "",
                         f"{_total(rest):,}"))
            notes.append("")
        return Sheet(self._title(), _COLUMNS, tuple(rows), tuple(notes))

    def parts(self) -> Sequence[Any]:
        return self.sheet().parts()

    def _title(self) -> str:
        return (f"{quantity(len(self.rows), 'leaf')}, {self.bytes:,} bytes on each of "
                f"{quantity(self.devices, 'device')}")


def _cells(group: Sequence[Row]) -> tuple[str, ...]:
    """Returns the line of a parameter and of the optimizer state that is laid out like it."""
    row = group[0]
    return (row.path, str(len(group)), str(row.shape), row.dtype, _short(row.spec),
            f"{_total(group):,}")


def _total(rows: Sequence[Row]) -> int:
    return sum(row.bytes for row in rows)


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns groups of rows: a parameter, then the optimizer state that is laid out like it.

    Such state has the same shape and spec, and the parameter's name at the end of its path.
    """
    params = {param_name(row.path) for row in rows}
    groups = {}
    for row in rows:
        owner = next((e for e in endings(row.path) if e in params), row.path)
        groups.setdefault((owner, row.shape, row.dtype, row.spec), []).append(row)
    return list(groups.values())


def _short(spec: P) -> str:
    return "P(" + ", ".join(repr(e) for e in spec) + ")" if any(spec) else "whole"


def brief(tree: Any) -> str:
    """Returns the number of a tree's arrays, and their bytes in all and on each device.

    Arrays may be shapes or deleted, or tracers, whose bytes on each device are not known.

    >>> import jax.numpy as jnp
    >>> brief({"w": jnp.ones((4, 8)), "b": jnp.ones(8)}), brief({})
    ('2 arrays, 160 bytes, 160 bytes on each device', 'no arrays')
    """
    arrays = [x for x in jax.tree.leaves(tree) if trees.is_array(x)]
    if not arrays:
        return "no arrays"
    total = sum(trees.itemsize(x.dtype) * math.prod(x.shape) for x in arrays)
    text = f"{quantity(len(arrays), 'array')}, {tables.size(total)}"
    if any(isinstance(x, Tracer) for x in arrays):
        return text
    held = sum(trees.itemsize(x.dtype) * math.prod(_held(x)) for x in arrays)
    return f"{text}, {tables.size(held)} on each device"


def _held(x: Any) -> tuple[int, ...]:
    """Returns the shape of an array's part on one device."""
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(tuple(x.shape))


def of(policy: Policy, tree: Any, placements: Sequence[Placement]) -> Layout:
    """Returns the `Layout` of a state, given the placement of each of its leaves."""
    rows = tuple(_row(policy, leaf, place)
                 for leaf, place in zip(describe(tree), placements, strict=True))
    return Layout(rows, policy.mesh.size)


def _row(policy: Policy, leaf: Leaf, place: Placement) -> Row:
    elements = math.prod(place.kept or leaf.shape)

    def size(spec: P) -> int:
        devices = math.prod(policy.mesh.shape[axis] for axis in rules.axes_of(spec))
        return trees.itemsize(leaf.dtype) * elements // devices

    return Row(leaf.path, leaf.shape, leaf.dtype, place.spec, size(place.spec), size(place.whole),
               "" if place.sharded else place.reason)
