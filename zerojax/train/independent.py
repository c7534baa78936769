"""The dimensions along which a program treats the slices of its arrays independently.

A stack of layers, `[layers, m, n]`, is such a dimension for an optimizer that orthogonalizes each
layer's matrix by itself. The result is advice for a layout: an unknown primitive counts as one that
combines all slices.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jax.extend import core as jex

from zerojax.gather import uses

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max
    min mul ne neg nextafter not or polygamma pow real reduce_precision regularized_incomplete_beta
    rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
_LINEAR_ALGEBRA = """
    cholesky eig eigh geqrf hessenberg householder_product lu qr schur svd triangular_solve
    tridiagonal
"""
# primitives that compute each element of a result from the same element of each operand
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# primitives that take the last two dimensions of each operand as a matrix
LINEAR_ALGEBRA = frozenset(_LINEAR_ALGEBRA.split())

Dims = tuple[int | None, ...]  # for each dimension, the number of its class; None: of no class


@dataclasses.dataclass(frozen=True)
class Slices:
    """A dimension along which a program treats slices independently.

    Attributes:
      size: the number of slices.
      inputs, results: the dimension's index in each of them; None if an array does not have it.
    """

    size: int
    inputs: tuple[int | None, ...]
    results: tuple[int | None, ...]


def slices(jaxpr: Any, cost: Callable[[int], float]) -> Slices | None:
    """Returns the independent dimension of a program's largest input with the least cost, or None.

    Args:
      jaxpr: a program without constants.
      cost: of a number of slices.

    >>> import jax, jax.numpy as jnp
    >>> slices(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((3, 4, 4))).jaxpr, cost=lambda n: n)
    Slices(size=3, inputs=(0,), results=(0,))
    """
    classes = _Classes()
    inputs = [classes.new(v.aval.shape) for v in jaxpr.invars]
    results = _followed(classes, jaxpr, inputs)
    largest = max(range(len(inputs)), key=lambda i: math.prod(jaxpr.invars[i].aval.shape))
    sizes = {classes.find(c): d for c, d in
             zip(inputs[largest], jaxpr.invars[largest].aval.shape, strict=True) if d > 1}
    free = [c for c in sizes if c not in classes.combined]
    if not free:
        return None
    best = min(free, key=lambda c: cost(sizes[c]))
    return Slices(sizes[best], *(tuple(classes.index(dims, best) for dims in arrays)
                                 for arrays in (inputs, results)))


class _Classes:
    """Classes of dimensions that a program pairs with each other.

    Attributes:
      combined: the classes whose slices the program combines.
    """

    def __init__(self):
        self._parents: dict[int, int] = {}
        self._combined: set[int] = set()

    def new(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns a class for each dimension of an array."""
        dims = tuple(range(len(self._parents), len(self._parents) + len(shape)))
        self._parents.update((d, d) for d in dims)
        return dims

    def find(self, c: int) -> int:
        """Returns the number of the class that `c` was joined to."""
        while self._parents[c] != c:
            c = self._parents[c]
        return c

    def join(self, cs: Iterable[int | None]) -> int | None:
        """Joins classes, and returns the number of the result; None if there is none."""
        found = [self.find(c) for c in cs if c is not None]
        self._parents.update((c, found[0]) for c in found)
        return found[0] if found else None

    def combine(self, cs: Iterable[int | None]) -> None:
        """Notes that the program combines the slices along these dimensions."""
        self._combined.update(c for c in cs if c is not None)

    @property
    def combined(self) -> set[int]:
        return {self.find(c) for c in self._combined}

    def index(self, dims: Dims, best: int) -> int | None:
        """Returns the index of the dimension of a class."""
        return next((i for i, c in enumerate(dims) if c is not None and self.find(c) == best), None)


def _followed(classes: _Classes, jaxpr: Any, inputs: Sequence[Dims]) -> list[Dims]:
    """Returns the classes of the results' dimensions, for those of a program's inputs."""
    jaxpr = uses.without_constants(jaxpr)
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(v) -> Dims:
        return () if isinstance(v, jex.Literal) else known.get(v, (None,) * len(v.aval.shape))

    for eqn in jaxpr.eqns:
        operands = [of(v) for v in eqn.invars]
        known.update(zip(eqn.outvars, _rule(eqn)(classes, eqn, operands), strict=True))
    return [of(v) for v in jaxpr.outvars]


def _rule(eqn) -> Callable[[_Classes, Any, list[Dims]], Sequence[Dims]]:
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return _elementwise
    if name in LINEAR_ALGEBRA:
        return _linear_algebra
    is_reduction = name.startswith(("reduce_", "arg")) and "axes" in eqn.params
    return _reduction if is_reduction else _RULES.get(name, _unknown)


def _unknown(classes, eqn, operands):
    for dims in operands:
        classes.combine(dims)
    return [(None,) * len(v.aval.shape) for v in eqn.outvars]


def _elementwise(classes, eqn, operands):
    shape = eqn.outvars[0].aval.shape
    full = [(dims, v.aval.shape) for dims, v in zip(operands, eqn.invars, strict=True) if dims]
    joined = tuple(classes.join(dims[i] for dims, sizes in full if sizes[i] == d)
                   for i, d in enumerate(shape))
    return [joined] * len(eqn.outvars)


def _linear_algebra(classes, eqn, operands):
    for dims in operands:
        classes.combine(dims[-2:])
    stack = operands[0][:-2]
    return [(*stack, *[None] * (len(v.aval.shape) - len(stack))) for v in eqn.outvars]


def _reduction(classes, eqn, operands):
    axes = set(map(int, eqn.params["axes"]))
    classes.combine(dims[i] for dims in operands for i in axes if dims)
    return [tuple(c for i, c in enumerate(operands[0]) if i not in axes)] * len(eqn.outvars)


def _product(classes, eqn, operands):
    (_, (left, right)), (a, b) = eqn.params["dimension_numbers"], operands
    for dims, stack in ((a, left), (b, right)):
        classes.combine(c for i, c in enumerate(dims) if i not in stack)
    joined = [classes.join((a[i], b[j])) for i, j in zip(left, right, strict=True)]
    return [(*joined, *[None] * (len(eqn.outvars[0].aval.shape) - len(joined)))]


def _transpose(classes, eqn, operands):
    return [tuple(operands[0][i] for i in eqn.params["permutation"])]


def _squeeze(classes, eqn, operands):
    return [tuple(c for i, c in enumerate(operands[0]) if i not in eqn.params["dimensions"])]


def _broadcast(classes, eqn, operands):
    old, new = eqn.invars[0].aval.shape, list(eqn.outvars[0].aval.shape)
    dims: list[int | None] = [None] * len(new)
    for i, c in zip(eqn.params["broadcast_dimensions"], operands[0], strict=False):
        dims[i] = c
    kept = dict(zip(eqn.params["broadcast_dimensions"], old, strict=True))
    return [tuple(c if kept.get(i) == new[i] else None for i, c in enumerate(dims))]


def _reshape(classes, eqn, operands):
    """Merged dimensions continue in the class of the first; all parts of a split one in its own."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    dims: list[int | None] = [None] * len(new)
    for mine, theirs in _matched(old, new):
        classes.combine(operands[0][i] for i in mine[1:])
        for i in theirs:
            dims[i] = operands[0][mine[0]]
    return [tuple(dims)]


def _matched(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the smallest runs of dimensions of one size in two shapes, without those of size 1.

    >>> list(_matched((1, 6, 4), (2, 3, 4)))
    [([1], [0, 1]), ([2], [2])]
    """
    left, right = ([i for i, d in enumerate(shape) if d != 1] for shape in (old, new))
    while left and right:
        mine, theirs = [left.pop(0)], [right.pop(0)]
        while (a := _size(old, mine)) != (b := _size(new, theirs)):
            run, rest = (mine, left) if a < b else (theirs, right)
            run.append(rest.pop(0))
        yield mine, theirs


def _size(shape: Sequence[int], some: Iterable[int]) -> int:
    return math.prod(shape[i] for i in some)


def _scan(classes, eqn, operands):
    body = next(iter(jex.jaxprs_in_params(eqn.params)))
    body = uses.without_constants(body)
    given = []
    for dims, v, inner in zip(operands, eqn.invars, body.invars, strict=True):
        sliced = len(v.aval.shape) - len(inner.aval.shape)
        classes.combine(dims[:sliced])
        given.append(dims[sliced:])
    results = _followed(classes, body, given)
    return [(*[None] * (len(v.aval.shape) - len(dims)), *dims)
            for dims, v in zip(results, eqn.outvars, strict=True)]


def _call(classes, eqn, operands):
    return _followed(classes, next(iter(jex.jaxprs_in_params(eqn.params))), operands)


def _cond(classes, eqn, operands):
    branches = [_followed(classes, body, operands[1:])
                for body in jex.jaxprs_in_params(eqn.params)]
    return [tuple(map(classes.join, zip(*same, strict=True)))
            for same in zip(*branches, strict=True)]


_RULES = {"broadcast_in_dim": _broadcast, "cond": _cond, "dot_general": _product, "jit": _call,
          "pjit": _call, "reshape": _reshape, "scan": _scan, "squeeze": _squeeze,
          "transpose": _transpose}
