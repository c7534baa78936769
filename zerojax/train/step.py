"""Training and evaluation steps: jitted functions of a state and a batch, traced once per shape.

    gradients of the mean, at rest (see `gradients`)
    norm, clip, finite?    -> optax update on shards, or the state as it was
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zerojax import errors, trees
from zerojax.data import batch as batches
from zerojax.errors import ModelError, PolicyError, message_last
from zerojax.plan import audit, cache, profile
from zerojax.plan.demand import Use
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.processes import fingerprint
from zerojax.train import checks, loss, optimizer, planning, state_layout, transforms
from zerojax.train.gradients import Differentiator
from zerojax.train.loss import Loss
from zerojax.train.optimizer import Update
from zerojax.train.preflight import Preflight
from zerojax.train.skips import Skips
from zerojax.train.state import TrainState
from zerojax.train.transforms import LossCall
from zerojax.wire import Wire

_CALL = "state, metrics = step(state, batch)"
_EVALUATION = 0xFFFFFFFF  # folded into the key of an evaluation, in place of a step's number


def norm(tree) -> jax.Array:
    """Returns the global 2-norm, in float32.

    >>> float(norm([jnp.array([3.0]), jnp.array([4.0])]))
    5.0
    """
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


class TrainStep:
    """`step(state, batch) -> (state, metrics)`, made by `Zero.train_step`, which documents it.

    The given state is donated: continue with the returned one.

    Attributes:
      policy: the `Zero` that made it.
      loss_fn, tx, accumulate, clip_norm, max_skipped, compiler_options: as given to
        `Zero.train_step`.
    """

    def __init__(self, policy: Policy, loss_fn, tx, *, accumulate: int, clip_norm: float | None,
                 max_skipped: int | None, compiler_options: dict | None):
        checks.check_optimizer("train_step", loss_fn, tx, "(loss_fn, tx)")
        checks.check_loss("train_step", loss_fn, "(loss_fn, tx)")
        transforms.check_accumulate("train_step", accumulate)
        if clip_norm is not None and not _is_positive(clip_norm):
            raise PolicyError(f"train_step(clip_norm={clip_norm!r}): write a positive norm, or "
                              "None to leave gradients unclipped.")
        if max_skipped is not None and not _is_positive(max_skipped):
            raise PolicyError(f"train_step(max_skipped={max_skipped!r}): write the number of "
                              "consecutive steps, 1 or more, or None.")
        self.policy = policy
        self.loss_fn = loss_fn
        self.tx = tx
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        profile.check_there(compiler_options or {})
        self.compiler_options = compiler_options or {}
        self._jitted = jax.jit(self._step, donate_argnums=0, compiler_options=compiler_options)
        self._preflight = Preflight(policy, "train_step", donate=True)
        self._skips = Skips(max_skipped)
        self._dtypes = []

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._settings().items()
                          if value not in (None, {}))
        return (f"{type(self).__name__}({checks.name_of(self.loss_fn)}{options}): (state, batch) "
                f"-> (state, metrics)\n  {self.policy!r}")

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name)
                for name in ("accumulate", "clip_norm", "max_skipped", "compiler_options")}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with message_last:
            checks.check_state("train_step", state, batch, _CALL)
            self._skips.check(state)
            self._dtypes = self._dtypes or self._expected_dtypes(state)
            state = self._preflight(state, (batch,), batch=batch, dtypes=self._dtypes,
                                    fields=lambda state: self._fields(state, batch))
            state, metrics = self._preflight.dispatch(self._jitted, state, batch)
            self._skips.record(state, metrics)
            return state, metrics

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """Lowers as `jax.jit` does; `state` and `batch` may be `ShapeDtypeStruct`s.

        A batch without shardings gets the shardings that the step expects.
        """
        with message_last:
            checks.check_state("train_step", state, batch, "step.lower(state, batch)")
            return self._jitted.lower(state, batches.placed(self.policy, batch))

    def plan(self, state: TrainState, batch: Any, *, cache: bool = True) -> Plan:
        """Returns the memory, collectives and time of a step, and whether they are those of ZeRO.

        Nothing is run or allocated. Over simulated GPUs (`zj.make_mesh(topology=...)`) a child
        process compiles the step, and `cache` keeps the result on disk, under ~/.cache/zerojax or
        $ZEROJAX_CACHE. Over real devices, their own compiler runs in this process.

        Args:
          state, batch: arrays, or `ShapeDtypeStruct`s such as `Zero.abstract` returns.

        Raises:
          CompileError: the compiler failed, aborted or ran out of memory; the text has its last
            lines.
          BatchError, LossError, PolicyError: as for the step.
        """
        checks.check_state("train_step", state, batch, "step.plan(state, batch)")
        self._expected_dtypes(state)
        batches.check(self.policy, batch, self.accumulate)
        batches.check_mesh(self.policy, (state, batch))
        batch = batches.placed(self.policy, batch)
        with message_last:
            per_device, why, uses = self._way(state, batch)
        return planning.planned(self.policy, self._jitted, state, (batch,), {},
                                accumulate=self.accumulate, per_device=per_device, why=why,
                                uses=uses, compiler_options=self.compiler_options, cache=cache)

    def wire_error(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        """Returns how much the formats of `Wire` change the gradient of each trained parameter.

        It is computed with and without them, which takes two steps' time; the state is not changed.

        Returns:
          float32 scalars by path: the 2-norm of the difference, divided by that of the gradient
          without the formats; 0 if both are 0.
        """
        checks.check_state("train_step", state, batch, "step.wire_error(state, batch)")
        batches.check(self.policy, batch, self.accumulate)
        with message_last:
            return self._wire_error(state, batch)

    @functools.cached_property
    def _wire_error(self):
        plain = dataclasses.replace(self.policy, wire=Wire())

        def errors(state, batch):
            ours, exact = (self._gradients(policy, state, batch) for policy in (self.policy, plain))
            paths = [leaf.path for leaf in state.model.leaves if leaf.trained]
            return {path: norm([a - b]) / jnp.maximum(norm([b]), jnp.finfo("float32").tiny)
                    for path, a, b in zip(paths, ours, exact, strict=True)}

        return jax.jit(errors, compiler_options=self.compiler_options)

    def _gradients(self, policy: Policy, state, batch) -> list:
        call = self._loss_call(policy, state, batch)
        grads, _, _ = call.differentiator(policy)(call.model.flat, state.model_state, call.inputs,
                                                  state.scale)
        return grads

    def _expected_dtypes(self, state) -> list:
        """Returns the dtypes of the leaves of a state with this optimizer.

        Raises `PolicyError` for a state that the optimizer cannot take.
        """
        optimizer.check_padding(self.tx, state.trained)
        shapes = jax.eval_shape(
            lambda state: state.replace(opt_state=optimizer.init(self.tx, state.trained)), state)
        return [x.dtype for x in jax.tree.leaves(shapes)]

    def _fields(self, state, batch) -> dict:
        return {**self._settings(), "profile": cache.named_files(self.compiler_options),
                **_fields(self.loss_fn, self._jitted, state, batch)}

    def _way(self, state, batch) -> tuple[bool, str, tuple[Use, ...]]:
        """Returns whether each device differentiates its own part, the reason, and the reads."""
        found = []

        def studied(state, batch):
            _, differentiator, update = self._studied(state, batch)
            found.append((differentiator.per_device, differentiator.why,
                          differentiator.uses(update.still)))

        jax.eval_shape(studied, state, batch)
        return found[0]

    def _step(self, state: TrainState, batch):
        call, differentiator, update = self._studied(state, batch)
        grads, loss, _ = differentiator(call.model.flat, state.model_state, call.inputs,
                                        state.scale)
        grads = jax.tree.structure(state.trained).unflatten(grads)
        return self._finish(state, update, grads, loss)

    def _studied(self, state, batch) -> tuple[LossCall, Differentiator, Update]:
        checks.check_dtypes(self.policy, state)
        self._check_optimizer(state)
        batches.check(self.policy, batch, self.accumulate)
        trained = state.trained
        update = optimizer.trace(self.tx, trained, state.opt_state, trained, jnp.float32(0))
        if all(update.still):
            errors.warn("the optimizer moves no parameter: all of its updates are 0, as those of a "
                        "learning rate of 0 are.")
        call = self._loss_call(self.policy, state, batch)
        return call, call.differentiator(self.policy), update

    def _loss_call(self, policy: Policy, state, batch) -> LossCall:
        """Returns the loss of a state and a batch, to be called with the key of the step."""
        def judge(model, batch, rng):
            return loss.call(self.loss_fn, model, batch, rng)

        key = jax.random.fold_in(state.rng, state.step)
        return LossCall.of(policy, judge, state, (batch, key), {}, accumulate=self.accumulate)

    def _check_optimizer(self, state):
        expected = jax.eval_shape(functools.partial(optimizer.init, self.tx), state.trained)
        ours, theirs = _shapes(expected), _shapes(state.opt_state)
        same_tree = jax.tree.structure(expected) == jax.tree.structure(state.opt_state)
        if ours == theirs and same_tree:
            return
        given, wanted = (_described(x, other) for x, other in
                         ((state.opt_state, ours), (expected, theirs)))
        raise ModelError("train_step was given another optimizer than zero.init: the state has "
                         f"{given}, and the step needs {wanted}; give both the same tx: "
                         "zero.init(init_fn, tx, ...) and zero.train_step(loss_fn, tx).")

    def _finish(self, state, update: Update, grads, loss: Loss):
        """Returns the state after an update, or as it was if that is not finite; and metrics."""
        mean = loss.total / loss.weight
        grad_norm = norm(update.moved(jax.tree.leaves(grads)))
        grads = _clipped(grads, grad_norm, self.clip_norm)
        with jax.named_scope(audit.OPTIMIZER):
            updates, opt_state = update(grads, state.opt_state, state.trained, mean)
            params = state.put(update.applied(state.trained, updates))
        trained = trees.taken(jax.tree.leaves(params), state.model.trained)
        param_norm = norm(update.moved(trained))  # also shows updates that are not finite
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(mean) & jnp.isfinite(param_norm)
        new = state.replace(params=params, opt_state=opt_state, model_state=loss.model_state)
        new = jax.tree.map(lambda a, b: b if a is b else jnp.where(finite, a, b), new, state)
        new = new.replace(step=state.step + 1, scale=state.scale.update(finite),
                          skipped=jnp.where(finite, 0, state.skipped + 1))
        metrics = {"loss": mean, "grad_norm": grad_norm, "param_norm": param_norm,
                   "weight": loss.weight, "skipped": new.skipped, **new.scale.metrics()}
        return _at_rest(self.policy, new, state), metrics | _reported_aux(loss)


class EvalStep:
    """`evaluate(state, batch) -> metrics`, made by `Zero.eval_step`, which documents it.

    Attributes:
      policy: the `Zero` that made it.
      loss_fn: as given to `Zero.eval_step`.
    """

    def __init__(self, policy: Policy, loss_fn, compiler_options: dict | None):
        checks.check_loss("eval_step", loss_fn, "(loss_fn)")
        self.policy = policy
        self.loss_fn = loss_fn
        self._jitted = jax.jit(self._evaluate, compiler_options=compiler_options)
        self._preflight = Preflight(policy, "eval_step", donate=False)

    def __repr__(self) -> str:
        return (f"EvalStep({checks.name_of(self.loss_fn)}): (state, batch) -> metrics\n"
                f"  {self.policy!r}")

    def __call__(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        with message_last:
            checks.check_state("eval_step", state, batch, "metrics = evaluate(state, batch)")
            state = self._preflight(
                state, (batch,), batch=batch,
                fields=lambda state: _fields(self.loss_fn, self._jitted, state, batch))
            return self._preflight.dispatch(self._jitted, state, batch)

    def _evaluate(self, state, batch):
        batches.check(self.policy, batch)
        batch = jax.lax.with_sharding_constraint(batch, batches.sharding(self.policy))

        def judge(model, batch, rng):
            result = loss.normalise(loss.call(self.loss_fn, model, batch, rng))
            return result.replace(model_state=None)

        key = jax.random.fold_in(state.rng, _EVALUATION)
        result = transforms.gathered(self.policy, judge, 0)(state, batch, key)
        metrics = {"loss": result.total / result.weight, "weight": result.weight}
        return metrics | _reported_aux(result)


def _reported_aux(loss: Loss) -> dict:
    if loss.aux is None:
        return {}
    return {"aux": jax.tree.map(lambda x: x / loss.weight, loss.aux)}


def _clipped(grads, grad_norm: jax.Array, clip_norm: float | None):
    if clip_norm is None:
        return grads
    factor = jnp.minimum(1.0, clip_norm / grad_norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _at_rest(policy: Policy, new: TrainState, old: TrainState) -> TrainState:
    """Constrains a state to its shardings; XLA would let parameters keep those of the update."""
    return jax.lax.with_sharding_constraint(new, state_layout.shardings(policy, old))


def _is_positive(x: Any) -> bool:
    try:
        return bool(x > 0)
    except TypeError:  # text, for example
        return False


def _shapes(tree) -> list[tuple[str, tuple[int, ...]]]:
    return [(trees.path_of(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]


def _described(opt_state, other: list) -> str:
    """Returns the kinds of an optimizer's state, and some of its shapes that `other` lacks."""
    kinds = ", ".join(optimizer.kinds(opt_state)) or "no optimizer state"
    own = [f"{path} {shape}" for path, shape in _shapes(opt_state) if (path, shape) not in other]
    return kinds + (f" (with {', '.join(own[:2])})" if own else "")


def _fields(loss_fn, jitted, state, batch) -> Mapping[str, Any]:
    """Returns the values that all processes must agree on to run the same step."""
    return {"loss_fn": fingerprint.of_function(loss_fn), "state": fingerprint.shapes(state),
            "batch": fingerprint.shapes(batch),
            "program": fingerprint.of_program(jitted, state, batch)}
