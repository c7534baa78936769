"""The choice between the two ways to differentiate a loss.

global       One loss over the whole microbatch; XLA finds the partial sums and reduces them.
             Correct for any loss.
per device   vmap over the batch's parts, one part per device; each reduction is an operation of the
             program. Correct for sums over examples whose program can be split into parts.

An obstacle is a reason why a device cannot differentiate its own part alone. Its text is a
predicate whose subject is the loss: "has a convolution".
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import LossError, PolicyError, ZeroError
from zerojax.gather.pair import SCOPE
from zerojax.layout import rules
from zerojax.policy import Policy
from zerojax.train.study import Objective, TracedLoss

Tree = Any

_MEAN = "returns a bare mean"
_REQUESTED = 'is differentiated with gradients="global"'
_NEW_STATE = "returns new model state"
_STATE = "uses a model with floating-point state"
_GATHERS = "gathers other parameters itself (zero.gathered)"
_OVERRULED = (_STATE,)  # by gradients="per_device", which declares that no example sees another
_INSTEAD = {
    _MEAN: "Return zj.Loss(total, weight)",
    _REQUESTED: 'Write gradients="per_device"',
    _NEW_STATE: "Return zj.Loss without it",
    _STATE: 'If no example depends on another, write gradients="per_device"',
    _GATHERS: "Gather them before the loss, and pass the result as a batch (batch_argnums)",
}


def find_obstacles(policy: Policy, objective: Objective, model_state: Tree,
                   traced: TracedLoss) -> tuple[str, ...]:
    """Returns the obstacles in a loss, its model and its inputs; () if there are none."""
    found = [objective.unsplit, _overwritten(objective), _floating(model_state, traced.written),
             closed_over(objective, traced), *_in_program(set(policy.batch_axes), traced.jaxpr)]
    return tuple(dict.fromkeys(filter(None, found)))


def closed_over(objective: Objective, traced: TracedLoss) -> str:
    """Returns the obstacle that the loss closes over what may belong to the batch; "" if not.

    Such a value of the surrounding program would not be split with the batch.
    """
    shapes = [x.shape for x in traced.consts
              if isinstance(x, Tracer) and x.shape[:1] == (objective.examples,)]
    return f"closes over an array of the batch's length, of shape {shapes[0]}" if shapes else ""


def _overwritten(objective: Objective) -> str:
    leaves = (*objective.leaves, *objective.state_leaves)
    found = any(leaf.overwritten for leaf in leaves)
    return f"has values that their gradient overwrites ({rules.OVERWRITTEN})" if found else ""


def _floating(model_state: Tree, written: Sequence[bool]) -> str:
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(model_state)]
    if any(trees.taken(written, floating)):
        return _NEW_STATE
    return _STATE if any(floating) else ""


def _in_program(axes: set[str], jaxpr) -> Iterator[str]:
    """Yields the obstacles among the equations of a jaxpr and of those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    platforms = {v for eqn in jaxpr.eqns if eqn.primitive.name == "platform_index"
                 for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        if why := _in_equation(axes, eqn, platforms):
            yield why
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _in_program(axes, inner)


def _in_equation(axes: set[str], eqn, platforms: set) -> str:
    name, params = eqn.primitive.name, eqn.params
    if name == "sharding_constraint":
        return _constraint(axes, eqn)
    if name == "shard_map":
        mapped = axes & set(params.get("newly_manual_axes") or params["mesh"].axis_names)
        return f"has a shard_map over {sorted(mapped)}" if mapped else ""
    if name == "conv_general_dilated":
        # XLA partitions the gradient of a vmapped convolution wrongly (jax 0.10 to 0.12)
        return "has a convolution"
    if name == "cond" and _is_choice(eqn, platforms):
        return "branches by lax.cond or switch"
    if name == "while":  # each part would choose its own number of iterations
        return "has a loop of unknown length (while_loop)"
    if name in ("pure_callback", "io_callback") or params.get("ordered"):
        return f"calls the host ({name})"
    return ""


def _constraint(axes: set[str], eqn) -> str:
    pinned = axes & set(rules.axes_of(getattr(eqn.params["sharding"], "spec", P())))
    if not pinned:
        return ""
    is_ours = SCOPE in str(eqn.source_info.name_stack).split("/")
    return _GATHERS if is_ours else f"constrains activations over {sorted(pinned)}"


def _is_choice(eqn, platforms: set) -> bool:
    """Whether a cond depends on the whole batch or on a key: each part would choose for itself."""
    index = eqn.invars[0]
    return not isinstance(index, jex.Literal) and index not in platforms


def choose(policy: Policy, is_sum: bool, obstacles: Sequence[str]) -> tuple[bool, str]:
    """Returns (whether each device differentiates its own part, why or why not).

    Args:
      is_sum: whether the loss function returned a `Loss`.

    Raises:
      PolicyError: the policy demands what only the other way can do.
    """
    if policy.gradients == "per_device":
        _check_per_device(obstacles)
        return True, 'gradients="per_device"'
    why = _why_global(policy, is_sum, obstacles)
    if not why:
        return True, "the loss is a sum over examples"
    _check_reduce(policy, why)
    return False, f"the loss {why}"


def _why_global(policy: Policy, is_sum: bool, obstacles: Sequence[str]) -> str:
    """Returns why one loss over the whole batch is differentiated; "" if each part can be."""
    if not is_sum:
        return _MEAN
    if obstacles:
        return obstacles[0]
    return _REQUESTED if policy.gradients == "global" else ""


def fall_back(policy: Policy, error: Exception) -> tuple[bool, str]:
    """Returns (False, why), as `choose`, after tracing one device's part raised `error`.

    Raises:
      PolicyError: the policy demands the way that failed.
    """
    if isinstance(error, ZeroError) and not isinstance(error, LossError):
        raise error
    why = _why_not(error)
    wish, instead = _wish(policy)
    if policy.gradients == "per_device" or wish:
        if isinstance(error, ZeroError):
            raise error
        needed = 'gradients="per_device"'
        if policy.gradients is None:
            needed = f"{wish}, which needs {needed}"
        instead = f" and {instead}" if wish else ""
        raise PolicyError(f'{needed}: the loss {why}; write '
                          f'gradients="global"{instead}.') from error
    return False, f"the loss {why}"


def _wish(policy: Policy) -> tuple[str, str]:
    """Returns the setting that only per-device gradients can honour, and what to write instead.

    Both are "" if there is no such setting.
    """
    compute, reduce = policy.precision.compute_dtype, policy.precision.reduce_dtype
    if reduce != compute:
        return f"Precision(compute={compute!r}, reduce={reduce!r})", f"reduce={compute!r}"
    if policy.wire.reduce:
        return f"Wire(reduce={policy.wire.reduce!r})", "Wire(reduce=None)"
    return "", ""


def _why_not(error: Exception) -> str:
    if "out_axes" in str(error):
        return ("writes integers of the batch into the model's state, where each device would "
                "write different ones")
    first = "".join(str(error).splitlines()[:1])
    return f"cannot be split over the batch: {type(error).__name__}: {first}"


def _check_per_device(obstacles: Sequence[str]):
    for why in obstacles:
        if why not in _OVERRULED:
            raise PolicyError(f'gradients="per_device": the loss {why}, so that a device cannot '
                              "differentiate its own part of the batch alone; write the loss "
                              'without that, or write gradients="global".')


def _check_reduce(policy: Policy, why: str):
    wish, otherwise = _wish(policy)
    if wish:
        compute = policy.precision.compute_dtype
        instead = _INSTEAD.get(why, "Write the loss without that")
        raise PolicyError(f"{wish}: the loss {why}, so that it is differentiated as one loss over "
                          "the whole batch, where XLA reduces gradients in the dtype of the "
                          f"product, {compute}. {instead}, so that each device differentiates its "
                          f"own part, or write {otherwise}.")
