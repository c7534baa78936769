"""A loss function of a model, and its program: a jaxpr that takes pending parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from zerojax import errors, tables, trees
from zerojax.errors import LossError, ModelError
from zerojax.gather import pending, rewrite, uses
from zerojax.gather.models import Kind
from zerojax.layout.rules import Leaf
from zerojax.policy import Policy
from zerojax.train import means
from zerojax.train.loss import Loss, normalise

Tree = Any

LARGE = 2**24  # bytes; a loss that closes over more warns


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss function of a model of a known kind.

    Attributes:
      loss_fn: `loss_fn(model, inputs)`, where `inputs` is a list of arrays; returns a scalar or a
        `Loss`; with `has_aux`, a `Loss` or a pair (scalar or `Loss`, aux).
      is_batch: for each input, whether it is split by its first dimension into microbatches and
        parts.
      kind: the kind of the model, see `models`.
      leaves: the model's parameters, trained and frozen, in the order of the leaves of `treedef`.
      treedef: the structure of the tree of parameters.
      state_leaves: the leaves of the model's state.
      has_aux: as in `jax.value_and_grad`.
      unsplit: why the inputs cannot be split, or "".
      examples: the number of examples in the whole batch; 0 if no input is a batch.
    """

    loss_fn: Callable
    is_batch: tuple[bool, ...]
    kind: Kind
    leaves: tuple[Leaf, ...]
    treedef: Any
    state_leaves: tuple[Leaf, ...] = ()
    has_aux: bool = False
    unsplit: str = ""
    examples: int = 0

    def __call__(self, params: list, model_state: Tree, inputs: list) -> tuple[Loss, Any, bool]:
        """Returns (the loss with the model's new state, aux, whether it was given as a `Loss`)."""
        model = self.kind.join(self.treedef.unflatten(params), model_state)
        result, aux = self.loss_fn(model, inputs), None
        if self.has_aux and not isinstance(result, Loss):
            result, aux = _pair(result)
        loss = normalise(result)
        after = self.kind.state_after(model, model_state)
        if loss.model_state is not None:
            after = self.kind.merged(after, loss.model_state)
        return loss.replace(model_state=after), aux, isinstance(result, Loss)

    def divided(self, inputs: Sequence) -> tuple[list, list]:
        """Returns (the inputs that are split, the others)."""
        others = [not split for split in self.is_batch]
        return trees.taken(inputs, self.is_batch), trees.taken(inputs, others)

    def joined(self, batch: Sequence, others: Sequence) -> list:
        """Returns all inputs in their order; the inverse of `divided`."""
        return trees.merged(self.is_batch, batch, others)


def _pair(result):
    if not isinstance(result, tuple) or len(result) != 2:
        raise LossError(f"has_aux=True, but the loss returned {trees.brief(result)}; return a pair "
                        "(loss, aux) or a zj.Loss, or leave has_aux out.")
    return result


@dataclasses.dataclass(frozen=True)
class TracedLoss:
    """An objective traced for inputs of some shapes.

    Attributes:
      jaxpr: the program; it takes parameters in the compute dtype, the model's state and inputs.
      out: the shapes of its results, as the tree ((`Loss`, aux), model's state).
      consts: the values that the loss closes over.
      keys: for each of consts and inputs, whether the loss draws random numbers from it.
      is_sum: whether the loss function returned a `Loss`.
      written: for each leaf of the model's state, whether the loss changed it.
    """

    jaxpr: Any
    out: Any
    consts: tuple
    keys: tuple[bool, ...]
    is_sum: bool
    written: tuple[bool, ...]

    def __call__(self, params: Sequence, model_state: Sequence, inputs: list) -> tuple[Loss, Any]:
        """Returns (the loss with the model's new state, aux).

        Parameters and leaves of the model's state may be pending.
        """
        values = rewrite.evaluate(self.jaxpr, [*params, *model_state, *inputs], self.consts)
        (loss, aux), state = results(self.out, values)
        return loss.replace(model_state=state), aux

    def folded(self, inputs: list, number) -> tuple["TracedLoss", list]:
        """Returns the traced loss and its inputs, with `number` folded into their random keys."""
        values = zip([*self.consts, *inputs], self.keys, strict=True)
        new = [trees.fold(x, number) if is_key else x for x, is_key in values]
        n = len(self.consts)
        return dataclasses.replace(self, consts=tuple(new[:n])), new[n:]

    def key_among(self, inputs: list) -> Any:
        """Returns a random key among the inputs and the closed-over values, or None.

        A closed-over value that is a constant of the program would be the same in every step.
        """
        n = len(self.consts)
        traced = [isinstance(x, Tracer) for x in self.consts]
        candidates = [*trees.taken(self.consts, traced), *inputs]
        flags = [*trees.taken(self.keys[:n], traced), *self.keys[n:]]
        found = trees.taken(candidates, flags)
        return found[-1] if found else None

    @property
    def aux(self) -> list:
        """The shapes of the leaves of aux."""
        (_, aux), _ = self.out
        return jax.tree.leaves(aux)


def results(out: Tree, values: Sequence) -> tuple[Any, Tree]:
    """Returns (result, model's state) from the results of a jaxpr, which have the tree `out`.

    State that the program did not read is returned in shards, as it was given.
    """
    result, state = jax.tree.structure(out).unflatten(values)
    return (jax.tree.map(pending.array, result, is_leaf=_is_pending),
            jax.tree.map(lambda x: x.x if _is_pending(x) else x, state, is_leaf=_is_pending))


def _is_pending(x) -> bool:
    return isinstance(x, pending.Pending)


def avals(policy: Policy, leaves: Sequence[Leaf]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of parameters as a loss sees them: whole, in the compute dtype."""
    return [jax.ShapeDtypeStruct(leaf.shape, policy.precision.computed(leaf.path, leaf.dtype))
            for leaf in leaves]


def trace(policy: Policy, objective: Objective, model_state: Tree, inputs: list) -> TracedLoss:
    """Traces the objective; raises what the loss raises, before anything is compiled.

    Raises:
      ModelError: the loss uses a mapped axis.
    """
    found = {}

    def run(params, model_state, inputs):
        loss, aux, found["is_sum"] = objective(params, model_state, inputs)
        found["written"] = _written(model_state, loss.model_state)
        return (loss.replace(model_state=None), aux), loss.model_state

    whole = avals(policy, objective.leaves)
    try:
        jaxpr, out = jax.make_jaxpr(run, return_shape=True)(whole, model_state, inputs)
    except NameError as error:
        _check_mapped_axis(error)
        raise
    return TracedLoss(jaxpr, out, tuple(jaxpr.consts), _keys(jaxpr, len(inputs)), **found)


def _written(before: Tree, after: Tree) -> tuple[bool, ...]:
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return tuple(new is not old for old, new in leaves)


def _check_mapped_axis(error: NameError):
    if "axis name" in str(error):
        raise ModelError("the loss uses a mapped axis, such as that of pmap or vmap(axis_name=...) "
                         f"({error}), but here it sees the whole batch; leave out psum, pmean and "
                         "axis_name (also BatchNorm's).") from error


def _keys(jaxpr, inputs: int) -> tuple[bool, ...]:
    """Whether each constant, and each of the last arguments, is a random key: typed or wrapped."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    variables = [*inner.constvars, *inner.invars[len(inner.invars) - inputs:]]
    raw = {v: str(i) for i, v in enumerate(variables) if trees.is_old_key(v.aval)}
    wrapped = {name for eqn, names in uses.of(inner, raw)
               if eqn.primitive.name == "random_wrap" for name in names}
    return tuple(trees.is_key(v.aval) or str(i) in wrapped for i, v in enumerate(variables))


def warn_of_means(traced: TracedLoss, params: int, larger: Callable[[], TracedLoss]) -> None:
    """Warns of sums of a `Loss` that are means, which would be divided by the weight again.

    Args:
      params: the number of the model's parameters.
      larger: returns the loss traced for a batch of twice the size.
    """
    if not traced.is_sum:
        return
    (loss, _), _ = traced.out
    aux = [f".aux{jax.tree_util.keystr(path)}" for path, _ in jax.tree.leaves_with_path(loss.aux)]
    names = {0: ".total"} | dict(enumerate(aux, 2))  # by the number of the result
    found = {i: means.sizes(traced.jaxpr, params, i) for i in names}
    for i in [i for i in names if found[i].may_be_mean]:
        if found[i].is_mean(means.sizes(larger().jaxpr, params, i)):
            _warn_of_mean(names[i])


def _warn_of_mean(field: str) -> None:
    small, instead = "the reported value is", "give the sum instead"
    if field == ".total":
        small = "the loss and its gradients are"
        instead = ("give the sum, without the division: zj.Loss(losses.sum(), losses.size), and "
                   "multiply other terms, such as a penalty, by the weight")
    errors.warn(f"Loss{field} is a mean (a sum divided by the number of its terms) and is divided "
                f"by Loss.weight again, so that {small} too small; {instead}.")


def warn_of_no_gradient(traced: TracedLoss, leaves: Sequence[Leaf]) -> None:
    """Warns if the loss depends on no trained parameter: it may read those of another model."""
    jaxpr = uses.without_constants(traced.jaxpr)
    trained = [v for v, leaf in zip(jaxpr.invars, leaves, strict=False) if leaf.trained]
    if jaxpr.outvars[0] not in uses.depending(jaxpr, trained):  # the first result is the total
        errors.warn("the loss does not depend on any trained parameter, so that its gradient is 0. "
                    "Compute it with the model that the loss function is given as its first "
                    "argument, not with a model or parameters from outside the function.")


def warn_of_constants(traced: TracedLoss) -> None:
    """Warns if the loss closes over large arrays: jit makes them constants of the program."""
    held = [x for x in traced.consts if not isinstance(x, Tracer)]
    total = sum(x.nbytes for x in held)
    if total > LARGE:
        largest = max(held, key=lambda x: x.nbytes)
        what = f"{tables.size(total)} (the largest is {largest.dtype}{list(largest.shape)})"
        errors.warn(f"the loss closes over arrays of {what}, which become part of the program, "
                    "whole on every device. Return them from init_fn and freeze them "
                    "(zero.init(..., trainable=...)), or pass them with the batch.")
