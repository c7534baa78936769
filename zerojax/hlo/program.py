"""Instructions of optimized HLO text: shapes, operands, execution counts, and lines of Python.

Reads what `compiled.as_text()` returns for the GPU compiler of jax 0.10 to 0.12. This text is
scheduled: the instructions of a computation are in the order in which they start. Needs no devices
and no jax.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS = {"pred": 8, "token": 0, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
        "f4e2m1fn": 4,
        **{f"f8{kind}": 8 for kind in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2",
                                       "e5m2fnuz", "e8m0fnu")},
        **{f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}}
UNKNOWN_BITS = 64  # for a dtype that is not in BITS, which a plan reports

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")  # a bound: f32[<=8]
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)="
                     r"%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dtype of an array in HLO's spelling ("bf16"), and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * BITS.get(self.dtype, UNKNOWN_BITS) // 8)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def shapes(text: str) -> tuple[Shape, ...]:
    """Returns the shape of every array in a piece of HLO text.

    >>> shapes("(bf16[4,2]{1,0}, f32[])")
    (Shape(dtype='bf16', dims=(4, 2)), Shape(dtype='f32', dims=()))
    """
    return tuple(Shape(dtype, _dims(dims)) for dtype, dims in _SHAPE.findall(text))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d.lstrip("<=")) for d in text.split(",") if d)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type op(arguments)attributes`.

    Attributes:
      root: whether its result is that of the computation.
    """

    root: bool
    name: str
    type: str
    op: str
    arguments: str
    attributes: str

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return shapes(self.type)

    @functools.cached_property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.shapes)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAME.findall(self.arguments))

    @property
    def trips(self) -> int:
        """The number of iterations of a loop; 1 if XLA does not know it, and for other ops."""
        found = _TRIPS.search(self.attributes) if self.op == "while" else None
        return int(found[1]) if found else 1

    @property
    def trips_unknown(self) -> bool:
        """Whether this is a loop whose number of iterations XLA does not know."""
        return self.op == "while" and not _TRIPS.search(self.attributes)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it calls."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return tuple(names)

    def attribute(self, name: str) -> str:
        """Returns the text of an attribute or a field of the metadata, without braces or quotes.

        It is empty if the instruction does not have the attribute.
        """
        value = r'"([^"]*)"|\{([^}]*)\}|%?([\w.\-]+)'
        found = re.search(rf"\b{name}=(?:{value})", self.attributes)
        return next((group for group in found.groups() if group is not None), "") if found else ""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of Python from which an instruction came."""

    file: str
    line: int
    function: str

    def __str__(self):
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation, in their order.
      entry: the name of the computation that the program starts with.
      devices: how many devices run the program together.
      tables: the tables of source lines at the start of the text.
      unread: the lines that this parser does not know, such as a new form of instruction.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    devices: int
    tables: Mapping[str, Mapping[int, str]]
    unread: tuple[str, ...] = ()

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one execution of the program."""
        times = dict.fromkeys(self.computations, 0)

        def visit(name: str, factor: int) -> None:
            times[name] += factor
            for inst in self.computations[name]:
                for called in inst.called:
                    if called in times:
                        visit(called, factor * inst.trips)

        visit(self.entry, 1)
        return times

    @functools.cached_property
    def names(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation by their names."""
        return {name: {inst.name: inst for inst in body}
                for name, body in self.computations.items()}

    @functools.cached_property
    def consumers(self) -> dict[str, dict[str, list[Instruction]]]:
        """The instructions that take each result, by computation, in the order of the schedule."""
        found = {name: {} for name in self.computations}
        for name, body in self.computations.items():
            for inst in body:
                for operand in inst.operands:
                    found[name].setdefault(operand, []).append(inst)
        return found

    @functools.cached_property
    def products(self) -> dict:
        """The products that `cost` has counted so far, by computation."""
        return {}

    @functools.cached_property
    def touched(self) -> dict:
        """The bytes that `cost` has counted so far, by computation and instruction."""
        return {}

    def frames(self, inst: Instruction) -> Iterator[Frame]:
        """Yields the lines of Python of an instruction, innermost first, if any were kept."""
        frames = self.tables.get("StackFrames", {})
        number = int(inst.attribute("stack_frame_id") or 0)
        while number in frames:
            here = _fields(frames[number])
            place = _fields(self.tables["FileLocations"][here["file_location_id"]])
            yield Frame(self.tables["FileNames"][place["file_name_id"]], place["line"],
                        self.tables["FunctionNames"][place["function_name_id"]])
            number = here.get("parent_frame_id", 1) - 1  # printed one too high: 1 means none


def _fields(text: str) -> dict[str, int]:
    """Returns the fields of a table's row, such as "file_name_id=1 line=7"."""
    pairs = (field.partition("=") for field in text.split())
    return {key: int(value) for key, _, value in pairs}


def parse(text: str) -> Program:
    """Returns the program of `compiled.as_text()`."""
    computations, tables = {}, {}
    current, table, unread = [], {}, []
    entry = ""
    for line in text.splitlines():
        if line[:1].isspace():
            if match := _INSTRUCTION.match(line):
                root, *rest = match.groups()
                current.append(Instruction(bool(root), *rest))
            elif line.strip():
                unread.append(line.strip())
        elif head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif row := _ROW.match(line):
            table[int(row[1])] = row[2] if row[2] is not None else row[3]
        elif line.isalpha():
            table = tables.setdefault(line, {})
        elif line.strip() not in ("", "}") and not line.startswith("HloModule "):
            unread.append(line)
    bodies = {name: tuple(body) for name, body in computations.items()}
    return Program(bodies, entry, _devices(text), tables, tuple(unread))


def _devices(text: str) -> int:
    header = text[:text.find("\n")]
    count = re.search(r"num_partitions=(\d+)", header)
    return int(count[1]) if count else 1
