"""Checks of the functions, optimizers and states that the methods of `Zero` are given."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import LossError, ModelError
from zerojax.policy import Policy
from zerojax.train import loss_scale
from zerojax.train.state import TrainState


def is_optimizer(x: Any) -> bool:
    """Whether `x` has the methods of an optax transform."""
    return hasattr(x, "init") and hasattr(x, "update")


def check_loss(where: str, loss_fn: Any, call: str) -> None:
    """Raises `LossError` for anything but a function, such as the model or the optimizer.

    Args:
      where: the method.
      call: how to call it.
    """
    is_model = isinstance(loss_fn, nn.Module | nnx.Module)
    if callable(loss_fn) and not is_model:
        return
    uses = "model.apply(variables, x)" if isinstance(loss_fn, nn.Module) else "model(x)"
    body = f"calls {uses} and " if is_model else ""
    raise LossError(f"zero.{where} was given {trees.kind(loss_fn)} in place of the loss function; "
                    f"write zero.{where}{call} with a function loss_fn(model, batch) that {body}"
                    "returns zj.Loss(losses.sum(), losses.size).")


def check_function(where: str, fn: Any, instead: str) -> None:
    """Raises `ModelError` for anything but a function, such as a model.

    Args:
      instead: what to write.
    """
    if not callable(fn) or isinstance(fn, nn.Module | nnx.Module):
        raise ModelError(f"zero.{where} was given {trees.kind(fn)}, not a function; "
                         f"write {instead}.")


def check_optimizer(where: str, first: Any, tx: Any, call: str) -> None:
    """Raises `ModelError` if the second argument of a method is no optax transform.

    Args:
      first: its first argument, which may be the transform.
      call: how to call it.
    """
    if is_optimizer(tx):
        return
    if is_optimizer(first):
        what = "the optimizer as its first argument, where the function belongs"
    elif callable(tx) and getattr(tx, "__module__", "").startswith("optax"):
        what = (f"the function optax.{tx.__name__} itself as its second argument; call it: tx = "
                f"optax.{tx.__name__}(1e-3)")
    else:
        what = (f"{trees.kind(tx)} as its second argument, which is not an optax transform such as "
                "optax.adamw(1e-3)")
    raise ModelError(f"zero.{where} was given {what}; write zero.{where}{call}.")


def check_state(where: str, state: Any, batch: Any, call: str) -> None:
    """Raises `ModelError` for anything but a state of `zero.init`.

    Args:
      batch: the argument after it, which may be the state.
      call: how to call the function that the method returned.
    """
    if isinstance(state, TrainState) and not getattr(state.skipped, "ndim", 0):
        return
    if hasattr(state, "islands") or isinstance(state, TrainState):
        raise ModelError(f"{where} was given a state of islands; write {where} with "
                         "islands.average(state), which is one state, or use the step of "
                         "islands.train_step.")
    held = state if isinstance(state, tuple) else ()
    is_metrics = isinstance(state, Mapping) and {"loss", "weight"} <= set(state)
    if isinstance(batch, TrainState):
        why = f"the arguments are in the wrong order; write {call}"
    elif is_metrics or any(isinstance(x, TrainState) for x in held):
        why = f"a step returns the state and the metrics; write {call}"
    elif isinstance(state, nnx.Module) or _is_params(state):
        why = ("give it the whole state, or make one of an existing model (an NNX module, "
               "parameters, or linen's {'params': params}): state = zero.init(model, tx)")
    else:
        why = ("write state = zero.init(model.init, tx, jax.random.key(0), x), or use a training "
               "state of your own with zero.create, and a step of your own under zero.jit")
    raise ModelError(f"{where} was given {trees.kind(state)} as its state, not the state that "
                     f"zero.init returns; {why}.")


def _is_params(x: Any) -> bool:
    return isinstance(x, Mapping) and all(map(trees.is_array, jax.tree.leaves(x)))


def check_model(where: str, model: Any) -> None:
    """Raises `ModelError` for a training state of the user's own in place of its parameters."""
    if isinstance(model, TrainState) or trees.is_array(model):
        return
    held = set(model) if isinstance(model, Mapping) else set(dir(model))
    if {"params", "opt_state"} <= held:
        raise ModelError(f"{where} was given a whole training state ({trees.kind(model)}), and "
                         "would take the arrays of the optimizer for parameters; write "
                         "zero.value_and_grad(loss)(state.params, batch).")


def check_placed(where: str, policy: Policy, state: Any) -> None:
    """Raises `ModelError` for a state of shapes, or on other devices than those of the mesh."""
    leaves = jax.tree.leaves(state)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves[:1]):
        raise ModelError(f"{where} was given a state of shapes, as zero.abstract returns it; make "
                         "one of arrays with zero.init, or plan a step of these shapes with "
                         "step.plan(state, batch).")
    if x := batches.elsewhere(policy, leaves):
        raise ModelError(f"{where} was given a state on {batches.devices_of(x[0])}, but the mesh "
                         f"of its Zero has {policy.mesh.size} devices; write state = "
                         "old.move(state, new), where old is the Zero that made the state and new "
                         "the Zero of this call.")


def call_note(fn: Any, call: str, arguments: Mapping[str, Any], advice: str) -> str:
    """Returns the note for an exception of a user's function: how zerojax called it.

    Args:
      call: the arguments as they are written in the call.
      arguments: those to describe.

    >>> call_note(len, "batch", {"batch": {"x": jax.numpy.ones(3)}}, "give another batch")
    "zerojax called len(batch), where batch is {'x': float32[3]}: give another batch."
    """
    given = " and ".join(f"{name} is {trees.brief(x)}" for name, x in arguments.items())
    return f"zerojax called {name_of(fn)}({call}){', where ' * bool(given)}{given}: {advice}."


def name_of(fn: Any) -> str:
    """Returns the name of a function, of a method with its class, or of a function in a partial."""
    fn = getattr(fn, "func", fn)
    name = getattr(fn, "__qualname__", type(fn).__name__).rpartition("<locals>.")[2]
    owner = getattr(fn, "__self__", None)
    is_method = owner is not None and "." in name
    return f"{type(owner).__name__}.{fn.__name__}" if is_method else name


def check_dtypes(policy: Policy, state: TrainState) -> None:
    """Raises `ModelError` for a state whose dtypes or loss scale are those of another policy."""
    precision = policy.precision
    wanted = loss_scale.for_dtype(precision.compute_dtype)
    if wanted.metrics() and not state.scale.metrics():
        raise ModelError("train_step computes in float16, but its state has no loss scale, because "
                         "the Zero that made it computes in another dtype; write state = "
                         "old.move(state, new), where old is the Zero that made the state and new "
                         "the Zero of this step.")
    for leaf in state.model.leaves:
        if leaf.trained and leaf.dtype != precision.at_rest(leaf.path):
            raise ModelError(f"train_step was given a state whose parameter {leaf.path} is kept in "
                             f"{leaf.dtype}, but its Zero keeps it in "
                             f"{precision.at_rest(leaf.path)} (Precision(params=...)); use the "
                             "Zero that made the state, or restore the state from a checkpoint "
                             "with cast=True.")
