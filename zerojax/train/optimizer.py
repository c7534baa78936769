"""An optax transform as a program: the parameters that it never moves, and effects of padding."""

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

# primitives whose result is 0 if their operands are, or one of them for mul
_ZERO_AT_ZERO = {"convert_element_type", "broadcast_in_dim", "reshape", "copy", "neg", "mul", "jit",
                 "pjit", "reshard", "sharding_constraint"}


@dataclasses.dataclass(frozen=True)
class Update:
    """`tx.update`, traced for gradients of some shapes.

    Attributes:
      jaxpr: the program; it takes gradients, optimizer state, parameters and the loss.
      out: the shapes of its results, as the tree (updates, optimizer state).
      still: for each parameter, whether its update is 0 for all gradients, as `optax.set_to_zero`
        makes it. XLA drops such a parameter's gradient, unless something else needs it.
    """

    jaxpr: Any
    out: Tree
    still: tuple[bool, ...]

    def __call__(self, grads: Tree, opt_state: Tree, params: Tree,
                 value: jax.Array) -> tuple[Tree, Tree]:
        """Returns (updates, optimizer state); `value` is the loss."""
        flat = jax.tree.leaves((grads, opt_state, params, value))
        results = eval_jaxpr(self.jaxpr.jaxpr, self.jaxpr.consts, *flat)
        return jax.tree.structure(self.out).unflatten(results)

    def applied(self, params: Tree, updates: Tree) -> list:
        """Returns the leaves of the updated parameters; those never moved are the same objects."""
        new = jax.tree.leaves(optax.apply_updates(params, updates))
        return [old if still else x
                for old, x, still in zip(jax.tree.leaves(params), new, self.still, strict=True)]

    def moved(self, leaves: Sequence) -> list:
        """Returns the elements of `leaves`, one per parameter, of the parameters that are moved.

        If the transform moves none, all are returned.
        """
        return trees.taken(leaves, [not still for still in self.still]) or list(leaves)


def init(tx: Any, params: Tree) -> Tree:
    """Returns `tx.init(params)`.

    Raises:
      PolicyError: the transform refuses the parameters.
    """
    try:
        return tx.init(params)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(error, "init receives only the parameters", params) from error


def trace(tx: Any, grads: Tree, opt_state: Tree, params: Tree, value: Any) -> Update:
    """Traces the transform's update; it receives the loss as `value` if it takes that argument.

    Raises:
      PolicyError: the transform needs other arguments, such as those of a line search.
    """
    update = functools.partial(_updated, tx)
    jaxpr, out = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params, value)
    updates, _ = out
    return Update(jaxpr, out, _are_zero(jaxpr.jaxpr)[:len(jax.tree.leaves(updates))])


def _updated(tx: Any, grads: Tree, opt_state: Tree, params: Tree, value: Any) -> tuple[Tree, Tree]:
    """Returns what the transform's update returns, with `value` or, if refused, without it."""
    tx = optax.with_extra_args_support(tx)
    try:
        try:
            return tx.update(grads, opt_state, params, value=value)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
        return tx.update(grads, opt_state, params)
    except (TypeError, ValueError, AttributeError) as error:
        given = "update receives only gradients, its state, the parameters and the loss"
        raise _refused(error, given, params) from error


def check_padding(tx: Any, params: Tree) -> None:
    """Raises `PolicyError` if padding affects a transform.

    Padding affects it if its state has other shapes for padded arrays, or if it updates tiny arrays
    differently when they are padded.

    Args:
      params: arrays or shapes, some of them padded.
    """
    if not any(map(padded.is_padded, padded.leaves(params))):
        return
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params,
                         is_leaf=padded.is_padded)
    plain_state, state = (jax.eval_shape(functools.partial(init, tx), x) for x in (plain, params))
    if _shapes(plain_state) != _shapes(state):
        effect = "its state has the shapes of padded arrays"
    else:
        effect = _effect_on_tiny(tx, params)
    if effect:
        names = ", ".join(kinds(plain_state)) or "without state"
        raise PolicyError(f'Zero(uneven="pad"): the optimizer ({names}) is affected by rows of '
                          f"zeros at the ends of arrays: {effect}. Take a transform that works "
                          "element by element, or leave out uneven.")


def _shapes(tree: Tree) -> list[tuple[int, ...]]:
    return [x.shape for x in padded.leaves(tree)]


def _effect_on_tiny(tx: Any, params: Tree) -> str:
    """Returns how two updates of tiny arrays differ with and without padding; "" if they do not."""
    rng = np.random.default_rng(0)
    draw = functools.partial(_tiny, rng)
    values, *grads = [jax.tree.map(draw, params, is_leaf=padded.is_padded) for _ in range(3)]
    plain = _after(tx, values, grads)
    other = _after(tx, _pad_like(params, values), [_pad_like(params, grad) for grad in grads])
    for (path, x), y in zip(jax.tree.leaves_with_path(plain), padded.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if _differs(x, y, is_param=name.startswith("params")):
            return f"{name} differs after two updates of tiny arrays"
    return ""


def _tiny(rng: np.random.Generator, x: Any) -> np.ndarray:
    """Draws a small array whose dimensions are ordered by size like those of `x`."""
    sizes = sorted(set(x.shape))
    shape = [min(d, 3 + 2 * sizes.index(d)) for d in x.shape]
    return rng.normal(size=shape).astype(x.dtype)


def _pad_like(params: Tree, tiny: Tree) -> Tree:
    """Adds one row of zeros to each dimension that is padded in `params`."""

    def one(like, x):
        if not padded.is_padded(like):
            return x
        shapes = zip(x.shape, like.kept.shape, like.shape, strict=True)
        return padded.pad(x, [d + (kept > logical) for d, kept, logical in shapes])

    return jax.tree.map(one, params, tiny, is_leaf=padded.is_padded)


def _differs(plain: Any, other: Any, is_param: bool) -> bool:
    """Whether results differ; in a padded parameter, the rows of zeros must stay zeros as well."""
    if is_param and padded.is_padded(other):
        other = other.kept
        plain = padded.filled(jnp.asarray(plain), other.shape)
    return not trees.is_key(other) and not np.allclose(plain, other, rtol=1e-4, atol=1e-6)


def _after(tx: Any, params: Tree, grads: Sequence[Tree]) -> Tree:
    """Returns the parameters and the optimizer state after these gradients, without jit."""
    opt_state, value = init(tx, params), jnp.float32(1)
    for grad in grads:
        updates, opt_state = _updated(tx, jax.tree.map(jnp.asarray, grad), opt_state, params, value)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state}


def kinds(opt_state: Any) -> tuple[str, ...]:
    """Returns the names of the kinds of state that a transform keeps, in order.

    >>> kinds(optax.adam(1e-3).init({"w": np.zeros(2)}))
    ('ScaleByAdamState',)
    """
    return tuple(name for name in _named_tuples(opt_state)
                 if name not in ("EmptyState", "MaskedNode"))


def _named_tuples(tree: Any) -> Iterator[str]:
    if hasattr(tree, "_fields"):
        yield type(tree).__name__
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return
    for child in tree:
        yield from _named_tuples(child)


def _refused(error: Exception, given: str, params: Tree) -> PolicyError:
    """Returns the error for a transform that refused what it was given."""
    names = [name.partition(".")[0] for name in _optax_functions(error)]
    names += re.findall(r"(\w+)\.<locals>", str(error))
    name = f"the optimizer ({names[-1]})" if names else "the optimizer"
    notes = []
    if any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None)):
        notes.append("frozen parameters are None, so select with jax.tree.map")
    if any(map(padded.is_padded, padded.leaves(params))):
        notes.append("the path of a padded parameter has one more key at its end")
    note = f" ({'; '.join(notes)})" if notes else ""
    return PolicyError(f"{name} cannot be used in zerojax's step: its {given}{note}, and it raised "
                       f"{str(error)!r}. Take another transform, or write your own loop with "
                       "zero.value_and_grad under zero.jit.")


def _optax_functions(error: Exception) -> Iterator[str]:
    """Yields the qualified names of the inner functions of optax that an error passed through."""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_qualname
        is_optax = "optax" in trace.tb_frame.f_globals.get("__name__", "")
        if is_optax and "<locals>" in name:
            yield name
        trace = trace.tb_next


def _are_zero(jaxpr) -> tuple[bool, ...]:
    """Whether each result of a jaxpr is 0 everywhere, as far as its equations alone show."""
    zeros: set = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _ZERO_AT_ZERO and _makes_zeros(eqn, zeros):
            zeros.update(eqn.outvars)
    return tuple(_is_zero(v, zeros) for v in jaxpr.outvars)


def _is_zero(v, zeros: set) -> bool:
    return not np.any(v.val) if isinstance(v, jex.Literal) else v in zeros


def _makes_zeros(eqn, zeros: set) -> bool:
    """Whether an equation's results are 0 everywhere, because of zeros among its operands."""
    if bodies := list(jex.jaxprs_in_params(eqn.params)):
        return all(_are_zero(bodies[0]))
    operands = [_is_zero(v, zeros) for v in eqn.invars]
    return any(operands) if eqn.primitive.name == "mul" else all(operands)
