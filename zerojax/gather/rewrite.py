"""Where a program reads its parameters: its jaxpr evaluated again, each sharded one pending until an equation reads it.

| equation | a pending parameter |
|---|---|
| scan that slices it (a whole dimension) | stays pending in the body, that dimension dropped: gathered in the loop |
| any other scan, while | is read before the loop: XLA accumulates inside, reduces once |
| remat | stays pending inside: gathered again in the backward pass |
| jit, closed call | is inlined, same scope |
| slice, squeeze, split of whole dimensions | each piece is pending, so that it is gathered alone |
| transpose, cast to a wider dtype | a view, which shares the read |
| anything else (dot, custom_jvp, custom_vjp, shard_map, Pallas, an equation of a later jax) | is read here |

A parameter is gathered once in a scope. Per device the read is shared too, so that its cotangent is reduced once. With one
loss each use has a scatter of its own: XLA adds the shards, where it would sum whole the sum of unlike products.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import core as jex
from jax.sharding import Sharding

from zerojax.gather.pair import Gather


class Parameter:
    """A sharded parameter in one scope: its shard, and what was read of it.

    Args:
      x: at rest. gathered: whole and in the compute dtype, where that was done at the start of the step; else None.
      pair: how it is gathered and scattered. path: for messages.
    """

    def __init__(self, x: jax.Array, gathered: jax.Array | None, pair: Gather, path: str):
        self.x, self.gathered, self.pair, self.path = x, gathered, pair, path
        self._pieces = {}

    @functools.cached_property
    def _top(self):
        return self.pair.top(self.x) if self.gathered is None else self.gathered

    @functools.cached_property
    def _cast(self):
        return self.x.astype(self.pair.compute)

    @functools.cached_property
    def _shared(self):
        return self.pair.read(self.x, self._top)

    def pieces(self, key: Any, cut: Callable) -> list["Pending"]:
        """What `cut` returned for this key first: equal pieces share their reads."""
        if key not in self._pieces:
            self._pieces[key] = cut()
        return self._pieces[key]

    def read(self, dtype: str, accumulated: bool) -> jax.Array:
        """It whole, in the compute dtype or a wider one; `accumulated`: a loop sums its cotangent before it is scattered."""
        if self.pair.per_device:
            return self._shared.astype(dtype)
        pair = self.pair.accumulated() if accumulated else self.pair
        # uses in the compute dtype are added before they are widened, so that XLA sees one reduction
        return pair.read(self._cast if dtype == self.pair.compute else self.x, self._top, dtype)


@jax.tree_util.register_pytree_node_class
class Pending:
    """A view of a parameter that no equation has read: some order of its dimensions, in some dtype.

    A pytree of arrays, so that it goes through scan and remat; what comes out of them is a parameter of another scope.
    """

    def __init__(self, parameter: Parameter, order: tuple[int, ...], dtype: str):
        self.parameter, self.order, self.dtype = parameter, order, dtype

    @classmethod
    def of(cls, x, gathered, pair: Gather, dtype: str, path: str) -> "Pending":
        return cls(Parameter(x, gathered, pair, path), tuple(range(len(pair.spec))), dtype)

    def tree_flatten(self):
        return (self.x, self.gathered), (self.pair, self.dtype, self.parameter.path)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls.of(*children, *aux)

    def _turned(self, x):
        return x if x is None or self.order == tuple(range(len(self.order))) else jax.lax.transpose(x, self.order)

    @property
    def x(self):
        return self._turned(self.parameter.x)

    @property
    def gathered(self):
        return self._turned(self.parameter.gathered)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pair.logical(tuple(self.parameter.x.shape[i] for i in self.order))

    @property
    def pair(self) -> Gather:
        return self.parameter.pair.only(self.order)

    def read(self, dtype: str | None = None, accumulated: bool = False) -> jax.Array:
        return self._turned(self.parameter.read(dtype or self.dtype, accumulated))

    def transpose(self, permutation) -> "Pending":
        return Pending(self.parameter, tuple(self.order[i] for i in permutation), self.dtype)

    def widen(self, dtype: str) -> "Pending":
        return Pending(self.parameter, self.order, dtype)

    def cut(self, how: Callable, pair: Gather) -> list["Pending"]:
        """The pieces that `how` cuts it into, each with a read of its own."""
        xs = how(self.x)
        gathered = [None] * len(xs) if self.gathered is None else how(self.gathered)
        return [Pending.of(x, g, pair, self.dtype, self.parameter.path) for x, g in zip(xs, gathered, strict=True)]

    def sliced(self) -> "Pending":
        """It, as a scan over its first dimension has sliced its arrays."""
        rest = self.pair.only(tuple(range(1, len(self.pair.spec))))
        return Pending.of(self.parameter.x, self.parameter.gathered, rest, self.dtype, self.parameter.path)


def array(x: Any) -> Any:
    """`x`, read if it is pending."""
    return x.read() if isinstance(x, Pending) else x


def evaluate(jaxpr, args: Sequence[Any], consts: Sequence[Any] | None = None) -> list[Any]:
    """The results of a jaxpr (closed, or without constants), of which `args` may be pending, as its results then may be.

    `consts` are in place of its own.
    """
    inner, closed = getattr(jaxpr, "jaxpr", jaxpr), consts or getattr(jaxpr, "consts", ())
    env = dict(zip([*inner.constvars, *inner.invars], [*closed, *args], strict=True))
    value = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
    plain = []  # equations in a row that nothing pending enters

    def flush():
        env.update(_run(inner, plain, value))
        plain.clear()

    for eqn in inner.eqns:
        if not any(isinstance(env.get(v), Pending) for v in _variables(eqn)):
            plain.append(eqn)
            continue
        flush()
        env.update(zip(eqn.outvars, _placed(inner, eqn, [value(v) for v in eqn.invars]), strict=True))
    flush()
    return [value(v) for v in inner.outvars]


def _variables(eqn) -> list:
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


_MOVES = {"convert_element_type", "transpose", "reshape", "squeeze", "slice", "split", "dynamic_slice", "copy", "broadcast_in_dim"}


def uses(jaxpr, held: Mapping[Any, str]) -> Iterator[tuple[Any, set[str]]]:
    """Each equation that takes some of the held variables, also moved or cast, or within calls and loops; with their names."""
    jaxpr, held = getattr(jaxpr, "jaxpr", jaxpr), dict(held)
    for eqn in jaxpr.eqns:
        mine = {i: held[v] for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and v in held}
        if not mine:
            continue
        yield eqn, set(mine.values())
        if eqn.primitive.name in _MOVES:
            held.update(dict.fromkeys(eqn.outvars, mine[0]) if 0 in mine else {})
        for body in jex.jaxprs_in_params(eqn.params):
            offset = len(eqn.invars) - len(body.invars)  # calls pass their last operands in order
            yield from uses(body, {body.invars[i - offset]: name for i, name in mine.items() if 0 <= i - offset < len(body.invars)})


def widened(jaxpr, held: Mapping[Any, str]) -> dict[str, str]:
    """Names of held variables that some equation reads in a wider floating dtype than theirs, and that dtype."""
    return {name: wide for eqn, names in uses(jaxpr, held) if (wide := _wide(eqn)) for name in names}


def _wide(eqn) -> str:
    """The dtype in which an equation reads narrower numbers, or ""."""
    name, dtypes = eqn.primitive.name, [v.aval.dtype for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "dtype")]
    if name == "dot_general" and dtypes[0] != dtypes[1]:
        return str(jnp.promote_types(*dtypes[:2]))
    cast = name == "convert_element_type" and jnp.issubdtype(dtypes[1], jnp.floating) and wider(dtypes[1], dtypes[0])
    return str(dtypes[1]) if cast else ""


def wider(a, b) -> bool:
    """Whether all of dtype `b` fits in another, `a`.

    >>> wider("float32", "bfloat16"), wider("float16", "bfloat16")
    (True, False)
    """
    return a != b and jnp.promote_types(a, b) == a


def _run(jaxpr, eqns: Sequence, value: Callable) -> dict:
    """The results of some of a jaxpr's equations, by variable, as jax itself evaluates them."""
    made = [v for eqn in eqns for v in eqn.outvars]
    needed = [v for v in dict.fromkeys(v for eqn in eqns for v in _variables(eqn)) if v not in set(made)]
    part = jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=list(eqns))
    return dict(zip(made, eval_jaxpr(part, (), *map(value, needed)), strict=True))


def _alone(jaxpr, eqn, args: Sequence[Any]) -> list[Any]:
    """The results of one equation for operands other than its own."""
    made = _run(jaxpr, [eqn], {v: x for v, x in zip(eqn.invars, args, strict=True) if not isinstance(v, jex.Literal)}.get)
    return [made[v] for v in eqn.outvars]


class _Call(jex.Primitive):
    """A function in an equation's place: jax calls it under the equation's name stack, source line and context."""

    multiple_results = True

    def __init__(self, run: Callable):
        super().__init__("zerojax")
        self.run, self.result = run, None

    def bind(self, *args, **params):
        self.result = self.run()
        return []


def _at(jaxpr, eqn, run: Callable) -> Any:
    """`run()`, as if the equation's line had called it."""
    call = _Call(run)
    place = eqn.replace(primitive=call, params={}, invars=[], outvars=[])
    eval_jaxpr(jaxpr.replace(constvars=[], invars=[], outvars=[], eqns=[place]), ())
    return call.result


def _placed(jaxpr, eqn, args: list) -> list[Any]:
    """The results of an equation that something pending enters."""
    rule = _RULES.get(eqn.primitive.name, lambda *_: None)
    outs = _at(jaxpr, eqn, lambda: rule(jaxpr, eqn, args))
    if outs is not None:
        return outs
    return _alone(jaxpr, eqn, _at(jaxpr, eqn, lambda: [_operand(eqn, args, x) for x in args]))


def _operand(eqn, args, x):
    if not isinstance(x, Pending):
        return x
    # a product with wider numbers is one in their dtype: the cotangent is then reduced as it is made
    dtype = str(functools.reduce(jnp.promote_types, [a.dtype for a in args])) if eqn.primitive.name == "dot_general" else None
    return x.read(dtype, accumulated=eqn.primitive.name in ("scan", "while"))


def _scan(jaxpr, eqn, args):
    body, p = eqn.params["jaxpr"], eqn.params
    inner = getattr(body, "jaxpr", body)
    stacked = lambda outer, inner: [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outer, inner, strict=True)]
    before_xs = stacked(eqn.invars, inner.invars).count(False)
    carries = stacked(eqn.outvars, inner.outvars).count(False)
    xs = [_whole_if_split(x) for x in args[before_xs:]]
    before = [_operand(eqn, args, x) for x in args[:before_xs]]
    if not any(isinstance(x, Pending) for x in xs):
        return _alone(jaxpr, eqn, [*before, *xs])
    consts, carry = before[:before_xs - carries], before[before_xs - carries:]

    def turn(carry, xs):
        outs = list(map(array, evaluate(body, [*consts, *carry, *(x.sliced() if isinstance(x, Pending) else x for x in xs)])))
        return outs[:carries], outs[carries:]

    carry, ys = jax.lax.scan(turn, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _whole_if_split(x):
    """What a scan slices, read before it if the mesh splits the sliced dimension: each slice would be on one device."""
    if not isinstance(x, Pending) or not x.pair.at_rest(0):
        return x
    path = x.parameter.path
    warnings.warn(f"{path}: a scan slices its dimension 0, over which it is sharded ({x.pair.spec}), so that all slices are "
                  f"gathered before the scan. Zero(rules={{{path!r}: P(None, 'data')}}) shards the next dimension if it divides; "
                  f"{{{path!r}: P()}} leaves it whole.", stacklevel=2)
    return x.read(accumulated=True)


def _remat(jaxpr, eqn, args):
    p = eqn.params
    if p["differentiated"]:  # of a gradient taken inside the loss; jax.checkpoint makes none
        return None
    body = lambda *args: list(map(array, evaluate(p["jaxpr"], args)))
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)


def _call(jaxpr, eqn, args):
    p = eqn.params
    if any(isinstance(s, Sharding) for s in p.get("in_shardings", ())):
        return None
    with jax.named_scope(f"jit({p.get('name', 'call')})"):
        return evaluate(p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"], args)


def _transpose(jaxpr, eqn, args):
    return [args[0].transpose(eqn.params["permutation"])]


def _cast(jaxpr, eqn, args):
    new = eqn.params["new_dtype"]
    return [args[0].widen(str(new))] if jnp.issubdtype(new, jnp.floating) and wider(new, args[0].dtype) else None


def _lookup(jaxpr, eqn, args):
    """In a table that is also read in a wider dtype: read in that here too, so that XLA sees one reduction of both gradients."""
    x = args[0]
    if not isinstance(x, Pending) or not x.pair.wide:
        return None
    out, = _alone(jaxpr, eqn, [x.read(x.pair.wide), *args[1:]])
    return [out.astype(eqn.outvars[0].aval.dtype)]


def _cut(jaxpr, eqn, args):
    """Slices and squeezes, if they leave whole each dimension that the mesh splits, and pieces are worth a gather each."""
    x = args[0]
    if not isinstance(x, Pending) or any(x.pair.extra):
        return None
    kept = tuple(i for i in range(len(x.shape)) if i not in eqn.params.get("dimensions", ()))
    pair = x.pair.only(kept)
    fixed = [(j, x.shape[i]) for j, i in enumerate(kept) if pair.spec[j] is not None]
    shapes = [v.aval.shape for v in eqn.outvars]
    if len(fixed) < sum(e is not None for e in x.pair.spec) or any(s[j] != d for s in shapes for j, d in fixed):
        return None
    if min(map(math.prod, shapes)) < x.pair.least:
        return None
    cut = lambda: x.cut(lambda x: _alone(jaxpr, eqn, [x, *args[1:]]), pair)
    if len(args) > 1:  # at places that are values: equal equations, as of a jit that is called twice, cut other pieces
        return cut()
    return x.parameter.pieces((x.order, x.dtype, eqn.primitive.name, str(eqn.params)), cut)


_RULES = {"scan": _scan, "remat2": _remat, "checkpoint": _remat, "transpose": _transpose, "convert_element_type": _cast,
          "gather": _lookup}
_RULES |= dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call)
_RULES |= dict.fromkeys(("slice", "squeeze", "split", "dynamic_slice"), _cut)
