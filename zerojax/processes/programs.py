"""Programs as text, and the first line in which those of several processes differ."""

import bisect
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from zerojax.processes.exchange import Group

# jax identifies the Python functions of a custom_partitioning call by their address
_PARTITIONING = re.compile(r'(custom_call @CustomSPMDPartitioning\(.*backend_config = )"\d+"')
_DEFINED = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_AT_END = re.compile(r"loc\((#loc\d*|\".*)\)$")
_CONSTANT = re.compile(r"\s*(%\w+) = stablehlo.constant ")
_FRAME = re.compile(r'"([^"]+)":(\d+):\d+|(#loc\d*)')  # a place, or a reference to a definition
_ZEROJAX = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", _ZEROJAX + os.sep)
_HEAD, _BEFORE, _AFTER = 40, 20, 40  # characters of a long line in an error


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program. Two are equal if their texts are, wherever their source is.

    Attributes:
      text: operations, shapes, shardings and constants, without source lines.
      lowered: the `jax.stages.Lowered` of this process.
    """

    text: str
    lowered: Any = dataclasses.field(compare=False)

    @classmethod
    def of(cls, lowered: Any) -> "Program":
        """Returns the program of a `jax.stages.Lowered`."""
        return cls(_PARTITIONING.sub(r"\1", lowered.as_text()), lowered)

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        return f"{len(self.lines)} lines, {digest}"

    @functools.cached_property
    def lines(self) -> list[str]:
        """The lines of the text."""
        return self.text.splitlines(keepends=True)

    def place(self, line: int) -> str:
        """Returns "file:line" of the user's code that a line comes from, or "".

        A constant comes from where it is used, and an operation with a body has its place after
        the body.
        """
        text = self.lowered.as_text(debug_info=True).splitlines()
        defined = {found[1]: found[2] for each in text if (found := _DEFINED.match(each))}
        lines = [each for each in text if not _DEFINED.match(each)]
        if len(lines) != len(self.lines):
            return ""
        constant = _CONSTANT.match(lines[line])
        uses = constant and re.compile(re.escape(constant[1]) + r"\b").search
        at_end = (_AT_END.search(each) for each in lines[line + bool(constant):]
                  if not uses or uses(each))
        places = (_users(_frames(found[1], defined)) for found in at_end if found)
        return next(filter(None, places), "")


def _frames(location: str, defined: dict[str, str]) -> Iterable[tuple[str, str]]:
    """Yields file and line of each frame of a location, innermost first."""
    for file, line, reference in _FRAME.findall(location):
        if reference:
            yield from _frames(defined.get(reference, ""), defined)
        else:
            yield file, line


def _users(frames: Iterable[tuple[str, str]]) -> str:
    """Returns the innermost frame outside libraries, without the directory, which hosts may have
    in different places."""
    users = (f"{os.path.basename(file)}:{line}" for file, line in frames
             if not any(library in file for library in _LIBRARIES))
    return next(users, "")


def first_difference(group: Group, program: Program) -> tuple[int, dict[int, str]]:
    """Returns the index of the first line that differs, and this line of each process.

    Every process of the group calls it with its own program. They exchange digests of the
    beginnings of their programs, and one shortened line.
    """
    lines = program.lines
    line = _first(group, len(lines), lambda n: "".join(lines[:n]))
    mine = "".join(lines[line:line + 1]).strip()
    text = _shortened(mine, _first(group, len(mine), lambda n: mine[:n]))
    place = program.place(line) if mine else ""
    end = f"the end, after {len(lines)} lines"
    shown = f"`{text}`{f' at {place}' if place else ''}" if mine else end
    return line, group.texts(shown)


def _first(group: Group, length: int, beginning: Callable[[int], str]) -> int:
    """Returns the index of the first part that differs between processes, by bisection.

    Args:
      length: the number of parts of this process's text.
      beginning: returns the text of so many parts.
    """
    def differ(last: int) -> bool:
        digest = hashlib.sha256(beginning(last + 1).encode()).digest()
        marks = group.words(np.frombuffer(digest, np.uint32))
        return len({mark.tobytes() for mark in marks.values()}) > 1

    longest = max(group.shared(length).values())
    return bisect.bisect_left(range(longest), True, key=differ)


def _shortened(line: str, column: int) -> str:
    """Returns the beginning of a long line, and the part around the column that differs.

    >>> _shortened("%0 = stablehlo.constant dense<[" + "1, " * 50 + "2]>", 181)
    '%0 = stablehlo.constant dense<[1, 1, 1, ...1, 1, 1, 1, 1, 1, 2]>'
    """
    first, last = column - _BEFORE, column + _AFTER
    if len(line) <= _HEAD + _BEFORE + _AFTER:
        return line
    if first <= _HEAD:
        return f"{line[:last]}..." if last < len(line) else line
    return f"{line[:_HEAD]}...{line[first:last]}{'...' if last < len(line) else ''}"
