"""Optimised HLO text to instructions: shapes, operands, how often each runs, the user's line it came from.

Needs no devices and no jax. Reads what `compiled.as_text()` gives for the GPU compiler of jax 0.10 to 0.12, which is
scheduled: the order of a computation's instructions is the order they are started in.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
        "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TABLE = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: dtype in HLO's spelling ("bf16"), and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype.startswith("f8") else BITS.get(self.dtype, 32)
        return self.elements * bits // 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def shapes(text: str) -> tuple[Shape, ...]:
    """Every array named in a piece of HLO.

    >>> shapes("(bf16[4,2]{1,0}, f32[])")
    (Shape(dtype='bf16', dims=(4, 2)), Shape(dtype='f32', dims=()))
    """
    return tuple(Shape(t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in _SHAPE.findall(text))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type op(operands)attributes`. `arguments` is what stands in the brackets."""

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
        """How often a loop turns; one whose count XLA does not know counts once."""
        found = _TRIPS.search(self.attributes) if self.op == "while" else None
        return int(found[1]) if found else 1

    @property
    def turns_unknown(self) -> bool:
        """It is a loop whose count XLA does not know."""
        return self.op == "while" and not _TRIPS.search(self.attributes)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [b.strip().lstrip("%") for b in branches.split(",")]
        return tuple(names)

    def attribute(self, name: str) -> str:
        """Of metadata, or the text in an attribute's braces or quotes; empty if it has none."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|\{{([^}}]*)\}}|%?([\w.\-]+))', self.attributes)
        return next((g for g in found.groups() if g is not None), "") if found else ""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of Python that an instruction came from."""

    file: str
    line: int
    function: str

    def __str__(self):
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program.

    Attributes:
      computations: instructions by computation, in their order.
      entry: the computation that is the program.
      devices: how many run it together.
      tables: of source lines, as the text begins with.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    devices: int
    tables: Mapping[str, Mapping[int, str]]

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one execution of the program."""
        times = dict.fromkeys(self.computations, 0)

        def visit(name, factor):
            times[name] += factor
            for inst in self.computations[name]:
                for called in inst.called:
                    if called in times:
                        visit(called, factor * inst.trips)

        visit(self.entry, 1)
        return times

    @functools.cached_property
    def names(self) -> dict[str, dict[str, Instruction]]:
        """By computation: instructions by their names."""
        return {name: {inst.name: inst for inst in body} for name, body in self.computations.items()}

    @functools.cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """By computation: who takes each result, in the order of the schedule."""
        found = {name: {} for name in self.computations}
        for name, body in self.computations.items():
            for inst in body:
                for operand in inst.operands:
                    found[name].setdefault(operand, []).append(inst)
        return found

    @functools.cached_property
    def flops(self) -> dict:
        """What `cost` has found already, by computation."""
        return {}

    def frames(self, inst: Instruction) -> Iterator[Frame]:
        """Yields the lines of Python it came from, innermost first, as far as the compiler kept them."""
        number, frames = int(inst.attribute("stack_frame_id") or 0), self.tables.get("StackFrames", {})
        while number in frames:
            here = _fields(frames[number])
            place = _fields(self.tables["FileLocations"][here["file_location_id"]])
            yield Frame(self.tables["FileNames"][place["file_name_id"]], place["line"],
                        self.tables["FunctionNames"][place["function_name_id"]])
            number = here.get("parent_frame_id", 1) - 1  # printed one too high: 1 is none


def _fields(text: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (f.partition("=") for f in text.split())}


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, current, entry = {}, [], ""
    tables, table = {}, {}
    for line in text.splitlines():
        if line[:1].isspace():
            if match := _INSTRUCTION.match(line):
                root, *rest = match.groups()
                current.append(Instruction(bool(root), *rest))
        elif head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif row := _TABLE.match(line):
            table[int(row[1])] = row[2] if row[2] is not None else row[3]
        elif line.isalpha():
            table = tables.setdefault(line, {})
    count = re.search(r"num_partitions=(\d+)", text[:text.find("\n")])
    return Program({k: tuple(v) for k, v in computations.items()}, entry, int(count[1]) if count else 1, tables)
