"""What ZeRO wants of a compiled step."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zerojax.hlo.program import Shape
from zerojax.layout import placement, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import theory
from zerojax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Demand:
    """A compiled step as ZeRO wants it: the policy, what of the model it reads and where that lies, microbatches, the way to
    differentiate and why."""

    policy: Policy
    leaves: tuple[Leaf, ...]
    places: tuple[Placement, ...]
    accumulate: int = 1
    per_device: bool = True
    why: str = ""

    @property
    def wire(self) -> theory.Wire:
        return theory.wire(self.policy.stage, self.accumulate, per_device=self.per_device)

    @property
    def sharded(self) -> list[tuple[Leaf, Placement]]:
        return [(leaf, place) for leaf, place in zip(self.leaves, self.places, strict=True) if place.sharded]

    def local(self, leaf: Leaf, place: Placement) -> tuple[int, ...]:
        """A parameter's dimensions once gathered, on one device: the model's own axes still divide it."""
        axes = [rules.axes_of(P(entry)) for entry in place.whole]
        shape = place.kept or leaf.shape
        return tuple(d // math.prod(self.policy.mesh.shape[a] for a in on) for d, on in zip(shape, axes, strict=True))

    @functools.cached_property
    def known(self) -> dict[int, list[tuple[tuple[int, ...], Leaf, int]]]:
        """By their number of elements: dimensions that a sharded parameter, or a layer of a stack of them or of a stack of stacks,
        has on one device; with the parameter and its size there."""
        found = collections.defaultdict(list)
        for leaf, place in self.sharded:
            dims = self.local(leaf, place)
            stacks = [i for i, (at_rest, whole) in enumerate(zip(place.spec, place.whole, strict=True)) if at_rest == whole]
            slices = {tuple(sorted(d for i, d in enumerate(dims) if i not in sliced and d != 1))
                      for n in range(3) for sliced in itertools.combinations(stacks, n)}
            for one in slices:
                found[math.prod(one)].append((one, leaf, math.prod(dims)))
        return found

    def owners(self, s: Shape) -> dict[Leaf, int]:
        """The sharded parameters that an array may be of, each with its size on one device."""
        dims = key(s.dims)
        return {leaf: size for one, leaf, size in self.known.get(s.elements, ()) if _alike(one, dims)}

    @functools.cached_property
    def total(self) -> float:
        """Bytes each device sends in a step, by theory, shards and copies."""
        p, sent = self.policy, 0.0
        for leaf, place in zip(self.leaves, self.places, strict=True):
            size, compute = math.prod(self.local(leaf, place)), itemsize(placement.computed(p, leaf))
            reduce = itemsize(p.precision.reduced(leaf.path, leaf.dtype)) if leaf.trained else 0
            copies = 2 * (p.replicas - 1) / p.replicas * size * reduce
            if place.sharded:
                sent += self.wire.bytes(size, p.shards, compute=compute, reduce=reduce) + copies * self.wire.reduced / p.shards
            else:
                sent += theory.wire(0, self.accumulate, per_device=self.per_device).bytes(size, p.parts, reduce=reduce)
        return sent


def itemsize(dtype: str) -> int:
    """Bytes of a number of a dtype, also of one that numpy does not know."""
    return jnp.dtype(dtype).itemsize if not dtype.startswith("key") else 8


def key(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))


@functools.lru_cache(maxsize=4096)
def _alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether of two sorted shapes of one size, one is the other with dimensions merged."""
    return _merges(a, b) or _merges(b, a)


def _merges(parts: tuple[int, ...], wholes: tuple[int, ...]) -> bool:
    if not wholes:
        return not parts
    for n in range(1, len(parts) - len(wholes) + 2):
        for chosen in itertools.combinations(range(len(parts)), n):
            if math.prod(parts[i] for i in chosen) == wholes[-1]:
                if _merges(tuple(d for i, d in enumerate(parts) if i not in chosen), wholes[:-1]):
                    return True
    return False
