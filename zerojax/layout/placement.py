"""Placements of whole states: parameters by rule or shape, optimizer state by path and shape.

There is no table of optimizers. A leaf of optimizer state whose path ends in a parameter's path,
and which has that parameter's shape, is placed like the parameter. All others are placed by their
own shape.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import LayoutError
from zerojax.layout import padded, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy

Tree = Any
ELSEWHERE = "created whole, against the policy"


def param_name(path: str) -> str | None:
    """Returns a parameter's name from its path in a training state; None for any other leaf.

    The state may be one of several in a tree.

    >>> param_name("params/embed/kernel"), param_name("critic/params/kernel")
    ('embed/kernel', 'critic/kernel')
    >>> param_name("opt_state/0/mu/kernel")
    """
    keys = path.split("/")
    if "params" not in keys or "opt_state" in keys[:keys.index("params")]:
        return None
    keys.remove("params")
    return "/".join(keys)


def endings(path: str) -> Iterator[str]:
    """Returns the endings of a path, longest first.

    >>> list(endings("a/b/c"))
    ['a/b/c', 'b/c', 'c']
    """
    keys = path.split("/")
    return ("/".join(keys[i:]) for i in range(len(keys)))


def describe(tree: Tree, bases: Sequence[P] | None = None,
             scanned: Sequence[int | None] | None = None,
             group: Literal["trained", "state"] = "trained") -> tuple[Leaf, ...]:
    """Returns one `Leaf` for each array of `tree`.

    `bases` and `scanned` have one entry per leaf of `tree`, in its order.
    """
    flat = jax.tree.leaves_with_path(tree, is_leaf=padded.is_padded)
    bases = bases or [P()] * len(flat)
    scanned = scanned or [None] * len(flat)
    return tuple(Leaf(trees.path_of(path), x.shape, str(x.dtype), rules.full(base, len(x.shape)),
                      dim, group)
                 for (path, x), base, dim in zip(flat, bases, scanned, strict=True))


def computed(policy: Policy, leaf: Leaf) -> str:
    """Returns the dtype in which a program reads a leaf of a model.

    The model's state is read in the dtype in which it is stored.
    """
    if leaf.group == "state" or leaf.overwritten:
        return leaf.dtype
    return policy.precision.computed(leaf.path, leaf.dtype)


def on_wire(policy: Policy, leaf: Leaf) -> tuple[str, str]:
    """Returns the formats of `Policy.wire` in which a leaf is gathered and its gradient reduced.

    "" stands for the compute dtype and the reduce dtype.
    """
    if (leaf.group == "state" or leaf.overwritten or policy.precision.kept(leaf.path)
            or not jnp.issubdtype(leaf.dtype, jnp.floating)):
        return "", ""
    wire, reduce = policy.wire, policy.wire.reduce if leaf.trained else None
    dimensions = len(leaf.shape) - (leaf.scanned is not None)
    if dimensions < 2 or wire.excludes(leaf.path):  # not in blocks
        return "", reduce if reduce == "bfloat16" else ""
    return wire.gather or "", reduce or ""


def place(policy: Policy, leaf: Leaf) -> Placement:
    """Returns the placement of a leaf of a model under a policy.

    Rules apply to parameters only. Axes in the leaf's `base` that the mesh lacks are ignored.
    """
    rule = None if leaf.group == "state" else rules.find_rule(leaf.path, policy.rules)
    if rule is None:
        return place_other(policy, leaf, policy.uneven == "pad" and leaf.group != "state")
    pad = policy.uneven == "pad" and policy.stage > 0
    ruled = rules.by_rule(leaf, rule, policy.rules[rule], policy.spec_axes, policy.mesh.shape,
                          policy.replica_axis, pad)
    return ruled if policy.stage else _whole(ruled)


def place_other(policy: Policy, leaf: Leaf, pad: bool = False) -> Placement:
    """Returns the placement of a leaf to which no rule applies. Random keys stay whole."""
    if leaf.dtype.startswith("key"):
        return Placement(leaf.base, leaf.base, "a random key")
    base = rules.keep(leaf.base, lambda axis: axis in policy.mesh.axis_names)
    ruled = rules.shard(dataclasses.replace(leaf, base=base), policy.spec_axes, policy.shards,
                        policy.min_shard, pad)
    return ruled if policy.stage else _whole(ruled)


def _whole(ruled: Placement) -> Placement:
    return Placement(ruled.whole, ruled.whole, "stage 0 keeps everything whole")


def place_state(policy: Policy, params: Sequence[Leaf], tree: Tree) -> list[Placement]:
    """Returns the placement of each leaf of `tree`, given the leaves of the parameters.

    `tree` is optimizer state or a whole training state.
    """
    known = {}
    for leaf in params:
        for keys, ending in _cuts(leaf.path):
            known.setdefault((ending, leaf.shape), []).append((keys, place(policy, leaf)))
    shared = _shared_keys(params)
    return [_inherit(known, shared, leaf) or place_other(policy, leaf) for leaf in describe(tree)]


def _inherit(known: dict, shared: set[str], leaf: Leaf) -> Placement | None:
    """Returns the placement of the parameter to which a leaf of optimizer state belongs.

    The leaf's path is the parameter's with keys added before it or inserted into it. It may lack
    the leading keys that all parameters share, and may end in the "value" of an NNX variable.
    """
    for keys, ending in (*_cuts(leaf.path), *_cuts(leaf.path.removesuffix("/value"))):
        for before, inherited in known.get((ending, leaf.shape), ()):
            if before - shared <= keys:
                return inherited
    return None


def _cuts(path: str) -> Iterator[tuple[set[str], str]]:
    """Yields each ending of a path, longest first, with the set of the keys before it."""
    for ending in endings(path):
        yield set(path.removesuffix(ending).split("/")), ending


def _shared_keys(params: Sequence[Leaf]) -> set[str]:
    """Returns the leading keys that all parameters share, such as "model" in nnx's optimizer."""
    levels = zip(*(leaf.path.split("/")[:-1] for leaf in params), strict=False)
    return {keys[0] for keys in itertools.takewhile(lambda keys: len(set(keys)) == 1, levels)}


def fitting(policy: Policy, ruled: Placement, x: Any) -> Placement:
    """Returns the placement by the rules, adapted to the shape in which an array is stored.

    An array that is not padded stays whole where the rules would pad it.

    Raises:
      LayoutError: the array is padded for another number of devices.
    """
    kept = x.kept.shape if padded.is_padded(x) else None
    if kept == ruled.kept or (kept and not ruled.sharded):
        return dataclasses.replace(ruled, kept=kept)
    if kept:
        raise LayoutError(f"an array of shape {x.shape} is padded to {kept}, for a number of "
                          f"devices other than the {policy.shards} that share a state here; "
                          "convert it with the Zero that created it: zero.move(state, other).")
    return Placement(ruled.whole, ruled.whole, f"{rules.INDIVISIBLE} of {x.shape} is divisible by "
                                               f"{policy.shards}, and it is not padded")


def placed(policy: Policy, ruled: Placement, sharding: Any, x: Any) -> Placement:
    """Returns the placement of an array by its sharding, or by the rules if it has none.

    The reason for a whole array comes from the rules.
    """
    ruled = fitting(policy, ruled, x)
    if not isinstance(sharding, NamedSharding):
        return ruled
    spec = rules.full(sharding.spec, len(x.shape))
    whole = rules.keep(spec, lambda axis: axis not in policy.axes)
    return Placement(spec, whole, ruled.reason or ELSEWHERE, ruled.kept)
