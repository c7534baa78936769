"""Training state, born sharded: no device ever holds it whole."""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from zerojax import layout, models, scale, scanned, specs, trees
from zerojax.errors import ModelError
from zerojax.policy import Policy
from zerojax.specs import Leaf, Placement


@dataclasses.dataclass(frozen=True)
class Model:
    """What a state remembers of the model besides arrays: its kind, and its parameters as the layout sees them."""

    kind: Any
    leaves: tuple[Leaf, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.leaves))

    def __hash__(self):
        return self._hash


class TrainState(struct.PyTreeNode):
    """Everything a step changes.

    Attributes:
      step: int32 scalar, batches seen; skipped steps count.
      params: tree of floating arrays, in `Precision.params`.
      opt_state: what the optax transform keeps.
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


def _cast(policy: Policy, params):
    for path, x in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ModelError(f"parameter {layout.path_of(path)} is of dtype {jnp.result_type(x)}; what is trained is real and "
                             "floating. Keep it in another collection (linen) or kind of Variable (NNX), or as a constant.")
    return jax.tree.map(lambda x: jnp.asarray(x, policy.precision.params), params)


def survey(policy: Policy, init_fn, args) -> tuple[Model, list]:
    """Traces `init_fn` and describes its parameters; with the treedefs of params and model state.

    Raises:
      ModelError: no floating array in what it returns, a parameter that is not floating, or an array kept as a constant.
      LayoutError: a rule that matches nothing.
    """
    found = {}

    def traced(*args):
        model = init_fn(*args)
        found["kind"], params, state, found["bases"] = models.kind_of(model).split(model)
        found["treedefs"] = [jax.tree.structure(tree) for tree in (params, state)]
        return _cast(policy, params)

    jaxpr, params = jax.make_jaxpr(traced, return_shape=True)(*args)
    if not jax.tree.leaves(params):
        kind = type(found["kind"]).__name__
        raise ModelError(f"init_fn returned a model ({kind}) without a floating array: there is nothing to train. "
                         "Return the parameters, as model.init(key, x) or a module.")
    leaves = layout.describe(params, found["bases"], scanned.stacked(jaxpr))
    specs.check_rules([leaf.path for leaf in leaves], policy.rules)
    _check_static(found["kind"])
    return Model(found["kind"], leaves), found["treedefs"]


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
        _, *trees, _ = type(model.kind).split(init_fn(*args))
        # init_fn runs again here: functions that it makes differ from the survey's, and unequal trees match no shardings
        params, model_state = (d.unflatten(jax.tree.leaves(tree)) for d, tree in zip(treedefs, trees, strict=True))
        params = _cast(policy, params)
        key = _first_key(args) if rng is None else rng
        return TrainState(jnp.int32(0), params, tx.init(params), model_state, key,
                          scale.for_dtype(policy.precision.computes), jnp.int32(0), model)

    return build


def placements(policy: Policy, state: TrainState) -> TrainState:
    """A `Placement` for each leaf of a state, as a state."""
    whole = Placement(P(), P(), "no parameter or optimizer state")
    leaves = state.model.leaves
    params = jax.tree.structure(state.params).unflatten([layout.place(policy, leaf) for leaf in leaves])
    opt = jax.tree.structure(state.opt_state).unflatten(layout.place_state(policy, leaves, state.opt_state))
    return jax.tree.map(lambda _: whole, state).replace(params=params, opt_state=opt)


def shardings(policy: Policy, state: TrainState) -> TrainState:
    """A `NamedSharding` for each leaf of a state, as a state."""
    return jax.tree.map(lambda p: specs.sharding(policy.mesh, p.spec), placements(policy, state),
                        is_leaf=lambda x: isinstance(x, Placement))


def lying(policy: Policy, state: TrainState) -> TrainState:
    """As `placements`, but where an array already lies somewhere, there."""
    put = lambda rule, x: layout.placed(policy, rule, getattr(x, "sharding", None), x.shape)
    return jax.tree.map(put, placements(policy, state), state, is_leaf=lambda x: isinstance(x, Placement))


def scaled(policy: Policy, state: TrainState) -> TrainState:
    """A state with a loss scale if `policy` needs one, a new one if it had none."""
    ours = scale.for_dtype(policy.precision.computes)
    return state if type(ours) is type(state.scale) else state.replace(scale=ours)


def report(policy: Policy, state: TrainState) -> layout.Layout:
    """The `Layout` of a state."""
    places = jax.tree.leaves(lying(policy, state), is_leaf=lambda x: isinstance(x, Placement))
    return layout.report(policy, state, places)


def _first_key(args):
    """The state's key: folded from the first key among init's arguments, of the new kind or the old, else key(0)."""
    typed = lambda x: trees.is_key(x) and x.shape == ()
    keys = [x for x in jax.tree.leaves(args) if hasattr(x, "dtype") and (typed(x) or trees.is_old_key(x))]
    if not keys:
        return jax.random.key(0)
    return jax.random.fold_in(keys[0] if typed(keys[0]) else jax.random.wrap_key_data(keys[0]), 0x5EED)
