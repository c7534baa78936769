"""`zero.jit`: `jax.jit` for the user's own training loop.

Shardings follow the state that the function is called with; the batch is split over the devices.
"""

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from zerojax import errors, trees
from zerojax.data import batch as batches
from zerojax.errors import PolicyError, message_last
from zerojax.gather import uses
from zerojax.layout import rules
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.processes import fingerprint
from zerojax.train import argument_shardings, checks, planning
from zerojax.train.preflight import Preflight

_PRODUCTS = {"dot_general", "conv_general_dilated", "gather"}


class Jitted:
    """A function of a state and other arguments, jitted; made by `Zero.jit`, which documents it.

    Attributes:
      policy: the `Zero` that made it.
      fn: the function that was given.
    """

    def __init__(self, policy: Policy, fn, *,
                 batch_argnums: int | Collection[int] | Mapping[int, Any], **options):
        checks.check_function("jit", fn, "zero.jit(fn) with a function fn(state, batch, ...)")
        functools.update_wrapper(self, fn)
        self.policy = policy
        self.fn = fn
        self._options = options
        self._donates = bool(options["donate_argnums"])
        numbers = (batch_argnums,) if isinstance(batch_argnums, int) else batch_argnums
        # how each batch is split, by argument number; None: by the first dimension of its arrays
        self._specs = dict(numbers) if isinstance(numbers, Mapping) else dict.fromkeys(numbers)
        self._check_specs()
        self._names = list(inspect.signature(fn).parameters)
        self._jitted = {}  # by shardings: jit itself traces once per shape
        self._uses = {}  # by `_trace_key`: how often the trace needs each argument
        self._preflight = Preflight(policy, "zero.jit", donate=self._donates)
        self._is_new = False  # whether the function was traced since the last warning

    def __repr__(self) -> str:
        return f"zero.jit({checks.name_of(self.fn)})\n  {self.policy!r}"

    def __call__(self, state, *args, **kwargs):
        with message_last:
            state = self._preflight(state, args, kwargs, batch=self._batches(args, kwargs),
                                    fields=lambda state: self._fields(state, args, kwargs))
            program = self.of(state, *args, **kwargs)
            result = self._preflight.dispatch(program, state, *args, **kwargs)
            self._warn_of_products(state, *args, **kwargs)
            return result

    def lower(self, state, *args, **kwargs):
        """Lowers as `jax.jit` does.

        `state` may be shapes with shardings, such as `Zero.abstract` returns.
        """
        with message_last:
            lowered = self.of(state, *args, **kwargs).lower(state, *args, **kwargs)
        self._warn_of_products(state, *args, **kwargs)
        return lowered

    def plan(self, state, *args, accumulate: int = 1, cache: bool = True, **kwargs) -> Plan:
        """Returns the memory, collectives and time of a call; see `Zero.plan`."""
        batches.check_mesh(self.policy, (state, args, kwargs))
        placed = batches.placed(self.policy, (args, kwargs))
        program = self.of(state, *placed[0], **placed[1])
        with message_last:  # notes the uses; jax keeps the trace
            program.trace(state, *placed[0], **placed[1])
        key = self._trace_key(self._shardings(state, *placed), state, *placed)
        uses = self._uses.get(key, ())
        return planning.planned(self.policy, program, state, args, kwargs, accumulate=accumulate,
                                uses=planning.of_model(state, uses), cache=cache,
                                compiler_options=self._options["compiler_options"])

    def _check_specs(self) -> None:
        """Raises `PolicyError` for a batch's spec with an axis that the mesh does not have."""
        names = self.policy.mesh.axis_names
        for i, specs in self._specs.items():
            for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)):
                missing = [axis for axis in rules.axes_of(P(*spec)) if axis not in names]
                if missing:
                    raise PolicyError(f"zero.jit(batch_argnums={{{i}: {spec}}}): the mesh has the "
                                      f"axes {names}, but not {missing}; name one of these, such "
                                      f"as jax.P({names[-1]!r}).")

    def of(self, state, *args, **kwargs):
        """Returns the jitted function for arguments with these shardings."""
        shardings = self._shardings(state, args, kwargs)
        if shardings not in self._jitted:
            traced = functools.partial(self._traced, shardings)
            self._jitted[shardings] = jax.jit(traced, **self._options)
        return self._jitted[shardings]

    def _shardings(self, state, args, kwargs) -> tuple[Sharding | None, ...]:
        leaves = jax.tree.leaves(self._not_batches(state, args, kwargs))
        return tuple(getattr(x, "sharding", None) for x in leaves)

    def _trace_key(self, shardings, state, args, kwargs) -> tuple:
        """Returns all that a trace depends on; the same for traced arguments as for real ones."""
        static = {name: x for name, x in kwargs.items() if name in self._static}
        arrays = state, args, {name: x for name, x in kwargs.items() if name not in static}
        return (shardings, jax.tree.structure(arrays), tuple(_shapes(arrays)),
                frozenset(static.items()))

    def _fields(self, state, args, kwargs) -> dict:
        program = self.of(state, *args, **kwargs)
        return {"fn": fingerprint.of_function(self.fn),
                "program": fingerprint.of_program(program, state, *args, **kwargs)}

    def _batches(self, args, kwargs) -> Any:
        """Returns the batch, or a list of several."""
        found = [x for i, x in enumerate(args, 1) if i in self._specs]
        found += [x for name, x in kwargs.items() if self._number(name) is not None]
        return found[0] if len(found) == 1 else found

    def _not_batches(self, state, args, kwargs) -> tuple:
        """Returns the state and the other arguments that are not batches; no static ones."""
        by_position = (x for i, x in enumerate(args, 1) if i not in self._specs)
        by_name = {name: x for name, x in kwargs.items()
                   if self._number(name) is None and name not in self._static}
        return (state, *by_position, by_name)

    @property
    def _static(self) -> Collection[str]:
        names = self._options.get("static_argnames") or ()
        return {names} if isinstance(names, str) else set(names)

    def _number(self, name: str) -> int | None:
        """Returns the number of the batch with that name; None for any other argument."""
        return next((i for i in self._specs if self._names[i:i + 1] == [name]), None)

    def _traced(self, shardings: Sequence[Sharding | None], state, *args, **kwargs):
        """Runs the function on traced arguments; `shardings` are of those that are not batches."""
        self._is_new = True
        key = self._trace_key(shardings, state, args, kwargs)
        others = self._not_batches(state, args, kwargs)
        old = _with_shardings(state, shardings)
        args = [self._spread(i, x) for i, x in enumerate(args, 1)]
        kwargs = {name: self._spread(self._number(name), x) for name, x in kwargs.items()}
        with argument_shardings.tracing(others, shardings) as known:
            result = self.fn(state, *args, **kwargs)
        self._uses[key] = [known.uses.get(id(x)) for x in jax.tree.leaves(others)]
        return _placed_as(old, result)

    def _spread(self, number: int | None, x):
        """Returns an argument, split over the devices if it is a batch."""
        if number is None or number not in self._specs:
            return x
        specs = self._specs[number]
        if specs is None:
            return batches.spread(self.policy, x)

        def put(spec: P, tree):
            sharding = NamedSharding(self.policy.mesh, spec)
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

        return jax.tree.map(put, specs, x, is_leaf=lambda x: isinstance(x, P))

    def _warn_of_products(self, state, *args, **kwargs):
        """Warns, once per trace, of parameters that the function multiplies in shards."""
        if not self._is_new:
            return
        self._is_new = False
        traced = self.of(state, *args, **kwargs).trace(state, *args, **kwargs).jaxpr
        names = sorted(set(self._multiplied(state, getattr(traced, "jaxpr", traced))))
        if not names:
            return
        some = ", ".join(names[:3]) + " and others" * (len(names) > 3)
        errors.warn(f"zero.jit({getattr(self.fn, '__name__', self.fn)}): {some} are multiplied "
                    "without having been gathered, so that XLA may move activations instead of "
                    "them (tensor parallelism). Write zero.value_and_grad(loss)(params, batch) in "
                    "place of jax.value_and_grad, or zero.gathered(fn)(params, ...) in place of "
                    "fn.")

    def _multiplied(self, state, jaxpr) -> Iterator[str]:
        """Yields the paths of sharded arrays of the state that a product in the program reads."""
        flat = jax.tree.leaves_with_path(state)
        paths = {var: trees.path_of(path) for (path, x), var in
                 zip(flat, jaxpr.invars, strict=False) if self._is_sharded(path, x)}
        for eqn, names in uses.of(jaxpr, paths):
            if eqn.primitive.name in _PRODUCTS:
                yield from names

    def _is_sharded(self, path, x) -> bool:
        """Whether ZeRO shards an array of the state that a model reads: no optimizer state."""
        spec = getattr(getattr(x, "sharding", None), "spec", P())
        return (bool(set(rules.axes_of(spec)) & set(self.policy.axes))
                and "opt_state" not in trees.path_of(path).split("/")
                and jnp.issubdtype(x.dtype, jnp.floating))


def _with_shardings(state, shardings: Sequence[Sharding | None]):
    """Returns a traced state as shapes; the first shardings are those of its leaves."""
    flat, treedef = jax.tree.flatten(state)
    return treedef.unflatten(
        [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)
         for x, sharding in zip(flat, shardings, strict=False)])


def _placed_as(old, result):
    """Returns `result` with every state in it placed as `old`, the state that was given.

    A gradient or an update may have other shardings than the state.
    """
    wanted = _shapes(old)

    def is_state(x) -> bool:
        return jax.tree.structure(x) == jax.tree.structure(old) and _shapes(x) == wanted

    def put(x, like):
        named = isinstance(like.sharding, NamedSharding)
        return jax.lax.with_sharding_constraint(x, like.sharding) if named else x

    return jax.tree.map(lambda x: jax.tree.map(put, x, old) if is_state(x) else x, result,
                        is_leaf=is_state)


def _shapes(tree) -> list:
    return [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]
