"""How many elements of its parameters ZeRO moves at most, and the arrays that exceed it."""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Shape
from zerojax.plan import provenance
from zerojax.plan.demand import Demand, key
from zerojax.plan.moves import Move
from zerojax.tables import quantity

SLACK = 1.02
SMALL = 2**16  # bytes of one array: norms, losses, batch statistics

Pair = tuple[Collective, Shape]


class Odd(NamedTuple):
    """An array that is none of ZeRO's, and why."""

    collective: Collective
    shape: Shape
    why: str


def exceeding(demand: Demand, pairs: Sequence[Pair], group: Callable,
              owners: Callable[..., list[Move]]) -> tuple[list[Odd], list[Pair]]:
    """Returns the arrays that exceed the budgets of their groups, and the others.

    Args:
      group: returns the key of an array's group.
      owners: returns the moves that an array may belong to, such as `Demand.owners`.
    """
    groups = collections.defaultdict(list)
    for pair in pairs:
        groups[group(demand, *pair)].append(pair)
    odd, left = [], []
    for mine in groups.values():
        c, s = mine[0]
        axes = c.axes(demand.policy.mesh.shape) or ()
        more, rest = _too_often(demand, mine, _most(demand, c, owners(s, c.kind, axes)))
        odd += more
        left += rest
    return odd, left


def by_shape(demand: Demand, c: Collective, s: Shape) -> tuple:
    """Returns the key of a budget: of all reductions over the same axes, or of one shape."""
    if c.kind == "all-reduce":
        return c.kind, c.axes(demand.policy.mesh.shape)
    return c.kind, c.axes(demand.policy.mesh.shape), key(s.dims)


def by_family(demand: Demand, c: Collective, s: Shape) -> tuple:
    """Returns the key of a budget: of all parameters that are related to the owners of an array."""
    axes = c.axes(demand.policy.mesh.shape) or ()
    return c.kind, axes, frozenset(demand.relatives(s, c.kind, axes))


def _too_often(demand: Demand, pairs: list[Pair], most: float) -> tuple[list[Odd], list[Pair]]:
    """Returns the arrays that exceed a budget of elements, and the others."""
    moved = sum(_elements(pair) for pair in pairs)
    often = f"{moved / most:.3g} times as much as" if most else "though none may be moved"
    why = (f"arrays of these parameters' shapes move {often} in stage {demand.policy.stage} with "
           f"{quantity(demand.accumulate, 'microbatch')} and this program's reads: an activation "
           "of a parameter's shape, or a weight that is read in a loop which does not slice it")
    beyond, left = _beyond(demand, pairs, SLACK * most)
    return [Odd(c, s, why) for c, s in beyond], left


def _beyond(demand: Demand, pairs: list[Pair], most: float) -> tuple[list[Pair], list[Pair]]:
    """Returns the arrays that exceed a number of elements, and the others.

    The most doubtful arrays are taken out until the others fit; then those that fit after all are
    put back.
    """
    left = sorted(pairs, key=lambda pair: _doubt(demand, *pair))
    total, gone, beyond = sum(_elements(pair) for pair in pairs), [], []
    while left and total > most:
        gone.append(left.pop())
        total -= _elements(gone[-1])
    for pair in reversed(gone):
        if total + _elements(pair) > most:
            beyond.append(pair)
        else:
            left.append(pair)
            total += _elements(pair)
    return beyond, left


def _doubt(demand: Demand, c: Collective, s: Shape) -> tuple[bool, bool, bool, int]:
    """Returns a sort key, which is higher for arrays that are less likely to be ZeRO's.

    Small arrays of no parameter's shape have the highest: they may be statistics, which are no
    fault if they send little.
    """
    is_known = bool(demand.is_whole(s) or demand.owners(s))
    return (not provenance.by_the_pair(c.frames), not is_known, s.bytes <= SMALL, c.trips)


def _elements(pair: Pair) -> int:
    c, s = pair
    return s.elements * c.trips


def _most(demand: Demand, c: Collective, owners: Sequence[Move]) -> float:
    """Returns the number of elements that ZeRO moves of these parameters at most, in all iterations
    of all loops.

    Args:
      c: one of the collectives, all of one kind and, if they are all-reduces, over the same axes.
    """
    if c.kind == "all-reduce":
        # per device, once per step; with one loss, XLA reduces each use of a tied weight
        times = 1 if demand.per_device else 2 * demand.accumulate
        over_copies = c.axes(demand.policy.mesh.shape) == (demand.policy.replica_axis,)
        return times * demand.summed + (demand.scattered if over_copies else 0)
    return sum(move.times * move.size for move in dict.fromkeys(owners))
