"""`zero.jit`: jax.jit for a training loop of the user's own. Shardings follow the state, the batch is split over the devices."""

import functools
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.gather import rewrite
from zerojax.layout import rules
from zerojax.plan.plan import Plan
from zerojax.processes import agreement, fingerprint
from zerojax.train import donation, frame


class Jitted:
    """What `Zero.jit` returns: `fn`, jitted; the first argument is the state."""

    def __init__(self, policy: Any, fn, *, batch_argnums: int | Collection[int] | Mapping[int, Any], **options):
        functools.update_wrapper(self, fn)
        self.policy, self.fn, self._options = policy, fn, options
        numbers = (batch_argnums,) if isinstance(batch_argnums, int) else batch_argnums
        self._splits = dict(numbers) if isinstance(numbers, Mapping) else dict.fromkeys(numbers)
        self._names = list(inspect.signature(fn).parameters)
        self._jitted = {}  # by layout: jit traces for shapes alone
        self._agreed, self._fresh = agreement.Once(), False

    def __call__(self, state, *args, **kwargs):
        split = [x for i, x in enumerate(args, 1) if i in self._splits]
        batches.check_given(self.policy, split + [x for k, x in kwargs.items() if self._split_of(k) is not None])
        if self._options["donate_argnums"]:
            state = donation.ready("zero.jit", self.policy.mesh, state, others=(args, kwargs))
        else:
            donation.check_alive("zero.jit", state)
        self._agreed(self.policy, "zero.jit", lambda: {
            "fn": fingerprint.of_function(self.fn),
            "program": fingerprint.of_program(self.of(state, *args, **kwargs), state, *args, **kwargs)}, state, args, kwargs)
        result = self.of(state, *args, **kwargs)(state, *args, **kwargs)
        self._tell(state, *args, **kwargs)
        return result

    def lower(self, state, *args, **kwargs):
        """As jit's; `state` as from `Zero.abstract` or `jax.eval_shape` with shardings."""
        lowered = self.of(state, *args, **kwargs).lower(state, *args, **kwargs)
        self._tell(state, *args, **kwargs)
        return lowered

    def plan(self, state, *args, accumulate: int = 1, cache: bool = True, **kwargs) -> Plan:
        """What a call needs and moves; as `Zero.plan`."""
        return self.policy.plan(self, state, *args, accumulate=accumulate, cache=cache,
                                compiler_options=self._options["compiler_options"], **kwargs)

    def of(self, state, *args, **kwargs):
        """The jitted function for arguments that are placed as these."""
        known = jax.tree.leaves(self._placed(state, args, kwargs))
        key = tuple(getattr(x, "sharding", None) for x in known)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(functools.partial(self._traced, key), **self._options)
        return self._jitted[key]

    def _placed(self, state, args, kwargs):
        """The arguments that are no batch."""
        return (state, *(x for i, x in enumerate(args, 1) if i not in self._splits),
                {k: x for k, x in kwargs.items() if self._split_of(k) is None and k not in self._static})

    @property
    def _static(self) -> Collection[str]:
        names = self._options.get("static_argnames") or ()
        return {names} if isinstance(names, str) else set(names)

    def _split_of(self, name: str) -> int | None:
        return next((i for i in self._splits if self._names[i:i + 1] == [name]), None)

    def _traced(self, shardings, state, *args, **kwargs):
        self._fresh = True
        given = self._placed(state, args, kwargs)
        flat, treedef = jax.tree.flatten(state)
        known = treedef.unflatten([jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=s)
                                   for x, s in zip(flat, shardings, strict=False)])  # the state's are the first
        args = [self._spread(i, x) if i in self._splits else x for i, x in enumerate(args, 1)]
        kwargs = {k: x if (i := self._split_of(k)) is None else self._spread(i, x) for k, x in kwargs.items()}
        with frame.within(given, shardings):
            return _kept(self.fn(state, *args, **kwargs), known)

    def _spread(self, index: int, batch):
        """A batch over the devices: by its first dimension, or as the specs say."""
        specs = self._splits[index]
        if specs is None:
            return batches.spread(self.policy, batch)
        put = lambda spec, x: jax.lax.with_sharding_constraint(x, NamedSharding(self.policy.mesh, spec))
        return jax.tree.map(lambda spec, tree: jax.tree.map(functools.partial(put, spec), tree), specs, batch,
                            is_leaf=lambda x: isinstance(x, P))

    def _tell(self, state, *args, **kwargs):
        """Warns, once a trace, of parameters that the function multiplies without a verb of ours."""
        if not self._fresh:
            return
        self._fresh = False
        traced = self.of(state, *args, **kwargs).trace(state, *args, **kwargs).jaxpr
        jaxpr = getattr(traced, "jaxpr", traced)
        paths = [(trees.path_of(path), x) for path, x in jax.tree.leaves_with_path(state)]
        held = {var: name for (name, x), var in zip(paths, jaxpr.invars, strict=False) if _is_read(self.policy, name, x)}
        bare = sorted(set().union(*(names for eqn, names in rewrite.uses(jaxpr, held) if eqn.primitive.name in _PRODUCTS)))
        if bare:
            names, name = ", ".join(bare[:3]) + " and others" * (len(bare) > 3), getattr(self.fn, "__name__", self.fn)
            warnings.warn(f"zero.jit({name}): {names} are multiplied without having been gathered, so that XLA may "
                          "move activations in their place (tensor parallelism). Write zero.value_and_grad(loss)(params, batch) "
                          "for jax.value_and_grad, or zero.gathered(fn)(params, ...) for fn.", stacklevel=3)


def _is_read(policy, name: str, x) -> bool:
    """Whether an array of the state is one that ZeRO spreads for a model to read: not optimizer state."""
    spread = set(rules.axes_of(getattr(getattr(x, "sharding", None), "spec", P()))) & set(policy.axes)
    return bool(spread) and "opt_state" not in name.split("/") and jnp.issubdtype(x.dtype, jnp.floating)


_PRODUCTS = {"dot_general", "conv_general_dilated", "gather"}


def _kept(result, known):
    """`result` with every state in it where the old one was: a gradient or update may be elsewhere."""
    of = lambda tree: (jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)])
    wanted = of(known)
    is_state = lambda x: jax.tree.structure(x) == wanted[0] and of(x) == wanted
    named = lambda x: isinstance(getattr(x, "sharding", None), NamedSharding)
    put = lambda new, old: jax.lax.with_sharding_constraint(new, old.sharding) if named(old) else new
    return jax.tree.map(lambda x: jax.tree.map(put, x, known) if is_state(x) else x, result, is_leaf=is_state)
