"""The dimensions that an init function stacks in a scan, which the model slices in a scan again.

They must stay whole.
"""

from jax.extend import core as jex

_CASTS = {"convert_element_type", "copy", "name"}


def stacked(jaxpr) -> list[int | None]:
    """Returns the dimension along which a scan stacked each result of an init function, or None.

    >>> import jax
    >>> def init(seed):
    ...     return jax.lax.scan(lambda c, _: (c + 1, jax.numpy.full((3,), c)), seed, length=4)[1]
    >>> stacked(jax.make_jaxpr(init)(0))
    [0]
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    return [_stacked(v, made) for v in jaxpr.outvars]


def _stacked(var, made) -> int | None:
    """Returns the same for one variable; `made` has its equation and its place in the results."""
    if isinstance(var, jex.Literal) or var not in made:
        return None
    eqn, i = made[var]
    inner = next(iter(jex.jaxprs_in_params(eqn.params)), None)
    if eqn.primitive.name == "scan" and inner:
        per_turn = len(var.aval.shape) > len(inner.outvars[i].aval.shape)  # stacked, not a carry
        return 0 if per_turn else None
    if eqn.primitive.name == "transpose":
        axis = _stacked(eqn.invars[0], made)
        return None if axis is None else list(eqn.params["permutation"]).index(axis)
    if inner and len(inner.outvars) == len(eqn.outvars):
        return stacked(inner)[i]
    return _stacked(eqn.invars[0], made) if eqn.primitive.name in _CASTS else None
