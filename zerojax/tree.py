"""Any other pytree of parameters: plain dicts, registered dataclasses, Equinox modules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from zerojax.box import Box


def _kind(leaf) -> str:
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return "static"
    return "params" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"


@dataclasses.dataclass(frozen=True)
class Tree:
    """Floating arrays are trained, other arrays are model state, anything else (functions, names) is kept aside."""

    treedef: Any
    static: tuple
    box = Box

    @staticmethod
    def is_one(model) -> bool:
        return True

    @classmethod
    def split(cls, model) -> tuple["Tree", Any, Any, list]:
        """(kind, params, model_state, no mesh axes); both trees are the model's, with None in the other's places."""
        leaves, treedef = jax.tree.flatten(model)
        only = lambda kind: [x if _kind(x) == kind else None for x in leaves]
        params = only("params")
        specs = [PartitionSpec() for x in params if x is not None]
        return cls(treedef, tuple(only("static"))), treedef.unflatten(params), treedef.unflatten(only("state")), specs

    def join(self, params, model_state):
        parts = zip(self.treedef.flatten_up_to(params), self.treedef.flatten_up_to(model_state), self.static, strict=True)
        return self.treedef.unflatten([next((x for x in part if x is not None), None) for part in parts])

    def state_after(self, model, model_state):
        return model_state
