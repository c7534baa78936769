"""Optimised HLO text to collectives: kind, dtypes, bytes, the devices that take part, and how often each runs.

Needs no devices and no jax. Reads what `compiled.as_text()` gives for the GPU compiler of jax 0.10 to 0.12.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
        "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, which may move several arrays.

    Attributes:
      kind: one of `KINDS`.
      shapes: the whole arrays it is about: what a gather makes, what a reduction sums.
      groups: device numbers that take part together, one row a group.
      trips: how often it runs in one execution of the program.
      asynchronous: it has a start and a done, with room for compute between.
      op_name, source: the user's operation it came from, as far as the compiler kept it.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    trips: int
    asynchronous: bool
    computation: str
    op_name: str
    source: str

    @property
    def size(self) -> int:
        """Devices in a group."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def bytes(self) -> int:
        """Of the whole arrays, once."""
        return sum(s.bytes for s in self.shapes)

    def wire(self, shape: Shape) -> float:
        """Bytes each device sends for one of its arrays in one execution of the program, by the ring algorithms."""
        share = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * shape.bytes * self.trips

    @property
    def wire_bytes(self) -> float:
        return sum(map(self.wire, self.shapes))

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
        """The mesh axes it runs over; None if its groups are no set of axes of this mesh.

        Args:
          mesh: axis names and sizes, devices numbered in row-major order.
        """
        mine = {frozenset(g) for g in self.groups}
        for n in range(len(mesh) + 1):
            for chosen in itertools.combinations(mesh, n):
                if mine == _groups_over(tuple(mesh.items()), chosen):
                    return chosen
        return None


@functools.lru_cache(maxsize=256)
def _groups_over(mesh: tuple[tuple[str, int], ...], chosen: tuple[str, ...]) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, _rows(dict(mesh), chosen)))


def _rows(mesh: Mapping[str, int], chosen: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ in their coordinates on `chosen` axes alone."""
    names = list(mesh)
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    order = [names.index(n) for n in names if n not in chosen] + [names.index(n) for n in names if n in chosen]
    return tuple(map(tuple, ids.transpose(order).reshape(-1, math.prod(mesh[n] for n in chosen)).tolist()))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the entry's name."""
    computations, current, entry = {}, [], ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _trips(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs; a loop whose count XLA does not know counts once."""
    times = dict.fromkeys(computations, 0)

    def visit(name, factor):
        times[name] += factor
        for inst in computations[name]:
            loops = _TRIPS.search(inst.rest) if inst.op == "while" else None
            names = _CALLED.findall(inst.rest)
            for branches in _BRANCHES.findall(inst.rest):
                names += [b.strip().lstrip("%") for b in branches.split(",")]
            for called in names:
                if called in computations:
                    visit(called, factor * (int(loops[1]) if loops else 1))

    visit(entry, 1)
    return times


def shapes(text: str) -> tuple[Shape, ...]:
    """Every array named in a piece of HLO.

    >>> shapes("(bf16[4,2]{1,0}, f32[])")
    (Shape(dtype='bf16', dims=(4, 2)), Shape(dtype='f32', dims=()))
    """
    return tuple(Shape(t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in _SHAPE.findall(text))


def groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """`replica_groups` or `source_target_pairs` of an instruction, in any of HLO's spellings.

    >>> groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = lambda s: [int(x) for x in s.split(",")]
        ids = np.arange(math.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
        ids = ids.transpose(numbers(iota[3])) if iota[3] else ids
        return tuple(map(tuple, ids.reshape(numbers(iota[1])).tolist()))
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text):
        return _named(*named.groups())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", text):
        return tuple(tuple(int(x) for x in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed[1]))
    return (tuple(range(devices)),)


def _named(mesh: str, dims: str | None, order: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups over named axes, or parts of axes: `'a':(2)4` is the part of size 4 behind one of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values())).reshape([int(d) for d in dims.split(",")] if dims else -1)
    ids = ids.transpose([int(d) for d in order.split(",")]) if order else ids
    chosen = {name: (int(pre or 1), int(size or sizes[name])) for name, pre, size in
              re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    split = [d for name, n in sizes.items() for pre, size in [chosen.get(name, (n, 1))] for d in (pre, size, n // pre // size)]
    middle = [3 * i + 1 for i in range(len(sizes))]
    rest = [i for i in range(len(split)) if i not in middle]
    rows = ids.reshape(split).transpose(rest + middle).reshape(-1, math.prod(size for _, size in chosen.values()))
    return tuple(map(tuple, rows.tolist()))


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text, those that never run left out."""
    computations, entry = _parse(text)
    times = _trips(computations, entry)
    count = re.search(r"num_partitions=(\d+)", text)
    devices = int(count[1]) if count else 1
    return tuple(_collective(inst, body, name, times[name], devices) for name, body in computations.items() if times[name]
                 for inst in body if _kind(inst))


def _kind(inst: _Instruction) -> str | None:
    op = inst.op.removesuffix("-start")
    return op if op in KINDS else None


def _collective(inst: _Instruction, body: Sequence[_Instruction], computation: str, trips: int, devices: int) -> Collective:
    kind = inst.op.removesuffix("-start")
    asynchronous = inst.op.endswith("-start")
    result = inst.shape
    if asynchronous:  # the start's shape lists operands as well; the done's lists what comes out
        done = [i for i in body if i.op == f"{kind}-done" and re.match(rf".*%{re.escape(inst.name)}\)", i.rest)]
        result = done[0].shape if done else inst.shape
    grouped = groups(inst.rest, devices)
    whole = shapes(result)
    if kind == "reduce-scatter":  # shards come out; the sum was over arrays as large as the group
        whole = tuple(Shape(s.dtype, _unsharded(s.dims, inst.rest, len(grouped[0]))) for s in whole)
    meta = lambda key: (re.search(rf'{key}="?([^"\s}}]+)', inst.rest) or ("", ""))[1]
    line = meta("source_line")
    return Collective(inst.name, kind, whole, grouped, trips, asynchronous, computation, meta("op_name"),
                      f"{meta('source_file')}:{line}" if line else "")


def _unsharded(dims: tuple[int, ...], rest: str, size: int) -> tuple[int, ...]:
    axis = re.search(r"dimensions=\{(\d+)", rest)
    i = int(axis[1]) if axis else 0
    return tuple(d * size if j == i else d for j, d in enumerate(dims))
