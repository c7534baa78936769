"""A loss as a program, and the choice between the two ways to differentiate it.

global       one loss over the whole microbatch; XLA finds the partial sums and reduces them. Right for any loss.
per device   vmap over the batch's parts, one a device; each reduction is an operation of the program. Right for sums over
             examples whose program can be split so.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P

from zerojax import tables, trees
from zerojax.errors import LossError, ModelError, PolicyError, ZeroError
from zerojax.gather import rewrite
from zerojax.gather.pair import SCOPE
from zerojax.layout import rules
from zerojax.layout.rules import Leaf
from zerojax.policy import Policy
from zerojax.train import means
from zerojax.train.loss import Loss, normalise

Tree = Any


LARGE = 2**24  # bytes of arrays that a loss closes over
CLOSES_OVER = "closes over an array of the batch's length"


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss function of a model of a known kind.

    Attributes:
      loss_fn: `loss_fn(model, inputs)`, of a list of arrays; returns a scalar or a `Loss`; with `has_aux`, that or (that, aux).
      batch: which of the inputs are split by their first dimension into microbatches and parts.
      kind, leaves, treedef: of the model; its parameters, in the order of the leaves of `treedef`, the frozen ones among them.
      state: leaves of the model's state.
      unsplit: why its inputs cannot be split, or "". examples: in the whole batch; 0 of none.
    """

    loss_fn: Callable
    batch: tuple[bool, ...]
    kind: Any
    leaves: tuple[Leaf, ...]
    treedef: Any
    state: tuple[Leaf, ...] = ()
    has_aux: bool = False
    unsplit: str = ""
    examples: int = 0

    def __call__(self, params: list, model_state: Tree, inputs: list) -> tuple[Loss, Any, bool]:
        """(the loss with the model's state after it, aux, whether the function returned a `Loss`)."""
        model = self.kind.join(self.treedef.unflatten(params), model_state)
        result, aux = self.loss_fn(model, inputs), None
        if self.has_aux and not isinstance(result, Loss):
            result, aux = _pair(result)
        loss = normalise(result)
        after = self.kind.state_after(model, model_state)
        after = after if loss.model_state is None else self.kind.merged(after, loss.model_state)
        return loss.replace(model_state=after), aux, isinstance(result, Loss)


def _pair(result):
    if not isinstance(result, tuple) or len(result) != 2:
        raise LossError(f"has_aux=True, but the loss returned a {type(result).__name__}; return (loss, aux), or zj.Loss.")
    return result


@dataclasses.dataclass(frozen=True)
class Program:
    """An objective as traced for inputs of some shapes.

    Attributes:
      jaxpr: of parameters in the compute dtype, model state and inputs; out: the tree of its results, a `Loss` and aux.
      consts: values that the function closes over.
      keys: which of consts and inputs it draws random numbers from.
      is_sum: the function returned a `Loss`.
      written: which leaves of the model's state it changed.
      obstacles: what in it keeps a device from differentiating its own part, in the user's terms.
    """

    jaxpr: Any
    out: Any
    consts: tuple
    keys: tuple[bool, ...]
    is_sum: bool
    written: tuple[bool, ...]
    obstacles: tuple[str, ...]

    def __call__(self, params: Sequence, model_state: Sequence, inputs: list) -> tuple[Loss, Any]:
        """As the objective; parameters and the leaves of the model's state may be pending."""
        values = rewrite.evaluate(self.jaxpr, [*params, *model_state, *inputs], self.consts)
        (loss, aux), state = results(self.out, values)
        return loss.replace(model_state=state), aux

    def folded(self, inputs: list, number) -> tuple["Program", list]:
        """The program and its inputs with a number folded into their random keys."""
        new = [trees.fold(x, number) if key else x for x, key in zip([*self.consts, *inputs], self.keys, strict=True)]
        n = len(self.consts)
        return dataclasses.replace(self, consts=tuple(new[:n])), new[n:]

    @property
    def aux(self) -> list:
        """Shapes of the leaves of aux."""
        (_, aux), _ = self.out
        return jax.tree.leaves(aux)


def results(out: Tree, values: Sequence) -> tuple[Any, Tree]:
    """(results, the model's state) of a program with results of that tree. State that it did not read comes back as it was given,
    in shards."""
    result, state = jax.tree.structure(out).unflatten(values)
    pending = lambda x: isinstance(x, rewrite.Pending)
    return (jax.tree.map(rewrite.array, result, is_leaf=pending),
            jax.tree.map(lambda x: x.x if pending(x) else x, state, is_leaf=pending))


def avals(policy: Policy, leaves: Sequence[Leaf]) -> list[jax.ShapeDtypeStruct]:
    """Parameters as a program sees them: whole, in the compute dtype."""
    return [jax.ShapeDtypeStruct(leaf.shape, policy.precision.computed(leaf.path, leaf.dtype)) for leaf in leaves]


def trace(policy: Policy, objective: Objective, model_state: Tree, inputs: list) -> Program:
    """The objective's program. Raises what the loss raises, before anything is compiled."""
    found = {}

    def traced(params, model_state, inputs):
        loss, aux, found["is_sum"] = objective(params, model_state, inputs)
        pairs = zip(jax.tree.leaves(loss.model_state), jax.tree.leaves(model_state), strict=True)
        found["written"] = tuple(after is not before for after, before in pairs)
        return (loss.replace(model_state=None), aux), loss.model_state

    try:
        jaxpr, out = jax.make_jaxpr(traced, return_shape=True)(avals(policy, objective.leaves), model_state, inputs)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ModelError(f"the loss uses a mapped axis, as under pmap or vmap(axis_name=...) ({error}), but it sees the whole "
                         "batch here: leave out psum, pmean and axis_name (BatchNorm's too).") from error
    obstacles = _obstacles(policy, objective, jaxpr, model_state, found)
    return Program(jaxpr, out, tuple(jaxpr.consts), _keys(jaxpr, len(inputs)), found["is_sum"], found["written"], obstacles)


def _keys(jaxpr, inputs: int) -> tuple[bool, ...]:
    """Which of the constants and the last arguments are random keys: typed, or wrapped as such."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    variables = [*inner.constvars, *inner.invars[len(inner.invars) - inputs:]]
    old = {v: str(i) for i, v in enumerate(variables) if trees.is_old_key(v.aval)}
    wrapped = {name for eqn, names in rewrite.uses(inner, old) if eqn.primitive.name == "random_wrap" for name in names}
    return tuple(trees.is_key(v.aval) or str(i) in wrapped for i, v in enumerate(variables))


def _obstacles(policy: Policy, objective: Objective, jaxpr, model_state, found) -> tuple[str, ...]:
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(model_state)]
    written = any(w and f for w, f in zip(found["written"], floating, strict=True))
    of_state = "returns new model state" if written else "is of a model with floating state" if any(floating) else ""
    fp8 = f"has state that its gradient overwrites ({rules.OVERWRITTEN})"
    fp8 *= any(leaf.overwritten for leaf in (*objective.leaves, *objective.state))
    found = [objective.unsplit, fp8, of_state, _closed_over(objective, jaxpr), *_in_program(set(policy.batch_axes), jaxpr)]
    return tuple(dict.fromkeys(filter(None, found)))


def warn_of_means(program: Program, larger: Callable[[], Program]) -> None:
    """Warns of a `Loss` whose total is a mean, also of a `larger` batch (or else a constant divides it); it would be divided by
    the weight again."""
    seems = lambda program: means.is_mean(program.jaxpr, 0, 1)  # a Loss's first results are total and weight
    if program.is_sum and seems(program) and seems(larger()):
        warnings.warn("Loss.total is a mean (a sum divided by the number of its terms), and is divided by Loss.weight again: loss "
                      "and gradients are as many times smaller. Write zj.Loss(losses.sum(), losses.size).", stacklevel=2)


def warn_of_constants(program: Program) -> None:
    """Warns of large arrays that a loss closes over: jit writes them into the program, whole on every device."""
    held = [x for x in program.consts if not isinstance(x, Tracer)]
    if (total := sum(x.nbytes for x in held)) > LARGE:
        largest = max(held, key=lambda x: x.nbytes)
        what = f"{tables.size(total)}, the largest {largest.dtype}{list(largest.shape)}"
        warnings.warn(f"the loss closes over arrays of {what}: they are part of the program, whole on every device. Return them "
                      "from init_fn and freeze them (zero.init(..., trainable=...)), or pass them with the batch.", stacklevel=2)


def _closed_over(objective: Objective, jaxpr) -> str:
    """A value of the surrounding program that may be the batch's: it would not be split with it."""
    like = [x.shape for x in jaxpr.consts if isinstance(x, Tracer) and x.shape[:1] == (objective.examples,)]
    return f"{CLOSES_OVER}, of shape {like[0]}" if like else ""


def _in_program(axes: set[str], jaxpr) -> Iterator[str]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    of_platform = {v for eqn in jaxpr.eqns if eqn.primitive.name == "platform_index" for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "sharding_constraint":
            pinned = sorted(axes & set(rules.axes_of(getattr(p["sharding"], "spec", P()))))
            ours = SCOPE in str(eqn.source_info.name_stack).split("/")
            why = _GATHERS if ours else f"constrains activations over {pinned}"
            yield from [why] * bool(pinned)
        elif name == "shard_map":
            mapped = sorted(axes & set(p.get("newly_manual_axes") or p["mesh"].axis_names))
            yield from [f"has a shard_map over {mapped}"] * bool(mapped)
        elif name == "conv_general_dilated":
            yield "has a convolution"  # XLA partitions the gradient of a vmapped one wrongly (jax 0.10 to 0.12)
        elif name == "cond" and not isinstance(eqn.invars[0], jex.Literal) and eqn.invars[0] not in of_platform:
            yield "chooses by lax.cond or switch"  # on the batch as a whole, or on a key: each part would choose for itself
        elif name == "while":
            yield "has a loop of unknown length (while_loop)"  # each part would turn as often as it wants itself
        elif name in ("pure_callback", "io_callback") or p.get("ordered"):
            yield f"calls the host ({name})"
        for inner in jex.jaxprs_in_params(p):
            yield from _in_program(axes, inner)


def choose(policy: Policy, program: Program) -> tuple[bool, str]:
    """(whether each device differentiates its own part, why or why not).

    Raises:
      PolicyError: a wish that the other way alone can fulfil.
    """
    p, obstacles = policy.precision, program.obstacles
    if policy.gradients == "per_device":
        _check_per_device(obstacles)
        return True, "as asked"
    why = None if program.is_sum and not obstacles else obstacles[0] if program.is_sum else "returns a bare mean"
    why = "is asked to be global" if policy.gradients == "global" and why is None else why
    if why and p.reduce_dtype != p.compute_dtype:
        raise PolicyError(
            f"Precision(compute={p.compute_dtype!r}, reduce={p.reduce_dtype!r}): with one loss over the whole batch (this one {why}), XLA "
            f"reduces in the dtype of the product, {p.compute_dtype}. {_instead(why)}, so that each device differentiates its own part, "
            f"or leave reduce={p.compute_dtype!r}.")
    return (False, f"the loss {why}") if why else (True, "the loss is a sum over examples")


def given_up(policy: Policy, error: Exception) -> tuple[bool, str]:
    """One loss and why, after an `error` in the program of one device's part of a batch; raised again where that was wished for."""
    p = policy.precision
    if isinstance(error, ZeroError) and not isinstance(error, LossError):
        raise error
    if "out_axes" in str(error):
        why = "writes integers of the batch into the model's state, and each device would have its own"
    else:
        why = f"cannot be split over the batch: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if policy.gradients == "per_device" or p.reduce_dtype != p.compute_dtype:
        if isinstance(error, ZeroError):
            raise error
        wish = 'gradients="per_device"' if policy.gradients else f"Precision(reduce={p.reduce_dtype!r}), which needs it"
        raise PolicyError(f'{wish}: the loss {why}; write gradients="global" and leave reduce as compute.') from error
    return False, f"the loss {why}"


# what may be insisted on: right if no example sees another, as the user then says
_JUDGED = ("is of a model with floating state",)
_GATHERS = "gathers other parameters itself (zero.gathered)"
_INSTEAD = {
    _GATHERS: "Gather them before, and pass the result as a batch (batch_argnums)",
    "returns a bare mean": "Return zj.Loss(total, weight)",
    "returns new model state": "Return zj.Loss without it",
    "is of a model with floating state": 'If no example sees another, write gradients="per_device"',
    "is asked to be global": 'Write gradients="per_device"',
}


def _instead(why: str) -> str:
    return _INSTEAD.get(why, "Write the loss without that")


def _check_per_device(obstacles: Sequence[str]):
    for why in obstacles:
        if why not in _JUDGED:
            raise PolicyError(f'gradients="per_device": the loss {why}, which no device can do for its own part of the '
                              'batch alone; write it without that, or write gradients="global".')
