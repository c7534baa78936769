"""Values of the command line: numbers with units, lists of numbers."""

import argparse

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def numbers(text: str) -> list[int]:
    """Parses integers separated by commas.

    >>> numbers("4,2")
    [4, 2]
    """
    return [int(n) for n in text.split(",")]


def count(text: str) -> float:
    """Parses a positive number, which can end with K, M, B or T: 10^3, 10^6, 10^9 or 10^12.

    >>> count("7.5B"), count("350m"), count("7.5e9")
    (7500000000.0, 350000000.0, 7500000000.0)
    """
    try:
        number = float(text[:-1]) * _UNITS[text[-1].upper()] if text[-1].isalpha() else float(text)
    except (ValueError, KeyError, IndexError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: write a positive number, such as 7.5B, 350M "
                                         "or 7.5e9")
    return number
