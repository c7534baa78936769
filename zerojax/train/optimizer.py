"""An optax transform as a program: which parameters it never moves, and whether it minds padding."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import eval_jaxpr
from jax.extend import core as jex

from zerojax import trees
from zerojax.errors import PolicyError
from zerojax.layout import padded

Tree = Any
_ASIDE = {"convert_element_type", "broadcast_in_dim", "reshape", "copy", "neg", "mul", "jit", "pjit", "reshard",
          "sharding_constraint"}  # 0 stays 0


@dataclasses.dataclass(frozen=True)
class Update:
    """`tx.update` as traced, for gradients of some shapes.

    Attributes:
      jaxpr: of gradients, optimizer state, parameters and the loss; out: the tree of (updates, optimizer state).
      still: of each parameter, whether its update is 0 whatever the gradients are, as `optax.set_to_zero` makes it. Where
        nothing else needs its gradient, XLA drops that.
    """

    jaxpr: Any
    out: Tree
    still: tuple[bool, ...]

    def __call__(self, grads: Tree, opt_state: Tree, params: Tree, value: jax.Array) -> tuple[Tree, Tree]:
        """(updates, optimizer state)."""
        flat = jax.tree.leaves((grads, opt_state, params, value))
        return jax.tree.structure(self.out).unflatten(eval_jaxpr(self.jaxpr.jaxpr, self.jaxpr.consts, *flat))

    def applied(self, params: Tree, updates: Tree) -> list:
        """The leaves of parameters after an update; those that it does not move are the very same."""
        new = jax.tree.leaves(optax.apply_updates(params, updates))
        return [old if still else x for old, x, still in zip(jax.tree.leaves(params), new, self.still, strict=True)]

    def moved(self, leaves: Sequence) -> list:
        """Those, of one a parameter, of parameters that it moves; all, if it moves none."""
        return [x for x, still in zip(leaves, self.still, strict=True) if not still] or list(leaves)


def init(tx: Any, params: Tree) -> Tree:
    """`tx.init(params)`.

    Raises:
      PolicyError: the transform refuses them.
    """
    try:
        return tx.init(params)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(error, "at init it is given the parameters", params) from error


def trace(tx: Any, grads: Tree, opt_state: Tree, params: Tree, value: Any) -> Update:
    """The transform's update for arrays of such shapes; it is given the loss as `value` where it takes that.

    Raises:
      PolicyError: the transform asks for more than that, as a line search does.
    """
    tx = optax.with_extra_args_support(tx)
    with_value = lambda grads, opt_state, params, value: tx.update(grads, opt_state, params, value=value)
    without = lambda grads, opt_state, params, value: tx.update(grads, opt_state, params)
    traced = lambda update: jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params, value)
    try:
        try:
            jaxpr, out = traced(with_value)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            jaxpr, out = traced(without)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(error, "at update it is given gradients, its state, the parameters and the loss's value", params) from error
    return Update(jaxpr, out, _still(jaxpr.jaxpr)[:len(jax.tree.leaves(out[0]))])


def check_padding(tx: Any, params: Tree) -> None:
    """Raises `PolicyError` for a transform that would see that arrays are padded: whose state has other shapes then, or whose
    update of tiny arrays is another.

    Args:
      params: arrays or shapes, some of them padded.
    """
    if not any(map(padded.is_padded, padded.leaves(params))):
        return
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params, is_leaf=padded.is_padded)
    shapes = lambda tree: [x.shape for x in padded.leaves(jax.eval_shape(functools.partial(init, tx), tree))]
    seen = "its state has the shapes of padded arrays" if shapes(plain) != shapes(params) else _differs(tx, params)
    if seen:
        names = ", ".join(kinds(jax.eval_shape(tx.init, plain))) or "without state"
        raise PolicyError(f'Zero(uneven="pad"): the optimizer ({names}) minds rows of zeros at the ends of arrays: {seen}. Take a '
                          "transform that works element by element, or leave uneven out.")


def _differs(tx: Any, params: Tree) -> str:
    """How two updates of tiny arrays differ, with and without padding; or ""."""
    rng = np.random.default_rng(0)
    tiny = lambda shape: [min(d, 3 + 2 * sorted(set(shape)).index(d)) for d in shape]  # in the same order
    draw = lambda x: rng.normal(size=tiny(x.shape)).astype(x.dtype)
    longer = lambda old, x: [d + (n > m) for d, n, m in zip(x.shape, old.kept.shape, old.shape, strict=True)]
    grown = lambda old, x: padded.pad(x, longer(old, x)) if padded.is_padded(old) else x
    grow = lambda tree: jax.tree.map(grown, params, tree, is_leaf=padded.is_padded)
    values, grads = ([jax.tree.map(draw, params, is_leaf=padded.is_padded) for _ in range(2)] for _ in range(2))
    plain, other = (_updated(tx, tree(values[0]), list(map(tree, grads))) for tree in (lambda tree: tree, grow))
    for (path, a), b in zip(jax.tree.leaves_with_path(plain), padded.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows = name.startswith("params") and padded.is_padded(b)  # whose rows of zeros have to stay zeros
        ours, theirs = (padded.filled(jnp.asarray(a), b.kept.shape), b.kept) if rows else (a, b)
        if not trees.is_key(theirs) and not np.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
            return f"{name} is another after two updates of tiny arrays"
    return ""


def _updated(tx: Any, params: Tree, grads: Sequence[Tree]) -> Tree:
    """Parameters and optimizer state after these gradients."""
    opt_state = init(tx, params)
    for grad in grads:
        update = trace(tx, grad, opt_state, params, jnp.float32(1))
        updates, opt_state = update(grad, opt_state, params, jnp.float32(1))
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state}


def kinds(opt_state: Any) -> tuple[str, ...]:
    """The kinds of state that a transform keeps, in order, from its named tuples.

    >>> kinds(optax.adam(1e-3).init({"w": np.zeros(2)}))
    ('ScaleByAdamState',)
    """
    return tuple(name for name in _named(opt_state) if name not in ("EmptyState", "MaskedNode"))


def _named(tree: Any) -> Iterator[str]:
    if hasattr(tree, "_fields"):
        yield type(tree).__name__
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    for child in children:
        yield from _named(child)


def _refused(error: Exception, what: str, params: Tree) -> PolicyError:
    names = [name.partition(".")[0] for name in _functions(error)] + re.findall(r"(\w+)\.<locals>", str(error))
    name = f"the optimizer ({names[-1]})" if names else "the optimizer"
    none = any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None))
    what += " (frozen ones are None: choose with jax.tree.map)" * none
    what += " (paths to padded ones end in one key more)" * any(map(padded.is_padded, padded.leaves(params)))
    return PolicyError(f"{name} can't be used in zerojax's step: {what}, no more, and it says {str(error)!r}. Take another "
                       "transform, or write a loop of your own: zero.value_and_grad under zero.jit.")


def _functions(error: Exception) -> Iterator[str]:
    """Those of optax that an error came through."""
    trace = error.__traceback__
    while trace is not None:
        if "optax" in trace.tb_frame.f_globals.get("__name__", ""):
            if "<locals>" in trace.tb_frame.f_code.co_qualname:
                yield trace.tb_frame.f_code.co_qualname
        trace = trace.tb_next


def _still(jaxpr) -> tuple[bool, ...]:
    """Of each result, whether it is 0 in every place, by the equations alone."""
    zeros: set = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _ASIDE and _makes_zeros(eqn, zeros):
            zeros.update(eqn.outvars)
    return tuple(_is_zero(v, zeros) for v in jaxpr.outvars)


def _is_zero(v, zeros: set) -> bool:
    return not np.any(v.val) if isinstance(v, jex.Literal) else v in zeros


def _makes_zeros(eqn, zeros: set) -> bool:
    """Whether an equation gives 0 in every place: it spreads a 0, or arrays of zeros."""
    if bodies := list(jex.jaxprs_in_params(eqn.params)):
        return all(_still(bodies[0]))
    known = [_is_zero(v, zeros) for v in eqn.invars]
    return any(known) if eqn.primitive.name == "mul" else all(known)
