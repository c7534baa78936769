"""The uses of variables in a jaxpr: which equations take them, and in which dtypes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

_MOVES = {"convert_element_type", "transpose", "reshape", "squeeze", "slice", "split",
          "dynamic_slice", "copy", "broadcast_in_dim"}


def without_constants(jaxpr: Any) -> Any:
    """Returns the jaxpr inside a closed one, or the jaxpr itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def variables(eqn) -> list:
    """Returns the operands of an equation that are not literals."""
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def depending(jaxpr: Any, some: Iterable[Any]) -> set:
    """Returns some variables of a jaxpr, and all those that depend on them."""
    found = set(some)
    for eqn in without_constants(jaxpr).eqns:
        if not found.isdisjoint(variables(eqn)):
            found.update(eqn.outvars)
    return found


def of(jaxpr: Any, held: Mapping[Any, str]) -> Iterator[tuple[Any, set[str]]]:
    """Yields each equation that uses some of the held variables, with the names of those it uses.

    Follows variables through moves, casts, calls and loops.
    """
    held = dict(held)
    for eqn in without_constants(jaxpr).eqns:
        names = {i: held[v] for i, v in enumerate(eqn.invars)
                 if not isinstance(v, jex.Literal) and v in held}
        if not names:
            continue
        yield eqn, set(names.values())
        if eqn.primitive.name in _MOVES and 0 in names:
            held.update(dict.fromkeys(eqn.outvars, names[0]))
        for body in jex.jaxprs_in_params(eqn.params):
            yield from of(body, _passed(eqn, body, names))


def _passed(eqn, body, names: Mapping[int, str]) -> dict[Any, str]:
    """Returns the names of a body's variables, for those of its equation's operands by position.

    A call passes its last operands to the body, in order.
    """
    offset = len(eqn.invars) - len(body.invars)
    return {body.invars[i - offset]: name for i, name in names.items()
            if 0 <= i - offset < len(body.invars)}


def widened(jaxpr: Any, held: Mapping[Any, str]) -> dict[str, str]:
    """Returns the names of the held variables that are read in a wider dtype, with that dtype."""
    return {name: wide for eqn, names in of(jaxpr, held) if (wide := _wide(eqn)) for name in names}


def _wide(eqn) -> str:
    """Returns the dtype in which an equation reads narrower numbers, or ""."""
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "dtype")]
    if eqn.primitive.name == "dot_general" and dtypes[0] != dtypes[1]:
        return str(jnp.promote_types(*dtypes[:2]))
    if eqn.primitive.name == "convert_element_type" and widens(dtypes[0], dtypes[1]):
        return str(dtypes[1])
    return ""


def widens(old, new) -> bool:
    """Whether a cast from dtype `old` to dtype `new` is to wider floating numbers.

    >>> widens("bfloat16", "float32"), widens("bfloat16", "float16"), widens("int8", "int32")
    (True, False, False)
    """
    return jnp.issubdtype(new, jnp.floating) and old != new and jnp.promote_types(old, new) == new
