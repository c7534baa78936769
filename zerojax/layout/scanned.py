"""Which dimensions an init stacked: a scan slices them again, so that they must stay whole."""

from jax.extend import core as jex

_CASTS = {"convert_element_type", "copy", "name"}


def stacked(jaxpr) -> list[int | None]:
    """For each result of an init: the dimension along which a scan stacked it, or None.

    >>> import jax
    >>> init = lambda seed: jax.lax.scan(lambda c, _: (c + 1, jax.numpy.full((3,), c)), seed, length=4)[1]
    >>> stacked(jax.make_jaxpr(init)(0))
    [0]
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    return [_stacked(v, made) for v in jaxpr.outvars]


def _stacked(var, made) -> int | None:
    if isinstance(var, jex.Literal) or var not in made:
        return None
    eqn, i = made[var]
    inner = next(iter(jex.jaxprs_in_params(eqn.params)), None)
    if eqn.primitive.name == "scan" and inner:
        return 0 if len(var.aval.shape) > len(inner.outvars[i].aval.shape) else None  # a result a turn, not a carry
    if eqn.primitive.name == "transpose":
        axis = _stacked(eqn.invars[0], made)
        return None if axis is None else list(eqn.params["permutation"]).index(axis)
    if inner and len(inner.outvars) == len(eqn.outvars):
        return stacked(inner)[i]
    return _stacked(eqn.invars[0], made) if eqn.primitive.name in _CASTS else None
