"""Recognizes, by its program, a loss whose total is a mean: the weight would divide it again."""

import math
from typing import Any

from jax.extend import core as jex

_SAME = {"convert_element_type", "copy", "reshape", "squeeze"}


def is_mean(jaxpr: Any, total: int, weight: int) -> bool:
    """Whether one result of a jaxpr is a mean, and another, its weight, is not the constant 1.

    A mean is a sum divided by the number of its terms. A sum divided by another sum is one as well,
    if the weight is also a sum.

    Args:
      total, weight: the numbers of the two results.

    >>> import jax, jax.numpy as jnp
    >>> is_mean(jax.make_jaxpr(lambda x: (x.mean(), 4.0))(jnp.ones(4)), 0, 1)
    True
    >>> is_mean(jax.make_jaxpr(lambda x: (x.sum(), 4.0))(jnp.ones(4)), 0, 1)
    False
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    quotient = _origin(jaxpr, jaxpr.outvars[total])
    weight_origin = _origin(jaxpr, jaxpr.outvars[weight])
    is_one = isinstance(weight_origin, jex.Literal) and weight_origin.val == 1
    if is_one or not _is_made_by(quotient, "div"):
        return False
    body, eqn = quotient
    above, below = (_origin(body, v) for v in eqn.invars)
    if not _is_made_by(above, "reduce_sum"):
        return False
    if isinstance(below, jex.Literal):
        return float(below.val) == _terms(above[1])
    return _is_made_by(below, "reduce_sum") and _is_made_by(weight_origin, "reduce_sum")


def _terms(eqn) -> int:
    """Returns the number of terms of each sum of a reduce_sum."""
    shape = eqn.invars[0].aval.shape
    return math.prod(shape[i] for i in eqn.params["axes"])


def _is_made_by(origin: Any, name: str) -> bool:
    return isinstance(origin, tuple) and origin[1].primitive.name == name


def _origin(jaxpr: Any, var: Any) -> Any:
    """Returns where a variable comes from, through casts and calls.

    That is a literal, (jaxpr, equation), or None if it is an argument.
    """
    while not isinstance(var, jex.Literal):
        eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
        if eqn is None:
            return None
        bodies = list(jex.jaxprs_in_params(eqn.params))
        if eqn.primitive.name in ("jit", "pjit") and bodies:
            jaxpr = bodies[0]
            var = jaxpr.outvars[eqn.outvars.index(var)]
        elif eqn.primitive.name in _SAME:
            var = eqn.invars[0]
        else:
            return jaxpr, eqn
    return var
