"""A model taken apart, with the placement of each of its arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from zerojax import trees
from zerojax.errors import PolicyError
from zerojax.gather import models
from zerojax.gather.pair import Pair
from zerojax.layout import padded, placement
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import argument_shardings, parameters, trained
from zerojax.train.state import TrainState

Tree = Any


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model taken apart into parameters and state.

    Attributes:
      given: the model as it was given: a `TrainState`, an NNX module, or a pytree.
      kind, params, model_state: see `models`.
      leaves, placements: of each parameter, in the order of the leaves of `params`.
      state_leaves, state_placements: of each leaf of `model_state`.
    """

    given: Any
    kind: models.Kind
    params: Tree
    model_state: Tree
    leaves: tuple[Leaf, ...]
    placements: list[Placement]
    state_leaves: tuple[Leaf, ...]
    state_placements: list[Placement]

    @classmethod
    def of(cls, policy: Policy, model: Any, trainable: Any = None) -> "SplitModel":
        kind, params, model_state, leaves, state_leaves = _described(model, trainable)
        placements = argument_shardings.placements(policy, leaves, padded.leaves(params))
        state_placements = argument_shardings.placements(
            policy, state_leaves, jax.tree.leaves(model_state))
        return cls(model, kind, params, model_state, leaves, placements, state_leaves,
                   state_placements)

    @property
    def flat(self) -> list:
        """The parameters as they are kept."""
        return jax.tree.leaves(self.params)

    def opened(self, policy: Policy, pairs: Sequence[Pair]) -> tuple[list, list]:
        """Returns the parameters and the leaves of the state as a program takes them.

        Args:
          pairs: one for each parameter.
        """
        gathered = parameters.gather_once(policy, pairs, self.flat)
        params = parameters.opened(self.leaves, pairs, self.flat, gathered)
        state_pairs = parameters.make_pairs(policy, self.state_leaves, self.state_placements)
        state = jax.tree.leaves(self.model_state)
        state = parameters.opened(self.state_leaves, state_pairs, state)
        return params, state

    def join(self, params: list, model_state: Tree) -> Any:
        """Returns the model with other parameters and state."""
        return self.kind.join(padded.structure(self.params).unflatten(params), model_state)

    def update(self, model_state: Tree) -> None:
        """Writes the state after a function into the given model, if that is an NNX module."""
        if isinstance(self.given, nnx.Module):
            nnx.update(self.given, model_state)

    def as_given(self, grads: Sequence[Any]) -> Tree:
        """Returns gradients of the trained parameters in the tree in which jax returns them.

        Frozen parameters have None. For an NNX module, it is an `nnx.State`, as for `nnx.grad`.
        """
        flags = [leaf.trained for leaf in self.leaves]
        if not isinstance(self.given, nnx.Module):
            return trees.put(trees.only(self.params, flags), [True] * len(grads), grads)
        wanted = {leaf.path for leaf in self.leaves if leaf.trained}

        def is_trained(path, x) -> bool:
            return isinstance(x, nnx.Param) and "/".join(map(str, path)) in wanted

        return jax.tree.structure(nnx.state(self.given, is_trained)).unflatten(grads)


def _described(model: Any, trainable: Any) -> tuple[Any, Tree, Tree, tuple, tuple]:
    """Returns (kind, parameters, state, descriptions of the parameters, of the state)."""
    if isinstance(model, TrainState):
        if trainable is not None:
            raise PolicyError(f"value_and_grad(trainable={trainable!r}) was given a state of "
                              "zero.init, whose optimizer state is of the parameters trained "
                              "there; write zero.init(..., trainable=...) instead.")
        known = model.model
        return known.kind, model.params, model.model_state, known.leaves, known.state
    kind = models.Nnx if isinstance(model, nnx.Module) else models.Tree
    kind, params, model_state, axes = kind.split(model)
    leaves = placement.describe(params, axes)
    leaves = trained.marked(leaves, trainable, model, jax.tree.leaves(params))
    return kind, params, model_state, leaves, placement.describe(model_state, group="state")
