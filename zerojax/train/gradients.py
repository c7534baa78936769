"""Gradients of a batch, in microbatches and either way to differentiate, reduced as the stage says.

    params (shards)        -> gathered once (stages 1, 2), or where the program reads them (3)
    for each microbatch    -> gradients, scattered where they arise (2, 3) or kept as they are (1)
    gradients that were kept are reduced, and the sum is divided by the summed weight
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import BatchError, LossError
from zerojax.gather.pair import PARTS, Pair
from zerojax.layout import rules
from zerojax.layout.rules import Placement
from zerojax.plan.demand import Use
from zerojax.policy import Policy
from zerojax.train import choice, parameters, study
from zerojax.train.loss import Loss
from zerojax.train.study import Objective, TracedLoss

Tree = Any


@dataclasses.dataclass(frozen=True)
class Differentiator:
    """The gradient of an objective under a policy.

    Attributes:
      traced: the objective, traced for a microbatch or for one device's part of it.
      pairs: one per parameter, in the objective's order.
      state_pairs: one per leaf of the model's state.
      per_device: whether each device differentiates its own part.
      why: the reason for `per_device`, as text.
      accumulate: number of microbatches.
    """

    policy: Policy
    objective: Objective
    traced: TracedLoss
    pairs: tuple[Pair, ...]
    state_pairs: tuple[Pair, ...]
    per_device: bool
    why: str
    accumulate: int = 1

    def __call__(self, params: list, model_state: Tree, inputs: list,
                 scale) -> tuple[list, Loss, Tree]:
        """Returns (gradients, the `Loss` summed over the batch, aux).

        The gradients are those of the mean loss with respect to the trained parameters, each at
        the parameter's spec and in its dtype.
        """
        gathered = parameters.gather_once(self.policy, self.pairs, params)
        seeds = self._seeds(inputs)
        differentiate = self._accumulated if self.accumulate > 1 else self._microbatch
        grads, loss, aux = differentiate(params, gathered, model_state, inputs, scale)
        return self._reduced(grads, loss.weight, scale, seeds), loss, aux

    def uses(self, still: Sequence[bool] = ()) -> tuple[Use, ...]:
        """Returns how often a microbatch needs each leaf of the parameters and of the state.

        Args:
          still: whether the optimizer never moves each trained parameter, so that XLA drops its
            gradient.
        """
        unmoved = itertools.chain(still, itertools.repeat(False))
        dropped = [leaf.trained and next(unmoved) for leaf in self.objective.leaves]
        found = parameters.uses_in(self.traced.jaxpr, (*self.pairs, *self.state_pairs))
        return tuple(dataclasses.replace(use, scatters=0) if drop else use
                     for use, drop in itertools.zip_longest(found, dropped))

    def forward(self, params: list, model_state: Tree, inputs: list) -> Any:
        """Evaluates whole parameters on a microbatch split into parts, without gradients.

        Raises what the loss or jax raises if the program cannot be split into parts.
        """

        def evaluate(part, state, inputs):
            return [], *part.traced(params, jax.tree.leaves(state), inputs)

        return self._over_parts(evaluate, [], model_state, inputs)

    def _accumulated(self, params, gathered, model_state, inputs, scale):
        """Returns the same as `_microbatch`, with gradients and losses summed over microbatches."""
        batch, others = self.objective.divided(inputs)

        def body(carry, xs):
            sums, model_state = carry
            micro, index = xs
            folded, mine = self._folded(self.objective.joined(micro, others), index)
            grads, loss, aux = folded._microbatch(params, gathered, model_state, mine, scale)
            sums = self._constrained([total + x.astype(total.dtype)
                                      for total, x in zip(sums, grads, strict=True)])
            return (sums, loss.model_state), (loss.replace(model_state=None), aux)

        start = self._constrained(self._zeros(params)), model_state
        micro = batches.microbatches(self.policy, batch, self.accumulate)
        xs = micro, jnp.arange(self.accumulate)
        (grads, model_state), (losses, aux) = jax.lax.scan(body, start, xs)
        # a microbatch takes every n-th example, see `batches.microbatches`
        aux = jax.tree.map(lambda x: _merged(x.swapaxes(0, 1)), aux)
        loss = jax.tree.map(lambda x: x.sum(0), losses)
        return grads, loss.replace(model_state=model_state), aux

    def _microbatch(self, params, gathered, model_state, inputs, scale):
        """Returns (gradients of the total, loss, aux) of one microbatch."""
        seeds = self._seeds(inputs)  # the same for all parts, so that no device needs another's
        if not self.per_device:
            return self._whole(params, gathered, seeds, model_state, inputs, scale)

        def differentiate(part, state, inputs):
            return part._whole(params, gathered, seeds, state, inputs, scale)

        grads_out = [0 if pair.at_end else None for pair in self._of_trained(self.pairs)]
        return self._over_parts(differentiate, grads_out, model_state, inputs)

    def _whole(self, params, gathered, seeds, model_state, inputs, scale):
        """Returns (gradients of the total, loss, aux) of inputs that are not split any further."""
        objective = self.objective
        state, treedef = jax.tree.flatten(model_state)
        is_trained = [leaf.trained for leaf in objective.leaves]
        is_fp8 = [leaf.overwritten for leaf in objective.state_leaves]

        def total(trained, fp8):
            xs = trees.put(params, is_trained, trained)
            ys = trees.put(state, is_fp8, fp8)
            xs = parameters.opened(objective.leaves, self.pairs, xs, gathered, seeds)
            ys = parameters.opened(objective.state_leaves, self.state_pairs, ys)
            loss, aux = self.traced(xs, ys, inputs)
            return loss.total, (loss, aux)

        _, pull, (loss, aux) = jax.vjp(total, trees.taken(params, is_trained),
                                       trees.taken(state, is_fp8), has_aux=True)
        weight = self._scaled_weight(loss, scale)
        grads, fp8 = pull(scale.seed(weight))
        after = treedef.unflatten(trees.put(jax.tree.leaves(loss.model_state), is_fp8, fp8))
        return scale.unscale(grads, weight), loss.replace(model_state=after), aux

    def _seeds(self, inputs: list) -> list:
        """Returns the seeds of random rounding, which differ between microbatches."""
        return parameters.seeds_of(self.pairs, self.traced.key_among(inputs))

    def _scaled_weight(self, loss: Loss, scale):
        """Returns the weight for the scale: per device their mean, so that all scale alike."""
        has_scale = bool(scale.metrics())  # `NoScale` has none, and does not read the weight
        return jax.lax.pmean(loss.weight, PARTS) if self.per_device and has_scale else loss.weight

    def _over_parts(self, run: Callable, grads_out: list, model_state: Tree, inputs: list):
        """Maps `run` over the parts of a microbatch, one per device; returns the same as `run`.

        Args:
          run: a function of (differentiator of a part, model state, inputs of the part), which
            returns (gradients, loss, aux).
          grads_out: for each gradient, 0 if it stays one per part, None if `run` reduces it.
        """
        batch, others = self.objective.divided(inputs)

        def one(batch, index):
            folded, mine = self._folded(self.objective.joined(batch, others), index)
            grads, loss, aux = run(folded, _fold_keys(model_state, index), mine)
            return grads, loss.replace(model_state=None), aux, *self._counted(loss.model_state)

        mapped = jax.vmap(one, out_axes=(grads_out, 0, 0, None, 0), axis_name=PARTS,
                          spmd_axis_name=self.policy.batch_axes)
        parts = list(map(self._split, batch))
        grads, loss, aux, counts, keys = mapped(parts, jnp.arange(self.policy.parts))
        loss = jax.tree.map(lambda x: x.sum(0), loss)
        state = _recounted(model_state, counts, keys)
        return grads, loss.replace(model_state=state), jax.tree.map(_merged, aux)

    def _split(self, x):
        """Returns `[B, ...]` as `[parts, B / parts, ...]`, one part per device."""
        sharding = NamedSharding(self.policy.mesh, P(self.policy.batch_axes))
        n = self.policy.parts
        parts = x.reshape(n, x.shape[0] // n, *x.shape[1:])
        return jax.lax.with_sharding_constraint(parts, sharding)

    def _counted(self, model_state: Tree) -> tuple[list, list]:
        """Returns (changed leaves that are no keys, changed keys); None in place of other leaves.

        The former do not depend on the batch, like the counts of random streams.
        """
        leaves = list(zip(jax.tree.leaves(model_state), self.traced.written, strict=True))
        return ([x if changed and not trees.is_key(x) else None for x, changed in leaves],
                [x if changed and trees.is_key(x) else None for x, changed in leaves])

    def _folded(self, inputs: list, number) -> tuple["Differentiator", list]:
        """Returns (differentiator, inputs) with a number folded into the random keys of both."""
        traced, inputs = self.traced.folded(inputs, number)
        return dataclasses.replace(self, traced=traced), inputs

    def _of_trained(self, xs: Sequence) -> list:
        """Returns the elements of `xs`, one per parameter, that belong to trained parameters."""
        return trees.taken(xs, [leaf.trained for leaf in self.objective.leaves])

    def _zeros(self, params) -> list:
        """Returns zeros to which the gradients of the microbatches are added."""
        trained = zip(self._of_trained(self.pairs), self._of_trained(params), strict=True)
        return [jnp.zeros((self.policy.parts, *x.shape) if pair.at_end else x.shape,
                          self._sum_dtype(x.dtype)) for pair, x in trained]

    def _sum_dtype(self, dtype):
        """Returns the dtype of summed gradients; complex and float64 ones keep theirs."""
        is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float64
        return self.policy.precision.accumulate if is_narrow else dtype

    def _constrained(self, grads: Sequence) -> list:
        """Constrains gradients: one per part over the parts, others to their spec."""
        specs = [P(self.policy.batch_axes, *pair.whole) if pair.at_end else pair.spec
                 for pair in self._of_trained(self.pairs)]
        return [pair.constrain(x, spec) for pair, x, spec
                in zip(self._of_trained(self.pairs), grads, specs, strict=True)]

    def _reduced(self, grads: Sequence, weight, scale, seeds: Sequence) -> list:
        """Returns gradients of the mean from those of the total, at their spec and dtype.

        Sums at the end are scaled like those at each read: float16 cannot hold a large total.
        """

        def mean(pair, x, seed):
            if pair.at_end:
                x = scale.unscale(pair.sum_parts(scale.rescale(x, weight), seed), weight)
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return pair.constrain((wide / weight).astype(pair.params), pair.spec)

        return list(map(mean, self._of_trained(self.pairs), grads, self._of_trained(seeds)))


def _merged(x):
    """Returns `[n, m, ...]` as `[n * m, ...]`."""
    return x.reshape(-1, *x.shape[2:])


def _fold_keys(model_state: Tree, number) -> Tree:
    return jax.tree.map(lambda x: trees.fold(x, number) if trees.is_key(x) else x, model_state)


def _recounted(model_state: Tree, counts: Sequence, keys: Sequence) -> Tree:
    """Returns the model's state after all parts, with the keys of the first part."""

    def one(old, count, key):
        if count is not None:
            return count
        return old if key is None else key[0]

    leaves, treedef = jax.tree.flatten(model_state)
    return treedef.unflatten(map(one, leaves, counts, keys))


def differentiator(policy: Policy, objective: Objective, places: Sequence[Placement],
                   state_places: Sequence[Placement], model_state: Tree, inputs: list,
                   accumulate: int = 1) -> Differentiator:
    """Traces the objective over one microbatch and chooses the way to differentiate it.

    If each device differentiates its own part, the objective is traced over one part as well.

    Raises:
      PolicyError: the policy demands what the way to differentiate cannot do.
      LossError: aux of a batch that is split does not have one row per example.
      BatchError: with `accumulate`, the loss closes over what may belong to the batch.
    """

    def traced(rows: int) -> TracedLoss:
        return study.trace(policy, objective, model_state, _cut(objective, inputs, rows))

    def built(per_device: bool, why: str, loss: TracedLoss) -> Differentiator:
        make_pairs = functools.partial(parameters.make_pairs, policy, per_device=per_device)
        pairs = make_pairs(objective.leaves, places, loss.jaxpr)
        state_pairs = make_pairs(objective.state_leaves, state_places)
        return Differentiator(policy, objective, loss, tuple(pairs), tuple(state_pairs),
                              per_device, why, accumulate)

    def by_parts(why: str) -> Differentiator:
        part = rows // policy.parts
        split = built(True, why, traced(part))
        if part < rows:
            _check_aux(split.traced, part, lambda: micro, rows)
        whole = study.avals(policy, objective.leaves)
        jax.eval_shape(split.forward, whole, model_state, _cut(objective, inputs, rows))
        return split

    rows = objective.examples // accumulate
    micro = traced(rows)
    study.warn_of_constants(micro)
    study.warn_of_no_gradient(micro, objective.leaves)
    study.warn_of_means(micro, len(objective.leaves), lambda: traced(2 * rows))
    _check_overwritten(objective, micro, accumulate)
    if accumulate > 1:
        _check_closed_over(objective, micro, accumulate)
        _check_aux(micro, rows, lambda: traced(2 * rows), 2 * rows)
    obstacles = choice.find_obstacles(policy, objective, model_state, micro)
    per_device, why = choice.choose(policy, micro.is_sum, obstacles)
    if per_device:
        try:
            return by_parts(why)
        except Exception as error:  # of any class: from the loss, or from jax for a part of a batch
            per_device, why = choice.fall_back(policy, error)
    return built(per_device, why, micro)


def _check_overwritten(objective: Objective, micro: TracedLoss, accumulate: int):
    overwritten = any(leaf.overwritten and leaf.trained for leaf in objective.leaves)
    if overwritten and (micro.is_sum or accumulate > 1):
        raise LossError(f"the gradients of {rules.OVERWRITTEN} are new values, which must not be "
                        "divided by a weight or averaged over microbatches; return a bare mean and "
                        "write accumulate=1, or use zero.init and train_step.")


def _check_closed_over(objective: Objective, micro: TracedLoss, accumulate: int):
    if why := choice.closed_over(objective, micro):
        raise BatchError(f"accumulate={accumulate}, but the loss {why}, which is not split with "
                         "the batch; pass it as an argument and name it in batch_argnums.")


def _check_aux(traced: TracedLoss, rows: int, other: Callable[[], TracedLoss], other_rows: int):
    """Raises `LossError` for aux whose first dimension is not that of the examples.

    Args:
      rows: the number of examples for which the loss was traced.
      other: returns the loss traced for `other_rows` examples.
    """
    if not traced.aux:
        return
    for a, b in zip(traced.aux, other().aux, strict=True):
        if (a.shape[:1], b.shape[:1]) != ((rows,), (other_rows,)):
            raise LossError(f"aux has an array of shape {a.shape}, which is not one row for each "
                            f"of the {rows} examples in a part of the batch, so that the parts "
                            "cannot be joined; return sums with zj.Loss(total, weight, aux), or "
                            "write accumulate=1 and Zero(gradients='global').")


def _cut(objective: Objective, inputs: Sequence, rows: int) -> list:
    """Returns the inputs with the shapes of `rows` examples in place of the batch's arrays."""
    return [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) if is_batch else x
            for x, is_batch in zip(inputs, objective.is_batch, strict=True)]
