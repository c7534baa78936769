"""Which lines of Python are the user's and which are zerojax's: a finding names the former."""

import itertools
import linecache
import pathlib
import runpy
from collections.abc import Iterable, Iterator

from zerojax.hlo.program import Frame

PACKAGE = pathlib.Path(__file__).parents[1]
PAIR = PACKAGE / "gather" / "pair.py"
ENTRY = PACKAGE / "plan" / "compiler.py"  # frames outside of it only asked for the plan
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "equinox")


def is_users(frame: Frame) -> bool:
    """Whether a line is outside Python's start-up, jax, flax, optax, equinox and zerojax."""
    path = pathlib.Path(frame.file)
    if frame.file.startswith("<frozen ") or path.parent == pathlib.Path(runpy.__file__).parent:
        return False
    library = any(a in ("site-packages", "dist-packages") and b in LIBRARIES
                  for a, b in itertools.pairwise(path.parts))
    return not library and not path.is_relative_to(PACKAGE)


def within(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Yields the frames inside the planned function."""
    return itertools.takewhile(lambda frame: frame.file != str(ENTRY), frames)


def source(frames: Iterable[Frame]) -> str:
    """Returns the user's innermost line, "file:line"; empty if there is none.

    >>> source([Frame(str(PAIR), 90, "read"), Frame("/home/me/model.py", 7, "loss")])
    '/home/me/model.py:7'
    """
    return next((str(frame) for frame in within(frames) if is_users(frame)), "")


def by_the_pair(frames: Iterable[Frame]) -> bool:
    """Whether a line of zerojax's gather and scatter is among the frames."""
    return any(frame.file == str(PAIR) for frame in within(frames))


def readable(source: str) -> str:
    """Returns "file:line" with the line's text.

    A file below the working directory is named by its path from there, a notebook's cell as "cell".
    """
    file, _, line = source.rpartition(":")
    code = linecache.getline(file, int(line)).strip()
    path = pathlib.Path(file)
    if is_cell(path):
        path = pathlib.Path("cell")
    elif path.is_relative_to(pathlib.Path.cwd()):
        path = path.relative_to(pathlib.Path.cwd())
    return f"{path}:{line}" + (f": {code}" if code else "")


def is_cell(path: pathlib.Path) -> bool:
    """Whether a file is a notebook's cell, which has another path in every kernel."""
    return path.parent.name.startswith("ipykernel_")
