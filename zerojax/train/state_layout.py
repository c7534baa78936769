"""Where each leaf of a state is placed. A state is any pytree; `known` finds its parameters.

In lists of leaves and placements, a padded array is one leaf.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import PolicyError
from zerojax.gather import models
from zerojax.layout import padded, placement, report, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import donation, loss_scale
from zerojax.train.state import TrainState

_WHOLE = Placement(P(), P(), "no parameter or optimizer state")


@dataclasses.dataclass(frozen=True)
class Known:
    """The facts about a state that its shapes alone do not show.

    Attributes:
      model: the parameters, and the model's state if that is known, by their index in the state.
      whole: indices of the leaves that every device holds whole under any policy.
      may_pad: whether a policy may pad arrays that are not padded yet.
    """

    model: Mapping[int, Leaf]
    whole: frozenset[int] = frozenset()
    may_pad: bool = False

    @property
    def params(self) -> list[Leaf]:
        return [leaf for leaf in self.model.values() if leaf.group != "state"]


def known(state: Any, scanned: Sequence[int | None] | None = None) -> Known:
    """Returns the known facts about a state; a `TrainState` describes itself.

    The parameters of any other state are the leaves whose path contains the key `params`, or else
    its `nnx.Param`s.

    Args:
      state: arrays or shapes.
      scanned: the dimension of each leaf that a loop slices, or None.
    """
    if isinstance(state, TrainState):
        return _self_described(state)
    unboxed = meta.unbox(_shapes(state))
    leaves = placement.describe(unboxed, models.named_axes(state), scanned)
    by_path = {i: placement.param_name(leaf.path) for i, leaf in enumerate(leaves)}
    names = {i: name for i, name in by_path.items() if name} or _nnx_params(unboxed)
    return Known({i: dataclasses.replace(leaves[i], path=name) for i, name in names.items()})


def _self_described(state: TrainState) -> Known:
    treedef = padded.structure(state)
    index = treedef.unflatten(range(treedef.num_leaves))
    model = jax.tree.leaves((index.params, index.model_state))
    described = zip(model, (*state.model.leaves, *state.model.state), strict=True)
    counters = set(range(treedef.num_leaves)) - {*model, *jax.tree.leaves(index.opt_state)}
    return Known(dict(described), frozenset(counters), may_pad=True)


def _nnx_params(state: Any) -> dict[int, str]:
    """Returns the paths of an NNX state's parameters by their index among the state's leaves."""
    flat = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {i: trees.path_of(path) for i, (path, x) in enumerate(flat) if isinstance(x, nnx.Param)}


def _shapes(state: Any) -> Any:
    """Returns a state, which may hold Python numbers, as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), state)


def _by_rules(policy: Policy, state: Any, facts: Known) -> list[Placement]:
    """Returns where the policy wants each leaf, and padded to which shape."""
    ruled = placement.place_state(policy, facts.params, meta.unbox(_shapes(state)))
    for i in facts.whole:
        ruled[i] = _WHOLE
    for i, leaf in facts.model.items():
        ruled[i] = placement.place(policy, leaf)
    return ruled


def placements(policy: Policy, state: Any,
               scanned: Sequence[int | None] | None = None) -> list[Placement]:
    """Returns where the policy wants each leaf, in the shape that the leaf is kept in."""
    ruled = _by_rules(policy, state, known(state, scanned))
    return [placement.fitting(policy, rule, x)
            for rule, x in zip(ruled, padded.leaves(state), strict=True)]


def shardings(policy: Policy, state: Any, scanned: Sequence[int | None] | None = None) -> Any:
    """Returns a state's tree with a `NamedSharding` for each leaf."""
    return padded.structure(state).unflatten(
        [rules.sharding(policy.mesh, p.spec) for p in placements(policy, state, scanned)])


def at_rest(policy: Policy, state: Any) -> list[Placement]:
    """Returns where each leaf is: by its sharding, or where the policy wants it if it has none."""
    ruled = _by_rules(policy, state, known(state))
    return [placement.placed(policy, rule, getattr(x, "sharding", None), x)
            for rule, x in zip(ruled, padded.leaves(state), strict=True)]


def layout(policy: Policy, state: Any) -> report.Layout:
    """Returns the `Layout` of a state."""
    return report.of(policy, _shapes(state), at_rest(policy, state))


def model_leaves(policy: Policy, state: Any) -> tuple[tuple[Leaf, ...], tuple[Placement, ...]]:
    """Returns the parameters, and the model's state if that is known, and where each leaf is."""
    everything = at_rest(policy, state)
    leaves = known(state).model
    return tuple(leaves.values()), tuple(everything[i] for i in leaves)


def moved(policy: Policy, state: Any, other: Policy) -> Any:
    """Returns a state of `policy` as `other` places and pads it; see `Zero.move`."""
    _check_move(policy, state, other)
    donation.check_alive("move", state)
    if isinstance(other.mesh, AbstractMesh):
        raise PolicyError("move was given a policy over simulated GPUs, which hold no arrays; give "
                          "it one over a mesh of devices: zj.Zero(zj.make_mesh()).")
    state = _rescaled(other, state)
    facts = known(state)
    ruled = _by_rules(other, state, facts)
    leaves = [_put(other, rule, x, facts.may_pad)
              for rule, x in zip(ruled, padded.leaves(state), strict=True)]
    return padded.structure(state).unflatten(leaves)


def _check_move(policy: Policy, state: Any, other: Policy):
    if not isinstance(other, Policy) or isinstance(state, Policy):
        raise PolicyError(f"move was given {trees.kind(state)} and {trees.kind(other)}; write "
                          "moved = zero.move(state, other), with a state of zero and the Zero "
                          "that is to have it.")
    if hasattr(state, "islands"):
        raise PolicyError("zero.move was given a state of islands; write islands.move(state, "
                          "other_islands), or zero.move(islands.average(state), other).")
    ours, theirs = policy.precision, other.precision
    if (ours.params, ours.keep) != (theirs.params, theirs.keep):
        raise PolicyError(f"move changes the placement of a state, not its dtype, but it was asked "
                          f"to go from {ours.params} parameters to {theirs.params}; write the same "
                          "Precision(params=...), or save and restore with cast=True.")


def _rescaled(policy: Policy, state: Any) -> Any:
    """Returns a state with the kind of loss scale that the policy needs, new where it changes."""
    if not isinstance(state, TrainState):
        return state
    scale = loss_scale.for_dtype(policy.precision.compute_dtype)
    return state if type(scale) is type(state.scale) else state.replace(scale=scale)


def _put(policy: Policy, rule: Placement, x: Any, may_pad: bool) -> Any:
    """Returns an array on the devices that a rule wants it on, padded to the rule's shape."""
    if not (may_pad or padded.is_padded(x)):
        rule = placement.fitting(policy, rule, x)
    if (x.kept.shape if padded.is_padded(x) else None) != rule.kept:
        x = padded.pad(padded.logical(x), rule.kept)
    sharding = rules.sharding(policy.mesh, rule.spec)
    return padded.mapped(lambda kept: jax.device_put(kept, sharding), x)
