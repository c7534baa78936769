"""The result of a loss function: a scalar mean, or a `Loss` that is a sum over examples."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer

from zerojax import errors, trees
from zerojax.errors import LossError
from zerojax.train import checks

_ADVICE = ("if the loss expects other arguments, keys, shapes or dtypes, change the loss or the "
           "batch. The model is what init_fn returned (linen reads {'params': params})")


class Loss(struct.PyTreeNode):
    """A loss as a sum over examples, so that every split of the batch adds up to the same.

    The gradient and the reported loss are (sum of `total`) / (sum of `weight`), over devices and
    microbatches. Returning a `Loss` declares that no example depends on another, and each device
    then differentiates its own part of the batch. For a loss whose examples depend on each other
    (contrastive losses, batch statistics, load balancing), write `Zero(gradients="global")`.

    Attributes:
      total: floating scalar, the sum over the examples (or tokens) of the batch.
      weight: scalar, the number of examples or the sum of their mask; 0 for a part of the batch
        that is all padding.
      aux: pytree of scalars, each summed like `total` and reported divided by `weight` (the number
        of correct answers is reported as accuracy).
      model_state: the model's new state (for linen, the updated collections), or None if the model
        has none.

    >>> Loss(jnp.float32(6.0), 4).weight
    4
    """

    total: Any
    weight: Any
    aux: Any = None
    model_state: Any = None


def call(loss_fn: Callable, model: Any, batch: Any, rng: Any) -> Any:
    """Calls the loss, with the key if it takes one.

    A loss takes a key if it has a parameter named `rng`, or a third one without a default.

    >>> call(lambda model, batch, smoothing=0.1: smoothing, 1, 2, 3)
    0.1
    >>> call(lambda model, batch, key: key, 1, 2, 3)
    3
    """
    by_position, by_name = _key_arguments(loss_fn, rng)
    key = ", rng" * len(by_position) + ", rng=rng" * len(by_name)
    given = {"model": model, "batch": batch}
    with errors.noted(lambda: checks.call_note(loss_fn, f"model, batch{key}", given, _ADVICE)):
        return loss_fn(model, batch, *by_position, **by_name)


def _key_arguments(loss_fn: Callable, rng: Any) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments of a loss after the batch, by position and by name."""
    parameters = inspect.signature(loss_fn).parameters
    bound = getattr(loss_fn, "keywords", {})  # by functools.partial
    if "rng" in parameters and "rng" not in bound:
        return (), {"rng": rng}
    required = [p for p in parameters.values() if _is_required(p)]
    return ((rng,) if len(required) >= 3 else ()), {}


def _is_required(parameter: inspect.Parameter) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameter.kind in kinds and parameter.default is inspect.Parameter.empty


def normalise(result: Any) -> Loss:
    """Returns `result` as a `Loss` of float32 scalars; a bare mean has weight 1.

    Raises:
      LossError: the result is not a floating scalar, or its weight is the constant 0.
    """
    is_sum = isinstance(result, Loss)
    loss = result if is_sum else Loss(result, 1.0)
    _check_total("Loss.total" if is_sum else "the loss", loss.total)
    _check_weight(loss.weight)
    _check_aux(loss.aux)
    return loss.replace(total=_f32(loss.total), weight=_f32(loss.weight),
                        aux=jax.tree.map(_f32, loss.aux))


def _f32(x) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _check_total(what: str, x: Any):
    if x is None:
        raise LossError(f"{what} is None; end the loss function with return losses.mean(), or "
                        "return zj.Loss(losses.sum(), losses.size).")
    if isinstance(x, (tuple, list, dict)):
        raise LossError(f"{what} is {trees.kind(x)}, {trees.brief(x)}; return one scalar, or "
                        "zj.Loss(losses.sum(), losses.size, aux={...}) with scalars that are sums "
                        "over the examples, such as correct.sum(), and with model_state=... for "
                        "updated collections. In zero.value_and_grad, a pair (loss, aux) needs "
                        "has_aux=True.")
    if not hasattr(x, "dtype"):
        raise LossError(f"{what} is {trees.kind(x)}; return a scalar array, or "
                        "zj.Loss(total, weight, aux=...).")
    if x.shape != ():
        raise LossError(f"{what} has shape {x.shape}; "
                        "return a scalar: loss.mean(), or zj.Loss(loss.sum(), loss.size).")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LossError(f"{what} has dtype {x.dtype}, which has no gradient; "
                        "return a floating scalar.")


def _check_weight(weight: Any):
    if jnp.shape(weight) != ():
        raise LossError(f"Loss.weight has shape {jnp.shape(weight)}; "
                        "write its sum, such as mask.sum().")
    if not isinstance(weight, Tracer) and not weight > 0:
        raise LossError(f"Loss.weight is {weight}, but the loss is divided by it; "
                        "write the number of examples, or the sum of the mask.")


def _check_aux(aux: Any):
    for path, x in jax.tree.leaves_with_path(aux):
        if jnp.shape(x) != ():
            raise LossError(f"Loss.aux{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}; "
                            "write a scalar that is a sum over examples, such as correct.sum().")
