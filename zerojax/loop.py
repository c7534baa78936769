"""A training loop of the user's own: `zero.jit` around it, `zero.view` where its loss reads the parameters.

Inside a `zero.jit` the shardings are those of the state it was called with. It traces the function twice: once
to see how `view`ed parameters are read (`census`), once for real.
"""

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from zerojax import agreement, census, data, fingerprint, gradients, layout
from zerojax.box import Box
from zerojax.census import Census
from zerojax.errors import ModelError, PolicyError
from zerojax.linen import LinenBox
from zerojax.plan import Plan
from zerojax.policy import Policy
from zerojax.specs import Leaf, Placement


def params_of(state: Any) -> Any:
    """The parameters of a training state: its `params`, by attribute or key; None if it has none."""
    return state.get("params") if isinstance(state, Mapping) else getattr(state, "params", None)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a traced function may know of the state it was called with."""

    params: Any = None  # the concrete or abstract tree, for its shapes and shardings
    reads: Census | None = None  # None: the census is being taken

    def check(self, params) -> None:
        """Raises `ModelError` for a tree that is not the state's parameters."""
        given, ours = layout.describe(params), layout.describe(self.params)
        shapes = lambda leaves: {leaf.path: leaf.shape for leaf in leaves}
        if shapes(given) != shapes(ours):
            odd = [p for p, _ in set(shapes(given).items()) ^ set(shapes(ours).items())]
            raise ModelError(f"zero.view was given a tree that is not the state's parameters: they differ at "
                             f"{', '.join(sorted(set(odd))[:5])}; write zero.view(state.params).")

    def places(self, policy: Policy, leaves: tuple[Leaf, ...]) -> list[Placement]:
        """Where the parameters lie; by the policy's rules if no state is known."""
        shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(self.params)] or [None] * len(leaves)
        return [layout.placed(policy, layout.place(policy, leaf), s, leaf.shape) for leaf, s in zip(leaves, shardings, strict=True)]


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("zerojax_frame", default=None)


def view(policy: Policy, params: Any, leaves: tuple[Leaf, ...] | None = None, box: type[Box] = LinenBox) -> Any:
    """`params` with each leaf boxed, gathered as the stage says; see `Zero.view`.

    `leaves` describes them where more is known than their shapes; `box` is what the kind of model opens.
    """
    _check_wishes(policy)
    frame = _frame.get() or Frame(reads=Census())
    if frame.params is not None:
        frame.check(params)
    leaves, flat = leaves or layout.describe(params), jax.tree.leaves(params)
    places = frame.places(policy, leaves)
    if frame.reads is None:
        flat = [census.tag_leaf(x, leaf.path) for x, leaf in zip(flat, leaves, strict=True)]
        readers = gradients.census_tags(policy, leaves, places)
        gathered, reads = [None] * len(flat), Census()
    else:
        reads = frame.reads
        readers = gradients.readers(policy, leaves, places, reads, False)
        gathered = gradients.gather_once(policy, readers, flat)
    boxed = gradients.boxes(box, leaves, readers, flat, gathered, reads)
    chosen = [b if jnp.issubdtype(x.dtype, jnp.floating) else x for b, x in zip(boxed, flat, strict=True)]
    return jax.tree.structure(params).unflatten(chosen)


def _check_wishes(policy: Policy):
    p = policy.precision
    if policy.gradients == "per_device" or p.reduces != p.computes:
        given = f"gradients={policy.gradients!r}, Precision(compute={p.computes!r}, reduce={p.reduces!r})"
        raise PolicyError(f"zero.view with {given}: a loop of one's own has one loss over the whole batch, which XLA reduces in "
                          "the dtype of the product; use zero.train_step, or leave both wishes out.")


class Jitted:
    """What `Zero.jit` returns: `fn`, jitted; the first argument is the state, the second (if any) the batch, also by its name."""

    def __init__(self, policy: Any, fn, **options):
        functools.update_wrapper(self, fn)
        self.policy, self.fn, self._options = policy, fn, options
        self._batch = next(iter([*inspect.signature(fn).parameters][1:]), None)
        self._jitted = {}  # by layout: jit traces for shapes alone
        self._agreed = agreement.Once()

    def __call__(self, state, *args, **kwargs):
        data.check_shared(self.policy, args[0] if args else kwargs.get(self._batch or ""))
        self._agreed(self.policy, "zero.jit", lambda: {
            "fn": fingerprint.of_function(self.fn), "program": fingerprint.of_program(self.of(state), state, *args, **kwargs)},
            state, args, kwargs)
        return self.of(state)(state, *args, **kwargs)

    def lower(self, state, *args, **kwargs):
        """As jit's; `state` as from `Zero.abstract` or `jax.eval_shape` with shardings."""
        return self.of(state).lower(state, *args, **kwargs)

    def plan(self, state, *args, accumulate: int = 1, cache: bool = True, **kwargs) -> Plan:
        """What a call needs and moves; as `Zero.plan`."""
        return self.policy.plan(self, state, *args, accumulate=accumulate, cache=cache,
                                compiler_options=self._options["compiler_options"], **kwargs)

    def of(self, state):
        """The jitted function for states that lie as this one."""
        layout = tuple(getattr(x, "sharding", None) for x in jax.tree.leaves(state))
        if layout not in self._jitted:
            self._jitted[layout] = jax.jit(functools.partial(self._traced, layout), **self._options)
        return self._jitted[layout]

    def _traced(self, layout, state, *args, **kwargs):
        known = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(jax.tree.leaves(state), layout, strict=True)]
        known = jax.tree.structure(state).unflatten(known)
        if args:
            args = (data.spread(self.policy, args[0]), *args[1:])
        elif self._batch in kwargs:
            kwargs[self._batch] = data.spread(self.policy, kwargs[self._batch])
        call = functools.partial(self.fn, state, *args, **kwargs)
        with gradients.arrays_wanted():
            return _kept(self._run(params_of(known), call), known)

    def _run(self, params, call):
        reads = _in(Frame(params), lambda: census.take(jax.make_jaxpr(call)()))
        try:
            return _in(Frame(params, reads), call)
        except (TypeError, ValueError) as error:
            if not reads.often or not gradients.no_array(error):
                raise
        plain = dataclasses.replace(reads, often=frozenset())  # a use behind a read takes arrays only
        return _in(Frame(params, plain), call)


def _in(frame: Frame, run):
    token = _frame.set(frame)
    try:
        return run()
    finally:
        _frame.reset(token)


def _kept(result, known):
    """`result` with every state in it where the old one lay: a gradient or update may lie elsewhere."""
    of = lambda tree: (jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)])
    wanted = of(known)
    is_state = lambda x: jax.tree.structure(x) == wanted[0] and of(x) == wanted
    put = lambda new, old: jax.lax.with_sharding_constraint(new, old.sharding) if _named(old) else new
    return jax.tree.map(lambda x: jax.tree.map(put, x, known) if is_state(x) else x, result, is_leaf=is_state)


def _named(x) -> bool:
    return isinstance(getattr(x, "sharding", None), NamedSharding)
