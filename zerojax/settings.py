"""Helpers of the frozen settings: their text, and the check of a regex among them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from zerojax.errors import PolicyError


def as_text(settings: Any, *shown: str) -> str:
    """Returns the fields that differ from their defaults as text, except those already shown."""
    fields = [f for f in dataclasses.fields(settings) if f.name not in shown]
    values = {f.name: getattr(settings, f.name) for f in fields}
    values |= {name: dict(x) for name, x in values.items() if isinstance(x, Mapping)}
    defaults = {name: getattr(type(settings), name, {}) for name in values}  # {}: from a factory
    return "".join(f", {name}={value!r}" for name, value in values.items()
                   if value != defaults[name])


def check_pattern(what: str, pattern: str) -> None:
    """Raises `PolicyError` for text that is not a regular expression; `what` names it."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise PolicyError(f"{what} {pattern!r} is not a valid regular expression: "
                          f"{error}.") from None
