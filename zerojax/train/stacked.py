"""The states of several islands as one state: arrays with a leading dimension of islands.

    [n, ...]   own: trained parameters, optimizer state, model state; split over the island axis
    [...]      shared: step, random key, frozen parameters, outer optimizer; the same in all islands
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.layout import padded, report, rules
from zerojax.layout.padded import Padded
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import state_layout
from zerojax.train.state import TrainState

Tree = Any


class Outer(struct.PyTreeNode):
    """The state of the outer optimizer, the same in all islands.

    Attributes:
      params: the trained parameters after the last average, with None in place of frozen ones.
      opt_state: the state of the outer optax transform.
    """

    params: Any
    opt_state: Any


class IslandsState(struct.PyTreeNode):
    """The states of all islands.

    Attributes:
      islands: a `TrainState`. Each array that differs between islands has a leading dimension of
        islands; `step`, `rng` and frozen parameters are the same in all islands and have none.
      outer: the `Outer` of an outer optimizer; None without one.
    """

    islands: TrainState
    outer: Outer | None

    @property
    def step(self) -> jax.Array:
        """int32 scalar, the number of batches seen."""
        return self.islands.step

    @property
    def skipped(self) -> jax.Array:
        """int32[islands], the number of consecutive non-finite steps of each island."""
        return self.islands.skipped

    def __repr__(self) -> str:
        """Returns a few lines with the sizes of the state's parts."""
        outer = "" if self.outer is None else f"\n  outer: {report.brief(self.outer)}"
        return f"Islands of a {self.islands!r}{outer}"


def packed(state: IslandsState) -> TrainState:
    """Returns a state of islands as one `TrainState`, with the outer state among the optimizer's.

    `state_layout` then places the outer state like the optimizer's.
    """
    return pack(state.islands, state.outer)


def pack(state: TrainState, outer: Outer | None) -> TrainState:
    """Returns a state with an outer state among the optimizer's."""
    return state.replace(opt_state=(state.opt_state, outer))


def unpacked(state: TrainState) -> IslandsState:
    """Returns the state of islands that `packed` made a `TrainState` of."""
    opt_state, outer = state.opt_state
    return IslandsState(state.replace(opt_state=opt_state), outer)


def are_own(state: TrainState) -> list[bool]:
    """Returns whether each leaf of a state, packed or not, has a value of its own in each island.
    """
    def is_outer(x: Any) -> bool:
        return isinstance(x, Outer)

    own = jax.tree.map(lambda x: jax.tree.map(lambda _: not is_outer(x), x), state,
                       is_leaf=is_outer)
    trained = jax.tree.structure(state.params).unflatten(state.model.trained)
    return jax.tree.leaves(own.replace(step=False, rng=False, params=trained))


@dataclasses.dataclass(frozen=True)
class Stack:
    """The rules by which the states of `n` islands become one.

    Attributes:
      zero: the policy within an island.
      n: the number of islands.
      axis: the mesh axis over which the islands are split.
    """

    zero: Policy
    n: int
    axis: str

    @property
    def groups(self) -> int:
        """The number of groups of devices; each runs `n / groups` islands."""
        return self.zero.mesh.shape[self.axis]

    def of(self, state: TrainState) -> TrainState:
        """Returns the state of islands that all start from one state.

        Random keys, such as those of NNX's streams, become different ones.
        """
        def several(x: jax.Array) -> jax.Array:
            if trees.is_key(x):
                return jax.vmap(functools.partial(trees.fold, x))(jnp.arange(self.n))
            return jnp.broadcast_to(x, (self.n, *x.shape))

        return self.at_rest(self._lengthened(self._mapped(several, state)))

    def mean(self, state: TrainState) -> TrainState:
        """Returns one state: the mean of each floating array, and other arrays of the first island.

        Means are computed in float32 or wider.
        """
        def one(x: jax.Array) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x[0]
            return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0).astype(x.dtype)

        return self.one_at_rest(self._shortened(self._mapped(one, state)))

    def shapes_of_one(self, state: TrainState) -> TrainState:
        """Returns the shapes of the state of one island."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return self._shortened(self._mapped(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes))

    def each(self, fn: Callable, state: TrainState, batch: Tree) -> tuple[TrainState, Tree]:
        """Runs `fn(state, batch, index) -> state, metrics` in each island, with its own arrays.

        A shard_map over the island axis alone: no collective can cross it, while XLA places those
        within an island. (Under vmap, XLA partitions convolutions wrongly.)

        Returns:
          the states, and the metrics as arrays `[n, ...]`.
        """
        state = self._shortened(state)
        own = are_own(state)
        treedef = jax.tree.structure(state)
        specs = treedef.unflatten([P(self.axis) if flag else P() for flag in own])

        def run(state, batch, index):
            flat = jax.tree.leaves(state)
            shared = trees.taken(flat, [not flag for flag in own])

            def one(xs):
                mine, batch, index = xs
                new, metrics = fn(treedef.unflatten(trees.merged(own, mine, shared)), batch, index)
                return _parted(own, new), metrics

            batch = jax.tree.map(lambda x: x.reshape(len(index), -1, *x.shape[1:]), batch)
            (mine, others), metrics = _map(one, (trees.taken(flat, own), batch, index))
            return treedef.unflatten(trees.merged(own, mine, [x[0] for x in others])), metrics

        # without check_vma, which requires that all of the loss states over which axes it varies
        mapped = jax.shard_map(run, mesh=self.zero.mesh, axis_names={self.axis}, check_vma=False,
                               in_specs=(specs, P(self.axis), P(self.axis)),
                               out_specs=(specs, P(self.axis)))
        state, metrics = mapped(state, batch, jnp.arange(self.n))
        per_island = NamedSharding(self.zero.mesh, P(self.axis))
        return (self.at_rest(self._lengthened(state)),
                jax.lax.with_sharding_constraint(metrics, per_island))

    def at_rest(self, state: TrainState) -> TrainState:
        """Constrains the state of islands to its shardings."""
        return jax.lax.with_sharding_constraint(state, self.shardings(state))

    def one_at_rest(self, state: TrainState) -> TrainState:
        """Constrains the state of one island to its shardings."""
        return jax.lax.with_sharding_constraint(
            state, state_layout.shardings(self.zero, state))

    def shardings(self, state: TrainState) -> Tree:
        """Returns the `NamedSharding` of each leaf of a state of islands."""
        return padded.structure(state).unflatten(
            [rules.sharding(self.zero.mesh, place.spec) for place in self.placements(state)])

    def placements(self, state: TrainState) -> list[Placement]:
        """Returns where each leaf of a state of islands is."""
        one = self.shapes_of_one(state)
        places = state_layout.placements(self.zero, one)
        return [self._lengthened_place(place, self.axis, self.n) if flag else place
                for place, flag in zip(places, are_own(one), strict=True)]

    def model_leaves(self, state: TrainState) -> tuple[tuple[Leaf, ...], tuple[Placement, ...]]:
        """Returns the parameters and the model's state as a group of devices holds them, and where
        each leaf is; those of its islands are one array."""
        leaves, places = state_layout.model_leaves(self.zero, self.shapes_of_one(state))
        m = self.n // self.groups
        pairs = [(leaf, place) if leaf.group == "frozen" else
                 (dataclasses.replace(leaf, shape=(m, *leaf.shape), base=P(None, *leaf.base)),
                  self._lengthened_place(place, None, m))
                 for leaf, place in zip(leaves, places, strict=True)]
        return tuple(leaf for leaf, _ in pairs), tuple(place for _, place in pairs)

    def _lengthened_place(self, place: Placement, axis: str | None, n: int) -> Placement:
        kept = place.kept and (n, *place.kept)
        return dataclasses.replace(place, spec=P(axis, *place.spec), whole=P(axis, *place.whole),
                                   kept=kept)

    def _mapped(self, fn: Callable, state: TrainState) -> TrainState:
        """Returns a state with `fn` applied to the arrays that are each island's own."""
        leaves, treedef = jax.tree.flatten(state)
        return treedef.unflatten([fn(x) if flag else x
                                  for x, flag in zip(leaves, are_own(state), strict=True)])

    def _lengthened(self, state: TrainState) -> TrainState:
        """Returns a state whose own padded arrays have the dimension of islands in their shape."""
        return _reshaped(state, lambda shape: (self.n, *shape))

    def _shortened(self, state: TrainState) -> TrainState:
        """Returns a state whose own padded arrays lack the dimension of islands in their shape."""
        return _reshaped(state, lambda shape: shape[1:])


def _reshaped(state: TrainState, change: Callable) -> TrainState:
    """Returns a state with other logical shapes of the padded arrays that are each island's own."""
    def is_padded(x: Any) -> bool:  # while the number of dimensions differs from the shape's, too
        return isinstance(x, Padded) and hasattr(x.kept, "shape")

    leaves, treedef = jax.tree.flatten(state, is_leaf=is_padded)
    return treedef.unflatten([Padded(x.kept, change(x.shape)) if flag and is_padded(x) else x
                              for x, flag in zip(leaves, are_own(state), strict=True)])


def _map(fn: Callable, xs: Tree) -> Tree:
    """Maps over the leading dimension, one island after the other; one alone needs no loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.map(fn, xs)
    return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], xs)))


def _parted(flags: Sequence[bool], tree: Tree) -> tuple[list, list]:
    """Returns the leaves whose flag is True, and the others."""
    leaves = jax.tree.leaves(tree)
    return trees.taken(leaves, flags), trees.taken(leaves, [not flag for flag in flags])


def bytes_per_round(stack: Stack, state: TrainState) -> float:
    """Returns the bytes that each device sends for one average: an all-reduce of float32 shards.

    Trained parameters and floating model state are averaged: 2 (g - 1) / g times their bytes on a
    device, for g groups.
    """
    def local(leaf: Leaf, place: Placement) -> float:
        shape = (place.kept or leaf.shape)[1:]
        axes = rules.axes_of(place.spec)
        devices = math.prod(stack.zero.mesh.shape[axis] for axis in axes)
        return max(4, trees.itemsize(leaf.dtype)) * math.prod(shape) / devices

    pairs = zip(*stack.model_leaves(state), strict=True)
    g = stack.groups
    return 2 * (g - 1) / g * sum(local(leaf, place) for leaf, place in pairs
                                 if leaf.trained or _is_floating_state(leaf))


def _is_floating_state(leaf: Leaf) -> bool:
    is_key = leaf.dtype.startswith("key")
    return leaf.group == "state" and not is_key and jnp.issubdtype(leaf.dtype, jnp.inexact)
