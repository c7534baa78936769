"""Tables for terminals (rich) and notebooks (HTML), and sizes and times as text."""

import dataclasses
import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

GAP = 2  # characters between columns
PROSE = 100  # characters of a line of prose at most
WORD = 40  # characters of a word that is not divided
_NUMBER = re.compile(r"-?\d[\d,.]*(e[+-]?\d+)?(%|/\d+| [A-Za-z]+)?")
# notebooks wrap lines in <pre>, which breaks tables
_TABLE = '<pre style="white-space: pre; overflow-x: auto; font-family: monospace">{code}</pre>'
_PROSE = '<pre style="white-space: pre-wrap; max-width: 100ch; font-family: monospace">{}</pre>'


def size(n: float) -> str:
    """Returns a number of bytes as text, in powers of 1024.

    >>> size(1023), size(1536), size(3 * 2**30)
    ('1,023 bytes', '1.5 KiB', '3.0 GiB')
    """
    units = ["bytes", "KiB", "MiB", "GiB"]
    while n >= 1024 and len(units) > 1:
        n /= 1024
        units.pop(0)
    return f"{n:,.0f} bytes" if units[0] == "bytes" else f"{n:,.1f} {units[0]}"


def seconds(t: float) -> str:
    """Returns a time as text.

    >>> seconds(0.00025), seconds(0.25), seconds(2)
    ('250 us', '250 ms', '2 s')
    >>> seconds(0.9999), seconds(2000), seconds(0)
    ('1 s', '2,000 s', '0 us')
    """
    units = {"s": t, "ms": t * 1e3, "us": t * 1e6}
    unit = next((unit for unit, n in units.items() if n >= 0.9995), "us")  # 0.9995 rounds to 1
    n = units[unit]
    return f"{n:,.0f} {unit}" if n >= 999.5 else f"{n:.3g} {unit}"


def quantity(n: int, noun: str) -> str:
    """Returns a number with a noun in the singular or plural.

    >>> quantity(1, "microbatch"), quantity(4, "microbatch"), quantity(2000, "leaf")
    ('1 microbatch', '4 microbatches', '2,000 leaves')
    """
    plural = {"leaf": "leaves", "microbatch": "microbatches"}.get(noun, f"{noun}s")
    return f"{n:,} {noun if n == 1 else plural}"


def is_watched() -> bool:
    """Returns whether progress on standard error reaches a person: in a terminal or a notebook."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)


class Code(str):
    """A part that prints in lines of its own length, so that it can be pasted."""


class Printed:
    """A base class for values that print as tables and text, and that notebooks show as HTML."""

    def parts(self) -> Sequence[Any]:
        """Returns the grids and strings to print, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text(*self.parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(*self.parts())


@dataclasses.dataclass(frozen=True, repr=False)
class Sheet(Printed):
    """A title, column names, and rows of text, with footnotes. Prints as a table.

    Columns without text are left out.

    Attributes:
      title: the line above the table.
      columns: the names of the columns.
      rows: the cells of each row, as text.
      notes: a footnote for each row, or "". Equal ones are printed once.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> Sequence[Any]:
        return [self.title, Grid(self.named_columns()), *self._footnotes()]

    def named_columns(self) -> list[tuple[str, tuple[str, ...]]]:
        """Returns the name and the cells of each column that has text, then the footnotes' marks.
        """
        numbers = {note: str(i) for i, note in enumerate(self._distinct(), 1)}
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        columns = [*zip(self.columns, map(tuple, cells), strict=True),
                   ("note", tuple(numbers.get(note, "") for note in self.notes))]
        return [(name, cells) for name, cells in columns if any(cells)]

    def _footnotes(self) -> list[str]:
        return [f"{i}: {note}" for i, note in enumerate(self._distinct(), 1)]

    def _distinct(self) -> list[str]:
        return list(dict.fromkeys(filter(None, self.notes)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Columns, each with a name and cells, that can be laid out in different widths."""

    columns: Sequence[tuple[str, Sequence[str]]]

    def table(self, width: int):
        """Returns a `rich.table.Table` of this many characters, more if its words need them.

        Numbers are right-aligned and never wrap; other cells wrap after spaces and slashes.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        widths = self._widths(width)
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for (name, cells), n in zip(self.columns, widths, strict=True):
            table.add_column(Text(_wrapped(name, n)), width=n, no_wrap=True,
                             justify="right" if _are_numbers(cells) else "left")
        for row in zip(*(cells for _, cells in self.columns), strict=True):
            table.add_row(*(Text(_wrapped(cell, n)) for cell, n in zip(row, widths, strict=True)))
        return table

    def least(self) -> int:
        """Returns the smallest width in which no number and no word is divided."""
        return _total(_least(name, cells) for name, cells in self.columns)

    def natural(self) -> int:
        """Returns the width in which no cell wraps."""
        return _total(_longest((name, *cells)) for name, cells in self.columns)

    def _widths(self, width: int) -> list[int]:
        """Returns the width of each column.

        Each gets what its longest word needs; the rest is shared, first among those that need
        least.
        """
        widths = [_least(name, cells) for name, cells in self.columns]
        wanted = [_longest((name, *cells)) - n
                  for (name, cells), n in zip(self.columns, widths, strict=True)]
        spare = max(0, width - _total(widths))
        order = sorted(range(len(widths)), key=wanted.__getitem__)
        for done, i in enumerate(order):
            given = min(wanted[i], spare // (len(order) - done))
            widths[i] += given
            spare -= given
        return widths


def _total(widths: Iterable[int]) -> int:
    """Returns the width of a table: its columns, the gaps between them, and a margin."""
    widths = list(widths)
    return 1 + sum(widths) + GAP * len(widths)


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(_NUMBER.fullmatch(cell) for cell in cells if cell)


def _least(name: str, cells: Sequence[str]) -> int:
    words = (unit for text in (name, *cells) for unit in _units(text))
    return max(min(WORD, _longest(words)), _longest(cells) if _are_numbers(cells) else 0)


def _longest(texts: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(text.rstrip()) for text in texts), default=0)


def _units(text: str) -> list[str]:
    """Returns the parts of a text between which a line can end.

    >>> _units("params/embed, once")
    ['params/', 'embed, ', 'once']
    """
    return [unit for unit in re.findall(r"[^\s/]*[\s/]?", text) if unit]


def _wrapped(text: str, width: int) -> str:
    r"""Returns a text with line breaks; a unit that is wider than a line is divided.

    >>> _wrapped("params/embed, once", 12)
    'params/\nembed, once'
    """
    from rich.cells import chop_cells

    lines = [""]
    for unit in _units(text):
        if lines[-1] and _longest([lines[-1] + unit]) > width:
            lines.append("")
        lines[-1] += unit
        if _longest([lines[-1]]) > width:
            lines[-1:] = chop_cells(lines[-1], width)
    return "\n".join(line.rstrip() for line in lines)


def text(*parts) -> str:
    """Returns grids and strings as plain text.

    Its width is $COLUMNS or that of the terminal. In a file or a pipe, no cell wraps. A line of
    prose has at most 100 characters.
    """
    available = shutil.get_terminal_size((0, 0)).columns or _natural(parts)
    lines = _recorded(parts, available).export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def html(*parts) -> str:
    """Returns grids and strings as HTML, in which text wraps, no cell does, and wide tables scroll.
    """
    shown = [part for part in parts if not isinstance(part, str) or part.strip()]
    return "\n".join(_PROSE.format(escape(part.strip("\n"))) if isinstance(part, str) else
                     _table(part) for part in shown)


def _table(grid: "Grid") -> str:
    recorded = _recorded([grid], _natural([grid]))
    return recorded.export_html(inline_styles=True, code_format=_TABLE)


def _natural(parts: Sequence[Any]) -> int:
    return max([PROSE, *(part.natural() for part in parts if isinstance(part, Grid))])


def _recorded(parts: Sequence[Any], width: int):
    from rich.console import Console
    from rich.text import Text

    widest = max([width, *(part.least() for part in parts if isinstance(part, Grid))])
    console = Console(record=True, width=widest, height=25, force_jupyter=False,
                      file=io.StringIO())
    for part in parts:
        if isinstance(part, Grid):
            console.print(part.table(width))
        elif isinstance(part, Code):
            console.print(Text(part), soft_wrap=True)
        else:
            console.print(Text(part), width=min(width, PROSE))
    return console
