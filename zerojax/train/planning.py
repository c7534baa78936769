"""The plan of a jitted function of a state: the demands of ZeRO beside the compiled program."""

from collections.abc import Mapping, Sequence
from typing import Any

from zerojax.data import batch as batches
from zerojax.errors import ModelError, PolicyError
from zerojax.plan import plan
from zerojax.plan.compiler import Call
from zerojax.plan.demand import Demand, Use
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.train import state_layout


def planned(policy: Policy, jitted: Any, state: Any, args: tuple, kwargs: Mapping[str, Any], *,
            accumulate: int, compiler_options: Mapping[str, Any] | None, cache: bool,
            per_device: bool = False, why: str = "",
            uses: tuple[Use | None, ...] | None = None) -> Plan:
    """Returns the `Plan` of a call.

    Args:
      jitted: `jax.jit`ted, of a state, `args` and `kwargs`.
      per_device: whether each device differentiates its own part of the batch.
      why: the reason for that.
      uses: how often a microbatch needs each leaf; None if that is not known.

    See `Zero.plan` for the other arguments and for the errors.
    """
    batches.check_mesh(policy, (state, args, kwargs))
    leaves, placements = state_layout.model_leaves(policy, state)
    if not leaves:
        raise ModelError(f"zero.plan was given a state ({type(state).__name__}) without params, "
                         "but ZeRO shards parameters: give it a state with an attribute or key "
                         "`params`.")
    args, kwargs = batches.placed(policy, (args, kwargs))
    demand = Demand(policy, leaves, placements, accumulate, per_device, why, uses)
    call = Call(jitted, (state, *args), kwargs, compiler_options or {})
    return plan.make(demand, state_layout.layout(policy, state),
                     batches.local_bytes((args, kwargs)), call, cache=cache)


def of_model(state: Any, uses: Sequence[Use | None]) -> tuple[Use | None, ...]:
    """Returns the uses of the parameters and the model's state, from those of a state's leaves.

    A function of the user's own may also read them where nothing is noted, such as in a loop, so
    that the count is never below that of ZeRO's formula.
    """
    found = [uses[i] if i < len(uses) else None for i in state_layout.known(state).model]
    return tuple(use and _at_least_once(use) for use in found)


def _at_least_once(use: Use) -> Use:
    gathers = max(2.0, use.gathers)
    forward = max(1.0, use.gathers - use.again)
    return Use(gathers, max(1.0, use.scatters), use.calls, gathers - forward)


def check_settings(made_by: str, **given: Any) -> None:
    """Raises `PolicyError` for settings of a plan that the planned function has itself.

    Args:
      made_by: the method of `Zero` that made the function.
      given: each setting, or whether it was given.
    """
    names = [name for name, value in given.items() if value]
    if names:
        raise PolicyError(f"zero.plan({', '.join(f'{name}=...' for name in names)}) was given a "
                          f"function of zero.{made_by}, which is planned with its own settings; "
                          f"give them to zero.{made_by}.")
