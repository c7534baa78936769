"""The arrays that ZeRO moves of one sharded parameter, with kind, mesh axes, dtype and count.

    one hop     all-gather over all axes, reduce-scatter over all axes
    two hops    all-gather between hosts, in the forward pass only if there is a second copy, then
                of the parameter within a host; reductions the other way round
    encoded     codes and scales in place of each; an all-to-all in place of the reduce-scatter
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jax.sharding import PartitionSpec as P

from zerojax import wire
from zerojax.layout import placement, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.trees import itemsize

Kind = Literal["all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclasses.dataclass(frozen=True)
class Count:
    """How often a step moves a parameter: gathers in all, those of them in the forward pass, and
    reductions."""

    gathers: float
    forward: float
    reductions: float


@dataclasses.dataclass(frozen=True)
class Move:
    """An array that ZeRO moves.

    Attributes:
      leaf: the parameter.
      kind: the kind of collective.
      axes: the mesh axes of its groups of devices.
      dims: the dimensions on one device of the array that is gathered or reduced.
      dtype: the dtype on the wire.
      times: how often a step moves all of it at most.
      whole: whether it is the parameter itself, not a part of it or the scales of its codes.
    """

    leaf: Leaf
    kind: Kind
    axes: frozenset[str]
    dims: tuple[int, ...]
    dtype: str
    times: float
    whole: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    def sent(self, mesh: Mapping[str, int]) -> float:
        """Returns the bytes that each device sends per step.

        Args:
          mesh: the size of each mesh axis.
        """
        devices = math.prod(mesh[axis] for axis in self.axes)
        share = 1.0 if self.kind == "collective-permute" else (devices - 1) / devices
        return self.times * self.size * itemsize(self.dtype) * share


def of(policy: Policy, leaf: Leaf, place: Placement, count: Count,
       per_device: bool) -> Iterator[Move]:
    """Yields the moves of a sharded parameter."""
    gather_as, reduce_as = placement.on_wire(policy, leaf)
    for axes, dims, whole in _hops(policy, leaf, place):
        kept = policy.secondary and not whole
        times = count.forward if kept else count.gathers
        dtype = placement.computed(policy, leaf)
        move = Move(leaf, "all-gather", axes, dims, dtype, times, whole)
        yield from _encoded(policy, place, move, gather_as)
    if leaf.trained:
        yield from _reductions(policy, leaf, place, count.reductions, reduce_as, per_device)


def _reductions(policy: Policy, leaf: Leaf, place: Placement, times: float, reduce_as: str,
                per_device: bool) -> Iterator[Move]:
    dtype = policy.precision.reduced(leaf.path, leaf.dtype)
    whole = local(policy, leaf, place, place.whole)
    hops = _hops(policy, leaf, place)
    if not per_device:
        hops = [(_of_several(policy, policy.axes), whole, True)]
        if policy.inner_axes:  # shards move from the order of the devices
            yield Move(leaf, "collective-permute", _of_several(policy, policy.axes),
                       local(policy, leaf, place, place.spec), dtype, times, False)
    for axes, dims, is_whole in hops:
        move = Move(leaf, "reduce-scatter", axes, dims, dtype, times, is_whole)
        yield from _encoded(policy, place, move, reduce_as, "all-to-all")


def _hops(policy: Policy, leaf: Leaf,
          place: Placement) -> list[tuple[frozenset[str], tuple[int, ...], bool]]:
    """Returns the axes of each hop, the dimensions of its larger array, and whether it is the
    parameter."""
    whole = local(policy, leaf, place, place.whole)
    everything = _of_several(policy, policy.axes)
    inner = _of_several(policy, policy.inner_axes)
    if not inner or inner == everything:
        return [(everything, whole, True)]
    first = set(policy.axes) - set(policy.inner_axes)
    middle = rules.keep(place.spec, lambda axis: axis not in first)
    return [(inner, whole, True), (everything - inner, local(policy, leaf, place, middle), False)]


def _of_several(policy: Policy, axes: Sequence[str]) -> frozenset[str]:
    """Returns the axes with more than one device: others show in no group of a collective."""
    return frozenset(axis for axis in axes if policy.mesh.shape[axis] > 1)


def _encoded(policy: Policy, place: Placement, move: Move, code: str,
             kind: Kind | None = None) -> Iterator[Move]:
    """Yields a move as it is, or as codes with their scales, by another kind of collective."""
    dim, block = _blocks(policy, place, move) if code in wire.IN_BLOCKS else (0, 0)
    if not code or (code in wire.IN_BLOCKS and not block):
        yield move
        return
    kind = kind or move.kind
    yield dataclasses.replace(move, kind=kind, dtype=code)
    if block:
        dims = tuple(d // block if i == dim else d for i, d in enumerate(move.dims))
        yield dataclasses.replace(move, kind=kind, dims=dims, dtype="float32", whole=False)


def _blocks(policy: Policy, place: Placement, move: Move) -> tuple[int, int]:
    """Returns the dimension that is divided into blocks, and their size, of one layer of a stack.
    """
    dims = list(local(policy, move.leaf, place, place.spec))
    if move.leaf.scanned is not None:
        dims[move.leaf.scanned] = 0
    return wire.blocks_of(dims, policy.wire.block)


def local(policy: Policy, leaf: Leaf, place: Placement, spec: P) -> tuple[int, ...]:
    """Returns the dimensions on one device of a parameter with this spec."""
    return _divided(policy, place.kept or leaf.shape, spec)


def _divided(policy: Policy, shape: Sequence[int], spec: P) -> tuple[int, ...]:
    sizes = policy.mesh.shape
    return tuple(d // math.prod(sizes[axis] for axis in rules.axes_of(P(entry)))
                 for d, entry in zip(shape, spec, strict=True))
