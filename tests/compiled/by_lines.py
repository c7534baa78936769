"""A count, line by line, of what a compiled program sends and holds; uses no code of zerojax."""

import math
import re

SIZES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def _arrays(text):
    """Returns the bytes of all arrays in a type."""
    return sum(SIZES[dtype] * math.prod([int(d) for d in dims.split(",") if d])
               for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text))


def _lines(text):
    """Yields (computation, line) for each line that makes the result of a collective."""
    where = ""
    for line in text.split("\n"):
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            where = line.split(" (")[0].removeprefix("ENTRY ").lstrip("%")
        if any(f" {kind}(" in line or f" {kind}-done(" in line for kind in KINDS):
            yield where, line


def _turns(text):
    """Returns a function from a computation to how often it runs; loops in loops multiply."""
    turns = {}
    parent = {}
    where = ""
    for line in text.split("\n"):
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            where = line.split(" (")[0].removeprefix("ENTRY ").lstrip("%")
        if " while(" in line:
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            turns[body] = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
            parent[body] = where

    def total(name):
        return turns[name] * total(parent[name]) if name in turns else 1

    return total


def sent(text: str, devices: int) -> float:
    """Returns the bytes that each device sends, if all groups are all `devices`.

    A ring of N devices sends (N-1)/N of an array, and twice that for an all-reduce.
    """
    total = 0.0
    turns = _turns(text)
    for where, line in _lines(text):
        result = line.split(" = ", 1)[1]
        kind = next(k for k in KINDS if f" {k}(" in line or f" {k}-done(" in line)
        size = _arrays(result[:re.search(rf" {kind}(-done)?\(", result).start()])
        factor = {"all-gather": 1, "reduce-scatter": devices, "all-reduce": 2}[kind]
        total += factor * size * (devices - 1) / devices * turns(where)
    return total


def kinds(text: str) -> set[str]:
    """Returns the kinds of the collectives."""
    return {kind for _, line in _lines(text) for kind in KINDS
            if f" {kind}(" in line or f" {kind}-done(" in line}


def peak(memory) -> int:
    """Returns the peak memory according to the compiler's own figures."""
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes)
