"""Which values of a parametrized test `make test` runs; `make test-all` runs all of them."""

import pytest


def some(values, chosen):
    """Returns values for `parametrize`, marked slow unless `chosen(value)`."""
    return [value if chosen(value) else _slow(value) for value in values]


def _slow(value):
    return pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
