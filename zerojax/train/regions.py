"""The regions of an optimizer's program that need whole matrices, such as Newton-Schulz iterations.

    momenta, decay, learning rate    element by element: on shards, as they are at rest
    region                           the other equations, connected by arrays, with a product

An optimizer has one region per parameter. `schedule` finds the regions and which of them are alike.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.core import eval_jaxpr
from jax.extend import core as jex
from jax.sharding import Sharding

from zerojax.gather import uses
from zerojax.train.independent import ELEMENTWISE, LINEAR_ALGEBRA

_PRODUCTS = {"dot_general", "conv_general_dilated", "pallas_call", "ffi_call", *LINEAR_ALGEBRA}


@dataclasses.dataclass(frozen=True)
class Level:
    """Equations that can be evaluated once those of the levels below are.

    Attributes:
      alike: programs of regions, in groups of equal ones.
      plain: a program of all other equations.
    """

    alike: Sequence[Sequence[Any]]
    plain: Any


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Where a value belongs, and the level after which it is known.

    Attributes:
      place: "rest": on shards, like the program's inputs. "region": in a region of this level.
        "free": a scalar, or made of scalars and vectors alone.
    """

    place: Literal["free", "rest", "region"]
    level: int


def inlined(jaxpr: Any) -> Any:
    """Returns a closed jaxpr in which the calls of jitted functions are replaced by their bodies.

    >>> import jax.numpy as jnp
    >>> len(inlined(jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)).jaxpr.eqns)
    1
    """
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
             for v in jaxpr.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _called(jaxpr.jaxpr, jaxpr.consts, args))(*avals)


def _called(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, jex.Literal) else known[v] for v in eqn.invars]
        if body := _body(eqn):
            results = _called(uses.without_constants(body), body.consts, operands)
        else:
            results = evaluated(program(jaxpr, [eqn], eqn.outvars), known)
        known.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, jex.Literal) else known[v] for v in jaxpr.outvars]


def _body(eqn: Any) -> Any:
    """Returns the closed jaxpr of a jitted function without shardings of its own, or None."""
    given = any(isinstance(s, Sharding) for s in eqn.params.get("in_shardings", ()))
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") and not given else None


def program(jaxpr: Any, eqns: Sequence[Any], results: Sequence[Any]) -> Any:
    """Returns a program of some of a jaxpr's equations. Its inputs are the variables they lack."""
    made = {v for eqn in eqns for v in eqn.outvars}
    taken = dict.fromkeys(v for eqn in eqns for v in uses.variables(eqn))
    return jaxpr.replace(constvars=[], invars=[v for v in taken if v not in made],
                         outvars=list(results), eqns=list(eqns))


def evaluated(part: Any, known: Mapping[Any, Any]) -> list[Any]:
    """Returns the results of a program whose inputs are known variables."""
    return eval_jaxpr(part, (), *(known[v] for v in part.invars))


def schedule(jaxpr: Any) -> Iterator[Level]:
    """Yields the levels of a jaxpr without calls, in order."""
    kinds, users = _kinds(jaxpr), _users(jaxpr)
    levels = collections.defaultdict(list)
    for eqn in jaxpr.eqns:
        levels[_kind_of(eqn, kinds).level].append(eqn)
    for level in sorted(levels):
        in_regions = [eqn for eqn in levels[level] if _kind_of(eqn, kinds).place == "region"]
        found = [eqns for eqns in _connected(in_regions, kinds) if _needs_whole(eqns)]
        taken = {id(eqn) for eqns in found for eqn in eqns}
        plain = [eqn for eqn in levels[level] if id(eqn) not in taken]
        alike = collections.defaultdict(list)
        for eqns in found:
            part = program(jaxpr, eqns, _used_outside(users, eqns))
            alike[str(part), *_constants(part)].append(part)
        yield Level(list(alike.values()),
                    program(jaxpr, plain, [v for eqn in plain for v in eqn.outvars]))


def _kinds(jaxpr: Any) -> dict[Any, _Kind]:
    """Returns the kind of each variable."""
    kinds = {v: _Kind("rest" if v.aval.ndim > 1 else "free", 0)
             for v in (*jaxpr.constvars, *jaxpr.invars)}
    for eqn in jaxpr.eqns:
        kind = _kind_of(eqn, kinds)
        for v in eqn.outvars:
            kinds[v] = kind if v.aval.shape else _Kind("free", kind.level)
    return kinds


def _kind_of(eqn: Any, kinds: Mapping[Any, _Kind]) -> _Kind:
    """Returns the kind of an equation's results, scalars aside.

    An equation that is not element by element begins or continues a region. One that is continues a
    region if no other array enters; else the region's results return to rest.
    """
    operands = [kinds[v] for v in uses.variables(eqn)]
    arrays = {kind for kind in operands if kind.place != "free"}
    level = max((kind.level for kind in operands), default=0)
    if not arrays:
        return _Kind("free", level)
    after = max(kind.level + (kind.place != "region") for kind in operands)
    if eqn.primitive.name not in ELEMENTWISE:
        return _Kind("region", after)
    stays = arrays == {_Kind("region", after)}
    return _Kind("region", after) if stays else _Kind("rest", level)


def _connected(eqns: Sequence[Any], kinds: Mapping[Any, _Kind]) -> list[list[Any]]:
    """Returns the equations of one level's regions in groups that arrays in the region connect."""
    groups: dict[Any, list[Any]] = {}  # by the variables that a group makes
    for eqn in eqns:
        before = {id(groups[v]): groups[v] for v in uses.variables(eqn) if v in groups}
        group = [*(e for some in before.values() for e in some), eqn]
        made = [v for e in group for v in e.outvars if kinds[v].place == "region"]
        groups.update(dict.fromkeys(made, group))
    order = {id(eqn): i for i, eqn in enumerate(eqns)}
    distinct = {id(group): group for group in groups.values()}
    return [sorted(group, key=lambda eqn: order[id(eqn)]) for group in distinct.values()]


def _users(jaxpr: Any) -> Mapping[Any, set[int]]:
    """Returns the ids of the equations that take each variable; 0 for the program's results."""
    users = collections.defaultdict(set)
    for eqn in jaxpr.eqns:
        for v in uses.variables(eqn):
            users[v].add(id(eqn))
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            users[v].add(0)
    return users


def _used_outside(users: Mapping[Any, set[int]], eqns: Sequence[Any]) -> list[Any]:
    inside = {id(eqn) for eqn in eqns}
    return [v for eqn in eqns for v in eqn.outvars if v in users and users[v] - inside]


def _constants(jaxpr: Any) -> Iterator[int]:
    """Yields the ids of the constants in a program's loops and calls, whose text lacks them."""
    for eqn in jaxpr.eqns:
        for body in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(body, "eqns"):
                yield from map(id, getattr(body, "consts", ()))
                yield from _constants(uses.without_constants(body))


def _needs_whole(eqns: Sequence[Any]) -> bool:
    """Whether a region multiplies matrices.

    A branch, as in `optax.MultiSteps`, holds a whole optimizer with its state, which is not moved.
    """
    return (any(map(_multiplies, eqns))
            and not any(eqn.primitive.name == "cond" for eqn in eqns))


def _multiplies(eqn: Any) -> bool:
    """Whether an equation is a product of matrices, or a loop or branch with one."""
    if eqn.primitive.name in _PRODUCTS:
        return True
    return any(_multiplies(inner) for body in jex.jaxprs_in_params(eqn.params)
               for inner in uses.without_constants(body).eqns)
