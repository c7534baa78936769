"""`gathered` and `value_and_grad`: functions of parameters at rest, from functions of whole ones."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import BatchError, LossError, PolicyError
from zerojax.gather import models, rewrite
from zerojax.gather.pair import Gather
from zerojax.layout import padded, placement
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import frame, gradients, study, trained
from zerojax.train.gradients import Differentiator
from zerojax.train.loss_scale import NoScale
from zerojax.train.state import TrainState
from zerojax.train.study import Objective

Tree = Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart.

    Attributes:
      model: as it was given: a `TrainState`, an NNX module, or a pytree.
      kind, params, model_state: see `models`.
      leaves, places: of the parameters, in the order of the leaves of `params`; state, state_places: of the model's state.
    """

    model: Any
    kind: Any
    params: Tree
    model_state: Tree
    leaves: tuple[Leaf, ...]
    places: list[Placement]
    state: tuple[Leaf, ...]
    state_places: list[Placement]

    @classmethod
    def of(cls, policy: Policy, model: Any, trainable: Any = None) -> "Parts":
        if isinstance(model, TrainState):
            kind, params, model_state, leaves, state = (
                model.model.kind, model.params, model.model_state, model.model.leaves, model.model.state)
            if trainable is not None:
                raise PolicyError(f"value_and_grad(trainable={trainable!r}), of a state that zero.init made: write "
                                  "zero.init(..., trainable=...), so that its optimizer state is of the same parameters.")
        else:
            kind, params, model_state, specs = (models.Nnx if isinstance(model, nnx.Module) else models.Tree).split(model)
            leaves = trained.marked(placement.describe(params, specs), trainable, model, jax.tree.leaves(params))
            state = placement.describe(model_state, group="state")
        places = frame.places(policy, leaves, padded.leaves(params))
        state_places = frame.places(policy, state, jax.tree.leaves(model_state))
        return cls(model, kind, params, model_state, leaves, places, state, state_places)

    @property
    def flat(self) -> list:
        return jax.tree.leaves(self.params)

    @property
    def trained(self) -> list[bool]:
        return [leaf.trained for leaf in self.leaves]

    def opened(self, policy: Policy, pairs: Sequence[Gather]) -> tuple[list, list]:
        """Parameters and state as a program is given them."""
        state = gradients.opened(self.state, gradients.pairs(policy, self.state, self.state_places),
                                 jax.tree.leaves(self.model_state))
        return gradients.opened(self.leaves, pairs, self.flat, gradients.gather_once(policy, pairs, self.flat)), state

    def join(self, params: list, model_state: Tree) -> Any:
        return self.kind.join(padded.structure(self.params).unflatten(params), model_state)

    def update(self, model_state: Tree) -> None:
        """What a function changed in an NNX module's variables is changed in the one it was given."""
        if isinstance(self.model, nnx.Module):
            nnx.update(self.model, model_state)


def gathered(policy: Policy, fn: Callable, argnums: int | Collection[int]) -> Callable:
    """See `Zero.gathered`."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        at = numbers("argnums", argnums, len(args))
        parts = [Parts.of(policy, args[i]) for i in at]
        inputs, put = trees.divided((tuple(None if i in at else x for i, x in enumerate(args)), kwargs))
        found = {}

        def traced(params, states, inputs):
            given, named = put(inputs)
            whole = dict(zip(at, (p.join(*both) for p, *both in zip(parts, params, states, strict=True)), strict=True))
            result, found["put"] = trees.divided(fn(*(whole.get(i, x) for i, x in enumerate(given)), **named))
            return result, [p.kind.state_after(whole[i], state) for i, p, state in zip(at, parts, states, strict=True)]

        states = [p.model_state for p in parts]
        jaxpr, out = jax.make_jaxpr(traced, return_shape=True)([study.avals(policy, p.leaves) for p in parts], states, inputs)
        leaves, places = ([x for p in parts for x in getattr(p, name)] for name in ("leaves", "places"))
        pairs = iter(gradients.pairs(policy, leaves, places, jaxpr))
        params, state = zip(*(p.opened(policy, [next(pairs) for _ in p.leaves]) for p in parts), strict=True)
        given = itertools.chain(*params, *state, inputs)
        result, states = study.results(out, rewrite.evaluate(jaxpr, list(given)))
        for p, state in zip(parts, states, strict=True):
            p.update(state)
        return found["put"](result)

    return run


@dataclasses.dataclass(frozen=True)
class Call:
    """A loss function with what it is called with: the model taken apart, and other arrays. Raises `BatchError`."""

    parts: Parts
    objective: Objective
    inputs: list
    accumulate: int

    @classmethod
    def of(cls, policy: Policy, loss_fn: Callable, model: Any, args: tuple, kwargs: dict, *, batch: Collection[int] = (1,),
           has_aux: bool = False, accumulate: int = 1, trainable: Any = None) -> "Call":
        parts = Parts.of(policy, model, trainable)
        inputs, put = trees.divided((args, kwargs))
        flags = [i in batch and jnp.ndim(x) > 0 for i, arg in enumerate(args, 1) for x in jax.tree.leaves(arg) if trees.is_array(x)]
        flags += [False] * (len(inputs) - len(flags))

        def call(model, inputs):
            args, kwargs = put(inputs)
            return loss_fn(model, *args, **kwargs)

        split = [x for x, flag in zip(inputs, flags, strict=True) if flag]
        objective = Objective(call, tuple(flags), parts.kind, parts.leaves, padded.structure(parts.params), parts.state, has_aux,
                              _unsplit(inputs, flags), split[0].shape[0] if split else 0)
        if split or accumulate > 1:
            batches.check(policy, split, accumulate)
        if accumulate > 1 and objective.unsplit:
            raise BatchError(f"accumulate={accumulate}, but the loss {objective.unsplit}; name all arguments that are batches: "
                             "batch_argnums=(1, 2).")
        split = iter(jax.lax.with_sharding_constraint(split, batches.sharding(policy)))
        return cls(parts, objective, [next(split) if flag else x for x, flag in zip(inputs, flags, strict=True)], accumulate)

    def differentiator(self, policy: Policy) -> Differentiator:
        return gradients.differentiator(policy, self.objective, self.parts.places, self.parts.state_places, self.parts.model_state,
                                        self.inputs, self.accumulate)


def _unsplit(inputs, flags) -> str:
    """Why these inputs cannot be split into parts; or ""."""
    batch = [x for x, flag in zip(inputs, flags, strict=True) if flag]
    if not batch:
        return "is given no batch to split"
    alike = [x.shape for x, flag in zip(inputs, flags, strict=True) if not flag and x.shape[:1] == batch[0].shape[:1]]
    return f"is given an array of the batch's length, of shape {alike[0]}, that batch_argnums does not name" if alike else ""


def value_and_grad(policy: Policy, loss_fn: Callable, *, accumulate: int = 1, has_aux: bool = False,
                   batch_argnums: int | Collection[int] = 1, scale: Any = None, trainable: Any = None) -> Callable:
    """See `Zero.value_and_grad`."""
    check_accumulate("value_and_grad", accumulate)

    @functools.wraps(loss_fn)
    def run(model, *args, **kwargs):
        batch = numbers("batch_argnums", batch_argnums if args else (), 1 + len(args))
        call = Call.of(policy, loss_fn, model, args, kwargs, batch=batch, has_aux=has_aux, accumulate=accumulate,
                       trainable=trainable)
        diff = call.differentiator(policy)
        params = _once(call.parts.flat) if diff.per_device else call.parts.flat
        grads, loss, aux = diff(params, call.parts.model_state, call.inputs, scale or NoScale())
        if loss.aux is not None and not has_aux:
            raise LossError("the loss returned zj.Loss(aux=...), which value_and_grad returns with has_aux=True.")
        call.parts.update(loss.model_state)
        value = loss.total / loss.weight
        grads = _as_given(call.parts, grads)
        return ((value, loss if diff.program.is_sum and aux is None else aux), grads) if has_aux else (value, grads)

    return run


@jax.custom_vjp
def _once(params: list) -> list:
    """`params`, which are not to be differentiated again: sums over parts are not linear in them as written."""
    return params


def _not_again(_, ct):
    raise PolicyError("zero.value_and_grad was differentiated itself, but each device has differentiated its own part of the "
                      "batch; write Zero(gradients='global'), or differentiate zero.gathered(loss).")


_once.defvjp(lambda params: (params, None), _not_again)


def _as_given(parts: Parts, grads: list) -> Tree:
    """Gradients as jax.grad and nnx.grad return them: in the tree of what was differentiated, None where it is frozen."""
    if not isinstance(parts.model, nnx.Module):
        return trees.put(trees.only(parts.params, parts.trained), [True] * len(grads), grads)
    wanted = {leaf.path for leaf in parts.leaves if leaf.trained}
    state = nnx.state(parts.model, lambda path, x: isinstance(x, nnx.Param) and "/".join(map(str, path)) in wanted)
    return jax.tree.structure(state).unflatten(grads)


def numbers(name: str, given: int | Collection[int], count: int) -> tuple[int, ...]:
    """Argument numbers as jax takes them, also from the end, of `count` arguments.

    >>> numbers("argnums", -1, 3)
    (2,)
    """
    flat = tuple(map(operator.index, given if isinstance(given, Collection) else (given,)))
    if any(not -count <= i < count for i in flat):
        raise PolicyError(f"{name}={given!r}, but the function was called with {count} arguments by position; write numbers below.")
    return tuple(i % count for i in flat)


def check_accumulate(where: str, accumulate: Any) -> None:
    if not isinstance(accumulate, int) or accumulate < 1:
        raise PolicyError(f"{where}(accumulate={accumulate}): write a number of microbatches, 1 or more.")
