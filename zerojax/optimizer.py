"""An optax transform as a program: which gradients it uses, and which parameters it never moves."""

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax
from jax.core import eval_jaxpr
from jax.extend import core as jex

from zerojax.errors import PolicyError

Tree = Any
_ASIDE = {"convert_element_type", "broadcast_in_dim", "reshape", "copy", "neg", "mul", "jit", "pjit"}  # 0 stays 0


@dataclasses.dataclass(frozen=True)
class Update:
    """`tx.update` as traced, for gradients of some shapes.

    Attributes:
      jaxpr: of gradients, optimizer state, parameters and the loss; out: the tree of (updates, optimizer state).
      still: of each parameter, whether its update is 0 whatever the gradients are, as `optax.set_to_zero` makes it.
      unused: of each parameter, whether nothing at all depends on its gradient.
    """

    jaxpr: Any
    out: Tree
    still: tuple[bool, ...]
    unused: tuple[bool, ...]

    def __call__(self, grads: Tree, opt_state: Tree, params: Tree, value: jax.Array) -> tuple[Tree, Tree]:
        """(updates, optimizer state)."""
        flat = jax.tree.leaves((grads, opt_state, params, value))
        return jax.tree.structure(self.out).unflatten(eval_jaxpr(self.jaxpr.jaxpr, self.jaxpr.consts, *flat))

    def applied(self, params: Tree, updates: Tree) -> list:
        """The leaves of parameters after an update; those that it does not move are the very same."""
        new = jax.tree.leaves(optax.apply_updates(params, updates))
        return [old if still else x for old, x, still in zip(jax.tree.leaves(params), new, self.still, strict=True)]

    def moved(self, leaves: Sequence) -> list:
        """Those, of one a parameter, of parameters that it moves; all, if it moves none."""
        return [x for x, still in zip(leaves, self.still, strict=True) if not still] or list(leaves)

    @property
    def frozen(self) -> list[bool]:
        """Of each parameter, whether it needs no gradient; some always do."""
        return [still and unused and not all(self.still) for still, unused in zip(self.still, self.unused, strict=True)]


def init(tx: Any, params: Tree) -> Tree:
    """`tx.init(params)`.

    Raises:
      PolicyError: the transform refuses them.
    """
    try:
        return tx.init(params)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(error, "at init it is given the parameters") from error


def trace(tx: Any, grads: Tree, opt_state: Tree, params: Tree, value: Any) -> Update:
    """The transform's update for arrays of such shapes; it is given the loss as `value` where it takes that.

    Raises:
      PolicyError: the transform asks for more than that, as a line search does.
    """
    tx = optax.with_extra_args_support(tx)
    with_value = lambda grads, opt_state, params, value: tx.update(grads, opt_state, params, value=value)
    without = lambda grads, opt_state, params, value: tx.update(grads, opt_state, params)
    traced = lambda update: jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params, value)
    try:
        try:
            jaxpr, out = traced(with_value)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            jaxpr, out = traced(without)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(error, "at update it is given gradients, its state, the parameters and the loss's value") from error
    return Update(jaxpr, out, *_judged(jaxpr.jaxpr, len(jax.tree.leaves(grads)), len(jax.tree.leaves(out[0]))))


def _refused(error: Exception, what: str) -> PolicyError:
    names = [name.partition(".")[0] for name in _functions(error)] + re.findall(r"(\w+)\.<locals>", str(error))
    name = f"the optimizer ({names[-1]})" if names else "the optimizer"
    return PolicyError(f"{name} can't be used in zerojax's step: {what}, no more, and it says {str(error)!r}. Take another "
                       "transform, or write a loop of your own: zero.value_and_grad under zero.jit.")


def _functions(error: Exception) -> Iterator[str]:
    """Those of optax that an error came through."""
    trace = error.__traceback__
    while trace is not None:
        if "optax" in trace.tb_frame.f_globals.get("__name__", ""):
            if "<locals>" in trace.tb_frame.f_code.co_qualname:
                yield trace.tb_frame.f_code.co_qualname
        trace = trace.tb_next


def _judged(jaxpr, grads: int, updates: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """(still, unused): see `Update`. A set of gradients is an integer of as many bits."""
    on = {v: 1 << i for i, v in enumerate(jaxpr.invars[:grads])}
    zeros = set()
    value = lambda v: 0 if isinstance(v, jex.Literal) else on.get(v, 0)
    for eqn in jaxpr.eqns:
        needs = functools.reduce(operator.or_, map(value, eqn.invars), 0)
        on.update(dict.fromkeys(eqn.outvars, needs))
        if eqn.primitive.name in _ASIDE and _makes_zeros(eqn, zeros):
            zeros.update(eqn.outvars)
    still = tuple(v in zeros for v in jaxpr.outvars[:updates])
    used = functools.reduce(operator.or_, map(value, jaxpr.outvars), 0)
    return still, tuple(not used >> i & 1 for i in range(grads))


def _makes_zeros(eqn, zeros: set) -> bool:
    """Whether an equation gives 0 in every place: it spreads a 0, or arrays of zeros."""
    bodies = list(jex.jaxprs_in_params(eqn.params))
    if bodies:
        inner: set = set()
        for e in bodies[0].eqns:
            if e.primitive.name in _ASIDE and _makes_zeros(e, inner):
                inner.update(e.outvars)
        return all(v in inner for v in bodies[0].outvars)
    known = [not v.val if isinstance(v, jex.Literal) else v in zeros for v in eqn.invars]
    return any(known) if eqn.primitive.name == "mul" else all(known)
