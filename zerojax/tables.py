"""Tables for terminals (rich) and notebooks (HTML), and sizes and times as text."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any


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
    ('0.25 ms', '250 ms', '2 s')
    """
    return f"{t:.3g} s" if t >= 1 else f"{t * 1e3:.3g} ms"


class Printed:
    """A base class for values that print as tables and text, and that notebooks show as HTML."""

    def parts(self) -> Sequence[Any]:
        """Returns what is printed: rich tables and strings, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text(*self.parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(*self.parts())


@dataclasses.dataclass(frozen=True, repr=False)
class Sheet(Printed):
    """A title, column names, and rows of text. Prints as a table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self):
        """Returns a `rich.table.Table`; columns with numbers are right-aligned."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.columns):
            numbers = any(row[i][:1].isdigit() for row in self.rows)
            table.add_column(name, justify="right" if numbers else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def parts(self) -> Sequence[Any]:
        return [self.table()]


def text(*parts) -> str:
    """Returns rich tables and strings as plain text.

    The text is as wide as the widest table, because a truncated path is useless; strings wrap.
    """
    lines = _recorded(parts).export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def html(*parts) -> str:
    """Returns rich tables and strings as HTML, laid out like the plain text."""
    return _recorded(parts).export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _recorded(parts: Sequence[Any]):
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=_width(parts), force_jupyter=False, file=io.StringIO())
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    return console


def _width(parts: Sequence[Any]) -> int:
    """Returns the width of the widest table, at least 100."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=1000, force_jupyter=False)
    tables = [part for part in parts if not isinstance(part, str)]
    return max([100, *(Measurement.get(wide, wide.options, table).maximum for table in tables)])
