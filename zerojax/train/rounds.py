"""The average at the end of a round, plain or by an outer optimizer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zerojax.layout import padded, report
from zerojax.layout.report import Layout
from zerojax.plan import audit
from zerojax.policy import Policy
from zerojax.train import stacked
from zerojax.train.stacked import IslandsState, Outer, Stack
from zerojax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often islands average, and with which optimizer.

    Attributes:
      stack: the islands.
      policy: the policy of their batches.
      every: the number of steps in a round.
      outer: the outer optax transform, or None.
    """

    stack: Stack
    policy: Policy
    every: int
    outer: Any

    def average(self, state: IslandsState) -> IslandsState:
        """Returns the state after the average at the end of a round.

        The parameters of all islands become their mean or, with an outer optimizer, those that it
        makes of the mean move. The model's floating state becomes its mean. The optimizer's state
        and everything else stay as they are in each island.
        """
        one = self.stack.mean(stacked.packed(state))
        new, outer = self._next(one)
        one = one.replace(params=one.put(jax.tree.leaves(new)), opt_state=(None, outer))
        alike = self.stack.of(one)
        model_state = jax.tree.map(lambda mean, own: mean if _is_floating(own) else own,
                                   alike.model_state, state.islands.model_state)
        islands = state.islands.replace(params=alike.params, model_state=model_state)
        return stacked.unpacked(self.stack.at_rest(stacked.pack(islands, outer)))

    def _next(self, one: TrainState) -> tuple[Any, Outer | None]:
        """Returns the trained parameters with which the next round starts, and the outer state."""
        _, outer = one.opt_state
        if outer is None:
            return one.trained, None
        with jax.named_scope(audit.OPTIMIZER):
            move = jax.tree.map(jnp.subtract, outer.params, one.trained)
            updates, opt_state = self.outer.update(move, outer.opt_state, outer.params)
            new = optax.apply_updates(outer.params, updates)
        return new, Outer(new, opt_state)

    def layout(self, state: IslandsState) -> Layout:
        """Returns the placement of each leaf of a state."""
        joined = stacked.packed(state)
        places = padded.structure(joined).unflatten(self.stack.placements(joined))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return report.of(self.stack.zero, shapes, padded.leaves(stacked.unpacked(places)))


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
