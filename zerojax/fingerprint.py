"""What a process is about to run, as fields that another process can compare: versions, policy, shapes, functions, programs."""

import functools
import hashlib
import importlib.metadata
import inspect
import platform
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from zerojax import layout
from zerojax.policy import Policy

_PACKAGES = ("zerojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_SMALL = 2**16  # elements of an array whose values are compared, as those of a key


@functools.cache
def versions() -> dict[str, str]:
    """Of packages and Python."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def of_policy(policy: Policy) -> dict:
    mesh = policy.mesh
    devices = [f"{d.process_index}:{d.id}" for d in mesh.devices.flat]  # pyright: ignore[reportAttributeAccessIssue]
    return {"versions": versions(), "mesh": {"axes": dict(mesh.shape), "devices": " ".join(devices)},
            "policy": {"stage": policy.stage, "precision": vars(policy.precision), "gradients": policy.gradients,
                       "axis": policy.axes, "replica_axis": policy.replica_axis, "min_shard": policy.min_shard,
                       "rules": {pattern: str(spec) for pattern, spec in policy.rules.items()}}}


def shapes(tree: Any) -> dict[str, str]:
    """Of arrays or shapes: dtype and shape by path."""
    return _by_path(tree, lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x))


def values(tree: Any) -> dict[str, str]:
    """As `shapes`; of small arrays that are whole in this process, as keys, what they hold too."""
    return _by_path(tree, _leaf)


def _by_path(tree, text) -> dict[str, str]:
    return {layout.path_of(path) or "array": text(x) for path, x in jax.tree.leaves_with_path(tree)}


def _leaf(x) -> str:
    if not hasattr(x, "shape"):
        return repr(x)
    text = f"{x.dtype}{list(x.shape)}"
    alone = isinstance(x, np.ndarray | np.generic) or (isinstance(x, jax.Array) and x.is_fully_addressable)
    return f"{text} {_hash([_bytes(x)])}" if alone and x.size <= _SMALL else text


def _bytes(x) -> bytes:
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def of_function(function: Callable) -> str:
    """Its name, and a hash of its code: not of what it calls, which shows in the program."""
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    function = inspect.unwrap(function)
    function = function if hasattr(function, "__code__") else type(function).__call__
    code = getattr(function, "__code__", None)
    return f"{getattr(function, '__qualname__', function)} {_hash(_code(code)) if code else ''}"


def _code(code: types.CodeType) -> Iterable[bytes]:
    """But for where it stands: the hosts' directories may differ."""
    yield from (code.co_code, repr(code.co_names).encode(), repr(code.co_varnames).encode())
    for constant in code.co_consts:
        yield from _code(constant) if isinstance(constant, types.CodeType) else [_plain(constant)]


def _plain(value) -> bytes:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def of_program(jitted: Callable, *args: Any, **kwargs: Any) -> str:
    """Of what jit traces: how many operations, and a hash of them, their shapes and their constants. Calling it traces no more."""
    traced = jitted.trace(*args, **kwargs).jaxpr  # pyright: ignore[reportFunctionMemberAccess]
    parts = list(_program(traced.jaxpr, {}))
    constants = [_leaf(x).encode() for x in traced.consts]
    return f"{len(parts)} operations, {_hash(parts + constants)}"


def _program(jaxpr, numbers: dict) -> Iterable[bytes]:
    """Each equation, its operands by the order in which they came up."""
    number = lambda v: str(v) if isinstance(v, core.Literal) else numbers.setdefault(v, len(numbers))
    for v in (*jaxpr.constvars, *jaxpr.invars):
        number(v)
    for equation in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program) if _is_program(x)]
        settings = sorted((k, repr(v)) for k, v in equation.params.items() if isinstance(v, _SETTINGS))
        operands, results = map(number, equation.invars), [v.aval.str_short() for v in equation.outvars]
        for v in equation.outvars:
            number(v)
        text = repr((equation.primitive.name, [*operands], results, settings))
        yield _ADDRESS.sub("", text).encode()
        for x in inner:
            yield from _program(getattr(x, "jaxpr", x), numbers)


_SETTINGS = (int, float, str, bool, tuple, np.dtype)


def _is_program(x) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:12]
