"""Specs for whole states: parameters by rule and shape, and whatever an optax transform keeps by path and shape.

There is no table of optimizers. A leaf whose path ends in a parameter's path and which has that parameter's shape
lies where the parameter lies; every other leaf is laid out by its own shape.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import LayoutError
from zerojax.layout import padded, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy

Tree = Any
ELSEWHERE = "it was made so, against the policy"


def param_name(path: str) -> str | None:
    """The name of a parameter from its path in a training state, also in one of several states; None for any other leaf.

    >>> param_name("params/embed/kernel"), param_name("critic/params/kernel"), param_name("opt_state/0/mu/kernel")
    ('embed/kernel', 'critic/kernel', None)
    """
    keys = path.split("/")
    if "params" not in keys or "opt_state" in keys[:keys.index("params")]:
        return None
    return "/".join(keys[:keys.index("params")] + keys[keys.index("params") + 1:])


def describe(tree: Tree, bases: Sequence[P] | None = None, scanned: Sequence[int | None] | None = None,
             group: Literal["trained", "state"] = "trained") -> tuple[Leaf, ...]:
    """One `Leaf` for each array of `tree`; `bases` and `scanned` are in the order of its leaves."""
    flat = jax.tree.leaves_with_path(tree, is_leaf=padded.is_padded)
    bases = bases or [P()] * len(flat)
    scanned = scanned or [None] * len(flat)
    return tuple(Leaf(trees.path_of(p), x.shape, str(x.dtype), rules.full(b, len(x.shape)), s, group)
                 for (p, x), b, s in zip(flat, bases, scanned, strict=True))


def computed(policy: Policy, leaf: Leaf) -> str:
    """The dtype that a program reads a leaf of a model in; the model's state is read as it is."""
    return leaf.dtype if leaf.group == "state" or leaf.overwritten else policy.precision.computed(leaf.path, leaf.dtype)


def place(policy: Policy, leaf: Leaf) -> Placement:
    """Where a leaf of a model lies at rest under a policy, and once gathered. Rules are about parameters; axes of the model that
    the mesh lacks do not count."""
    rule = None if leaf.group == "state" else rules.find_rule(leaf.path, policy.rules)
    if rule is None:
        return place_other(policy, leaf, policy.uneven == "pad" and leaf.group != "state")
    placed = rules.by_rule(leaf, rule, policy.rules[rule], policy.axes, policy.mesh.shape, policy.replica_axis,
                           policy.uneven == "pad" and policy.stage > 0)
    return placed if policy.stage else _whole(placed)


def place_other(policy: Policy, leaf: Leaf, pad: bool = False) -> Placement:
    """Where a leaf lies that no rule is about. Random keys are whole."""
    if leaf.dtype.startswith("key"):
        return Placement(leaf.base, leaf.base, "a random key")
    known = rules.keep(leaf.base, lambda axis: axis in policy.mesh.axis_names)
    placed = rules.shard(dataclasses.replace(leaf, base=known), policy.axes, policy.shards, policy.min_shard, pad)
    return placed if policy.stage else _whole(placed)


def _whole(placed: Placement) -> Placement:
    return Placement(placed.whole, placed.whole, "stage 0 keeps everything whole")


def place_state(policy: Policy, params: Sequence[Leaf], tree: Tree) -> list[Placement]:
    """A `Placement` for each leaf of `tree` (optimizer state, or a whole training state), given the parameters."""
    known = {}
    for leaf in params:
        for ending in endings(leaf.path):
            known.setdefault((ending, leaf.shape), []).append((leaf.path.removesuffix(ending), place(policy, leaf)))
    return [_inherit(known, leaf) or place_other(policy, leaf) for leaf in describe(tree)]


def _inherit(known: dict, leaf: Leaf) -> Placement | None:
    """The placement of the parameter whose path is this leaf's, but for keys between and before."""
    for ending in endings(leaf.path):
        lead = leaf.path.removesuffix(ending).split("/")
        for before, placed in known.get((ending, leaf.shape), ()):
            if set(before.split("/")) <= set(lead):
                return placed
    return None


def endings(path: str):
    """Of "a/b/c": itself, "b/c", "c"."""
    keys = path.split("/")
    return ("/".join(keys[i:]) for i in range(len(keys)))


def fitting(policy: Policy, ruled: Placement, x: Any) -> Placement:
    """A rule for an array that may be kept in another shape than the rule would have it: what is not padded stays whole where
    the rule would pad it.

    Raises:
      LayoutError: it is padded for another number of devices.
    """
    kept = x.kept.shape if padded.is_padded(x) else None
    if kept == ruled.kept or (kept and not ruled.sharded):
        return dataclasses.replace(ruled, kept=kept)
    if kept:
        raise LayoutError(f"an array of shape {x.shape} is kept as {kept}, for another number of devices than the "
                          f"{policy.shards} that share a state here; write zero.move(state, other).")
    return Placement(ruled.whole, ruled.whole, f"{rules.INDIVISIBLE} of {x.shape} divides by {policy.shards}, and it is not padded")


def placed(policy: Policy, ruled: Placement, sharding: Any, x: Any) -> Placement:
    """Where an array lies by its sharding; by the rules, if it has none. These also say why it is whole."""
    ruled = fitting(policy, ruled, x)
    if not isinstance(sharding, NamedSharding):
        return ruled
    spec = rules.full(sharding.spec, len(x.shape))
    return Placement(spec, rules.keep(spec, lambda axis: axis not in policy.axes), ruled.reason or ELSEWHERE, ruled.kept)
