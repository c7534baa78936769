"""Fingerprints of a process's programs and settings, as fields that processes can compare."""

import dataclasses
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

from zerojax import trees
from zerojax.policy import Policy
from zerojax.processes.programs import Program

_PACKAGES = ("zerojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_SAMPLE = 2**16  # elements of an array that are hashed


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide what is computed."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return packages | {"python": platform.python_version()}


def of_policy(policy: Policy) -> dict:
    """Returns versions, the mesh with its devices as "process:id", and the settings of a policy."""
    mesh = policy.mesh
    devices = [f"{d.process_index}:{d.id}" for d in getattr(mesh.devices, "flat", ())]
    rules = [f"{pattern}: {spec}" for pattern, spec in policy.rules.items()]
    return {"versions": versions(),
            "mesh": {"axes": dict(mesh.shape), "devices": " ".join(devices)},
            "policy": {"stage": policy.stage, "precision": policy.precision.as_dict(),
                       "gradients": policy.gradients, "axis": policy.axes,
                       "replica_axis": policy.replica_axis, "min_shard": policy.min_shard,
                       "uneven": policy.uneven, "rules": rules,
                       "secondary": policy.secondary_axes, "wire": dataclasses.asdict(policy.wire)}}


def shapes(tree: Any) -> dict[str, str]:
    """Returns the dtype, shape and spec of each array or shape of a tree, by path."""
    return _by_path(tree, lambda x: _shape(x) if hasattr(x, "shape") else repr(x))


def values(tree: Any) -> dict[str, str]:
    """Returns `shapes`, with a hash of the contents of each array that this process holds whole.

    Random keys have one too. Of a large array, a sample is hashed.
    """
    return _by_path(tree, _leaf)


def _by_path(tree: Any, text: Callable[[Any], str]) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(tree)
    return {trees.path_of(path) or "array": text(x) for path, x in leaves}


def _leaf(x: Any) -> str:
    if not hasattr(x, "shape"):
        return repr(x)
    on_host = isinstance(x, np.ndarray | np.generic)
    whole = on_host or (isinstance(x, jax.Array) and x.is_fully_addressable)
    return f"{_shape(x)} {_hash([_sample(x)])}" if whole else _shape(x)


def _shape(x: Any) -> str:
    spec = getattr(getattr(x, "sharding", None), "spec", None)
    return f"{x.dtype}{list(x.shape)}{'' if spec is None else f' {spec}'}"


def _sample(x: Any) -> bytes:
    is_key = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(x) if is_key else x).reshape(-1)
    step = -(-words.size // _SAMPLE) or 1
    return words[::-step].tobytes()


def of_function(function: Callable) -> str:
    """Returns the name of a function, and a hash of its code.

    The functions that it calls, and the values that it closes over, show in its program instead.
    """
    function = _unwrapped(function)
    if not hasattr(function, "__code__"):  # an object that is callable
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return f"{getattr(function, '__qualname__', function)} {_hash(_code(code)) if code else ''}"


def _unwrapped(function: Callable) -> Callable:
    if isinstance(function, functools.partial):
        return _unwrapped(function.func)
    if isinstance(function, types.MethodType):
        return _unwrapped(function.__func__)
    return inspect.unwrap(function)


def _code(code: types.CodeType) -> Iterable[bytes]:
    """Yields the parts of a code object, without its file, whose directory may differ by host."""
    yield from (code.co_code, repr(code.co_names).encode(), repr(code.co_varnames).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield _constant(constant)


def _constant(value: Any) -> bytes:
    ordered = sorted(map(repr, value)) if isinstance(value, frozenset) else value
    return repr(ordered).encode()


def of_program(jitted: Callable, *args: Any, **kwargs: Any) -> Program:
    """Returns the program of a jitted function.

    A later call neither traces nor lowers again. Of a `custom_partitioning` function, the text has
    the call, but not the body.
    """
    return Program.of(jitted.lower(*args, **kwargs))  # pyright: ignore[reportFunctionMemberAccess]


def of_text(text: str) -> str:
    """Returns the digest of a program's text, `jax.stages.Lowered.as_text()`.

    The text has the operations, shapes, shardings and constants, and no source lines.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def of_settings(value: Any) -> Any:
    """Returns a user's settings as JSON values.

    Sets are sorted, and other objects are represented by their text without addresses.

    >>> of_settings({"tags": {"b", "a"}, 1: np.float32(2), "of": print})
    {'tags': ["'a'", "'b'"], '1': '2.0', 'of': '<built-in function print>'}
    """
    if isinstance(value, Mapping):
        return {str(key): of_settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [of_settings(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else _ADDRESS.sub("", str(value))


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:12]
