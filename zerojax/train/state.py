"""The training state: everything that a step changes, and a description of the model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import struct

from zerojax import trees
from zerojax.gather.models import Kind
from zerojax.layout import report
from zerojax.layout.rules import Leaf


@dataclasses.dataclass(frozen=True)
class Model:
    """The static part of a training state: the kind of the model, and descriptions of its arrays.

    Attributes:
      kind: takes the model apart and puts it together again, see `zerojax.gather.models`.
      leaves: the parameters, in the order of the leaves of `TrainState.params`.
      state: the model's state, in the order of the leaves of `TrainState.model_state`.
    """

    kind: Kind
    leaves: tuple[Leaf, ...]
    state: tuple[Leaf, ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.leaves, self.state))

    def __hash__(self):
        return self._hash

    @property
    def trained(self) -> list[bool]:
        """Whether each parameter is trained."""
        return [leaf.trained for leaf in self.leaves]


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, the number of batches seen, including those of skipped steps.
      params: tree of arrays. Trained parameters have the dtype `Precision.params`; frozen ones keep
        the dtype that `init_fn` gave them.
      opt_state: the optimizer state of the trained parameters.
      model_state: linen's other collections, or the NNX variables that are not a `Param`.
      rng: scalar key; each step folds its number into it.
      scale: the loss scale; `NoScale` unless the compute dtype is float16.
      skipped: int32 scalar, the number of consecutive non-finite steps so far.
      model: static.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: Any
    rng: jax.Array
    scale: Any
    skipped: jax.Array
    model: Model = struct.field(pytree_node=False)

    def __repr__(self) -> str:
        """Returns a few lines with the sizes of the state's parts; `zero.layout` has all leaves."""
        frozen = self.model.trained.count(False)
        parts = {"params": self.params, "opt_state": self.opt_state,
                 "model_state": self.model_state}
        lines = {name: report.brief(tree) for name, tree in parts.items()}
        lines["params"] += f", {frozen} of them frozen" if frozen else ""
        return "\n".join([f"TrainState, step {_number(self.step)}",
                          *(f"  {name}: {line}" for name, line in lines.items())])

    @property
    def trained(self) -> Any:
        """The trained parameters, as the optimizer sees them: None in place of the frozen ones."""
        return trees.only(self.params, self.model.trained)

    def put(self, trained: Sequence[Any]) -> Any:
        """Returns `params` with new leaves in place of the trained ones."""
        return trees.put(self.params, self.model.trained, trained)


def _number(step: Any) -> str:
    """Returns a step's number, or "?" if it has no value: a shape, a tracer, a donated array."""
    try:
        return f"{int(step):,}"
    except (TypeError, RuntimeError):
        return "?"
