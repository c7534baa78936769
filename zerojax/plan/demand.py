"""The collectives that ZeRO allows a compiled step: how often each parameter moves, and the total
bytes."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec as P

from zerojax.hlo.program import Shape
from zerojax.layout import placement, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import theory
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
    """

    gathers: float
    scatters: float
    calls: int = 1

    def __add__(self, other: "Use") -> "Use":
        return Use(self.gathers + other.gathers, self.scatters + other.scatters,
                   self.calls + other.calls)


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
    """

    policy: Policy
    leaves: tuple[Leaf, ...]
    places: tuple[Placement, ...]
    accumulate: int = 1
    per_device: bool = True
    why: str = ""
    uses: tuple[Use | None, ...] | None = None

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
        axes = [rules.axes_of(P(entry)) for entry in place.whole]
        sizes = self.policy.mesh.shape
        shape = place.kept or leaf.shape
        return tuple(d // math.prod(sizes[a] for a in on)
                     for d, on in zip(shape, axes, strict=True))

    @functools.cached_property
    def _known(self) -> dict[int, list[tuple[tuple[int, ...], Leaf, int]]]:
        """By number of elements: the sorted dimensions of each sharded parameter on one device, of
        one layer of a stack of them and of a stack of stacks; with the parameter and its size
        there."""
        found = collections.defaultdict(list)
        for leaf, place in self.sharded:
            dims = self.local(leaf, place)
            stacks = [i for i, (rest, whole) in enumerate(zip(place.spec, place.whole, strict=True))
                      if rest == whole]
            for one in {_without(dims, sliced) for n in range(3)
                        for sliced in itertools.combinations(stacks, n)}:
                found[math.prod(one)].append((one, leaf, math.prod(dims)))
        return found

    def owners(self, shape: Shape) -> dict[Leaf, int]:
        """Returns the sharded parameters that an array may belong to, each with its size on one
        device."""
        dims = key(shape.dims)
        return {leaf: size for one, leaf, size in self._known.get(shape.elements, ())
                if _alike(one, dims)}

    def relatives(self, shape: Shape) -> dict[Leaf, int]:
        """Returns the owners of an array, and all parameters that arrays of their other shapes may
        belong to, each with its size on one device."""
        families = [self._families[leaf] for leaf in self.owners(shape)]
        return {leaf: self._sizes[leaf] for family in families for leaf in family}

    def family(self, shape: Shape) -> frozenset[int]:
        """Returns a value that is the same for all arrays with the same `relatives`."""
        return frozenset(id(self._families[leaf]) for leaf in self.owners(shape))

    @functools.cached_property
    def _sizes(self) -> dict[Leaf, int]:
        return {leaf: math.prod(self.local(leaf, place)) for leaf, place in self.sharded}

    @functools.cached_property
    def _families(self) -> dict[Leaf, set[Leaf]]:
        """The sharded parameters that have a shape in common, directly or through others."""
        families = {leaf: {leaf} for leaf in self._sizes}

        def join(a: Leaf, b: Leaf) -> None:
            if families[a] is not families[b]:
                families[a] |= families[b]
                families.update(dict.fromkeys(families[b], families[a]))

        for elements, entries in self._known.items():
            first = {}
            for dims, leaf, _ in entries if elements > SMALLEST else ():
                join(first.setdefault(dims, leaf), leaf)
            for (a, leaf), (b, other) in itertools.combinations(first.items(), 2):
                if _alike(a, b):
                    join(leaf, other)
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

    def _sent(self, leaf: Leaf, place: Placement) -> float:
        p, size = self.policy, math.prod(self.local(leaf, place))
        reduce = itemsize(p.precision.reduced(leaf.path, leaf.dtype)) if leaf.trained else 0
        if not place.sharded:
            whole = theory.wire(0, self.accumulate, per_device=self.per_device)
            return whole.bytes(size, p.parts, reduce=reduce)
        copies = 2 * (p.replicas - 1) / p.replicas * size * reduce * self.wire.reduced / p.shards
        compute = itemsize(placement.computed(p, leaf))
        return copies + self.wire.bytes(size, p.shards, compute=compute, reduce=reduce)


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
