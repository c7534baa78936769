"""A program evaluated again, with each sharded parameter pending until an equation reads it.

| equation | a pending parameter |
|---|---|
| scan that slices it along a whole dimension | stays pending in the body: gathered in the loop |
| any other scan, while | is read before the loop: XLA accumulates inside, reduces once |
| remat | stays pending inside: gathered again in the backward pass |
| jit, closed call | is inlined, in the same scope |
| slice, squeeze, split of whole dimensions | is cut into pending pieces: each is gathered alone |
| transpose, cast to a wider dtype | becomes another view, which shares the read |
| anything else | is read here |

Anything else is, for example, a dot product, custom_jvp, custom_vjp, shard_map, Pallas or an
equation of a later jax. `pending` defines pending parameters and their reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import core as jex
from jax.sharding import Sharding

from zerojax import errors
from zerojax.gather import uses
from zerojax.gather.pair import SECOND_COPY
from zerojax.gather.pending import Pending, array


def evaluate(jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] | None = None) -> list[Any]:
    """Returns the results of a jaxpr, closed or without constants, for `args` that may be pending.

    A result that no equation has read is pending as well. `consts` replace the jaxpr's constants.
    """
    values = _Values(jaxpr, args, consts)
    plain = []  # consecutive equations that nothing pending enters
    for eqn in values.jaxpr.eqns:
        if not values.pending_in(eqn):
            plain.append(eqn)
            continue
        values.run(plain)
        plain = []
        values.put(eqn.outvars, _results(_Equation(values.jaxpr, eqn), values.of(eqn.invars)))
    values.run(plain)
    return values.of(values.jaxpr.outvars)


class _Values:
    """The values of a jaxpr's variables during its evaluation."""

    def __init__(self, jaxpr, args, consts):
        self.jaxpr = uses.without_constants(jaxpr)
        consts = consts or getattr(jaxpr, "consts", ())
        self._values = {}
        self.put([*self.jaxpr.constvars, *self.jaxpr.invars], [*consts, *args])

    def of(self, variables) -> list[Any]:
        """Returns the values of variables and literals."""
        return [v.val if isinstance(v, jex.Literal) else self._values[v] for v in variables]

    def put(self, variables, values) -> None:
        """Sets the values of variables."""
        self._values.update(zip(variables, values, strict=True))

    def pending_in(self, eqn) -> bool:
        """Whether something pending enters an equation."""
        return any(isinstance(self._values.get(v), Pending) for v in uses.variables(eqn))

    def run(self, eqns: Sequence) -> None:
        """Evaluates equations that nothing pending enters, as jax itself does."""
        made = [v for eqn in eqns for v in eqn.outvars]
        taken = dict.fromkeys(v for eqn in eqns for v in uses.variables(eqn))
        needed = [v for v in taken if v not in set(made)]
        part = self.jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=list(eqns))
        self.put(made, eval_jaxpr(part, (), *self.of(needed)))


@dataclasses.dataclass(frozen=True)
class _Equation:
    """One equation of a jaxpr, to be evaluated for operands other than its own."""

    jaxpr: Any
    eqn: Any

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def outs(self) -> list[Any]:
        """The abstract values of its results."""
        return [v.aval for v in self.eqn.outvars]

    def results(self, args: Sequence[Any]) -> list[Any]:
        """Returns its results for these operands, none of which is pending."""
        needed = {v: x for v, x in zip(self.eqn.invars, args, strict=True)
                  if not isinstance(v, jex.Literal)}
        part = self.jaxpr.replace(constvars=[], invars=list(needed), outvars=self.eqn.outvars,
                                  eqns=[self.eqn])
        return eval_jaxpr(part, (), *needed.values())

    def call(self, run: Callable[[], Any]) -> Any:
        """Returns `run()`, called as if the equation's own line had called it."""
        primitive = _Call(run)
        place = self.eqn.replace(primitive=primitive, params={}, invars=[], outvars=[])
        eval_jaxpr(self.jaxpr.replace(constvars=[], invars=[], outvars=[], eqns=[place]), ())
        return primitive.result


class _Call(jex.Primitive):
    """A primitive that calls a function.

    jax binds it under the name stack, source line and context of the equation that it replaces.
    """

    multiple_results = True

    def __init__(self, run: Callable[[], Any]):
        super().__init__("zerojax")
        self.run = run
        self.result = None

    def bind(self, *args, **params):
        self.result = self.run()
        return []


def _results(eqn: _Equation, args: list) -> list[Any]:
    """Returns the results of an equation that something pending enters."""
    rule = _RULES.get(eqn.name, _no_rule)
    results = eqn.call(lambda: rule(eqn, args))
    if results is not None:
        return results
    return eqn.results(eqn.call(lambda: [_read(eqn, args, x) for x in args]))


def _read(eqn: _Equation, args: list, x: Any) -> Any:
    """Returns `x`, one of an equation's operands, read if it is pending."""
    if not isinstance(x, Pending):
        return x
    dtype = None
    if eqn.name == "dot_general":  # in the product's dtype: its cotangent is reduced as it is made
        dtype = str(functools.reduce(jnp.promote_types, [a.dtype for a in args]))
    return x.read(dtype, accumulated=eqn.name in ("scan", "while"))


# Rules return the results of an equation, some of whose operands are pending, or None to have the
# operands read and the equation evaluated as it is.


def _no_rule(eqn: _Equation, args: list) -> None:
    return None


def _scan(eqn: _Equation, args: list) -> list[Any]:
    consts, carry, xs = _scan_operands(eqn, args)
    if not any(isinstance(x, Pending) for x in xs):
        return eqn.results([*consts, *carry, *xs])

    def body(carry, xs):
        slices = [x.sliced() if isinstance(x, Pending) else x for x in xs]
        results = evaluate(eqn.params["jaxpr"], [*consts, *carry, *slices])
        results = [array(x) for x in results]
        return results[:len(carry)], results[len(carry):]

    settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    xs = [x.entering(x.shape[0]) if isinstance(x, Pending) else x for x in xs]
    carry, ys = jax.lax.scan(body, carry, xs, **settings)
    return [*carry, *ys]


def _scan_operands(eqn: _Equation, args: list) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns a scan's constants, its carry and the arrays that it slices; only these are pending.

    The ranks in its body tell them apart: jax 0.12 has dropped the parameters that counted them.
    """
    body = uses.without_constants(eqn.params["jaxpr"])
    unsliced = _same_rank(eqn.eqn.invars, body.invars)
    carried = _same_rank(eqn.eqn.outvars, body.outvars)
    xs = [_read_if_split(x) for x in args[unsliced:]]
    before = [_read(eqn, args, x) for x in args[:unsliced]]
    return before[:unsliced - carried], before[unsliced - carried:], xs


def _same_rank(outer, inner) -> int:
    """Returns how many variables of a scan have the same rank in its body."""
    return sum(len(o.aval.shape) == len(i.aval.shape) for o, i in zip(outer, inner, strict=True))


def _read_if_split(x: Any) -> Any:
    """Returns an operand that a scan slices, read if the sliced dimension is sharded.

    Each slice would otherwise be on one device only.
    """
    if not isinstance(x, Pending) or not x.pair.shards(0):
        return x
    errors.warn(f"{x.path}: a scan slices its dimension 0, which is sharded ({x.pair.spec}), so "
                "all slices are gathered before the scan. "
                f"Zero(rules={{{x.path!r}: P(None, 'data')}}) shards the next dimension if it "
                f"divides; {{{x.path!r}: P()}} leaves the array whole.")
    return x.read(accumulated=True)


def _remat(eqn: _Equation, args: list) -> list[Any] | None:
    params = eqn.params
    if params["differentiated"]:  # belongs to a gradient taken inside the loss
        return None

    def body(*args):
        return [array(x) for x in evaluate(params["jaxpr"], args)]

    policy = params["policy"]
    if any(isinstance(x, Pending) and x.pair.second_copy for x in args):
        policy = _keeping_second_copies(policy)
    args = [x.entering() if isinstance(x, Pending) else x for x in args]
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=policy)(*args)


def _keeping_second_copies(policy: Callable | None) -> Callable:
    """Returns a policy that saves second copies, and what `policy` saves or offloads."""

    def keep(prim, *args, **params):
        if prim.name == "name" and params["name"] == SECOND_COPY:
            return True
        return policy(prim, *args, **params) if policy else False

    return keep


def _call(eqn: _Equation, args: list) -> list[Any] | None:
    params = eqn.params
    if any(isinstance(s, Sharding) for s in params.get("in_shardings", ())):
        return None
    with jax.named_scope(f"jit({params.get('name', 'call')})"):
        return evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], args)


def _transpose(eqn: _Equation, args: list) -> list[Any]:
    return [args[0].transpose(eqn.params["permutation"])]


def _cast(eqn: _Equation, args: list) -> list[Any] | None:
    new = eqn.params["new_dtype"]
    return [args[0].widen(str(new))] if uses.widens(args[0].dtype, new) else None


def _lookup(eqn: _Equation, args: list) -> list[Any] | None:
    """Looks up in a wider dtype if another equation reads the table in it.

    XLA then sees one reduction of both gradients.
    """
    table, *indices = args
    if not isinstance(table, Pending) or not table.pair.wide:
        return None
    found, = eqn.results([table.read(table.pair.wide), *indices])
    return [found.astype(eqn.outs[0].dtype)]


def _cut(eqn: _Equation, args: list) -> list[Any] | None:
    """Cuts a parameter into pending pieces if they have all of each dimension that the mesh splits.

    A piece of fewer than `Pair.least` elements is not worth a gather of its own.
    """
    x, *places = args
    if not isinstance(x, Pending) or any(x.pair.extra):
        return None
    dropped = eqn.params.get("dimensions", ())  # by squeeze
    kept = [i for i in range(len(x.shape)) if i not in dropped]
    shapes = [out.shape for out in eqn.outs]
    if not _has_whole_shards(x, kept, shapes) or min(map(math.prod, shapes)) < x.pair.least:
        return None

    def cut():
        return x.cut(lambda array: eqn.results([array, *places]), x.pair.only(kept))

    if places:  # equal equations may cut other pieces, as in a jit that is called twice
        return cut()
    return x.parameter.pieces((x.order, x.dtype, eqn.name, str(eqn.params)), cut)


def _has_whole_shards(x: Pending, kept: list[int], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether pieces of `x` have all of each dimension that the mesh splits.

    The pieces have these shapes and the dimensions `kept` of `x`.
    """
    split = [i for i, axes in enumerate(x.pair.spec) if axes is not None]
    return all(i in kept and shape[kept.index(i)] == x.shape[i] for shape in shapes for i in split)


_RULES = {
    "scan": _scan,
    "remat2": _remat, "checkpoint": _remat,
    "jit": _call, "pjit": _call, "closed_call": _call, "core_call": _call,
    "transpose": _transpose,
    "convert_element_type": _cast,
    "gather": _lookup,
    "slice": _cut, "squeeze": _cut, "split": _cut, "dynamic_slice": _cut,
}
