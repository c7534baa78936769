"""The layout of a state as a table: who holds what, how many bytes, and why a leaf is whole."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from zerojax import tables
from zerojax.layout import rules
from zerojax.layout.placement import describe, endings, param_name
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report: where one leaf lies, and the bytes of it on each device, at rest and if it were gathered."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes: int
    gathered_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
    """Who holds what: one `Row` a leaf. Prints as a table, largest first; bytes are per device."""

    rows: tuple[Row, ...]
    devices: int

    @property
    def bytes(self) -> int:
        """Bytes per device, of all leaves."""
        return sum(row.bytes for row in self.rows)

    @property
    def whole(self) -> tuple[Row, ...]:
        """The leaves that every device holds in full, each with its reason."""
        return tuple(row for row in self.rows if row.reason)

    def table(self, most: int = 24):
        """A `rich.table.Table` of the `most` largest parameters, each with the optimizer state that lies as it does."""
        from rich import box
        from rich.table import Table

        title = f"{len(self.rows)} leaves, {self.bytes:,} bytes on each of {self.devices} devices"
        table = Table("leaf", "copies", "shape", "dtype", "spec", "bytes/device", "whole because", box=box.SIMPLE,
                      title=title, title_justify="left")
        groups = sorted(_alike(self.rows), key=lambda g: -sum(r.bytes for r in g))
        for group in groups[:most]:
            row = group[0]
            table.add_row(row.path, str(len(group)), str(row.shape), row.dtype, _short(row.spec),
                          f"{sum(r.bytes for r in group):,}", row.reason)
        if len(groups) > most:
            rest = [r for group in groups[most:] for r in group]
            table.add_row(f"... {len(groups) - most} smaller", str(len(rest)), "", "", "", f"{sum(r.bytes for r in rest):,}")
        return table

    def __str__(self) -> str:
        return tables.text(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(self.table())


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups: a parameter first, then what has its path's ending, shape and spec (an optimizer's momenta)."""
    params = {param_name(row.path) for row in rows}
    groups = {}
    for row in rows:
        owner = next((e for e in endings(row.path) if e in params), row.path)
        groups.setdefault((owner, row.shape, row.dtype, row.spec), []).append(row)
    return list(groups.values())


def _short(spec: P) -> str:
    return "P(" + ", ".join(repr(e) for e in spec) + ")" if any(spec) else "whole"


def of(policy: Policy, tree: Any, placements: Sequence[Placement]) -> Layout:
    """The `Layout` of a state's leaves."""
    rows = [Row(leaf.path, leaf.shape, leaf.dtype, place.spec, _bytes(policy, leaf, place, place.spec),
                _bytes(policy, leaf, place, place.whole), place.reason if not place.sharded else "")
            for leaf, place in zip(describe(tree), placements, strict=True)]
    return Layout(tuple(rows), policy.mesh.size)


def _bytes(policy: Policy, leaf: Leaf, place: Placement, spec: P) -> int:
    itemsize = 8 if leaf.dtype.startswith("key") else np.dtype(leaf.dtype).itemsize
    return itemsize * math.prod(place.kept or leaf.shape) // math.prod(policy.mesh.shape[a] for a in rules.axes_of(spec))
