"""A training loop of the user's own: `zero.jit` around it, `zero.view` where its loss reads the parameters.

Inside a `zero.jit` the shardings are those of the state it was called with. It traces the function twice: once
to see how `view`ed parameters are read (`census`), once for real.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from zerojax import census, data, gradients, layout, specs
from zerojax.box import Box
from zerojax.census import Census, Tag
from zerojax.errors import ModelError
from zerojax.linen import LinenBox
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
        return [placed(policy, leaf, s) for leaf, s in zip(leaves, shardings, strict=True)]


def placed(policy: Policy, leaf: Leaf, sharding: Any) -> Placement:
    """Where an array lies by its sharding, or would by the policy's rules if it has none; these also say why it is whole."""
    ruled = layout.place(policy, leaf)
    if not isinstance(sharding, NamedSharding):
        return ruled
    spec = specs.full(sharding.spec, len(leaf.shape))
    return Placement(spec, specs.keep(spec, lambda axis: axis not in policy.axes), ruled.reason or "made so")


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("zerojax_frame", default=None)


def view(policy: Policy, params: Any, leaves: tuple[Leaf, ...] | None = None, box: type[Box] = LinenBox) -> Any:
    """`params` with each leaf boxed, gathered as the stage says; see `Zero.view`.

    `leaves` describes them where more is known than their shapes; `box` is what the kind of model opens.
    """
    frame = _frame.get() or Frame(reads=Census())
    if frame.params is not None:
        frame.check(params)
    leaves, flat = leaves or layout.describe(params), jax.tree.leaves(params)
    places = frame.places(policy, leaves)
    if frame.reads is None:
        flat = [census.tag_leaf(x, leaf.path) for x, leaf in zip(flat, leaves, strict=True)]
        readers = [Tag(leaf.path, p.spec, p.whole, policy.precision.compute) for leaf, p in zip(leaves, places, strict=True)]
        gathered, reads = [None] * len(flat), Census()
    else:
        reads = frame.reads
        readers = gradients.readers(policy, leaves, places, reads, False)
        gathered = gradients.gather_once(policy, readers, flat)
    return jax.tree.structure(params).unflatten(gradients.boxes(box, leaves, readers, flat, gathered, reads))


class Jitted:
    """What `Zero.jit` returns: `fn`, jitted; the first argument is the state, the second (if any) the batch.

    Arguments of the same shapes are traced once, for the layout of the first state that came.
    """

    def __init__(self, policy: Policy, fn, donate: bool, compiler_options: dict | None):
        functools.update_wrapper(self, fn)
        self.policy, self.fn = policy, fn
        self._jitted = jax.jit(self._traced, donate_argnums=(0,) if donate else (), compiler_options=compiler_options)
        self._called_with = None

    def __call__(self, state, *args):
        self._called_with = state
        try:
            return self._jitted(state, *args)
        finally:
            self._called_with = None

    def lower(self, state, *args):
        """As jit's; `state` as from `Zero.abstract` or `jax.eval_shape` with shardings."""
        self._called_with = state
        return self._jitted.lower(state, *args)

    def _traced(self, state, *args):
        concrete = self._called_with
        if args:
            data.check(self.policy, args[0])
            args = (jax.lax.with_sharding_constraint(args[0], data.sharding(self.policy)), *args[1:])
        params = params_of(concrete)
        try:
            reads = self._in(Frame(params), lambda: census.take(jax.make_jaxpr(self.fn)(state, *args)))
        except (TypeError, ValueError) as error:
            raise gradients.no_array(error) or error from None
        return self._kept(self._run(params, reads, state, args), concrete)

    def _in(self, frame: Frame, run):
        token = _frame.set(frame)
        try:
            return run()
        finally:
            _frame.reset(token)

    def _run(self, params, reads, state, args):
        try:
            return self._in(Frame(params, reads), lambda: self.fn(state, *args))
        except (TypeError, ValueError):
            if not reads.often:
                raise
        plain = dataclasses.replace(reads, often=frozenset())  # a use behind a read takes arrays only
        return self._in(Frame(params, plain), lambda: self.fn(state, *args))

    def _kept(self, result, state):
        """The new state where the old one lay."""
        treedef = jax.tree.structure(state)
        put = lambda new, old: jax.lax.with_sharding_constraint(new, old.sharding) if _named(old) else new
        is_state = lambda x: jax.tree.structure(x) == treedef
        first = result[0] if isinstance(result, tuple) and result and not is_state(result) else result
        if not is_state(first):
            return result
        kept = jax.tree.map(put, first, state)
        return kept if first is result else (kept, *result[1:])


def _named(x) -> bool:
    return isinstance(getattr(x, "sharding", None), NamedSharding)
