"""Tables for terminals (rich) and notebooks (HTML), and sizes and times as text."""

import dataclasses
import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

GAP = 2  # characters between columns
PROSE = 100  # characters of a line of prose at most
# notebooks wrap lines in <pre>, which breaks tables
_HTML = ('<pre style="white-space: pre; overflow-x: auto; font-family: monospace">{code}</pre>')


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
    """
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if t * factor >= 1:
            return f"{t * factor:.3g} {unit}"
    return f"{t * 1e6:.3g} us" if t else "0 s"


def quantity(n: int, noun: str) -> str:
    """Returns a number with a noun in the singular or plural.

    >>> quantity(1, "microbatch"), quantity(4, "microbatch"), quantity(2000, "leaf")
    ('1 microbatch', '4 microbatches', '2,000 leaves')
    """
    plural = {"leaf": "leaves", "copy": "copies"}.get(noun) or noun + ("es" if noun.endswith(
        ("ch", "s")) else "s")
    return f"{n:,} {noun if n == 1 else plural}"


def is_watched() -> bool:
    """Whether progress on standard error reaches a person: in a terminal or a notebook."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)


class Printed:
    """A base class for values that print as tables and text, and that notebooks show as HTML."""

    def parts(self) -> Sequence[Any]:
        """Returns the sheets and strings to print, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text(*self.parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(*self.parts())


@dataclasses.dataclass(frozen=True, repr=False)
class Sheet(Printed):
    """A title, column names, and rows of text, with footnotes. Prints as a table.

    Attributes:
      notes: a footnote for each row, or "". Equal ones are printed once.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> Sequence[Any]:
        return [self, *(f"{i}: {note}" for note, i in self._footnotes.items())]

    @property
    def _footnotes(self) -> dict[str, int]:
        """The number of each footnote."""
        return {note: i for i, note in enumerate(dict.fromkeys(filter(None, self.notes)), 1)}

    def all_columns(self) -> list[tuple[str, tuple[str, ...]]]:
        """Returns the name and the cells of each column that is not empty, with one for the
        footnotes."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        marks = tuple(str(self._footnotes.get(note, "")) for note in self.notes)
        columns = [*zip(self.columns, map(tuple, cells), strict=True), ("note", marks)]
        return [(name, cells) for name, cells in columns if any(cells)]

    def table(self, width: int):
        """Returns a `rich.table.Table` of this many characters, more if its words need them.

        Numbers are right-aligned and never wrap; other cells wrap after spaces and slashes.
        """
        from rich import box
        from rich.table import Table

        columns = self.all_columns()
        widths = _widths(columns, width - 1)
        table = Table(box=box.SIMPLE, title=self.title, title_justify="left", title_style="bold",
                      padding=(0, 1, 0, 0))
        for (name, cells), n in zip(columns, widths, strict=True):
            table.add_column(_wrapped(name, n), width=n, no_wrap=True,
                             justify="right" if _are_numbers(cells) else "left")
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(_wrapped, row, widths))
        return table

    def width(self) -> int:
        """Returns the width of the table if no cell wraps."""
        return 1 + sum(GAP + _longest((name, *cells)) for name, cells in self.all_columns())


def _are_numbers(cells: Sequence[str]) -> bool:
    return any(cell[:1].isdigit() for cell in cells)


def _widths(columns: Sequence[tuple[str, Sequence[str]]], total: int) -> list[int]:
    """Returns the width of each column.

    Each gets what its longest word needs; the rest is shared, first among those that need least.
    """
    least = [_longest([*_units(name), *(cells if _are_numbers(cells) else
                                        (unit for cell in cells for unit in _units(cell)))])
             for name, cells in columns]
    wanted = [_longest((name, *cells)) - n for (name, cells), n in
              zip(columns, least, strict=True)]
    spare, widths = max(0, total - sum(least) - GAP * len(columns)), list(least)
    order = sorted(range(len(columns)), key=wanted.__getitem__)
    for done, i in enumerate(order):
        given = min(wanted[i], spare // (len(order) - done))
        widths[i] += given
        spare -= given
    return widths


def _longest(texts: Iterable[str]) -> int:
    return max((len(text.rstrip()) for text in texts), default=0)


def _units(text: str) -> list[str]:
    """Returns the parts of a text between which a line can end.

    >>> _units("params/embed, once")
    ['params/', 'embed, ', 'once']
    """
    return [unit for unit in re.findall(r"[^\s/]*[\s/]?", text) if unit]


def _wrapped(text: str, width: int) -> str:
    r"""Returns a text with line breaks.

    >>> _wrapped("params/embed, once", 12)
    'params/\nembed, once'
    """
    lines = [""]
    for unit in _units(text):
        if lines[-1] and len((lines[-1] + unit).rstrip()) > width:
            lines.append("")
        lines[-1] += unit
    return "\n".join(line.rstrip() for line in lines)


def text(*parts) -> str:
    """Returns sheets and strings as plain text, as wide as the terminal (or $COLUMNS, or 80).

    Tables and strings wrap; strings at 100 characters at most.
    """
    terminal = shutil.get_terminal_size((80, 24)).columns
    lines = _recorded(parts, terminal).export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def html(*parts) -> str:
    """Returns sheets and strings as HTML that scrolls sideways where the page is narrow."""
    width = max([PROSE, *(part.width() for part in parts if isinstance(part, Sheet))])
    return _recorded(parts, width).export_html(inline_styles=True, code_format=_HTML)


def _recorded(parts: Sequence[Any], width: int):
    from rich.console import Console
    from rich.text import Text

    tables = [part.table(width) if isinstance(part, Sheet) else part for part in parts]
    widest = Console(width=1000, force_jupyter=False)
    needed = (widest.measure(part).maximum for part in tables if not isinstance(part, str))
    console = Console(record=True, width=max(width, *needed, 0), force_jupyter=False,
                      file=io.StringIO())
    for part in tables:
        prose = isinstance(part, str)
        console.print(Text(part) if prose else part, width=min(width, PROSE) if prose else None)
    return console
