"""The training step of islands: each trains alone, and every H-th step ends with an average.

    step number 1 .. H - 1     the islands' own steps           no collective crosses islands
    step number H              the same program, then `average` one all-reduce between islands

Two programs, not one with a condition: the number of a step is known on the host, because a step
never waits for the state that the step before it returned.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import BatchError, ModelError, PolicyError, message_last
from zerojax.plan import plan
from zerojax.plan.compiler import Call
from zerojax.plan.demand import Demand, Use
from zerojax.plan.island_plan import IslandsPlan
from zerojax.processes import fingerprint
from zerojax.train import stacked
from zerojax.train.rounds import Rounds
from zerojax.train.skips import Skips
from zerojax.train.stacked import IslandsState, Outer, Stack
from zerojax.train.state import TrainState
from zerojax.train.step import TrainStep

_CALL = "state, metrics = step(state, batch)"


class IslandsStep(TrainStep):
    """`step(state, batch) -> (state, metrics)`, made by `Islands.train_step`, which documents it.

    The given state is donated: continue with the returned one.

    Attributes:
      rounds: how often the islands average.
      policy: the `Zero` within an island.
      loss_fn, tx, accumulate, clip_norm, max_skipped, compiler_options: as given to
        `Islands.train_step`.
    """

    def __init__(self, rounds, loss_fn, tx, **options: Any):
        super().__init__(rounds.stack.zero, loss_fn, tx, **options)
        self.rounds: Rounds = rounds
        self._average = jax.jit(rounds.average, donate_argnums=0,
                                compiler_options=options["compiler_options"])
        self._skips = _MostSkips(options["max_skipped"])
        self._last: tuple[Any, int] = None, 0  # the counter returned last, and its value

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n  in {self.rounds.policy!r}"

    def wire_error(self, state: Any, batch: Any) -> dict:
        """Raises `PolicyError`: the error is that of a step without islands."""
        raise PolicyError("wire_error is computed without islands; write islands.zero.train_step("
                          "loss_fn, tx).wire_error(islands.average(state), batch).")

    def __call__(self, state: IslandsState, batch: Any) -> tuple[IslandsState, dict]:
        with message_last:
            self._check(state, batch)
            _check_untraced(state)
            self._skips.check(state)
            state = self._preflight(state, (batch,), batch=batch,
                                    fields=lambda state: self._fields(state, batch))
            number = self._number(state) + 1
            state, metrics = self._preflight.dispatch(self._jitted, state, batch)
            if number % self.rounds.every == 0:
                state = self._average(state)
            self._last = state.step, number
            self._skips.record(state, metrics)
            return state, metrics

    def lower(self, state: IslandsState, batch: Any) -> jax.stages.Lowered:
        """Lowers the islands' own step as `jax.jit` does; `state` and `batch` may be shapes."""
        with message_last:
            self._check(state, batch)
            return self._jitted.lower(state, batches.placed(self.rounds.policy, batch))

    def plan(self, state: IslandsState, batch: Any, *, cache: bool = True) -> IslandsPlan:
        """Returns the memory, collectives and time of a step, and the traffic between islands.

        See `TrainStep.plan` for the arguments, for the errors, and for what it runs.
        """
        self._check(state, batch)
        batches.check_mesh(self.policy, (state, batch))
        batch = batches.placed(self.rounds.policy, batch)
        with message_last:
            step = self._demand(state, batch)
        layout, options = self.rounds.layout(state), self.compiler_options
        alone = plan.make(step, layout, batches.local_bytes(batch),
                          Call(self._jitted, (state, batch), {}, options), cache=cache)
        idle = dataclasses.replace(step, uses=(Use(0, 0),) * len(step.leaves))
        average = plan.make(idle, layout, 0, Call(self._average, (state,), {}, options),
                            cache=cache)
        stack = self.rounds.stack
        return IslandsPlan.of(alone, average, stack.axis, stack.n, self.rounds.every,
                              stacked.bytes_per_round(stack, state.islands))

    def _demand(self, state: IslandsState, batch: Any) -> Demand:
        """Returns the collectives that ZeRO allows within an island."""
        leaves, places = self.rounds.stack.model_leaves(state.islands)
        per_device, why, uses = self._way(state, batch)
        return Demand(self.policy, leaves, places, self.accumulate, per_device, why, uses)

    def _way(self, state: IslandsState, batch) -> tuple[bool, str, tuple[Use, ...]]:
        found, way = [], super()._way

        def studied(one: TrainState, part: Any, index: jax.Array):
            found.append(way(one, part))
            return one, ()

        jax.eval_shape(functools.partial(self.rounds.stack.each, studied), state.islands, batch)
        return found[0]

    def _step(self, state: IslandsState, batch):
        rounds = self.rounds
        _check_islands(rounds, state)
        step = super()._step

        def alone(one: TrainState, part: Any, index: jax.Array):
            new, metrics = step(one.replace(rng=trees.fold(one.rng, index)), part)
            return new.replace(rng=one.rng), metrics

        batch = jax.lax.with_sharding_constraint(batch, batches.sharding(rounds.policy))
        islands, metrics = rounds.stack.each(alone, state.islands, batch)
        return state.replace(islands=islands), metrics

    def _check(self, state: Any, batch: Any) -> None:
        if not isinstance(state, IslandsState):
            raise ModelError(f"the step of islands was given {trees.kind(state)} as its state; "
                             "write state = islands.init(model.init, tx, jax.random.key(0), x), "
                             "or islands.start(state) for a state of zero.init.")
        rounds = self.rounds
        _check_groups(rounds.stack, state)
        n, parts = rounds.stack.n, rounds.stack.zero.parts
        rows, most = batches.count(batch), n * parts * self.accumulate
        if rows % most or not rows:
            raise BatchError(f"the batch has {rows} examples, which do not divide evenly over {n} "
                             f"islands x {parts} devices in each x {self.accumulate} microbatches "
                             f"= {most}; give batches of {max(most, rows // most * most)}.")

    def _number(self, state: IslandsState) -> int:
        """Returns the number of steps before this one; waits for the device only for a state that
        the last call did not return."""
        counter, number = self._last
        return number if state.step is counter else int(state.step)

    def _fields(self, state, batch) -> dict:
        rounds = self.rounds
        return {**super()._fields(state, batch), "islands": rounds.stack.n, "every": rounds.every,
                "average": fingerprint.of_program(self._average, state)}


class _MostSkips(Skips):
    """Judges the island with the most skipped steps, among those of this process."""

    def _judge(self, metrics: Mapping[str, jax.Array], most: int) -> None:
        names = {"skipped", "loss", "grad_norm", "loss_scale"} & set(metrics)
        local = {name: _of_process(metrics[name]) for name in names}
        worst = int(np.argmax(local["skipped"]))
        super()._judge({name: x[worst] for name, x in local.items()}, most)


def _of_process(x: jax.Array) -> np.ndarray:
    """Returns the values of the islands that have devices of this process."""
    return np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards])


def _check_untraced(state: IslandsState) -> None:
    if isinstance(state.step, Tracer):
        raise PolicyError("the step of islands was called within another function that jax "
                          "traces, where it cannot tell whether a round ends. It is jitted "
                          f"already: write {_CALL}.")


def _check_groups(stack: Stack, state: IslandsState) -> None:
    """Raises `ModelError` for as many islands on other groups of devices: XLA would abort."""
    mesh = getattr(getattr(state.skipped, "sharding", None), "mesh", None)
    groups = dict(mesh.shape).get(stack.axis, stack.groups) if mesh else stack.groups
    if state.skipped.shape[:1] == (stack.n,) and groups != stack.groups:
        raise ModelError(f"the step of {stack.n} islands on {stack.groups} groups of devices was "
                         f"given a state on {groups} groups; write state = old.move(state, new), "
                         "where old are the islands that made it and new those of this step.")


def _check_islands(rounds: Rounds, state: IslandsState) -> None:
    """Raises `ModelError` for a state of other islands, or with another outer optimizer."""
    n = rounds.stack.n
    own = trees.taken(jax.tree.leaves(state.islands), stacked.are_own(state.islands))
    odd = next((x.shape for x in own if x.shape[:1] != (n,)), None)
    if odd is not None:
        raise ModelError(f"the step of {n} islands was given a state with an array of shape {odd}, "
                         f"whose first dimension is not {n}; write state = old.move(state, new), "
                         "where old are the islands that made it and new those of this step.")
    outer = rounds.outer and jax.eval_shape(
        lambda outer: Outer(outer, rounds.outer.init(outer)), _one_trained(rounds, state))
    if jax.tree.structure(outer) != jax.tree.structure(state.outer):
        raise ModelError("the state has another outer optimizer than the islands of this step; "
                         "write state = old.move(state, new), where old are the islands that made "
                         "it and new those of this step.")


def _one_trained(rounds: Rounds, state: IslandsState) -> Any:
    return rounds.stack.shapes_of_one(state.islands).trained
