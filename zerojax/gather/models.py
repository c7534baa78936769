"""The kinds of model: which arrays are parameters, and how a model is put together again."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

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


class Kind(Protocol):
    """A kind of model: how a model is split into parameters and state, and joined again.

    A kind is a frozen value that holds all of the model but its arrays.
    """

    @classmethod
    def split(cls, model: Any) -> tuple[Self, Any, Any, list[P]]:
        """Returns (kind, parameters, model state, specs).

        The specs hold the mesh axes that the model names for each parameter.
        """
        ...

    def join(self, params: Any, model_state: Any) -> Any:
        """Returns the model of these parameters and this state, the inverse of `split`."""
        ...

    def state_after(self, model: Any, model_state: Any) -> Any:
        """Returns the state that a function left in `model`, which `join` made of `model_state`."""
        ...

    def merged(self, model_state: Any, update: Any) -> Any:
        """Returns the state updated by a `Loss.model_state`.

        Raises:
          LossError: The update does not have the tree of the state.
        """
        ...


def kind_of(model: Any) -> type[Kind]:
    """Returns the kind of a model.

    >>> kind_of({"params": {}}), kind_of([1.0])
    (<class 'zerojax.gather.models.Linen'>, <class 'zerojax.gather.models.Tree'>)
    """
    if isinstance(model, nnx.Module):
        return Nnx
    return Linen if isinstance(model, Mapping) and "params" in model else Tree


def named_axes(tree: Any) -> list[P]:
    """Returns the mesh axes that linen's metadata names for each leaf.

    Logical names become mesh axes by the rules in force (`nn.logical_axis_rules`) and by those of
    the metadata. A name without a rule is kept.

    >>> box = nn.LogicallyPartitioned(jnp.ones((2, 4)), ("embed", "mlp"))
    >>> with nn.logical_axis_rules([("mlp", "model"), ("embed", None)]):
    ...     named_axes({"kernel": box})
    [P(None, 'model')]
    """
    return [_by_rules(x.get_partition_spec(), getattr(x, "rules", None)) if _is_box(x) else P()
            for x in jax.tree.leaves(tree, is_leaf=_is_box)]


def _is_box(x) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _by_rules(names: P, own: Any) -> P:
    rules = [*nn.get_logical_axis_rules(), *(own or ())]
    known = {name for name, _ in rules}
    axes = logical_to_mesh(names, rules)
    return P(*(axis if name in known else name for name, axis in zip(names, axes, strict=True)))


@dataclasses.dataclass(frozen=True)
class Linen:
    """A dict of variables, which `model.init` returns.

    The collection `params` holds the parameters. The other collections are model state, which
    changes only by `Loss(model_state=...)`.
    """

    @classmethod
    def split(cls, model) -> tuple[Self, Any, Any, list[P]]:
        specs = named_axes(model["params"])
        variables = {k: meta.unbox(v) for k, v in unfreeze(model).items()}
        params = variables.pop("params")
        return cls(), params, variables, specs

    def join(self, params, model_state):
        return {"params": params, **model_state}

    def state_after(self, model, model_state):
        return model_state

    def merged(self, model_state, update):
        if model_state and update and not set(model_state) & set(update):
            raise LossError(f"Loss.model_state has the collections {sorted(update)}, but the model "
                            f"has {sorted(model_state)}; return the collections that "
                            "apply(..., mutable=...) returned, unchanged.")
        return _like(model_state, {name: unfreeze(update[name]) if name in update else collection
                                   for name, collection in model_state.items()})


@dataclasses.dataclass(frozen=True)
class Nnx:
    """An `nnx.Module`. Its `nnx.Param`s are parameters, every other variable is model state."""

    graphdef: Any

    @classmethod
    def split(cls, model) -> tuple[Self, Any, Any, list[P]]:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        axes = nnx.to_pure_dict(nnx.get_partition_spec(params))
        specs = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, P))
        return cls(graphdef), nnx.to_pure_dict(params), nnx.to_pure_dict(rest), specs

    def join(self, params, model_state):
        return nnx.merge(self.graphdef, params, model_state)

    def state_after(self, model, model_state):
        """Returns the module's state without the variables that a function added (`sow`)."""
        return _known(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))), model_state)

    def merged(self, model_state, update):
        return _like(model_state, update)


def _known(after, before):
    """Returns the values in the dict `after` for the keys of `before`."""
    if not isinstance(before, dict):
        return after
    return {name: _known(after[name], value) for name, value in before.items()}


@dataclasses.dataclass(frozen=True)
class Tree:
    """Any other pytree, such as a dict, a registered dataclass or an Equinox module.

    Floating arrays are parameters. Other arrays and Equinox's `State` are model state. The kind
    keeps all other leaves, such as functions and names.
    """

    treedef: Any
    static: tuple
    groups: tuple[str, ...]

    @classmethod
    def split(cls, model) -> tuple[Self, Any, Any, list[P]]:
        """Returns parameters and state as trees of the model, each with None for other leaves."""
        leaves, treedef = jax.tree.flatten(model, is_leaf=padded.is_padded)
        groups = tuple(_groups(model))

        def only(*wanted):
            return [x if group in wanted else None
                    for x, group in zip(leaves, groups, strict=True)]

        params = treedef.unflatten(only("params"))
        state = treedef.unflatten(only("state", "equinox"))
        kind = cls(treedef, tuple(only("static")), groups)
        return kind, params, state, [P()] * groups.count("params")

    def join(self, params, model_state):
        params = self.treedef.flatten_up_to(params)
        model_state = self.treedef.flatten_up_to(model_state)
        return self.treedef.unflatten(map(_present, params, model_state, self.static))

    def state_after(self, model, model_state):
        return model_state

    def merged(self, model_state, update):
        """Returns the updated state; the update is the whole state, or only Equinox's `State`."""
        if "equinox" not in self.groups or not _is_equinox_state(update):
            return _like(model_state, update)
        new = iter(jax.tree.leaves(update))
        old = zip(self.treedef.flatten_up_to(model_state), self.groups, strict=True)
        merged = [next(new) if group == "equinox" else x for x, group in old]
        return _like(model_state, self.treedef.unflatten(merged))


def _present(*leaves):
    """Returns the one that is not None, or None."""
    return next((x for x in leaves if x is not None), None)


def _groups(model) -> Iterator[str]:
    """Yields the group of each leaf of a tree.

    The groups are "params", "state", "equinox" (state that may be updated alone) and "static".
    """

    def is_node(x):
        return _is_equinox_state(x) or padded.is_padded(x)

    for node in jax.tree.leaves(model, is_leaf=is_node):
        if _is_equinox_state(node):
            yield from ["equinox"] * len(jax.tree.leaves(node))
        else:
            yield _group(node)


def _is_equinox_state(x) -> bool:
    return type(x).__name__ == "State" and type(x).__module__.partition(".")[0] == "equinox"


def _group(leaf) -> str:
    if not (trees.is_array(leaf) or padded.is_padded(leaf)):
        return "static"
    return "params" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"


def _like(state, update):
    """Returns an update of a model's state, in the state's dtypes; raises if its tree differs."""
    ours, theirs = jax.tree.structure(state), jax.tree.structure(update)
    if theirs != ours:
        raise LossError(f"Loss.model_state has the tree {theirs}, but the model's state has "
                        f"{ours}; return the collections that apply(..., mutable=...) returned, "
                        "unchanged.")
    return jax.tree.map(lambda new, old: new.astype(old.dtype), update, state)
