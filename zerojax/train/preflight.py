"""The checks before each call of a jitted function of a state and batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zerojax.data import batch as batches
from zerojax.policy import Policy
from zerojax.processes import agreement
from zerojax.train import checks, donation


class Preflight:
    """The checks before each call of one jitted function: sound arguments, processes that agree.

    Args:
      where: the method that made the function, for errors.
      donate: whether the function takes the state's memory.
    """

    def __init__(self, policy: Policy, where: str, *, donate: bool):
        self.policy = policy
        self.where = where
        self.donate = donate
        self._agreed = agreement.Once()

    def __call__(self, state: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None, *,
                 batch: Any, fields: Callable[[Any], Mapping[str, Any]],
                 dtypes: Sequence[Any] = ()) -> Any:
        """Returns the state that the function can be called with.

        Args:
          state, args, kwargs: all arguments of the call.
          batch: those among them that are split over the devices.
          fields: returns, for the returned state, the values that all processes must agree on
            before the first call.
          dtypes: the dtypes that the function expects of the state's leaves, if it expects any.

        Raises:
          PolicyError: the GPUs are simulated, or see `Policy.check_context`.
          BatchError: see `batches.check_given`.
          ModelError: see `checks.check_placed`.
          StateError: an array of the state was deleted.
          ClusterError: processes are about to run different programs.
        """
        self.policy.check_devices(self.where)
        self.policy.check_context(self.where)
        batches.check_given(self.policy, batch)
        checks.check_placed(self.where, self.policy, state)
        if self.donate:
            others = (args, kwargs)
            state = donation.ready(self.where, self.policy.mesh, state, dtypes, others)
        else:
            donation.check_alive(self.where, state)
        self._agreed(self.policy, self.where, lambda: fields(state), state, args, kwargs)
        return state

    def dispatch(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a jitted program, and reports the call to the other processes."""
        with self._agreed.calling():
            return program(*args, **kwargs)
