"""What a loss function returns."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer

from zerojax.errors import LossError


class Loss(struct.PyTreeNode):
    """A loss as a sum over examples, so that any split of the batch adds up to the same.

    Gradient and reported loss are (sum of `total`) / (sum of `weight`), over devices and microbatches. Returning one says
    that examples do not see each other: each device then differentiates its own part. For a loss whose examples do
    (contrastive, batch statistics, load balancing) write `Zero(gradients="global")`.

    Attributes:
      total: floating scalar, the sum over this batch's examples (or tokens).
      weight: scalar, their number or summed mask; 0 for a part of a batch that is all padding.
      aux: pytree of scalars summed as `total` is, reported over `weight` too (so correct answers become accuracy).
      model_state: the model's new state (linen: the updated collections), or None if it has none.

    >>> Loss(jnp.float32(6.0), 4).weight
    4
    """

    total: Any
    weight: Any
    aux: Any = None
    model_state: Any = None


def call(loss_fn, model, batch, rng):
    """`loss_fn(model, batch)`, with the key if it has a parameter named `rng`, or a third one without a default.

    >>> call(lambda model, batch, smoothing=0.1: smoothing, 1, 2, 3), call(lambda model, batch, key: key, 1, 2, 3)
    (0.1, 3)
    """
    parameters = inspect.signature(loss_fn).parameters
    if "rng" in parameters and "rng" not in getattr(loss_fn, "keywords", {}):  # those a partial has bound
        return loss_fn(model, batch, rng=rng)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in kinds and p.default is inspect.Parameter.empty]
    return loss_fn(model, batch, rng) if len(required) >= 3 else loss_fn(model, batch)


def normalise(result) -> Loss:
    """`result` as a `Loss` of float32 scalars; a bare mean counts with weight 1.

    Raises:
      LossError: not a floating scalar, or a weight that is the constant 0.
    """
    loss = result if isinstance(result, Loss) else Loss(result, 1.0)
    what = "Loss.total" if isinstance(result, Loss) else "the loss"
    _check_scalar(what, loss.total)
    if jnp.shape(loss.weight) != ():
        raise LossError(f"Loss.weight has shape {jnp.shape(loss.weight)}; write its sum, as mask.sum().")
    if not isinstance(loss.weight, Tracer) and not loss.weight > 0:
        raise LossError(f"Loss.weight is {loss.weight}: the loss would be divided by it; "
                        "write the number of examples, or the sum of the mask.")
    for path, x in jax.tree.leaves_with_path(loss.aux):
        if jnp.shape(x) != ():
            raise LossError(f"Loss.aux{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}; "
                            "write a scalar that is summed over examples, as correct.sum().")
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    return loss.replace(total=f32(loss.total), weight=f32(loss.weight), aux=jax.tree.map(f32, loss.aux))


def _check_scalar(what, x):
    if isinstance(x, (tuple, list, dict)) or not hasattr(x, "dtype"):
        raise LossError(f"{what} is a {type(x).__name__}; return a scalar array, or zj.Loss(total, weight, aux=...).")
    if x.shape != ():
        raise LossError(f"{what} has shape {x.shape}; return a scalar: loss.mean(), or zj.Loss(loss.sum(), loss.size).")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LossError(f"{what} is of dtype {x.dtype}, which has no gradient; return a floating scalar.")
