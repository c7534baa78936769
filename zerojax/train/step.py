"""The training step: one jitted function, traced once for a state and batch of given shapes.

    gradients of the mean, at their specs (see `gradients`)
    norm, clip, finite?    -> optax update on shards, or the state as it was
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import ModelError, NonFiniteError, PolicyError
from zerojax.layout import rules
from zerojax.plan import plan
from zerojax.plan.demand import Demand
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.processes import agreement, fingerprint
from zerojax.train import donation, loss, optimizer, transforms
from zerojax.train import state as states
from zerojax.train.gradients import Differentiator
from zerojax.train.loss import Loss
from zerojax.train.optimizer import Update
from zerojax.train.state import TrainState
from zerojax.train.transforms import Call


def norm(tree) -> jax.Array:
    """The global 2-norm, in float32.

    >>> float(norm([jnp.array([3.0]), jnp.array([4.0])]))
    5.0
    """
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


class TrainStep:
    """`step(state, batch) -> (state, metrics)`; made by `Zero.train_step`, which documents it.

    The state given is donated: use the one returned.
    """

    def __init__(self, policy: Policy, loss_fn, tx, *, accumulate: int, clip_norm: float | None, max_skipped: int | None,
                 compiler_options: dict | None):
        transforms.check_accumulate("train_step", accumulate)
        if clip_norm is not None and not clip_norm > 0:
            raise PolicyError(f"train_step(clip_norm={clip_norm}): write a positive norm, or None not to clip.")
        if max_skipped is not None and max_skipped < 1:
            raise PolicyError(f"train_step(max_skipped={max_skipped}): write how many steps in a row, 1 or more, or None.")
        self.policy, self.loss_fn, self.tx = policy, loss_fn, tx
        self.accumulate, self.clip_norm, self.max_skipped = accumulate, clip_norm, max_skipped
        self.compiler_options = compiler_options or {}
        self._jitted = jax.jit(self._step, donate_argnums=0, compiler_options=compiler_options)
        self._dtypes, self._pending, self._last, self._agreed = [], collections.deque(), None, agreement.Once()

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if isinstance(self.policy.mesh, AbstractMesh):
            raise PolicyError("train_step over GPUs that are not there: nothing can run on them. Write step.plan(state, batch), or "
                              "take a mesh of devices: zj.make_mesh().")
        self._raise_if_stuck(state)
        batches.check_given(self.policy, batch)
        self._dtypes = self._dtypes or self._expected(state)
        state = donation.ready("train_step", self.policy.mesh, state, self._dtypes)
        self._agreed(self.policy, "train_step", lambda: self._fields(state, batch), state, batch)
        state, metrics = self._jitted(state, batch)
        if self.max_skipped and not isinstance(metrics["skipped"], Tracer):
            metrics["skipped"].copy_to_host_async()
            self._pending.append(metrics["skipped"])
            self._last = state.skipped
        return state, metrics

    def _expected(self, state) -> list:
        """The dtypes of the leaves of a state with this optimizer; raises what stands against it."""
        _check_state(state)
        optimizer.check_padding(self.tx, state.trained)
        own = lambda state: state.replace(opt_state=optimizer.init(self.tx, state.trained))
        return [x.dtype for x in jax.tree.leaves(jax.eval_shape(own, state))]

    def _fields(self, state, batch) -> dict:
        """What other processes have to have in common with this one."""
        return {"accumulate": self.accumulate, "clip_norm": self.clip_norm, "max_skipped": self.max_skipped,
                "compiler_options": self.compiler_options} | _fields(self.loss_fn, self._jitted, state, batch)

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """As jit's: states and batches may be `ShapeDtypeStruct`s; a batch without shardings is given its own."""
        return self._jitted.lower(state, batches.placed(self.policy, batch))

    def plan(self, state: TrainState, batch: Any, *, cache: bool = True) -> Plan:
        """What a step needs and moves: memory, collectives, time, and whether they are ZeRO's. Nothing is run or allocated.

        Over GPUs that are not there (`zj.make_mesh(topology=...)`) a child process compiles, and `cache` keeps what it made on
        disk, under ~/.cache/zerojax or $ZEROJAX_CACHE; over devices that are there, their compiler does.

        Args:
          state, batch: arrays, or `ShapeDtypeStruct`s as `Zero.abstract` makes them.

        Raises:
          CompileError: the compiler failed, aborted or ran out of memory; with its last lines.
          BatchError, LossError, PolicyError: as the step would.
        """
        self._expected(state)
        batches.check(self.policy, batch, self.accumulate)
        batches.check_mesh(self.policy, (state, batch))
        batch = batches.placed(self.policy, batch)
        demand = self._demand(state, batch)
        return plan.make(demand, states.layout(self.policy, state), batches.local_bytes(batch), self._jitted, (state, batch), {},
                         self.compiler_options, cache=cache)

    def _demand(self, state, batch) -> Demand:
        found = []

        def studied(state, batch):
            _, diff, _ = self._studied(state, batch)
            found.append((diff.per_device, diff.why))

        jax.eval_shape(studied, state, batch)
        return Demand(self.policy, *states.read(self.policy, state), self.accumulate, *found[0])

    def _raise_if_stuck(self, state):
        """Looks at the step before the last, so that every host raises at the same call and the device has one more to do."""
        if getattr(state, "skipped", None) is not self._last:  # of another run
            self._pending.clear()
        if self.max_skipped and len(self._pending) > 1 and (skipped := int(self._pending.popleft())) >= self.max_skipped:
            self._pending.clear()
            raise NonFiniteError(
                f"{skipped} steps in a row had a loss or gradient that is not finite (max_skipped={self.max_skipped}); the state "
                "is as it was before them. A summed weight of 0 does that, as do a learning rate too high, bad data, or float16 "
                "at the lowest loss scale.")

    def _step(self, state: TrainState, batch):
        call, diff, update = self._studied(state, batch)
        grads, loss, _ = diff(call.parts.flat, state.model_state, call.inputs, state.scale)
        grads = jax.tree.structure(state.trained).unflatten(grads)
        return self._finish(state, update, grads, loss, states.placements(self.policy, state))

    def _studied(self, state, batch) -> tuple[Call, Differentiator, Update]:
        _check_state(state)
        self._check_optimizer(state)
        batches.check(self.policy, batch, self.accumulate)
        update = optimizer.trace(self.tx, state.trained, state.opt_state, state.trained, jnp.float32(0))
        call = self._call(state, batch)
        return call, call.differentiator(self.policy), update

    def _call(self, state, batch) -> Call:
        """The loss of a state and a batch, with the step's key."""
        judge = lambda model, batch, rng: loss.call(self.loss_fn, model, batch, rng)
        key = jax.random.fold_in(state.rng, state.step)
        return Call.of(self.policy, judge, state, (batch, key), {}, accumulate=self.accumulate)

    def _check_optimizer(self, state):
        ours = jax.eval_shape(functools.partial(optimizer.init, self.tx), state.trained)
        shapes = lambda tree: [(trees.path_of(p), x.shape) for p, x in jax.tree.leaves_with_path(tree)]
        if shapes(ours) != shapes(state.opt_state) or jax.tree.structure(ours) != jax.tree.structure(state.opt_state):
            odd = sorted(set(shapes(ours)) ^ set(shapes(state.opt_state)))[:3] or [optimizer.kinds(ours)]
            raise ModelError(f"train_step was given another optimizer than zero.init: their states differ at {odd}; "
                             "give both the same optax transform.")

    def _finish(self, state, update: Update, grads, loss: Loss, places):
        mean, moved = loss.total / loss.weight, lambda tree: update.moved(jax.tree.leaves(tree))
        grad_norm = norm(moved(grads))
        updates, opt_state = update(_clipped(grads, grad_norm, self.clip_norm), state.opt_state, state.trained, mean)
        params = state.put(update.applied(state.trained, updates))
        param_norm = norm(moved(trees.only(params, state.model.trained)))  # tells of updates that are not finite, too
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(mean) & jnp.isfinite(param_norm)
        new = state.replace(params=params, opt_state=opt_state, model_state=loss.model_state)
        new = jax.tree.map(lambda a, b: b if a is b else jnp.where(finite, a, b), new, state)
        new = new.replace(step=state.step + 1, scale=state.scale.update(finite), skipped=jnp.where(finite, 0, state.skipped + 1))
        metrics = {"loss": mean, "grad_norm": grad_norm, "param_norm": param_norm, "weight": loss.weight,
                   "skipped": new.skipped, **new.scale.metrics()}
        if loss.aux is not None:
            metrics["aux"] = jax.tree.map(lambda x: x / loss.weight, loss.aux)
        return _at_rest(self.policy, new, places), metrics


def _clipped(grads, grad_norm, clip_norm: float | None):
    if clip_norm is None:
        return grads
    factor = jnp.minimum(1.0, clip_norm / grad_norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _at_rest(policy, state, places):
    """Without it, XLA would give the parameters whatever sharding the update had."""
    put = lambda p, x: jax.lax.with_sharding_constraint(x, rules.sharding(policy.mesh, p.spec))
    return jax.tree.map(put, places, state, is_leaf=lambda x: isinstance(x, rules.Placement))


def _check_state(state):
    if not isinstance(state, TrainState):
        raise ModelError(f"a train_step's state is what zero.init returned, not a {type(state).__name__}; "
                         "for a training state of your own use zero.create and zero.jit.")


_EVALUATION = 0xFFFFFFFF  # in place of a step's number


def _fields(loss_fn, jitted, state, batch) -> dict:
    return {"loss_fn": fingerprint.of_function(loss_fn), "state": fingerprint.shapes(state), "batch": fingerprint.shapes(batch),
            "program": fingerprint.of_program(jitted, state, batch)}


class EvalStep:
    """`evaluate(state, batch) -> metrics`; made by `Zero.eval_step`, which documents it."""

    def __init__(self, policy: Policy, loss_fn, compiler_options: dict | None):
        self.policy, self.loss_fn = policy, loss_fn
        self._jitted, self._agreed = jax.jit(self._evaluate, compiler_options=compiler_options), agreement.Once()

    def __call__(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        batches.check_given(self.policy, batch)
        donation.check_alive("eval_step", state)
        self._agreed(self.policy, "eval_step", lambda: _fields(self.loss_fn, self._jitted, state, batch), state, batch)
        return self._jitted(state, batch)

    def _evaluate(self, state, batch):
        _check_state(state)
        batches.check(self.policy, batch)
        batch = jax.lax.with_sharding_constraint(batch, batches.sharding(self.policy))
        judge = lambda model, batch, rng: loss.normalise(loss.call(self.loss_fn, model, batch, rng)).replace(model_state=None)
        result = transforms.gathered(self.policy, judge, 0)(state, batch, jax.random.fold_in(state.rng, _EVALUATION))
        metrics = {"loss": result.total / result.weight, "weight": result.weight}
        return metrics if result.aux is None else metrics | {"aux": jax.tree.map(lambda x: x / result.weight, result.aux)}
