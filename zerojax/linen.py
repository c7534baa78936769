"""Flax linen: a dict of variables, whose `params` are boxed where a module asks for them.

Linen calls `AxisMetadata.unbox` where `self.param` reads, inside `nn.scan` and `nn.remat` too, and `remove_axis`
where a scan or vmap slices. The user's model is not touched.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta, unfreeze

from zerojax.box import Box


@jax.tree_util.register_pytree_with_keys_class
class LinenBox(Box, meta.AxisMetadata):
    """A `Box` that linen opens."""

    __slots__ = ()

    def unbox(self):
        return self.once()

    def replace_boxed(self, val):
        return val

    def add_axis(self, index, params):
        return type(self)(self.value, self.gathered, self.reader.insert(index), self.path, self.often)

    def remove_axis(self, index, params):
        return self.sliced(index)


@dataclasses.dataclass(frozen=True)
class Linen:
    """What `model.init` returns: `params` is trained, other collections are model state."""

    box = LinenBox

    @staticmethod
    def is_one(model) -> bool:
        return isinstance(model, Mapping) and "params" in model

    @classmethod
    def split(cls, model) -> tuple["Linen", Any, Any, list]:
        """(kind, params, model_state, the mesh axes that `nn.with_partitioning` gave each parameter)."""
        specs = nn.get_partition_spec(model)["params"]
        variables = {k: meta.unbox(v) for k, v in unfreeze(model).items()}
        params = variables.pop("params")
        return cls(), params, variables, jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))

    def join(self, params, model_state):
        return {"params": params, **model_state}

    def state_after(self, model, model_state):
        """Collections change only through `Loss(model_state=...)`."""
        return model_state
