"""The collectives that ZeRO allows a compiled step: how often each parameter moves, and the total
bytes."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Sequence

from zerojax.hlo.program import Shape
from zerojax.layout import rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import moves, theory
from zerojax.plan.moves import Count, Move
from zerojax.policy import Policy
from zerojax.trees import itemsize

SCALARS = 2**14  # elements of losses, norms and statistics that join a reduction of whole gradients
SMALLEST = 2**15  # elements: parameters that only have a smaller shape in common are not related


@dataclasses.dataclass(frozen=True)
class Use:
    """How often a step needs a parameter, per microbatch, as multiples of the whole parameter.

    Attributes:
      gathers: times that it is gathered, the forward and the backward pass together.
      scatters: times that its gradient is reduced; 0 if it has none.
      calls: functions that gather it, in stages 1 and 2 once at their start.
      again: those of `gathers` that recompute it in the backward pass.
    """

    gathers: float
    scatters: float
    calls: int = 1
    again: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        return Use(self.gathers + other.gathers, self.scatters + other.scatters,
                   self.calls + other.calls, self.again + other.again)


@dataclasses.dataclass(frozen=True)
class Demand:
    """A step as ZeRO wants it compiled.

    Attributes:
      policy: the stage, mesh and precision.
      leaves, places: the parameters and the model state that the step reads, and where they are.
      accumulate: the number of microbatches.
      per_device: whether each device differentiates its own part.
      why: the reason for that, as text.
      uses: the use of each leaf in the traced program; None where the program is not known.
      differentiates: whether the program has a backward pass, which ZeRO's formulas then count.
    """

    policy: Policy
    leaves: tuple[Leaf, ...]
    places: tuple[Placement, ...]
    accumulate: int = 1
    per_device: bool = True
    why: str = ""
    uses: tuple[Use | None, ...] | None = None
    differentiates: bool = True

    @property
    def wire(self) -> theory.Wire:
        return theory.wire(self.policy.stage, self.accumulate, per_device=self.per_device)

    @property
    def sharded(self) -> list[tuple[Leaf, Placement]]:
        pairs = zip(self.leaves, self.places, strict=True)
        return [(leaf, place) for leaf, place in pairs if place.sharded]

    @functools.cached_property
    def _use(self) -> dict[Leaf, Use]:
        pairs = zip(self.leaves, self.uses or (), strict=False)
        return {leaf: use for leaf, use in pairs if use}

    def count(self, leaf: Leaf) -> Count:
        """Returns how often a step moves a sharded parameter at most."""
        gathers = self.gathers(leaf)
        return Count(gathers, gathers - self._again(leaf), self.reductions(leaf))

    def _again(self, leaf: Leaf) -> float:
        """Returns how many of the gathers are in the backward pass."""
        if self.policy.stage < 3:
            return 0.0
        return self.accumulate * (self._use[leaf].again if leaf in self._use else 1.0)

    def gathers(self, leaf: Leaf) -> float:
        """Returns how many times a step gathers a sharded parameter at most."""
        if leaf not in self._use:
            return self.wire.gathered
        use = self._use[leaf]
        return use.calls if self.policy.stage < 3 else self.accumulate * use.gathers

    def reductions(self, leaf: Leaf) -> float:
        """Returns how many times a step reduces the gradient of a sharded parameter at most."""
        if not leaf.trained:
            return 0
        again = self._use[leaf].scatters if leaf in self._use else 1
        once = self.policy.stage == 1 and self.per_device
        return self.wire.reduced * (1 if once else again)

    def is_read(self, leaf: Leaf) -> bool:
        """Whether the step reads a parameter, as far as that is known."""
        return leaf not in self._use or self._use[leaf].gathers > 0

    def local(self, leaf: Leaf, place: Placement) -> tuple[int, ...]:
        """Returns the dimensions of a gathered parameter on one device, which the model's own axes
        still divide."""
        return moves.local(self.policy, leaf, place, place.whole)

    @functools.cached_property
    def moves(self) -> tuple[Move, ...]:
        """The arrays of sharded parameters that ZeRO moves."""
        return tuple(move for leaf, place in self.sharded for move in
                     moves.of(self.policy, leaf, place, self.count(leaf), self.per_device))

    @functools.cached_property
    def _known(self) -> dict[int, list[tuple[tuple[int, ...], Move]]]:
        """By number of elements: the sorted dimensions of each move, of one layer of a stack of
        them and of a stack of stacks; with the move."""
        places = dict(self.sharded)
        found = collections.defaultdict(list)
        for move in self.moves:
            place = places[move.leaf]
            stacks = [i for i, (rest, whole) in enumerate(zip(place.spec, place.whole, strict=True))
                      if rest == whole and i < len(move.dims)]
            for one in {_without(dims, sliced) for dims in self._forms(move, place)
                        for n in range(3) for sliced in itertools.combinations(stacks, n)}:
                found[math.prod(one)].append((one, move))
        return found

    def _forms(self, move: Move, place: Placement) -> list[tuple[int, ...]]:
        """Returns the dimensions of a move and, if the model splits the parameter too, those of a
        stack of its shards, which the compiler may gather and then permute."""
        own = rules.axes_of(place.whole)
        if not move.whole or not own:
            return [move.dims]
        apart = rules.keep(place.spec, lambda axis: axis in own or axis in move.axes)
        shard = moves.local(self.policy, move.leaf, place, apart)
        return [move.dims, (*shard, math.prod(self.policy.mesh.shape[a] for a in move.axes))]

    def owners(self, shape: Shape, kind: str | None = None,
               axes: Collection[str] | None = None) -> list[Move]:
        """Returns the moves that an array may belong to.

        Args:
          kind, axes: of the collective; None means any. The axes of a collective-permute are not
            known.
        """
        dims = key(shape.dims)
        return [move for one, move in self._known.get(shape.elements, ()) if _alike(one, dims)
                and kind in (None, move.kind)
                and (axes is None or kind == "collective-permute" or move.axes == set(axes))]

    def relatives(self, shape: Shape, kind: str, axes: Collection[str]) -> list[Move]:
        """Returns the owners of an array, and all moves of the same kind and axes that arrays of
        their other shapes may belong to."""
        families = [self._families[move] for move in self.owners(shape, kind, axes)]
        return list({move: None for family in families for move in family})

    @functools.cached_property
    def _families(self) -> dict[Move, set[Move]]:
        """The moves of one kind over the same axes that have a shape in common, directly or through
        others."""
        families = {move: {move} for move in self.moves}

        def join(a: Move, b: Move) -> None:
            if families[a] is not families[b] and (a.kind, a.axes) == (b.kind, b.axes):
                families[a] |= families[b]
                families.update(dict.fromkeys(families[b], families[a]))

        for elements, entries in self._known.items():
            first = {}
            for dims, move in entries if elements > SMALLEST else ():
                join(first.setdefault((dims, move.kind, move.axes), move), move)
            for (a, move), (b, other) in itertools.combinations(first.items(), 2):
                if _alike(a[0], b[0]):
                    join(move, other)
        return families

    @functools.cached_property
    def summed(self) -> int:
        """The elements of one all-reduce at most: scalars, and the gradients of all parameters that
        are whole on every device, which the compiler joins."""
        pairs = zip(self.leaves, self.places, strict=True)
        return SCALARS + sum(math.prod(self.local(leaf, place)) for leaf, place in pairs
                             if leaf.trained and not place.sharded)

    @functools.cached_property
    def scattered(self) -> float:
        """The elements of one device's shards of the trained parameters, as often as their
        gradients are reduced per step."""
        reduced = [self.reductions(leaf) * math.prod(self.local(leaf, place))
                   for leaf, place in self.sharded]
        return sum(reduced) / self.policy.shards

    def is_whole(self, shape: Shape) -> bool:
        """Whether an array may be the gradient of a parameter that is whole on every device."""
        pairs = zip(self.leaves, self.places, strict=True)
        whole = [self.local(leaf, place) for leaf, place in pairs
                 if leaf.trained and not place.sharded]
        return any(math.prod(dims) == shape.elements and _alike(key(dims), key(shape.dims))
                   for dims in whole)

    @functools.cached_property
    def total(self) -> float:
        """Bytes that each device sends per step by ZeRO's theory, for sharded and whole leaves."""
        pairs = zip(self.leaves, self.places, strict=True)
        return sum(self._sent(leaf, place) for leaf, place in pairs)

    @functools.cached_property
    def _formula(self) -> Count:
        """How often ZeRO's formula moves each sharded parameter."""
        wire = theory.wire(self.policy.stage, self.accumulate, per_device=self.per_device,
                           regathered=self.differentiates)
        if not self.differentiates:
            return Count(wire.gathered, wire.gathered, 0)
        backward = wire.gathered / 2 if self.policy.stage == 3 else 0
        return Count(wire.gathered, wire.gathered - backward, wire.reduced)

    def _sent(self, leaf: Leaf, place: Placement) -> float:
        p, size, count = self.policy, math.prod(self.local(leaf, place)), self._formula
        reduced = leaf.trained and self.differentiates
        reduce = itemsize(p.precision.reduced(leaf.path, leaf.dtype)) if reduced else 0
        if not place.sharded:
            whole = theory.wire(0, self.accumulate, per_device=self.per_device)
            return whole.bytes(size, p.parts, reduce=reduce)
        copies = 2 * (p.replicas - 1) / p.replicas * size * reduce * count.reductions / p.shards
        return copies + sum(move.sent(p.mesh.shape) for move in
                            moves.of(p, leaf, place, count, self.per_device))


def key(dims: Sequence[int]) -> tuple[int, ...]:
    """Returns dimensions in order, without those of size 1, as the compiler may permute and add
    them.

    >>> key((2048, 1, 16))
    (16, 2048)
    """
    return tuple(sorted(d for d in dims if d != 1))


def _without(dims: Sequence[int], sliced: Sequence[int]) -> tuple[int, ...]:
    return key([d for i, d in enumerate(dims) if i not in sliced])


@functools.lru_cache(maxsize=4096)
def _alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one of two sorted shapes of the same size is the other with dimensions merged."""
    return _merges(a, b) or _merges(b, a)


def _merges(parts: tuple[int, ...], wholes: tuple[int, ...]) -> bool:
    if not wholes:
        return not parts
    for n in range(1, len(parts) - len(wholes) + 2):
        for chosen in itertools.combinations(range(len(parts)), n):
            if math.prod(parts[i] for i in chosen) == wholes[-1]:
                rest = tuple(d for i, d in enumerate(parts) if i not in chosen)
                if _merges(rest, wholes[:-1]):
                    return True
    return False
