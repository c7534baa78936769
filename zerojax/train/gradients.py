"""Gradients of a batch: in microbatches, in either way to differentiate, each reduced as the stage says.

    params (shards) --gather once (stages 1, 2)--> w
    for each microbatch:   the program reads params, gathering (3) or not -> gradients, scattered where read (2, 3) or kept (1)
    reduce what was kept   -> gradients (shards) / summed weight
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import BatchError, LossError
from zerojax.gather import rewrite
from zerojax.gather.pair import PARTS, Gather
from zerojax.layout import placement, rules
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import study
from zerojax.train.loss import Loss
from zerojax.train.study import Objective, Program

Tree = Any


def pairs(policy: Policy, leaves: Sequence[Leaf], places: Sequence[Placement], jaxpr: Any = None,
          per_device: bool = False) -> list[Gather]:
    """The pair for each leaf of a model. Stages 0 and 1, and whole leaves, reduce once a step where the program can say so.

    Args:
      jaxpr: of these leaves as its first arguments; with one loss, it says which are read in a wider dtype too.
    """
    wide = {} if per_device or jaxpr is None else _widened(leaves, jaxpr)

    def pair(leaf, place):
        local = per_device and (policy.stage <= 1 or not place.sharded)
        compute = placement.computed(policy, leaf)
        reduce = policy.precision.reduced(leaf.path, leaf.dtype) if leaf.trained else compute
        return Gather(policy.mesh, place.spec, place.whole, leaf.dtype, compute, reduce, policy.axes, policy.replica_axis,
                      per_device, local, whole_first=policy.replica_axis is None, wide=wide.get(leaf.path, ""),
                      least=policy.min_shard, extra=_extra(leaf, place))

    return list(map(pair, leaves, places))


def _extra(leaf: Leaf, place: Placement) -> tuple[int, ...]:
    return tuple(n - d for n, d in zip(place.kept, leaf.shape, strict=True)) if place.kept else ()


def _widened(leaves: Sequence[Leaf], jaxpr) -> dict[str, str]:
    variables = getattr(jaxpr, "jaxpr", jaxpr).invars
    return rewrite.widened(jaxpr, {v: leaf.path for v, leaf in zip(variables, leaves, strict=False) if leaf.trained})


def gather_once(policy: Policy, pairs: Sequence[Gather], params: Sequence) -> list:
    """What is gathered at the start of a step: stages 1 and 2 all that is sharded, else nothing."""
    return [g.top(x) if policy.stage in (1, 2) and g.sharded else None for g, x in zip(pairs, params, strict=True)]


def opened(leaves: Sequence[Leaf], pairs: Sequence[Gather], xs: Sequence, gathered: Sequence | None = None) -> list:
    """Parameters or state as a program is given them: pending where they are sharded, else whole in the compute dtype."""

    def one(leaf, pair, x, whole):
        if pair.sharded or pair.extra:
            return rewrite.Pending.of(x, whole, pair, pair.compute, leaf.path)
        return x if leaf.dtype == pair.compute else x.astype(pair.compute)

    return list(map(one, leaves, pairs, xs, gathered or [None] * len(xs)))


@dataclasses.dataclass(frozen=True)
class Differentiator:
    """Gradients of an objective under a policy.

    Attributes:
      program: the objective for a microbatch, or for one device's part of it.
      pairs, state_pairs: of the parameters, in the objective's order, and of the model's state.
      per_device: the way to differentiate; why: the reason, for people.
      accumulate: number of microbatches.
    """

    policy: Policy
    objective: Objective
    program: Program
    pairs: tuple[Gather, ...]
    state_pairs: tuple[Gather, ...]
    per_device: bool
    why: str
    accumulate: int = 1

    def __call__(self, params: list, model_state: Tree, inputs: list, scale) -> tuple[list, Loss, Tree]:
        """(gradients of the mean by what is trained, each at its spec in the parameter's dtype; the `Loss` summed over the batch;
        aux)."""
        gathered = gather_once(self.policy, self.pairs, params)
        grads, loss, aux = self._accumulated(params, gathered, model_state, inputs, scale)
        return self._reduced(grads, loss.weight), loss, aux

    def _accumulated(self, params, gathered, model_state, inputs, scale):
        dtype = self.policy.precision.accumulate

        run = lambda made, *args: (made._parts if made.per_device else made._pull)(params, gathered, *args, scale)
        if self.accumulate == 1:
            return run(self, model_state, inputs)

        def body(carry, xs):
            (grads, model_state), (micro, index) = carry, xs
            made, mine = self._folded(self._merged(micro, self._rest(inputs)), index)
            new, loss, aux = run(made, model_state, mine)
            grads = self._kept([a + b.astype(a.dtype) for a, b in zip(grads, new, strict=True)])
            return (grads, loss.model_state), (loss.replace(model_state=None), aux)

        # complex and float64 gradients stay as wide as they are
        wide = lambda x: dtype if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.float64 else x.dtype
        trained = zip(self._trained(self.pairs), self._trained(params), strict=True)
        zeros = self._kept([jnp.zeros(self._shape(g, x), wide(x)) for g, x in trained])
        micro = batches.microbatches(self.policy, self._batch(inputs), self.accumulate)
        (grads, model_state), (losses, aux) = jax.lax.scan(body, (zeros, model_state), (micro, jnp.arange(self.accumulate)))
        aux = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), aux)
        return grads, jax.tree.map(lambda x: x.sum(0), losses).replace(model_state=model_state), aux

    def _pull(self, params, gathered, model_state, inputs, scale):
        objective, (state, treedef) = self.objective, jax.tree.flatten(model_state)
        trained, overwritten = ([getattr(leaf, name) for leaf in leaves] for name, leaves in (
            ("trained", objective.leaves), ("overwritten", objective.state)))

        def total(mine, scales):
            whole = opened(objective.leaves, self.pairs, trees.put(params, trained, mine), gathered)
            kept = opened(objective.state, self.state_pairs, trees.put(state, overwritten, scales))
            loss, aux = self.program(whole, kept, inputs)
            return loss.total, (loss, aux)

        _, pull, (loss, aux) = jax.vjp(total, trees.taken(params, trained), trees.taken(state, overwritten), has_aux=True)
        weight = jax.lax.pmean(loss.weight, PARTS) if self.per_device and scale.metrics() else loss.weight
        grads, scales = pull(scale.seed(weight))
        state = trees.put(jax.tree.leaves(loss.model_state), overwritten, scales)
        return scale.unscale(grads, weight), loss.replace(model_state=treedef.unflatten(state)), aux

    def forward(self, whole: list, model_state: Tree, inputs: list) -> Any:
        """The losses of the parts of a microbatch, of whole parameters; raises where the program cannot be split over them."""
        run = lambda made, whole, _, model_state, mine, scale: ([], *made.program(whole, jax.tree.leaves(model_state), mine))
        return self._parts(whole, [], model_state, inputs, None, run)

    def _parts(self, params, gathered, model_state, inputs, scale, run=None):
        grads_out = [] if run else [0 if g.local else None for g in self._trained(self.pairs)]
        run = run or Differentiator._pull
        n, axes = self.policy.parts, self.policy.batch_axes
        sharding = NamedSharding(self.policy.mesh, P(axes))
        split = lambda x: jax.lax.with_sharding_constraint(x.reshape(n, x.shape[0] // n, *x.shape[1:]), sharding)

        def part(batch, index):
            made, mine = self._folded(self._merged(batch, self._rest(inputs)), index)
            state = jax.tree.map(lambda x: trees.fold(x, index) if trees.is_key(x) else x, model_state)
            grads, loss, aux = run(made, params, gathered, state, mine, scale)
            return grads, loss.replace(model_state=None), aux, *self._counted(loss.model_state)

        mapped = jax.vmap(part, out_axes=(grads_out, 0, 0, None, 0), axis_name=PARTS, spmd_axis_name=axes)
        grads, loss, aux, counts, keys = mapped([split(x) for x in self._batch(inputs)], jnp.arange(n))
        loss, aux = jax.tree.map(lambda x: x.sum(0), loss), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux)
        return grads, loss.replace(model_state=self._recounted(model_state, counts, keys)), aux

    def _counted(self, state):
        """Leaves of the model's state that go on without the batch, as the counts of random streams do; and keys that it moved."""
        leaves = list(zip(jax.tree.leaves(state), self.program.written, strict=True))
        key = lambda x, written: written and trees.is_key(x)
        return [x if w and not key(x, w) else None for x, w in leaves], [x if key(x, w) else None for x, w in leaves]

    def _recounted(self, state, counts, keys):
        """The state after all parts: of keys, the first part's."""
        leaves, treedef = jax.tree.flatten(state)
        new = zip(leaves, counts, keys, strict=True)
        return treedef.unflatten([x if c is None and k is None else k[0] if c is None else c for x, c, k in new])

    def _folded(self, inputs: list, number) -> tuple["Differentiator", list]:
        """It and its inputs, with a number folded into the random keys of both."""
        program, inputs = self.program.folded(inputs, number)
        return dataclasses.replace(self, program=program), inputs

    def _batch(self, inputs):
        return [x for x, split in zip(inputs, self.objective.batch, strict=True) if split]

    def _rest(self, inputs):
        return [x for x, split in zip(inputs, self.objective.batch, strict=True) if not split]

    def _merged(self, batch, rest):
        """All inputs again, in their order."""
        batch, rest = iter(batch), iter(rest)
        return [next(batch if split else rest) for split in self.objective.batch]

    def _trained(self, xs: Sequence) -> list:
        """Those of what is trained."""
        return trees.taken(xs, [leaf.trained for leaf in self.objective.leaves])

    def _shape(self, pair, x):
        return (self.policy.parts, *x.shape) if pair.local else x.shape

    def _kept(self, grads):
        """Kept gradients over the parts, scattered ones at their spec."""
        spec = lambda g: P(self.policy.batch_axes, *g.whole) if g.local else g.spec
        return [g.constrain(x, spec(g)) for g, x in zip(self._trained(self.pairs), grads, strict=True)]

    def _reduced(self, grads, weight):
        """Gradients of the mean, each at its spec, in its parameter's dtype."""
        pairs = self._trained(self.pairs)
        whole = [g.sum_parts(x) if g.local else x for g, x in zip(pairs, grads, strict=True)]
        mean = lambda g, x: (x.astype(jnp.promote_types(x.dtype, jnp.float32)) / weight).astype(g.params)
        return [g.constrain(mean(g, x), g.spec) for g, x in zip(pairs, whole, strict=True)]


def differentiator(policy: Policy, objective: Objective, places: Sequence[Placement], state_places: Sequence[Placement],
                   model_state: Tree, inputs: list, accumulate: int = 1) -> Differentiator:
    """Traces the objective over one microbatch, and over one device's part of it where that is how it is differentiated.

    Raises:
      PolicyError: a wish that the way to differentiate cannot fulfil. LossError: aux that is not of examples, of a split batch.
    """
    traced = lambda rows: study.trace(policy, objective, model_state, _cut(objective, inputs, rows))

    def made(per_device: bool, why: str, program: Program) -> Differentiator:
        pair = tuple(pairs(policy, objective.leaves, places, program.jaxpr, per_device))
        state = tuple(pairs(policy, objective.state, state_places, per_device=per_device))
        return Differentiator(policy, objective, program, pair, state, per_device, why, accumulate)

    rows = objective.examples // accumulate
    part, whole = rows // policy.parts, traced(rows)
    study.warn_of_constants(whole)
    study.warn_of_means(whole, lambda: traced(2 * rows))
    if (whole.is_sum or accumulate > 1) and any(leaf.overwritten and leaf.trained for leaf in objective.leaves):
        raise LossError(f"the gradients of {rules.OVERWRITTEN} are new values, not to be divided by a weight or averaged "
                        "over microbatches: return a bare mean and write accumulate=1, or use zero.init and train_step.")
    if accumulate > 1 and (why := next((o for o in whole.obstacles if o.startswith(study.CLOSES_OVER)), "")):
        raise BatchError(f"accumulate={accumulate}, but the loss {why}, which is not split with the batch; pass it as an argument "
                         "and name it in batch_argnums.")
    if accumulate > 1 and whole.aux:
        _check_aux(whole, rows, traced(2 * rows), 2 * rows)
    per_device, why = study.choose(policy, whole)
    if per_device:
        try:
            by_parts = made(True, why, traced(part))
            if part < rows:
                _check_aux(by_parts.program, part, whole, rows)
            jax.eval_shape(by_parts.forward, study.avals(policy, objective.leaves), model_state, _cut(objective, inputs, rows))
            return by_parts
        except Exception as error:  # whatever the user's function or a rule of jax's raises for a part of a batch
            per_device, why = study.given_up(policy, error)
    return made(per_device, why, whole)


def _check_aux(program: Program, rows: int, other: Program, other_rows: int) -> None:
    """Raises `LossError` for aux whose first dimension does not grow with the batch, in programs of so many rows."""
    for a, b in zip(program.aux, other.aux, strict=True):
        if (a.shape[:1], b.shape[:1]) != ((rows,), (other_rows,)):
            raise LossError(f"aux holds an array of shape {a.shape}, which is not of the {rows} examples of a part that the batch "
                            "is split into, so that parts cannot be put together; return sums as zj.Loss(total, weight, aux), or "
                            "write accumulate=1 and Zero(gradients='global').")


def _cut(objective: Objective, inputs, rows: int) -> list:
    """Inputs as shapes, those of the batch of so many rows."""
    return [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) if split else x
            for x, split in zip(inputs, objective.batch, strict=True)]
