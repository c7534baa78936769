"""Tables for terminals (rich) and notebooks (HTML), and numbers for people."""

import dataclasses
import io
from collections.abc import Sequence


def size(n: float) -> str:
    """Bytes, in powers of 1024.

    >>> size(1023), size(1536), size(3 * 2**30)
    ('1,023 bytes', '1.5 KiB', '3.0 GiB')
    """
    units = ["bytes", "KiB", "MiB", "GiB"]
    while n >= 1024 and len(units) > 1:
        n /= 1024
        units.pop(0)
    return f"{n:,.0f} bytes" if units[0] == "bytes" else f"{n:,.1f} {units[0]}"


def seconds(t: float) -> str:
    """A time.

    >>> seconds(0.00025), seconds(0.25), seconds(2)
    ('0.25 ms', '250 ms', '2 s')
    """
    return f"{t:.3g} s" if t >= 1 else f"{t * 1e3:.3g} ms"


@dataclasses.dataclass(frozen=True, repr=False)
class Sheet:
    """Titled rows under columns; numbers are to be text already. Prints as a table, and shows as one in a notebook."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self):
        """As a `rich.table.Table`; columns of figures are set flush right."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.columns):
            figures = any(row[i][:1].isdigit() for row in self.rows)
            table.add_column(name, justify="right" if figures else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        return text(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self.table())


def text(*parts) -> str:
    """Tables and strings as plain text. As wide as the widest table needs, since a path cut short names nothing; strings wrap."""
    return "\n".join(line.rstrip() for line in _recorded(parts).export_text().splitlines()).strip("\n")


def html(*parts) -> str:
    return _recorded(parts).export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _recorded(parts: Sequence):
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    wide = Console(width=1000, force_jupyter=False)
    tables = [part for part in parts if not isinstance(part, str)]
    width = max([100, *(Measurement.get(wide, wide.options, table).maximum for table in tables)])
    console = Console(record=True, width=width, force_jupyter=False, file=io.StringIO())
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    return console
