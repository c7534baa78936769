"""Flax NNX: a module whose `Param`s are boxed, and opened by the variable's `on_get_value` hook."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from zerojax.box import Box


def _open(variable, value):
    return value.once() if isinstance(value, Box) else value


def _slice(variable, index, name):
    box = variable.get_raw_value()
    if isinstance(box, Box):
        variable.set_raw_value(box.sliced(index))


def _stack(variable, index, name):
    box = variable.get_raw_value()
    if isinstance(box, Box):
        variable.set_raw_value(Box(box.value, box.gathered, box.reader.insert(index), box.path, box.often))


_HOOKS = {"on_get_value": _open, "on_remove_axis": _slice, "on_add_axis": _stack}


def _known(after, before):
    return {k: _known(after[k], v) for k, v in before.items()} if isinstance(before, dict) else after


@dataclasses.dataclass(frozen=True)
class Nnx:
    """An `nnx.Module`: its `nnx.Param`s are trained, every other variable is model state."""

    graphdef: Any
    box = Box

    @staticmethod
    def is_one(model) -> bool:
        return isinstance(model, nnx.Module)

    @classmethod
    def split(cls, model) -> tuple["Nnx", Any, Any, list]:
        """(kind, params, model_state, the mesh axes that each parameter's metadata names)."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        specs = jax.tree.leaves(nnx.to_pure_dict(nnx.get_partition_spec(params)),
                                is_leaf=lambda s: isinstance(s, PartitionSpec))
        return cls(graphdef), nnx.to_pure_dict(params), nnx.to_pure_dict(rest), specs

    def join(self, params, model_state):
        model = nnx.merge(self.graphdef, params, model_state)
        for _, node in nnx.iter_graph(model):
            if isinstance(node, nnx.Variable) and isinstance(node.get_raw_value(), Box):
                node.set_metadata(_HOOKS)
        return model

    def state_after(self, model, model_state):
        """What the loss left in the module's variables; those that it added (`sow`) are dropped."""
        return _known(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))), model_state)
