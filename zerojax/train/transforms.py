"""`gathered` and `value_and_grad`: they turn functions of whole parameters into functions of
parameters at rest."""

import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from zerojax import errors, trees
from zerojax.data import batch as batches
from zerojax.errors import BatchError, LossError, PolicyError, message_last
from zerojax.gather import rewrite
from zerojax.layout import padded
from zerojax.policy import Policy
from zerojax.train import argument_shardings, checks, donation, gradients, parameters, study
from zerojax.train.gradients import Differentiator
from zerojax.train.loss import Loss
from zerojax.train.loss_scale import NoScale
from zerojax.train.split_model import SplitModel
from zerojax.train.study import Objective

_ADVICE = "if it expects other arguments, keys, shapes or dtypes, change it or the call"


def gathered(policy: Policy, fn: Callable, argnums: int | Collection[int]) -> Callable:
    """See `Zero.gathered`."""
    checks.check_function("gathered", fn, "zero.gathered(fn)(params, ...) with a function "
                          "fn(params, ...)")

    @functools.wraps(fn)
    def run(*args, **kwargs):
        with message_last:
            policy.check_context("zero.gathered")
            _check_alive("zero.gathered", *args, *kwargs.values())
            return evaluated(args, kwargs)

    def evaluated(args, kwargs):
        numbers = argument_numbers("argnums", argnums, len(args))
        if not numbers:
            raise PolicyError("gathered(argnums=()) names no argument that holds parameters; write "
                              "their numbers, such as argnums=0.")
        split = {i: SplitModel.of(policy, args[i]) for i in numbers}
        others = tuple(None if i in split else x for i, x in enumerate(args))
        inputs, put = trees.divided((others, kwargs))
        found = {}

        def traced(params, states, inputs):
            args, kwargs = put(inputs)
            joined = {i: split[i].join(*both)
                      for i, *both in zip(split, params, states, strict=True)}
            args = tuple(joined.get(i, x) for i, x in enumerate(args))
            with _noted(fn, args, kwargs):
                result = fn(*args, **kwargs)
            arrays, found["put"] = trees.divided(result)
            return arrays, [split[i].kind.state_after(joined[i], state)
                            for i, state in zip(split, states, strict=True)]

        arrays = _evaluated(policy, list(split.values()), traced, inputs)
        return found["put"](arrays)

    return run


def _check_alive(where: str, *arguments: Any) -> None:
    for x in arguments:
        donation.check_alive(where, x)


def _noted(fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> AbstractContextManager:
    """Notes in an exception of a function of the user's how it was called."""

    def note() -> str:
        names = list(inspect.signature(fn).parameters)[:len(args)]
        names += [f"argument{i}" for i in range(len(names), len(args))]
        call = ", ".join([*names, *(f"{name}={name}" for name in kwargs)])
        arguments = dict(zip(names, args, strict=True)) | dict(kwargs)
        return checks.call_note(fn, call, arguments, _ADVICE)

    return errors.noted(note)


def _evaluated(policy: Policy, split: Sequence[SplitModel], fn: Callable, inputs: list) -> Any:
    """Returns the result of `fn(parameters, states, inputs) -> result, states` for parameters at
    rest, and writes the states into the models."""
    whole = [study.avals(policy, model.leaves) for model in split]
    states = [model.model_state for model in split]
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(whole, states, inputs)
    leaves = [leaf for model in split for leaf in model.leaves]
    placements = [placement for model in split for placement in model.placements]
    pairs = parameters.make_pairs(policy, leaves, placements, jaxpr)
    argument_shardings.note_uses([x for model in split for x in model.flat],
                                 parameters.uses_in(jaxpr, pairs))
    each = iter(pairs)
    opened = [model.opened(policy, [next(each) for _ in model.leaves]) for model in split]
    params, states = zip(*opened, strict=True)
    given = list(itertools.chain(*params, *states, inputs))
    result, states = study.results(out, rewrite.evaluate(jaxpr, given))
    for model, state in zip(split, states, strict=True):
        model.update(state)
    return result


def value_and_grad(policy: Policy, loss_fn: Callable, *, accumulate: int = 1, has_aux: bool = False,
                   batch_argnums: int | Collection[int] = 1, scale: Any = None,
                   trainable: Any = None) -> Callable:
    """See `Zero.value_and_grad`."""
    checks.check_loss("value_and_grad", loss_fn, "(loss_fn)")
    check_accumulate("value_and_grad", accumulate)

    @functools.wraps(loss_fn)
    def run(model, *args, **kwargs):
        with message_last:
            policy.check_context("zero.value_and_grad")
            checks.check_model("zero.value_and_grad", model)
            _check_alive("zero.value_and_grad", model, *args, *kwargs.values())
            return differentiated(model, args, kwargs)

    def differentiated(model, args, kwargs):
        numbers = argument_numbers("batch_argnums", batch_argnums if args else (), 1 + len(args))
        call = LossCall.of(policy, loss_fn, model, args, kwargs, batch=numbers, has_aux=has_aux,
                           accumulate=accumulate, trainable=trainable)
        grads, loss, aux = call(policy, scale or NoScale())
        if loss.aux is not None and not has_aux:
            raise LossError("the loss returned zj.Loss(aux=...), which value_and_grad returns only "
                            "with has_aux=True.")
        call.model.update(loss.model_state)
        value = loss.total / loss.weight
        return ((value, aux) if has_aux else value), call.model.as_given(grads)

    return run


@dataclasses.dataclass(frozen=True)
class LossCall:
    """A loss function and its arguments: the model taken apart, and other arrays."""

    model: SplitModel
    objective: Objective
    inputs: list
    accumulate: int

    @classmethod
    def of(cls, policy: Policy, loss_fn: Callable, model: Any, args: tuple, kwargs: dict, *,
           batch: Collection[int] = (1,), has_aux: bool = False, accumulate: int = 1,
           trainable: Any = None) -> "LossCall":
        """Checks the arguments and splits the batch over the devices.

        Args:
          args, kwargs: the arguments of `loss_fn` after the model.
          batch: numbers of the arguments that are batches; the model is argument 0.

        Raises:
          BatchError: an array of the batch does not divide, or microbatches are not possible.
        """
        split = SplitModel.of(policy, model, trainable)
        inputs, put = trees.divided((args, kwargs))
        is_batch = _is_batch(args, batch, len(inputs))

        def call(model, inputs):
            args, kwargs = put(inputs)
            with _noted(loss_fn, (model, *args), kwargs):
                return loss_fn(model, *args, **kwargs)

        if any(is_batch):
            batches.check(policy, _batch_of(args, batch), accumulate)
        examples = [x.shape[0] for x in trees.taken(inputs, is_batch)]
        objective = Objective(call, is_batch, split.kind, split.leaves,
                              padded.structure(split.params), split.state_leaves, has_aux,
                              _unsplit(inputs, is_batch), examples[0] if examples else 0)
        inputs = _spread(policy, objective, inputs, accumulate)
        return cls(split, objective, inputs, accumulate)

    def differentiator(self, policy: Policy) -> Differentiator:
        return gradients.differentiator(
            policy, self.objective, self.model.placements, self.model.state_placements,
            self.model.model_state, self.inputs, self.accumulate)

    def __call__(self, policy: Policy, scale: Any) -> tuple[list, Loss, Any]:
        """Returns (gradients of the trained parameters, the summed loss, aux).

        Aux is the summed loss itself if the function returned a `Loss` alone.
        """
        differentiator = self.differentiator(policy)
        params = self.model.flat
        argument_shardings.note_uses(params, differentiator.uses()[:len(params)])
        if differentiator.per_device:
            params = _differentiated_once(params)
        grads, loss, aux = differentiator(params, self.model.model_state, self.inputs, scale)
        return grads, loss, loss if differentiator.traced.is_sum and aux is None else aux


def _is_batch(args: tuple, batch: Collection[int], inputs: int) -> tuple[bool, ...]:
    """Whether each of the inputs is split: arrays of a batch with at least one dimension.

    The inputs are the arrays in `args`, followed by those in the keyword arguments.
    """
    flags = [i in batch and jnp.ndim(x) > 0 for i, arg in enumerate(args, 1)
             for x in jax.tree.leaves(arg) if trees.is_array(x)]
    return (*flags, *[False] * (inputs - len(flags)))


def _batch_of(args: tuple, batch: Collection[int]) -> Any:
    """Returns the arguments that are a batch, with None in place of what is not split."""
    def split(x):
        return x if trees.is_array(x) and jnp.ndim(x) else None

    found = [jax.tree.map(split, arg) for i, arg in enumerate(args, 1) if i in batch]
    return found[0] if len(found) == 1 else found


def _unsplit(inputs: list, is_batch: Sequence[bool]) -> str:
    """Returns why these inputs cannot be split into parts, or ""."""
    batch = trees.taken(inputs, is_batch)
    if not batch:
        return "is given no batch to split"
    for x in trees.taken(inputs, [not flag for flag in is_batch]):
        if x.shape[:1] == batch[0].shape[:1]:
            return (f"is given an array of the batch's length, of shape {x.shape}, that "
                    "batch_argnums does not name")
    return ""


def _spread(policy: Policy, objective: Objective, inputs: list, accumulate: int) -> list:
    """Returns the inputs with the batch split over the devices."""
    batch, others = objective.divided(inputs)
    if accumulate > 1 and objective.unsplit:
        raise BatchError(f"accumulate={accumulate}, but the loss {objective.unsplit}; name all "
                         "arguments that are batches, such as batch_argnums=(1, 2).")
    batch = jax.lax.with_sharding_constraint(batch, batches.sharding(policy))
    return objective.joined(batch, others)


@jax.custom_vjp
def _differentiated_once(params: list) -> list:
    """Returns `params`; differentiating a result of them raises `PolicyError`.

    Sums over the devices' parts are not linear in the parameters as the program writes them.
    """
    return params


def _refuse(_, ct):
    raise PolicyError("zero.value_and_grad was itself differentiated, but each device has "
                      "differentiated its own part of the batch; write "
                      "Zero(gradients='global'), or differentiate zero.gathered(loss).")


_differentiated_once.defvjp(lambda params: (params, None), _refuse)


def argument_numbers(name: str, given: int | Collection[int], count: int) -> tuple[int, ...]:
    """Returns the numbers of some of `count` arguments; as in jax, -1 is the last one.

    >>> argument_numbers("argnums", -1, 3)
    (2,)
    """
    flat = tuple(map(operator.index, given if isinstance(given, Collection) else (given,)))
    if any(not -count <= i < count for i in flat):
        raise PolicyError(f"{name}={given!r}, but the function was called with {count} arguments "
                          f"by position; write numbers below {count}.")
    return tuple(i % count for i in flat)


def check_accumulate(where: str, accumulate: Any) -> None:
    """Raises `PolicyError` for a number of microbatches that is not a positive integer."""
    if not isinstance(accumulate, int) or accumulate < 1:
        raise PolicyError(f"{where}(accumulate={accumulate}): write a number of microbatches, "
                          "1 or more.")
