"""Recognizes, by its program, a `Loss` whose total does not fit its weight.

The gradient is that of total / weight, so both must grow with the batch. A total that is a mean
does not: the weight would divide it again. To see how a result grows, the program is compared with
that for a batch of twice the size. Programs that are not understood are taken for right.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jex

from zerojax.gather import uses

_SAME = {"convert_element_type", "copy", "reshape", "squeeze", "neg"}
_SUMS = {"add", "sub", "add_any"}
_WITH_LEAST = {"max", "add"}  # of a count, so that it is not 0


@dataclasses.dataclass(frozen=True)
class Term:
    """A summand of a total that is itself a sum over dimensions, times and divided by numbers.

    Attributes:
      count: the number of terms of the sum.
      factor: the factors by the divisors, None if there is none; a divisor that is itself a sum
        counts with the number of its terms.
    """

    count: float
    factor: float | None = None

    @property
    def size(self) -> float:
        return self.count * (1.0 if self.factor is None else self.factor)

    def times(self, factor: float) -> "Term":
        return Term(self.count, factor if self.factor is None else self.factor * factor)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The terms of a total, () if it is not understood, and the size of its weight, 0 if not."""

    total: tuple[Term, ...]
    weight: float

    @property
    def may_be_mean(self) -> bool:
        is_scaled = all(term.factor is not None for term in self.total)
        return self.weight != 0 and bool(self.total) and is_scaled

    def is_mean(self, larger: "Sizes") -> bool:
        """Whether the total is a mean over examples, which its weight would divide again.

        The number of its terms grows with the batch, but its size does not. The weight grows, or is
        a number other than that size, such as that of the examples in a batch.

        Args:
          larger: the sizes for a batch twice as large.
        """
        if not self.may_be_mean or len(larger.total) != len(self.total):
            return False
        for a, b in zip(self.total, larger.total, strict=True):
            if b.count != 2 * a.count or not _equal(a.size, b.size):
                return False
        fits = any(_equal(term.size, self.weight) for term in self.total)
        return larger.weight not in (0, self.weight) or not (fits or self.weight == 1)


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3)


def sizes(jaxpr: Any, params: int, total: int = 0) -> Sizes:
    """Returns the sizes of a total and of the weight, which are results of a jaxpr.

    Args:
      params: the number of the first arguments, which do not depend on the batch.
      total: the number of the total among the results; the weight is number 1.

    >>> import jax, jax.numpy as jnp
    >>> def loss(w, x):
    ...     return 0.5 * (w * x).mean() + w ** 2, x.size * 1.0
    >>> small, large = [sizes(jax.make_jaxpr(loss)(1.0, jnp.ones(n)), 1) for n in (4, 8)]
    >>> small.is_mean(large)
    True
    """
    jaxpr = uses.without_constants(jaxpr)
    varying = uses.depending(jaxpr, [*jaxpr.constvars, *jaxpr.invars[params:]])
    place = _Place(jaxpr, varying)
    found = list(_terms(place, jaxpr.outvars[total]))
    terms = tuple(term for term in found if term is not None)
    weight = _count(place, jaxpr.outvars[1])
    return Sizes(terms if len(terms) == len(found) else (), weight or 0)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A jaxpr, and those of its variables that depend on the batch."""

    jaxpr: Any
    varying: set

    def varies(self, var: Any) -> bool:
        return not isinstance(var, jex.Literal) and var in self.varying


def _origin(place: _Place, var: Any) -> tuple[_Place, Any]:
    """Returns the equation that makes a variable, through casts and calls, with its place.

    In place of an equation, it is the variable itself if that is a literal or an argument.
    """
    while not isinstance(var, jex.Literal):
        eqn = next((e for e in place.jaxpr.eqns if var in e.outvars), None)
        if eqn is None:
            break
        bodies = list(jex.jaxprs_in_params(eqn.params))
        if eqn.primitive.name in ("jit", "pjit") and bodies:
            body = uses.without_constants(bodies[0])
            given = eqn.invars[len(eqn.invars) - len(body.invars):]
            varying = [v for v, x in zip(body.invars, given, strict=True) if place.varies(x)]
            var = body.outvars[eqn.outvars.index(var)]
            place = _Place(body, uses.depending(body, varying))
        elif eqn.primitive.name in _SAME:
            var = eqn.invars[0]
        else:
            return place, eqn
    return place, var


def _terms(place: _Place, var: Any) -> Iterator[Term | None]:
    """Yields the summands of a variable that depend on the batch; None for one of another form."""
    if not place.varies(var):
        return
    place, eqn = _origin(place, var)
    name = eqn.primitive.name if hasattr(eqn, "primitive") else ""
    if name in _SUMS:
        for operand in eqn.invars:
            yield from _terms(place, operand)
    elif name == "reduce_sum":
        yield Term(_summed(eqn))
    elif name in ("mul", "div"):
        yield from _scaled(place, *eqn.invars, is_quotient=name == "div")
    else:
        yield None


def _scaled(place: _Place, x: Any, factor: Any, *, is_quotient: bool) -> Iterator[Term | None]:
    """Yields the terms of a product or a quotient."""
    if not is_quotient and not place.varies(x):
        x, factor = factor, x
    size = _count(place, factor) if is_quotient or not place.varies(factor) else None
    for term in _terms(place, x):
        if term is None or not size:
            yield None
        else:
            yield term.times(1 / size if is_quotient else size)


def _count(place: _Place, var: Any) -> float | None:
    """Returns the size of a factor or weight: a number, or the number of terms of a sum.

    Any other factor that does not depend on the batch has the size 1. None: it is not understood.
    """
    place, origin = _origin(place, var)
    if isinstance(origin, jex.Literal):
        return abs(float(origin.val))
    if not hasattr(origin, "primitive"):
        return None if place.varies(origin) else 1.0
    if origin.primitive.name == "reduce_sum":
        return _summed(origin)
    if not any(map(place.varies, origin.invars)):
        return 1.0
    varying: Sequence = [v for v in origin.invars if place.varies(v)]
    is_count = origin.primitive.name in _WITH_LEAST and len(varying) == 1
    return _count(place, varying[0]) if is_count else None


def _summed(eqn) -> float:
    """Returns the number of terms of each sum of a reduce_sum."""
    shape = eqn.invars[0].aval.shape
    return float(math.prod(shape[i] for i in eqn.params["axes"]))
