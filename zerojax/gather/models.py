"""What is particular to each kind of model: what of it is trained, and how it is put together again.

A kind is a frozen value:

- `split(model)` returns (kind, params, model_state, the mesh axes that the model names for each parameter);
- `join(params, model_state)` is its inverse;
- `state_after(model, model_state)` is the state that a function left in a model that it was given;
- `merged(model_state, update)` is the state with a `Loss.model_state` put in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, unfreeze
from flax.linen.spmd import logical_to_mesh
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import LossError
from zerojax.layout import padded


def named_axes(tree: Any) -> list[P]:
    """The mesh axes that linen's metadata names for each leaf; logical names by the rules in force (`nn.logical_axis_rules`) and
    the metadata's own. A name that no rule is about is kept.

    >>> box = nn.LogicallyPartitioned(jnp.ones((2, 4)), ("embed", "mlp"))
    >>> with nn.logical_axis_rules([("mlp", "model"), ("embed", None)]):
    ...     named_axes({"kernel": box})
    [P(None, 'model')]
    """
    boxed = lambda x: isinstance(x, meta.AxisMetadata)
    return [_by_rules(x.get_partition_spec(), getattr(x, "rules", None)) if boxed(x) else P()
            for x in jax.tree.leaves(tree, is_leaf=boxed)]


def _by_rules(names: P, own: Any) -> P:
    rules = [*nn.get_logical_axis_rules(), *(own or ())]
    known = {name for name, _ in rules}
    axes = logical_to_mesh(names, rules)
    return P(*(axis if name in known else name for name, axis in zip(names, axes, strict=True)))


def _is_spec(x) -> bool:
    return isinstance(x, P)


@dataclasses.dataclass(frozen=True)
class Linen:
    """What `model.init` returns, a dict of variables: `params` is trained, other collections are model state."""

    @classmethod
    def split(cls, model) -> tuple["Linen", Any, Any, list]:
        specs = named_axes(model["params"])
        variables = {k: meta.unbox(v) for k, v in unfreeze(model).items()}
        params = variables.pop("params")
        return cls(), params, variables, specs

    def join(self, params, model_state):
        return {"params": params, **model_state}

    def state_after(self, model, model_state):
        """Collections change only through `Loss(model_state=...)`."""
        return model_state

    def merged(self, model_state, update):
        if not set(model_state) & set(update) and model_state and update:
            raise LossError(f"Loss.model_state has {sorted(update)}, none of the model's collections {sorted(model_state)}; return "
                            "what apply(..., mutable=...) gave back, as it is.")
        return _like(model_state, {k: unfreeze(update[k]) if k in update else v for k, v in model_state.items()})


@dataclasses.dataclass(frozen=True)
class Nnx:
    """An `nnx.Module`: its `nnx.Param`s are trained, every other variable is model state."""

    graphdef: Any

    @classmethod
    def split(cls, model) -> tuple["Nnx", Any, Any, list]:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        specs = jax.tree.leaves(nnx.to_pure_dict(nnx.get_partition_spec(params)), is_leaf=_is_spec)
        return cls(graphdef), nnx.to_pure_dict(params), nnx.to_pure_dict(rest), specs

    def join(self, params, model_state):
        return nnx.merge(self.graphdef, params, model_state)

    def state_after(self, model, model_state):
        """What the loss left in the module's variables; those that it added (`sow`) are dropped."""
        return _known(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))), model_state)

    def merged(self, model_state, update):
        return _like(model_state, update)


def _known(after, before):
    return {k: _known(after[k], v) for k, v in before.items()} if isinstance(before, dict) else after


@dataclasses.dataclass(frozen=True)
class Tree:
    """Any other pytree (plain dicts, registered dataclasses, Equinox modules): floating arrays are trained, other arrays and
    Equinox's `State` are model state, anything else (functions, names) is kept aside."""

    treedef: Any
    static: tuple
    groups: tuple[str, ...]

    @classmethod
    def split(cls, model) -> tuple["Tree", Any, Any, list]:
        """Both trees are the model's, with None in the other's places."""
        leaves, treedef = jax.tree.flatten(model, is_leaf=padded.is_padded)
        groups = tuple(_groups(model))
        only = lambda *wanted: [x if group in wanted else None for x, group in zip(leaves, groups, strict=True)]
        params, state = treedef.unflatten(only("params")), treedef.unflatten(only("state", "equinox"))
        return cls(treedef, tuple(only("static")), groups), params, state, [P()] * groups.count("params")

    def join(self, params, model_state):
        parts = zip(self.treedef.flatten_up_to(params), self.treedef.flatten_up_to(model_state), self.static, strict=True)
        return self.treedef.unflatten([next((x for x in part if x is not None), None) for part in parts])

    def state_after(self, model, model_state):
        return model_state

    def merged(self, model_state, update):
        """An update is the whole model state, or Equinox's `State` alone."""
        if "equinox" not in self.groups or not _is_equinox_state(update):
            return _like(model_state, update)
        new = iter(jax.tree.leaves(update))
        old = zip(self.treedef.flatten_up_to(model_state), self.groups, strict=True)
        return _like(model_state, self.treedef.unflatten([next(new) if group == "equinox" else x for x, group in old]))


def _groups(model):
    """For each leaf: "params", "state", "equinox" (state that goes by itself) or "static"."""
    for node in jax.tree.leaves(model, is_leaf=lambda x: _is_equinox_state(x) or padded.is_padded(x)):
        yield from ["equinox"] * len(jax.tree.leaves(node)) if _is_equinox_state(node) else [_group(node)]


def _is_equinox_state(x) -> bool:
    return type(x).__name__ == "State" and type(x).__module__.partition(".")[0] == "equinox"


def _group(leaf) -> str:
    if not (trees.is_array(leaf) or padded.is_padded(leaf)):
        return "static"
    return "params" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"


def _like(state, update):
    """An update of a model's state, in its tree and dtypes."""
    if jax.tree.structure(update) != jax.tree.structure(state):
        raise LossError(f"Loss.model_state has the tree {jax.tree.structure(update)}, the model's state has "
                        f"{jax.tree.structure(state)}; return the collections that apply(..., mutable=...) gave back, as they are.")
    return jax.tree.map(lambda new, old: new.astype(old.dtype), update, state)


def kind_of(model) -> type[Linen] | type[Nnx] | type[Tree]:
    """
    >>> kind_of({"params": {}}), kind_of([1.0])
    (<class 'zerojax.gather.models.Linen'>, <class 'zerojax.gather.models.Tree'>)
    """
    if isinstance(model, nnx.Module):
        return Nnx
    return Linen if isinstance(model, Mapping) and "params" in model else Tree
