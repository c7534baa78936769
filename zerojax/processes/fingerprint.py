"""What a process is about to run, as fields that another process can compare: versions, policy, shapes, functions, programs."""

import enum
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from zerojax import trees
from zerojax.policy import Policy

_PACKAGES = ("zerojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_SAMPLE = 2**16  # elements of an array that are compared


@functools.cache
def versions() -> dict[str, str]:
    """Of packages and Python."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def of_policy(policy: Policy) -> dict:
    """Versions, the mesh with its devices as process:id, and what the policy says."""
    mesh = policy.mesh
    devices = [f"{d.process_index}:{d.id}" for d in getattr(mesh.devices, "flat", ())]
    return {"versions": versions(), "mesh": {"axes": dict(mesh.shape), "devices": " ".join(devices)},
            "policy": {"stage": policy.stage, "precision": policy.precision.as_dict(), "gradients": policy.gradients,
                       "axis": policy.axes, "replica_axis": policy.replica_axis, "min_shard": policy.min_shard,
                       "uneven": policy.uneven,
                       "rules": [f"{pattern}: {spec}" for pattern, spec in policy.rules.items()]}}


def shapes(tree: Any) -> dict[str, str]:
    """Of arrays or shapes: dtype, shape and where they lie, by path."""
    return _by_path(tree, lambda x: _shape(x) if hasattr(x, "shape") else repr(x))


def _shape(x) -> str:
    spec = getattr(getattr(x, "sharding", None), "spec", None)
    return f"{x.dtype}{list(x.shape)}{'' if spec is None else f' {spec}'}"


def values(tree: Any) -> dict[str, str]:
    """As `shapes`; of arrays that are whole in this process, as keys, what they hold too: of large ones, a sample."""
    return _by_path(tree, _leaf)


def _by_path(tree, text) -> dict[str, str]:
    return {trees.path_of(path) or "array": text(x) for path, x in jax.tree.leaves_with_path(tree)}


def _leaf(x) -> str:
    if not hasattr(x, "shape"):
        return repr(x)
    alone = isinstance(x, np.ndarray | np.generic) or (isinstance(x, jax.Array) and x.is_fully_addressable)
    return f"{_shape(x)} {_hash([_bytes(x)])}" if alone else _shape(x)


def _bytes(x) -> bytes:
    words = np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x).reshape(-1)
    return words[::-(-words.size // _SAMPLE) or 1].tobytes()


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
    parts = list(_program(traced, {}))
    return f"{len(parts)} operations, {_hash(parts)}"


def _program(program, numbers: dict) -> Iterable[bytes]:
    """Each equation, its operands by the order in which they came up; the constants; what is returned."""
    jaxpr = getattr(program, "jaxpr", program)
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
            yield from _program(x, numbers)
    yield repr(([*map(number, jaxpr.outvars)], [_leaf(x) for x in getattr(program, "consts", ())])).encode()


_SETTINGS = (int, float, str, bool, tuple, np.dtype, enum.Enum, NamedSharding, PartitionSpec)


def _is_program(x) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def of_settings(value: Any) -> Any:
    """A user's own, as JSON values: sets in order, other objects by their text without addresses.

    >>> of_settings({"tags": {"b", "a"}, 1: np.float32(2), "of": print})
    {'tags': ["'a'", "'b'"], '1': '2.0', 'of': '<built-in function print>'}
    """
    if isinstance(value, Mapping):
        return {str(key): of_settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [of_settings(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return value if value is None or isinstance(value, bool | int | float | str) else _ADDRESS.sub("", str(value))


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:12]
