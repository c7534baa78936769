"""Data positions and metrics as JSON values: numbers, text, bytes, and lists and dicts of these."""

import base64
from collections.abc import Mapping
from typing import Any

from zerojax.errors import CheckpointError

BYTES = "__bytes__"  # the key of a dict that stands for bytes


def encoded(name: str, value: Any) -> Any:
    """Returns JSON values; bytes become their base64 in a dict with a reserved key.

    >>> encoded("data_state", {"at": b"\\x00", "n": (1, 2)})
    {'at': {'__bytes__': 'AA=='}, 'n': [1, 2]}

    Args:
      name: the name of the value in errors.

    Raises:
      CheckpointError: a value that JSON cannot represent.
    """
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        _check_keys(name, value)
        return {key: encoded(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise CheckpointError(f"save was given a {name} that JSON cannot represent, of type "
                          f"{type(value).__name__}: {value!r:.60}. Give numbers, text, bytes, and "
                          "lists and dicts of these.")


def _check_keys(name: str, value: Mapping):
    for key in value:
        if not isinstance(key, str) or key == BYTES:
            raise CheckpointError(f"save was given a {name} with the key {key!r}; keys must be "
                                  f"text other than {BYTES!r}.")


def decoded(value: Any) -> Any:
    """Returns the value that `encoded` was given, with lists in place of tuples.

    >>> decoded({"at": {"__bytes__": "AA=="}})
    {'at': b'\\x00'}

    Raises:
      ValueError: text that is not base64, where bytes belong.
    """
    if isinstance(value, dict):
        if value.keys() == {BYTES}:
            return base64.b64decode(value[BYTES], validate=True)
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value
