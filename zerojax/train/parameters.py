"""A model's parameters and state as a program takes them: with their pairs, pending if sharded."""

from collections.abc import Sequence
from typing import Any

import jax

from zerojax.errors import PolicyError
from zerojax.gather import formats, reads, uses
from zerojax.gather.pair import Pair, Reduction
from zerojax.gather.pending import Pending
from zerojax.layout import placement
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan.demand import Use
from zerojax.policy import Policy


def make_pairs(policy: Policy, leaves: Sequence[Leaf], places: Sequence[Placement],
               jaxpr: Any = None, per_device: bool = False) -> list[Pair]:
    """Returns the pair for each leaf of a model.

    Args:
      jaxpr: the program whose first arguments are these leaves; with one loss, it shows which of
        them are also read in a wider dtype.
    """
    wide = {} if per_device or jaxpr is None else _widened(leaves, jaxpr)

    def pair(leaf, place):
        compute = placement.computed(policy, leaf)
        reduce = policy.precision.reduced(leaf.path, leaf.dtype) if leaf.trained else compute
        gather_as, reduce_as = placement.on_wire(policy, leaf)
        return Pair(policy.mesh, place.spec, place.whole, leaf.dtype, compute, reduce,
                    policy.axes, policy.replica_axis, policy.inner_axes, bool(policy.secondary),
                    _reduction(policy, place, per_device),
                    wide=wide.get(leaf.path, ""), least=policy.min_shard,
                    extra=_extra(leaf, place), gather_as=gather_as, reduce_as=reduce_as,
                    block=policy.wire.block)

    return list(map(pair, leaves, places))


def _reduction(policy: Policy, place: Placement, per_device: bool) -> Reduction:
    """Reduces once per step in stages 0 and 1, and for whole leaves, if each device has a part."""
    if per_device:
        at_end = policy.stage <= 1 or not place.sharded
        return Reduction.SUM_AT_END if at_end else Reduction.SUM_AT_READ
    return Reduction.VIA_WHOLE if policy.replica_axis is None else Reduction.DIRECT


def _extra(leaf: Leaf, place: Placement) -> tuple[int, ...]:
    if place.kept is None:
        return ()
    return tuple(n - d for n, d in zip(place.kept, leaf.shape, strict=True))


def _widened(leaves: Sequence[Leaf], jaxpr) -> dict[str, str]:
    variables = zip(uses.without_constants(jaxpr).invars, leaves, strict=False)
    return uses.widened(jaxpr, {v: leaf.path for v, leaf in variables if leaf.trained})


def gather_once(policy: Policy, pairs: Sequence[Pair], params: Sequence) -> list:
    """Returns the parameters gathered at the start of a step, and None for the others.

    Stages 1 and 2 gather all sharded parameters there, stages 0 and 3 none.
    """
    once = policy.stage in (1, 2)
    return [pair.gather(x) if once and pair.sharded else None
            for pair, x in zip(pairs, params, strict=True)]


def opened(leaves: Sequence[Leaf], pairs: Sequence[Pair], xs: Sequence,
           gathered: Sequence | None = None, seeds: Sequence | None = None) -> list:
    """Returns parameters or state for a program: pending if sharded, else in the compute dtype.

    Args:
      gathered: see `gather_once`; None means that nothing was gathered.
      seeds: see `seeds_of`; None means that nothing is rounded at random.
    """
    nothing = [None] * len(xs)

    def one(leaf, pair, x, whole, seed):
        if pair.sharded or pair.extra:
            return Pending.of(x, whole, pair, pair.compute, leaf.path, seed)
        return x if leaf.dtype == pair.compute else x.astype(pair.compute)

    return list(map(one, leaves, pairs, xs, gathered or nothing, seeds or nothing))


def seeds_of(pairs: Sequence[Pair], key: Any) -> list:
    """Returns the seed of each parameter's random rounding, or None, derived from a random key.

    Raises:
      PolicyError: a gradient is rounded at random, but there is no key.
    """
    reduced = next((pair.reduce_as for pair in pairs if pair.reduce_as), "")
    if not reduced:
        return [None] * len(pairs)
    if key is None:
        raise PolicyError(f"Wire(reduce={reduced!r}) rounds gradients at random, which needs a "
                          "random key that differs from step to step: give the loss one of "
                          "jax.random.key as an argument, as in value_and_grad(loss)(params, "
                          "batch, key) with loss(params, batch, key), or write Wire(reduce=None).")
    seed = jax.random.bits(key, (), "uint32")
    return [formats.mixed(seed, i) if pair.reduce_as else None for i, pair in enumerate(pairs)]


def uses_in(jaxpr: Any, pairs: Sequence[Pair]) -> list[Use]:
    """Returns how often a program needs each of its first arguments, which have these pairs."""
    variables = uses.without_constants(jaxpr).invars
    return reads.count(jaxpr, [_sharded(pair, v.aval.shape)
                               for pair, v in zip(pairs, variables, strict=False)])


def _sharded(pair: Pair, shape: tuple[int, ...]) -> reads.Sharded | None:
    if not pair.sharded:
        return None
    dims = {i for i in range(len(shape)) if pair.shards(i)}
    return reads.Sharded(shape, dims, 0 if any(pair.extra) else pair.least)
