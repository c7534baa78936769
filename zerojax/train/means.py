"""Whether a loss's total is a mean, as its program shows: it would be divided by the weight a second time."""

import math
from typing import Any

from jax.extend import core as jex

_SAME = {"convert_element_type", "copy", "reshape", "squeeze"}


def is_mean(jaxpr: Any, total: int, weight: int) -> bool:
    """Whether result number `total` is a sum over its number of terms, or over another sum, and result `weight` is not 1.

    >>> import jax, jax.numpy as jnp
    >>> is_mean(jax.make_jaxpr(lambda x: (x.mean(), 4.0))(jnp.ones(4)), 0, 1)
    True
    >>> is_mean(jax.make_jaxpr(lambda x: (x.sum(), 4.0))(jnp.ones(4)), 0, 1)
    False
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    value, weigher = _made(jaxpr, jaxpr.outvars[total]), _made(jaxpr, jaxpr.outvars[weight])
    if not _is(value, "div") or (isinstance(weigher, jex.Literal) and weigher.val == 1):
        return False
    where, eqn = value
    above, below = (_made(where, v) for v in eqn.invars)
    if not _is(above, "reduce_sum"):
        return False
    if isinstance(below, jex.Literal):
        shape, axes = above[1].invars[0].aval.shape, above[1].params["axes"]
        return float(below.val) == math.prod(shape[i] for i in axes)
    return _is(below, "reduce_sum") and _is(weigher, "reduce_sum")


def _is(made: Any, name: str) -> bool:
    return isinstance(made, tuple) and made[1].primitive.name == name


def _made(jaxpr: Any, var: Any) -> Any:
    """A literal, (jaxpr, equation) that makes a variable, or None; through casts, and within calls."""
    while not isinstance(var, jex.Literal):
        eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
        if eqn is None:
            return None
        bodies = list(jex.jaxprs_in_params(eqn.params))
        if eqn.primitive.name in ("jit", "pjit") and bodies:
            jaxpr, var = bodies[0], bodies[0].outvars[eqn.outvars.index(var)]
        elif eqn.primitive.name in _SAME:
            var = eqn.invars[0]
        else:
            return jaxpr, eqn
    return var
