"""Gradients of one microbatch, in either way to differentiate; and the choice between them.

global       one loss over the whole microbatch; XLA finds the partial sums and reduces them.
per device   vmap over the batch's parts, one a device; each reduction is an operation of the program.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import census, layout
from zerojax.box import Box
from zerojax.census import Census, Tag
from zerojax.errors import LossError, ModelError, PolicyError, ZeroError
from zerojax.gather import PARTS, Gather
from zerojax.loss import Loss, call, normalise
from zerojax.policy import Policy
from zerojax.specs import Leaf, Placement

Tree = Any


def readers(policy: Policy, leaves: tuple[Leaf, ...], places: list[Placement], reads: Census, per_device: bool) -> list[Gather]:
    """The pair for each parameter. Stages 0 and 1, and whole leaves, reduce once a step where the program can say so."""

    def pair(leaf, place):
        local = per_device and (policy.stage <= 1 or not place.sharded)
        compute = policy.precision.compute or leaf.dtype
        reduce = policy.precision.reduce or compute
        return Gather(policy.mesh, place.spec, place.whole, leaf.dtype, compute, reduce, policy.axes, policy.replica_axis,
                      per_device, local, whole_first=policy.replica_axis is None or leaf.path in reads.hoisted)

    return list(map(pair, leaves, places))


def census_tags(policy: Policy, leaves: tuple[Leaf, ...], places: list[Placement]) -> list[Tag]:
    """What stands in for `readers` while a census is taken."""
    return [Tag(leaf.path, p.spec, p.whole, policy.precision.compute or leaf.dtype) for leaf, p in zip(leaves, places, strict=True)]


def gather_once(policy: Policy, readers: list[Gather], params: list) -> list:
    """What is gathered at the start of a step: stages 1 and 2 all that is sharded, else nothing."""
    return [g.top(x) if policy.stage in (1, 2) and g.sharded else None for g, x in zip(readers, params, strict=True)]


def boxes(box: type[Box], leaves: tuple[Leaf, ...], readers: list, params: list, gathered: list, reads: Census) -> list:
    """What the loss is given for each parameter: a box, or the whole array where the census says so."""
    made = [_box(box, leaf.path, g, x, w, reads) for leaf, g, x, w in zip(leaves, readers, params, gathered, strict=True)]
    return [b.read() if b.path in reads.eager else b for b in made]


def _box(box, path, reader, x, gathered, reads):
    if path not in reads.often or not reader.one_loss:
        return box(x, gathered, reader, path)
    # the uses' cotangents are added before they are widened, so that XLA sees one reduction
    return box(x.astype(reader.compute), gathered, reader.narrow(), path, True)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss function over a model of a known kind.

    Attributes:
      leaves: the parameters, in the order of `treedef`'s leaves.
      treedef: of the params tree.
    """

    loss_fn: Callable
    kind: Any
    leaves: tuple[Leaf, ...]
    treedef: Any

    def __call__(self, boxed: list, model_state: Tree, batch: Tree, rng: jax.Array) -> tuple[Loss, bool]:
        """The loss, with the model's state after it; and whether the function returned a `Loss`."""
        model = self.kind.join(self.treedef.unflatten(boxed), model_state)
        result = call(self.loss_fn, model, batch, rng)
        loss = normalise(result)
        after = self.kind.state_after(model, model_state)
        return loss.replace(model_state=_merge(after, loss.model_state)), isinstance(result, Loss)


def _merge(state, update):
    if update is None:
        return state
    if isinstance(state, dict) and state and update and not set(state) & set(update):
        raise LossError(f"Loss.model_state has {sorted(update)}, none of the model's collections {sorted(state)}; return what "
                        "apply(..., mutable=...) gave back, as it is.")
    merged = {k: unfreeze(update[k]) if k in update else v for k, v in state.items()} if isinstance(state, dict) else update
    if jax.tree.structure(merged) != jax.tree.structure(state):
        raise LossError(f"Loss.model_state has the tree {jax.tree.structure(merged)}, the model's state has "
                        f"{jax.tree.structure(state)}; return the collections that apply(..., mutable=...) gave back, as they are.")
    return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, state)


@dataclasses.dataclass(frozen=True)
class Study:
    """What one abstract trace of the loss tells."""

    reads: Census
    is_sum: bool  # it returned a Loss
    writes_state: bool  # floating: what parts of a batch would each write otherwise
    statistics: bool  # the model has floating state, as BatchNorm's: the batch may be seen as one even if it is not written


def study(policy: Policy, objective: Objective, params: list, model_state: Tree, batch: Tree, rng) -> Study:
    """Traces the loss over one microbatch. Raises what the loss raises, before anything is compiled."""
    args = (params, model_state, batch, rng)
    found = _trace(policy, objective, Census(), args)
    if found.reads.often:  # only where every use takes a box
        try:
            _trace(policy, objective, Census(often=found.reads.often), args)
        except (TypeError, ValueError) as error:
            if not no_array(error):
                raise
            return dataclasses.replace(found, reads=dataclasses.replace(found.reads, often=frozenset()))
    return found


def _trace(policy, objective, reads, args) -> Study:
    places = [layout.place(policy, leaf) for leaf in objective.leaves]
    tags = census_tags(policy, objective.leaves, places)
    found = {}

    def traced(params, model_state, batch, rng):
        marked = [census.tag_leaf(x, leaf.path) for x, leaf in zip(params, objective.leaves, strict=True)]
        boxed = boxes(objective.kind.box, objective.leaves, tags, marked, [None] * len(tags), reads)
        loss, found["is_sum"] = objective(boxed, model_state, batch, rng)
        before, after = jax.tree.leaves(model_state), jax.tree.leaves(loss.model_state)
        found["writes_state"] = any(a is not b and jnp.issubdtype(b.dtype, jnp.inexact)
                                    for a, b in zip(after, before, strict=True))
        found["statistics"] = any(jnp.issubdtype(b.dtype, jnp.floating) for b in before)
        return loss

    return Study(census.take(jax.make_jaxpr(traced)(*args)), **found)


@contextlib.contextmanager
def arrays_wanted():
    """Says what to write where user code gives a box to a function that takes arrays only."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if ours := no_array(error):
            raise ours from error
        raise


def no_array(error: Exception) -> ModelError | None:
    """What to say of an error that comes from a box where an array was wanted; None for any other."""
    signs = ("__jax_array__", "zerojax.box", "LinenBox", "'Box'")
    if isinstance(error, ZeroError) or not any(sign in str(error) for sign in signs):
        return None
    return ModelError(f"the loss gives a parameter to a function that takes arrays only, as jax.lax functions do ({error}); "
                      "write zj.whole(w) there, or model = zj.whole(model) to have a whole submodule's parameters as arrays.")


def per_device(policy: Policy, found: Study) -> bool:
    """The way to differentiate. Raises `PolicyError` for a wish that the other way alone can fulfil."""
    p, pinned = policy.precision, sorted(found.reads.constrained & set(policy.batch_axes))
    able = found.is_sum and not found.writes_state and not found.statistics and not pinned
    way = policy.gradients or ("per_device" if able else "global")
    if way == "per_device" and pinned:
        raise PolicyError(f'gradients="per_device": the model constrains its activations over {pinned}, which each device '
                          'differentiating its own part uses up already; drop those constraints, or write gradients="global".')
    if way == "per_device" and found.writes_state:
        raise PolicyError('gradients="per_device": the loss returns new model state (as BatchNorm does), and each device would '
                          'have its own; write gradients="global".')
    if way == "global" and p.reduces != p.computes:
        why, instead = _why_one_loss(found, pinned)
        raise PolicyError(
            f"Precision(compute={p.computes!r}, reduce={p.reduces!r}): with one loss over the whole batch (this one {why}), XLA "
            f"reduces in the dtype of the product, {p.computes}. {instead}, so that each device differentiates its own part, or "
            f"leave reduce={p.computes!r}.")
    return way == "per_device"


def _why_one_loss(found: Study, pinned: list[str]) -> tuple[str, str]:
    """(why a loss is one over the whole batch, what to write so that it is not)."""
    if not found.is_sum:
        return "returns a bare mean", "Return zj.Loss(total, weight)"
    if found.writes_state:
        return "returns new model state", "Return zj.Loss without it"
    if pinned:
        return f"constrains activations over {pinned}", "Drop those constraints"
    if found.statistics:
        return "is of a model with floating state", 'If no example sees another, write gradients="per_device"'
    return 'is asked to be "global"', 'Write gradients="per_device"'


@dataclasses.dataclass(frozen=True)
class Differentiator:
    """Gradients of an objective under a policy. Totals, not means: divide by the summed weight at the end."""

    policy: Policy
    objective: Objective
    readers: list
    reads: Census
    per_device: bool

    def __call__(self, params: list, gathered: list, model_state, batch, rng, scale) -> tuple[list, Loss]:
        """(one gradient a parameter, the `Loss` summed over the microbatch).

        A gradient has the parameter's shape and lies at its spec; those of `local` readers are `[parts, *shape]`.
        """
        run = self._parts if self.per_device else self._whole
        return run(params, gathered, model_state, batch, rng, scale)

    def _pull(self, params, gathered, model_state, batch, rng, scale):
        def total(params):
            boxed = boxes(self.objective.kind.box, self.objective.leaves, self.readers, params, gathered, self.reads)
            loss, _ = self.objective(boxed, model_state, batch, rng)
            return loss.total, loss

        _, pull, loss = jax.vjp(total, params, has_aux=True)
        weight = jax.lax.pmean(loss.weight, PARTS) if self.per_device and scale.metrics() else loss.weight
        grads, = pull(scale.seed(weight))
        return scale.unscale(grads, weight), loss

    def _whole(self, params, gathered, model_state, batch, rng, scale):
        return self._pull(params, gathered, model_state, batch, rng, scale)

    def _parts(self, params, gathered, model_state, batch, rng, scale):
        n = self.policy.parts
        axes = self.policy.batch_axes
        sharding = NamedSharding(self.policy.mesh, P(axes))
        split = lambda x: jax.lax.with_sharding_constraint(x.reshape(n, -1, *x.shape[1:]), sharding)

        def part(batch, index):
            key = jax.random.fold_in(rng, index)
            grads, loss = self._pull(params, gathered, _fold_keys(model_state, key), batch, key, scale)
            return grads, loss.replace(model_state=None), _counts(loss.model_state)

        out = ([0 if g.local else None for g in self.readers], 0, None)
        mapped = jax.vmap(part, out_axes=out, axis_name=PARTS, spmd_axis_name=axes)
        try:
            grads, loss, counts = mapped(jax.tree.map(split, batch), jnp.arange(n))
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise PolicyError('gradients="per_device": the loss writes integers of the batch into the model\'s state, and each '
                              'device would have its own; write gradients="global".') from error
        loss = jax.tree.map(lambda x: x.sum(0), loss)
        return grads, loss.replace(model_state=_recount(model_state, counts))


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fold_keys(state, part):
    """Random keys that a module holds, told apart by the key of a step, microbatch and part: they can't go on themselves."""
    bits = jax.random.bits(part)
    fold = lambda key: jnp.vectorize(lambda k: jax.random.fold_in(k, bits))(key) if key.ndim else jax.random.fold_in(key, bits)
    return jax.tree.map(lambda x: fold(x) if _is_key(x) else x, state)


def _counts_on(x) -> bool:
    """Whether a leaf of model state goes on without the batch, as the counts of random streams and flags do."""
    return not (jnp.issubdtype(x.dtype, jnp.inexact) or _is_key(x))


def _counts(state):
    return [x if _counts_on(x) else None for x in jax.tree.leaves(state)]


def _recount(state, counts):
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([x if c is None else c for x, c in zip(leaves, counts, strict=True)])
