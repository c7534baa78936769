"""How often a program needs each sharded parameter whole, counted on the user's own program.

`rewrite` places the gathers; the proof compares the compiled program with this count, which does
not depend on the gathers that `rewrite` placed. There is one read per scope: the body of a loop
that slices the parameter and each rematerialized block are scopes of their own.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from jax.extend import core as jex

from zerojax.gather import uses
from zerojax.plan.demand import Use

CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMAT = {"checkpoint", "remat2"}
PIECES = {"slice", "squeeze", "split", "dynamic_slice"}


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A parameter as the count needs it.

    Attributes:
      shape: in the program.
      dims: the dimensions that the mesh splits.
      least: a piece of fewer elements is not gathered on its own; 0 if no piece is.
    """

    shape: tuple[int, ...]
    dims: Collection[int]
    least: int = 1


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Gathers in the forward pass, those that recomputation adds in the backward pass, and the
    scopes that read it, each of which reduces the gradient once."""

    forward: float = 0.0
    backward: float = 0.0
    scopes: float = 0.0

    def __add__(self, other: "_Reads") -> "_Reads":
        return _Reads(self.forward + other.forward, self.backward + other.backward,
                      self.scopes + other.scopes)

    def again(self) -> "_Reads":
        """Returns the reads of a block that is recomputed in the backward pass."""
        return dataclasses.replace(self, backward=self.backward + self.forward)


@dataclasses.dataclass(frozen=True)
class _View:
    """A parameter, or a part of it, that no equation has read.

    Attributes:
      index, param: of the parameter. dims: the dimension of the parameter that each dimension
        shows.
      shape, share: of this part; its share of the whole, in all iterations of the loops around it.
      part: names the part within its scope, so that equal parts share a read.
    """

    index: int
    param: Sharded
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    share: float = 1.0
    part: tuple = ()


def count(jaxpr: Any, params: Sequence[Sharded | None]) -> list[Use]:
    """Returns the use of each parameter; None stands for one that is whole anyway.

    Args:
      jaxpr: of the loss, whose first arguments are the parameters.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> w = jax.ShapeDtypeStruct((8, 4), "float32")
    >>> f = jax.checkpoint(lambda w, x: x @ w)
    >>> count(jax.make_jaxpr(lambda w: f(w, jnp.ones(8)))(w), [Sharded((8, 4), {0})])
    [Use(gathers=2.0, scatters=1.0, calls=1, again=1.0)]
    """
    jaxpr = uses.without_constants(jaxpr)
    scope = _Scope(len(params))
    scope.visit(jaxpr, {v: _View(i, p, tuple(range(len(p.shape))), tuple(p.shape))
                        for i, (v, p) in enumerate(zip(jaxpr.invars, params, strict=False)) if p})
    return [Use(reads.forward + reads.backward, reads.scopes, again=reads.backward)
            for reads in scope.reads]


class _Scope:
    """The reads of one scope and of those within it."""

    def __init__(self, count: int):
        self.reads = [_Reads() for _ in range(count)]
        self._read: set[tuple] = set()

    def visit(self, jaxpr, views: dict) -> list[_View | None]:
        """Counts the reads of a jaxpr; returns the views among its results."""
        for eqn in _needed(jaxpr):
            mine = {i: views[v] for i, v in enumerate(eqn.invars)
                    if not isinstance(v, jex.Literal) and v in views}
            if mine:
                outs = self._equation(eqn, mine)
                views |= {v: view for v, view in zip(eqn.outvars, outs, strict=False) if view}
        return [None if isinstance(v, jex.Literal) else views.get(v) for v in jaxpr.outvars]

    def _equation(self, eqn, mine: dict[int, _View]) -> Sequence[_View | None]:
        name = eqn.primitive.name
        if name in CALLS or name in REMAT or name == "scan":
            body, = jex.jaxprs_in_params(eqn.params)
            body = uses.without_constants(body)
            if name in CALLS:
                return self.visit(body, {body.invars[i]: view for i, view in mine.items()})
            inner = self._sliced(eqn, body, mine) if name == "scan" else mine
            return self._within(body, inner, {i: v for i, v in mine.items() if i not in inner},
                                again=name in REMAT)
        if 0 in mine and (parts := self._parts(eqn, mine[0])):
            return parts
        return self._all(mine.values())

    def _within(self, body, inner: dict[int, _View], outer: dict[int, _View], again: bool):
        """Counts a scope of its own; views that do not enter it are read before it."""
        scope = _Scope(len(self.reads))
        for view in filter(None, scope.visit(body, {body.invars[i]: v for i, v in inner.items()})):
            scope.read(view)
        found = [reads.again() if again else reads for reads in scope.reads]
        self.reads = [a + b for a, b in zip(self.reads, found, strict=True)]
        return self._all(outer.values())

    def _sliced(self, eqn, body, mine: dict[int, _View]) -> dict[int, _View]:
        """Returns the views that a scan slices along a dimension that is whole, as its body has
        them."""
        return {i: dataclasses.replace(view, dims=view.dims[1:], shape=view.shape[1:])
                for i, view in mine.items()
                if len(eqn.invars[i].aval.shape) > len(body.invars[i].aval.shape)
                and view.dims[0] not in view.param.dims}

    def _all(self, views) -> list:
        for view in views:
            self.read(view)
        return []

    def read(self, view: _View) -> None:
        if (view.index, view.part) not in self._read:
            self._read.add((view.index, view.part))
            self.reads[view.index] += _Reads(view.share, 0.0, view.share)

    def _parts(self, eqn, view: _View) -> Sequence[_View] | None:
        """Returns the views that an equation makes of one; None if it reads it."""
        name, p = eqn.primitive.name, eqn.params
        if name == "transpose":
            dims, shape = ([x[i] for i in p["permutation"]] for x in (view.dims, view.shape))
            return [dataclasses.replace(view, dims=tuple(dims), shape=tuple(shape))]
        if name == "convert_element_type":
            wide = uses.widens(eqn.invars[0].aval.dtype, eqn.params["new_dtype"])
            return [view] if wide else None
        if name not in PIECES:
            return None
        return self._pieces(eqn, view)

    def _pieces(self, eqn, view: _View) -> list[_View] | None:
        gone = eqn.params.get("dimensions", ()) if eqn.primitive.name == "squeeze" else ()
        dims = tuple(d for i, d in enumerate(view.dims) if i not in gone)
        size = dict(zip(view.dims, view.shape, strict=True))
        param, shapes = view.param, [v.aval.shape for v in eqn.outvars]
        whole = all(d in dims and shape[dims.index(d)] == size[d]
                    for shape in shapes for d in param.dims if d in view.dims)
        if not whole or not param.least or min(map(math.prod, shapes)) < param.least:
            return None
        # the same equation may cut other pieces at indices, such as in a jit that is called twice
        place = object() if len(eqn.invars) > 1 else None
        static = eqn.primitive.name, str(eqn.params), place
        share = view.share / math.prod(view.shape)
        return [_View(view.index, param, dims, shape, share * math.prod(shape),
                      (*view.part, static, n))
                for n, shape in enumerate(shapes)]


def _needed(jaxpr) -> list:
    """Returns the equations that have effects or that the results depend on; XLA drops the rest."""
    live = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            kept.append(eqn)
            live.update(uses.variables(eqn))
    return kept[::-1]
