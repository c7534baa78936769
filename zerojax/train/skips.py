"""Skipped steps: a warning for the first one, and an error after too many in a row."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer

from zerojax import errors
from zerojax.errors import NonFiniteError


class Skips:
    """Raises `NonFiniteError` after `most` consecutive skipped steps; never, if that is None.

    It reads the metrics of the step before the last, so that every process raises at the same call
    and the device always has another step to run.
    """

    def __init__(self, most: int | None):
        self.most = most
        self._pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()
        self._last = None
        self._has_warned = False

    def check(self, state: Any) -> None:
        """Raises or warns for the state that a step is about to be called with."""
        skipped = getattr(state, "skipped", None)
        if isinstance(skipped, Tracer):
            self._warn_of_tracing()
        if skipped is not self._last:  # of another run
            self._pending.clear()
        if self.most is None or len(self._pending) < 2:
            return
        self._judge(self._pending.popleft(), self.most)

    def record(self, state: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Notes the result of a step, unless the step is being traced."""
        if self.most is not None and not isinstance(state.skipped, Tracer):
            metrics["skipped"].copy_to_host_async()
            self._pending.append(metrics)
            self._last = state.skipped

    def _judge(self, metrics: Mapping[str, jax.Array], most: int) -> None:
        skipped = int(metrics["skipped"])
        if skipped >= most:
            self._pending.clear()
            raise NonFiniteError(
                f"{skipped} consecutive steps were skipped (max_skipped={most}); the state is as "
                f"it was before them. In the last one, {_cause(metrics)}.")
        is_usual = "loss_scale" in metrics  # while the scale adapts
        if skipped and not is_usual and not self._has_warned:
            self._has_warned = True
            errors.warn("a training step was skipped, which left the state as it was, because "
                        f"{_cause(metrics)}. metrics['skipped'] counts such steps in a row; {most} "
                        "of them raise zj.NonFiniteError (max_skipped). Only the first one warns.")

    def _warn_of_tracing(self) -> None:
        if self.most is not None and not self._has_warned:
            self._has_warned = True
            errors.warn(f"train_step(max_skipped={self.most}): the step was called within another "
                        "function that jax traces (jax.jit, a scan), where skipped steps cannot "
                        "be counted and the state's memory is not reused. The step is jitted "
                        "already: call step(state, batch) itself. To run several steps in one "
                        "program, write zero.train_step(..., max_skipped=None) and "
                        "jax.jit(..., donate_argnums=0).")


def _cause(metrics: Mapping[str, jax.Array]) -> str:
    """Returns what was not finite in a skipped step, and what may have caused it."""
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    lowest = ", or float16 at the lowest loss scale" if "loss_scale" in metrics else ""
    if not math.isfinite(loss):
        return (f"the loss was {loss}; possible causes are bad data, a summed weight of 0, and "
                f"parameters that grew too large at too high a learning rate{lowest}")
    if not math.isfinite(grad_norm):
        return (f"the loss was {loss:.6g}, but the norm of its gradient {grad_norm}; possible "
                "causes are functions without a finite derivative, such as jnp.sqrt and "
                f"jnp.linalg.norm at 0{lowest}")
    return (f"the loss was {loss:.6g} and the norm of its gradient {grad_norm:.6g}, but the "
            "optimizer's update was not finite; look for a learning rate or a schedule that is "
            "nan, inf or too high")
