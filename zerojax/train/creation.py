"""Creates training states under jit with sharded outputs, so that no device ever holds one whole.

    init_fn --trace--> description of the model --> function that makes the whole state,
                                                    with a sharding for each leaf --jit--> state
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from zerojax import errors, tables, trees
from zerojax.errors import ModelError
from zerojax.gather import models
from zerojax.layout import padded, placement, rules, scanned
from zerojax.layout.rules import Leaf
from zerojax.plan import moves
from zerojax.policy import Policy
from zerojax.processes import agreement, fingerprint
from zerojax.train import checks, loss_scale, optimizer, state_layout, trained
from zerojax.train.state import Model, TrainState

_INIT = "zero.init(model.init, tx, jax.random.key(0), x)"
_CREATE = "zero.create(create) with a function create() that makes and returns the state"
WHOLE = 0.05  # the fraction of a state above which `warn_of_whole` warns


@dataclasses.dataclass(frozen=True)
class Maker:
    """A function that makes a state, and the shardings of the state's leaves."""

    build: Callable
    shardings: Any

    def abstract(self, *args: Any) -> Any:
        """Returns the state as `ShapeDtypeStruct`s with shardings; nothing is allocated."""
        return padded.mapped(_with_sharding, jax.eval_shape(self.build, *args), self.shardings)

    def jitted(self) -> Callable:
        return jax.jit(self.build, out_shardings=self.shardings)


def _with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def create(policy: Policy, prepare: Callable[[], Maker], *args: Any) -> Any:
    """Returns the state that a maker makes of `args`, after all processes agree on the maker.

    Over simulated GPUs, returns its shapes.
    """
    if isinstance(policy.mesh, AbstractMesh):
        return prepare().abstract(*args)

    def fields(maker: Maker) -> dict:
        return {"state": fingerprint.shapes(maker.abstract(*args)),
                "arguments": fingerprint.values(args),
                "program": fingerprint.of_program(maker.jitted(), *args)}

    made, _ = agreement.before(policy, "zero.init", prepare, fields)
    return made.jitted()(*args)


def maker(policy: Policy, init_fn: Callable, tx: Any, args: tuple, trainable: Any,
          rng: jax.Array | None) -> Maker:
    """Returns the maker of a `TrainState`; see `Zero.init`, also for the errors."""
    model, treedefs = survey(policy, init_fn, args, trainable)
    build = _builder(policy, model, treedefs, init_fn, tx, rng)
    abstract = jax.eval_shape(build, *args)
    optimizer.check_padding(tx, abstract.trained)
    return Maker(build, state_layout.shardings(policy, abstract))


def maker_of_own(policy: Policy, make: Callable[[], Any]) -> Maker:
    """Returns the maker of a state of the user's own; see `Zero.create`."""

    def build():  # another function each time: jax would not see that globals of `make` changed
        with errors.noted(lambda: checks.call_note(make, "", {}, f"write {_CREATE}")):
            return make()

    abstract = jax.eval_shape(build)
    scans = scanned.stacked(jax.make_jaxpr(build)())
    _check_rules(policy, state_layout.known(abstract, scans).params)
    return Maker(build, state_layout.shardings(policy, abstract, scans))


def given(policy: Policy, init_fn: Any, tx: Any, args: tuple) -> tuple[Callable, tuple]:
    """Returns the function and the arguments that `Zero.init` runs.

    `Zero.init` also accepts a model that exists already, an NNX module or a tree of arrays: the
    function then puts its arguments into it.

    Raises:
      ModelError: `init_fn` is neither a function nor a model, or `tx` is not an optax transform.
    """
    _check_arguments(policy, init_fn, tx)
    if isinstance(init_fn, nnx.Module):
        graphdef, tree = nnx.split(init_fn)
    else:
        graphdef, tree = None, init_fn
    arrays, put = trees.divided(tree)
    if callable(init_fn) and (not arrays or isinstance(init_fn, jax.tree_util.Partial)):
        return init_fn, args
    if not arrays:
        raise ModelError(f"zero.init was given {trees.kind(init_fn)}, which is no function and "
                         f"holds no arrays; write {_INIT}, or an existing model: "
                         "zero.init(model, tx).")
    if args:
        raise ModelError(f"zero.init was given a {type(init_fn).__name__} and arguments for it, "
                         "which only a function takes; write zero.init(model, tx), or a function "
                         f"that makes the model, followed by its arguments: {_INIT}.")

    def rebuild(arrays):
        return put(arrays) if graphdef is None else nnx.merge(graphdef, put(arrays))

    return rebuild, ([_reachable(policy, x) for x in arrays],)


def _check_arguments(policy: Policy, init_fn: Any, tx: Any):
    policy.check_context("zero.init")
    checks.check_optimizer("init", init_fn, tx, _INIT.removeprefix("zero.init"))
    if isinstance(init_fn, nn.Module):
        raise ModelError(f"zero.init was given a linen module ({type(init_fn).__name__}), which "
                         f"holds no parameters; write {_INIT}.")


def _reachable(policy: Policy, x: Any) -> Any:
    """Returns an array that jit accepts beside the mesh's: from other devices, through the host."""
    ours = set(policy.mesh.devices.flat) if isinstance(policy.mesh, Mesh) else set()
    elsewhere = isinstance(x, jax.Array) and x.committed and x.sharding.device_set != ours
    return np.asarray(x) if elsewhere and x.is_fully_addressable and not trees.is_key(x) else x


def check_own(policy: Policy, make: Any) -> None:
    """Raises `ModelError` if `Zero.create` is not given a function."""
    policy.check_context("zero.create")
    checks.check_function("create", make, _CREATE)


def survey(policy: Policy, init_fn: Callable, args: tuple,
           trainable: Any = None) -> tuple[Model, list]:
    """Traces `init_fn` and describes the model that it returns.

    Returns:
      the `Model`, and the treedefs of its parameters and of its state.

    Raises:
      ModelError: no parameters, a trained parameter that is not floating, or an array that is
        kept as a constant.
      LayoutError: a rule that matches nothing, nothing to train, or a model that names an axis
        which the mesh does not have.
    """
    found = {}

    def traced(*args):
        with errors.noted(lambda: _init_note(init_fn, args)):
            model = init_fn(*args)
        found["kind"], params, state, bases = models.kind_of(model).split(model)
        found["treedefs"] = [jax.tree.structure(tree) for tree in (params, state)]
        leaves = placement.describe(params, bases)
        found["leaves"] = trained.marked(leaves, trainable, model, jax.tree.leaves(params))
        found["state"] = placement.describe(state, group="state")
        return params, state

    scans = scanned.stacked(jax.make_jaxpr(traced)(*args))
    leaves = _scanned(found["leaves"], scans)
    state = _scanned(found["state"], scans[len(leaves):])
    _check_params(leaves)
    _check_rules(policy, leaves)
    _check_static(found["kind"])
    return Model(found["kind"], _as_stored(policy, leaves), state), found["treedefs"]


def _init_note(init_fn: Callable, args: tuple) -> str:
    return checks.call_note(init_fn, ", ".join(map(trees.brief, args)), {},
                            "if it expects other arguments, change those of zero.init after tx, as "
                            f"in {_INIT} or zero.init(lambda: Net(nnx.Rngs(0)), tx)")


def _scanned(leaves: Sequence[Leaf], dims: Sequence[int | None]) -> tuple[Leaf, ...]:
    return tuple(dataclasses.replace(leaf, scanned=dim)
                 for leaf, dim in zip(leaves, dims, strict=False))


def _as_stored(policy: Policy, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Returns parameters with the dtypes that they have between steps."""
    def dtype(leaf: Leaf) -> str:
        return policy.precision.at_rest(leaf.path) if leaf.trained else leaf.dtype

    return tuple(dataclasses.replace(leaf, dtype=dtype(leaf)) for leaf in leaves)


def _check_params(leaves: Sequence[Leaf]):
    if not leaves:
        raise ModelError("init_fn returned a model without a floating array, so that there is "
                         "nothing to train; let it return parameters, as model.init(key, x) does, "
                         "or an NNX module.")
    for leaf in leaves:
        if leaf.trained and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ModelError(f"parameter {leaf.path} is of dtype {leaf.dtype}, but trained "
                             "parameters must be real and floating. Freeze it: "
                             "zero.init(..., trainable=...); or keep it in another collection "
                             "(linen) or kind of Variable (NNX).")


def _check_rules(policy: Policy, params: Sequence[Leaf]):
    paths = [leaf.path for leaf in params]
    rules.check_axes(params, policy.mesh.axis_names)
    rules.check_patterns("rule", policy.rules, paths)
    rules.check_patterns("Precision.keep", dict(policy.precision.keep), paths)


def _check_static(kind: models.Kind):
    """Raises `ModelError` for static values that jit cannot compare with those of other calls.

    Values that can be hashed can be compared, and jit needs no hash of the others.
    """
    with contextlib.suppress(TypeError):
        hash(kind)
        return
    try:
        bool(kind == copy.deepcopy(kind))
    except Exception as error:  # the user's own == may raise anything
        raise ModelError(f"the model holds a static value that cannot be compared ({error}), such "
                         "as an array in a plain attribute or static field. Make it an "
                         "nnx.Variable or a leaf, or build it where it is used.") from None


def _builder(policy: Policy, model: Model, treedefs: list, init_fn: Callable, tx: Any,
             rng: jax.Array | None) -> Callable:
    """Returns a function of the arguments of `init_fn` that makes the whole state.

    It runs `init_fn` again, so functions in the model are not the ones that the survey saw, and
    their trees would not match the shardings: hence the survey's treedefs.
    """

    def build(*args):
        _, params, model_state, _ = type(model.kind).split(init_fn(*args))
        params, model_state = (treedef.unflatten(jax.tree.leaves(tree)) for treedef, tree in
                               zip(treedefs, (params, model_state), strict=True))
        params = _stored(policy, model.leaves, params)
        opt_state = optimizer.init(tx, trees.only(params, model.trained))
        key = _first_key(args) if rng is None else rng
        scale = loss_scale.for_dtype(policy.precision.compute_dtype)
        return TrainState(jnp.int32(0), params, opt_state, model_state, key, scale, jnp.int32(0),
                          model)

    return build


def _stored(policy: Policy, leaves: Sequence[Leaf], params: Any) -> Any:
    """Returns parameters in the dtypes and shapes that they have between steps."""
    def stored(leaf: Leaf, x: Any) -> Any:
        x = jnp.asarray(x, leaf.dtype) if leaf.trained else x
        return padded.pad(x, placement.place(policy, leaf).kept)

    flat, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(stored, leaves, flat))


def _first_key(args: tuple) -> jax.Array:
    """Returns the state's key, derived from the first key, typed or raw, among the arguments."""
    def is_typed(x) -> bool:
        return trees.is_key(x) and x.shape == ()

    keys = [x for x in jax.tree.leaves(args)
            if hasattr(x, "dtype") and (is_typed(x) or trees.is_old_key(x))]
    if not keys:
        return jax.random.key(0)
    key = keys[0] if is_typed(keys[0]) else jax.random.wrap_key_data(keys[0])
    return jax.random.fold_in(key, 0x5EED)


def warn_of_wire(policy: Policy, state: TrainState) -> None:
    """Warns if the formats of `Wire` apply to no parameter."""
    leaves = state.model.leaves
    places = [(leaf, placement.place(policy, leaf)) for leaf in leaves]
    found = {move.dtype for leaf, place in places if place.sharded
             for move in moves.of(policy, leaf, place, moves.Count(1, 1, 1), per_device=True)}
    for field in ("gather", "reduce"):
        given = getattr(policy.wire, field)
        if given and policy.shards > 1 and given not in found:
            errors.warn(f"zero.init: Wire({field}={given!r}) applies to none of the {len(leaves)} "
                        f"parameters: they stay whole (min_shard={policy.min_shard}), have fewer "
                        "than two dimensions or none with blocks of 32 elements on a device, or "
                        f"their paths match exclude={policy.wire.exclude!r}.")


def warn_of_whole(policy: Policy, state: TrainState) -> None:
    """Warns if more than `WHOLE` of a state stays whole because its dimensions do not divide."""
    rows = state_layout.layout(policy, state).rows
    whole = [row for row in rows if row.reason.startswith(rules.INDIVISIBLE)]
    kept = sum(row.bytes for row in whole)
    total = sum(row.gathered_bytes for row in rows)
    if kept > WHOLE * total:
        first = max(whole, key=lambda row: row.bytes)
        errors.warn(f"zero.init: {kept / total:.0%} of the state's {tables.size(total)} stay "
                    f"whole on every device, such as {first.path}: {first.reason}, the number of "
                    "devices that share a state. Write Zero(..., uneven='pad'), which pads with "
                    "zeros, or choose a number of devices that divides.")
