"""Training state, born sharded: no device ever holds it whole."""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from zerojax import tables, trees
from zerojax.errors import ModelError
from zerojax.gather import models
from zerojax.layout import padded, placement, report, rules, scanned
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy
from zerojax.train import loss_scale, optimizer, trained

WHOLE = 0.05  # of a state


@dataclasses.dataclass(frozen=True)
class Model:
    """What a state remembers of the model besides arrays: its kind; its parameters and state as the layout sees them."""

    kind: Any
    leaves: tuple[Leaf, ...]
    state: tuple[Leaf, ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.leaves, self.state))

    def __hash__(self):
        return self._hash

    @property
    def trained(self) -> list[bool]:
        """Of each parameter, whether it is."""
        return [leaf.trained for leaf in self.leaves]


class TrainState(struct.PyTreeNode):
    """Everything a step changes.

    Attributes:
      step: int32 scalar, batches seen; skipped steps count.
      params: tree of arrays; what is trained is in `Precision.params`, what is frozen in the dtype that it came in.
      opt_state: what the optax transform keeps, for what is trained.
      model_state: linen's other collections, or NNX's variables that are no `Param`.
      rng: scalar key; steps fold their number into it.
      scale: loss scale, `NoScale` but for float16.
      skipped: int32 scalar, non-finite steps in a row up to now.
      model: static.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: Any
    rng: jax.Array
    scale: Any
    skipped: jax.Array
    model: Model = struct.field(pytree_node=False)

    @property
    def trained(self) -> Any:
        """Parameters that are trained, None in place of the frozen ones; as the optax transform sees them."""
        return trees.only(self.params, self.model.trained)

    def put(self, trained: Sequence[Any]) -> Any:
        """`params` with new leaves for what is trained."""
        return trees.put(self.params, self.model.trained, trained)


def _cast(policy: Policy, leaves: Sequence[Leaf], params):
    """Parameters as they are kept."""
    cast = lambda leaf, x: jnp.asarray(x, policy.precision.at_rest(leaf.path)) if leaf.trained else x
    flat, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(cast, leaves, flat))


def _padded(policy: Policy, leaves: Sequence[Leaf], params):
    """Parameters in the shapes that they are kept in."""
    flat, treedef = jax.tree.flatten(params)
    return treedef.unflatten([padded.pad(x, placement.place(policy, leaf).kept) for leaf, x in zip(leaves, flat, strict=True)])


def _check_floating(leaves: Sequence[Leaf]):
    for leaf in leaves:
        if leaf.trained and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ModelError(f"parameter {leaf.path} is of dtype {leaf.dtype}; what is trained is real and floating. Freeze it: "
                             "zero.init(..., trainable=...); or keep it in another collection (linen) or kind of Variable (NNX).")


def given(policy: Policy, init_fn: Any, tx: Any, args: tuple) -> tuple[Callable, tuple]:
    """(init_fn, args) for `Zero.init`, which also takes a model at hand: an NNX module, or a tree of arrays.

    Raises:
      ModelError: neither a function nor that, or no optax transform.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ModelError(f"zero.init(init_fn, tx, *args): the second argument is a {type(tx).__name__}, not an optax transform, as "
                         "optax.adamw(1e-3).")
    if isinstance(init_fn, nn.Module):
        raise ModelError(f"zero.init was given a linen module ({type(init_fn).__name__}), which holds no parameters; write "
                         "zero.init(model.init, tx, jax.random.key(0), x).")
    if isinstance(init_fn, nnx.Module):
        graphdef, state = nnx.split(init_fn)
        model = lambda state: nnx.merge(graphdef, state)
        arrays, put = trees.divided(state)
    else:
        model, (arrays, put) = lambda tree: tree, trees.divided(init_fn)
    if callable(init_fn) and (not arrays or isinstance(init_fn, jax.tree_util.Partial)):
        return init_fn, args
    if not arrays or args:
        what = type(init_fn).__name__ + (" and arguments for it" if arrays else "")
        raise ModelError(f"zero.init was given a {what}; write a function that makes the model and what it is called with, or a "
                         "model that is there: zero.init(model, tx).")
    return lambda arrays: model(put(arrays)), ([_at_hand(policy, x) for x in arrays],)


def _at_hand(policy: Policy, x: Any) -> Any:
    """An array that jit takes beside those of the mesh: one on other devices by way of the host."""
    ours = set(policy.mesh.devices.flat) if isinstance(policy.mesh, Mesh) else set()
    elsewhere = isinstance(x, jax.Array) and x.committed and x.sharding.device_set != ours
    return np.asarray(x) if elsewhere and x.is_fully_addressable and not trees.is_key(x) else x


def survey(policy: Policy, init_fn, args, trainable=None) -> tuple[Model, list]:
    """Traces `init_fn` and describes what it makes; with the treedefs of params and model state.

    Raises:
      ModelError: no floating array in what it returns, a trained parameter that is not floating, or an array kept as a constant.
      LayoutError: a rule that matches nothing, nothing that is trained, or a model that names an axis which the mesh lacks.
    """
    found = {}

    def traced(*args):
        model = init_fn(*args)
        found["kind"], params, state, bases = models.kind_of(model).split(model)
        found["treedefs"] = [jax.tree.structure(tree) for tree in (params, state)]
        found["leaves"] = trained.marked(placement.describe(params, bases), trainable, model, jax.tree.leaves(params))
        found["state"] = placement.describe(state, group="state")
        return params, state

    scans = scanned.stacked(jax.make_jaxpr(traced)(*args))
    leaves, state = _scanned(found["leaves"], scans), _scanned(found["state"], scans[len(found["leaves"]):])
    if not leaves:
        kind = type(found["kind"]).__name__
        raise ModelError(f"init_fn returned a model ({kind}) without a floating array: there is nothing to train. "
                         "Return the parameters, as model.init(key, x) or a module.")
    _check_floating(leaves)
    rules.check_axes(leaves, policy.mesh.axis_names)
    for what, patterns in {"rule": policy.rules, "Precision.keep": dict(policy.precision.keep)}.items():
        rules.check_patterns(what, patterns, [leaf.path for leaf in leaves])
    _check_static(found["kind"])
    return Model(found["kind"], _kept(policy, leaves), state), found["treedefs"]


def _scanned(leaves: Sequence[Leaf], dims: Sequence[int | None]) -> tuple[Leaf, ...]:
    return tuple(dataclasses.replace(leaf, scanned=dim) for leaf, dim in zip(leaves, dims, strict=False))


def _kept(policy: Policy, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Leaves in the dtypes that they are kept in."""
    dtype = lambda leaf: policy.precision.at_rest(leaf.path) if leaf.trained else leaf.dtype
    return tuple(dataclasses.replace(leaf, dtype=dtype(leaf)) for leaf in leaves)


def _check_static(kind):
    """jit compares static values to find what it compiled; it can do without their hash."""
    with contextlib.suppress(TypeError):
        hash(kind)
        return
    try:
        bool(kind == copy.deepcopy(kind))
    except Exception as error:  # whatever == of the user's raises
        raise ModelError(f"the model keeps something beside its parameters that can't be compared ({error}), as an array in a "
                         "plain attribute or static field. Make it an nnx.Variable or a leaf, or build it where it is "
                         "used.") from None


def builder(policy: Policy, model: Model, treedefs: list, init_fn, tx, rng):
    """A function of init_fn's arguments that makes the whole state, its trees as the survey saw them."""

    def build(*args):
        _, *made, _ = type(model.kind).split(init_fn(*args))
        # init_fn runs again here: functions that it makes differ from the survey's, and unequal trees match no shardings
        params, model_state = (d.unflatten(jax.tree.leaves(tree)) for d, tree in zip(treedefs, made, strict=True))
        params = _padded(policy, model.leaves, _cast(policy, model.leaves, params))
        key = _first_key(args) if rng is None else rng
        return TrainState(jnp.int32(0), params, optimizer.init(tx, trees.only(params, model.trained)), model_state, key,
                          loss_scale.for_dtype(policy.precision.compute_dtype), jnp.int32(0), model)

    return build


def _rules(policy: Policy, state: TrainState) -> TrainState:
    """Where a policy would place each leaf of a state, as a state."""
    whole = Placement(P(), P(), "no parameter or optimizer state")
    of = lambda tree, places: padded.structure(tree).unflatten(places)
    params = of(state.params, [placement.place(policy, leaf) for leaf in state.model.leaves])
    opt = of(state.opt_state, placement.place_state(policy, state.model.leaves, state.opt_state))
    kept = of(state.model_state, [placement.place(policy, leaf) for leaf in state.model.state])
    return jax.tree.map(lambda _: whole, state).replace(params=params, opt_state=opt, model_state=kept)


def placements(policy: Policy, state: TrainState) -> TrainState:
    """A `Placement` for each leaf of a state, as a state."""
    fit = lambda rule, x: placement.fitting(policy, rule, x)
    return jax.tree.map(fit, _rules(policy, state), state, is_leaf=lambda x: isinstance(x, Placement))


def moved(policy: Policy, state: TrainState) -> TrainState:
    """A state where `policy` wants it, padded as it wants it."""

    def move(rule, x):
        put = lambda x: jax.device_put(x, rules.sharding(policy.mesh, rule.spec))
        if (x.kept.shape if padded.is_padded(x) else None) == rule.kept:
            return padded.mapped(put, x)
        return padded.mapped(put, padded.pad(padded.logical(x), rule.kept))

    return jax.tree.map(move, _rules(policy, state), state, is_leaf=lambda x: isinstance(x, Placement))


def warn_of_whole(policy: Policy, state: TrainState) -> None:
    """Warns where more than `WHOLE` of a state stays whole because its dimensions do not divide."""
    rows = layout(policy, state).rows
    whole = [row for row in rows if row.reason.startswith(rules.INDIVISIBLE)]
    kept, total = sum(row.bytes for row in whole), sum(row.gathered_bytes for row in rows)
    if kept > WHOLE * total:
        first = max(whole, key=lambda row: row.bytes)
        warnings.warn(f"zero.init: {kept / total:.0%} of the state's {tables.size(total)} stay whole on every device, as "
                      f"{first.path}: {first.reason}, the devices that share a state. Write Zero(..., uneven='pad'), which keeps "
                      "rows of zeros at the ends, or take a number of devices that divides.", stacklevel=3)


def shardings(policy: Policy, state: TrainState) -> TrainState:
    """A `NamedSharding` for each leaf of a state, as a state."""
    return jax.tree.map(lambda p: rules.sharding(policy.mesh, p.spec), placements(policy, state),
                        is_leaf=lambda x: isinstance(x, Placement))


def lying(policy: Policy, state: TrainState) -> TrainState:
    """As `placements`, but where an array already lies somewhere, there."""
    put = lambda rule, x: placement.placed(policy, rule, getattr(x, "sharding", None), x)
    return jax.tree.map(put, placements(policy, state), state, is_leaf=lambda x: isinstance(x, Placement))


def read(policy: Policy, state: TrainState) -> tuple[tuple[Leaf, ...], tuple[Placement, ...]]:
    """What a step reads of a state, parameters and the model's state; and where they lie."""
    there = lying(policy, state)
    places = jax.tree.leaves((there.params, there.model_state), is_leaf=lambda x: isinstance(x, Placement))
    return (*state.model.leaves, *state.model.state), tuple(places)


def scaled(policy: Policy, state: TrainState) -> TrainState:
    """A state with a loss scale if `policy` needs one, a new one if it had none."""
    ours = loss_scale.for_dtype(policy.precision.compute_dtype)
    return state if type(ours) is type(state.scale) else state.replace(scale=ours)


def layout(policy: Policy, state: TrainState) -> report.Layout:
    """The `Layout` of a state."""
    places = jax.tree.leaves(lying(policy, state), is_leaf=lambda x: isinstance(x, Placement))
    return report.of(policy, state, places)


def _first_key(args):
    """The state's key: folded from the first key among init's arguments, of the new kind or the old, else key(0)."""
    typed = lambda x: trees.is_key(x) and x.shape == ()
    keys = [x for x in jax.tree.leaves(args) if hasattr(x, "dtype") and (typed(x) or trees.is_old_key(x))]
    if not keys:
        return jax.random.key(0)
    return jax.random.fold_in(keys[0] if typed(keys[0]) else jax.random.wrap_key_data(keys[0]), 0x5EED)
