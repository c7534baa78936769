"""Collectives of a compiled program: kind, dtypes, bytes, the devices that take part, and how often each runs.

Needs no devices and no jax.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from zerojax.hlo.program import Frame, Instruction, Program, Shape

_SPELLING = re.compile(r"(?:replica_groups|source_target_pairs)="
                       r"(?:mesh\[.*?\].*? \{.*?\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{\{.*?\}\})")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, which may move several arrays.

    Attributes:
      kind: one of `KINDS`.
      shapes: the whole arrays it is about: what a gather makes, what a reduction sums.
      groups: device numbers that take part together, one row a group.
      trips: how often it runs in one execution of the program.
      asynchronous: it has a start and a done, with room for compute between.
      op_name: the operation it came from, with the path of the module that asked for it.
      frames: the lines of Python it came from, innermost first, as far as the compiler kept them.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    trips: int
    asynchronous: bool
    computation: str
    op_name: str
    frames: tuple[Frame, ...] = ()

    @property
    def backward(self) -> bool:
        """It belongs to the backward pass (gathers for recomputation, and reductions)."""
        return "transpose(" in self.op_name or "rematted_computation" in self.op_name

    @property
    def differentiated(self) -> bool:
        """It belongs to the loss or its gradient."""
        return "jvp(" in self.op_name or "transpose(" in self.op_name

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
        return _axes(self.groups, tuple(mesh.items()))


@functools.lru_cache(maxsize=256)
def _axes(groups: tuple[tuple[int, ...], ...], mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...] | None:
    mine = frozenset(map(frozenset, groups))
    names = [name for name, _ in mesh]
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    return next((chosen for chosen in subsets if mine == _groups_over(mesh, chosen)), None)


@functools.lru_cache(maxsize=256)
def _groups_over(mesh: tuple[tuple[str, int], ...], chosen: tuple[str, ...]) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, _rows(dict(mesh), chosen)))


def _rows(mesh: Mapping[str, int], chosen: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ in their coordinates on `chosen` axes alone."""
    names = list(mesh)
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    order = [names.index(n) for n in names if n not in chosen] + [names.index(n) for n in names if n in chosen]
    return tuple(map(tuple, ids.transpose(order).reshape(-1, math.prod(mesh[n] for n in chosen)).tolist()))


@functools.lru_cache(maxsize=256)
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


def of(program: Program, wanted: Callable[[Frame], bool] = bool) -> tuple[Collective, ...]:
    """Returns the collectives of a program that run, in the order of its text.

    Args:
      wanted: the lines of Python to look for. A collective for which the compiler kept none of them takes the origin of the
        nearest instruction that has one.
    """
    return tuple(_collective(program, inst, name, wanted) for name, body in program.computations.items() if program.times[name]
                 for inst in body if kind(inst))


def kind(inst: Instruction) -> str | None:
    """Of a collective, or of the start of one; None for anything else."""
    op = inst.op.removesuffix("-start")
    return op if op in KINDS else None


def _collective(program: Program, inst: Instruction, computation: str, wanted: Callable[[Frame], bool]) -> Collective:
    which, asynchronous = inst.op.removesuffix("-start"), inst.op.endswith("-start")
    whole = inst.shapes
    if asynchronous:  # the start's shape lists operands as well; the done's lists what comes out
        whole = next((i.shapes for i in program.users[computation].get(inst.name, ()) if i.op == f"{which}-done"), whole)
    spelled = _SPELLING.search(inst.attributes)
    grouped = groups(spelled[0] if spelled else "", program.devices)
    if which == "reduce-scatter":  # shards come out; the sum was over arrays as large as the group
        axis = int(inst.attribute("dimensions").split(",")[0] or 0)
        whole = tuple(Shape(s.dtype, tuple(d * len(grouped[0]) if i == axis else d for i, d in enumerate(s.dims))) for s in whole)
    beside = asynchronous and '"is_sync":true' not in inst.attributes
    return Collective(inst.name, which, whole, grouped, program.times[computation], beside, computation,
                      *origin(program, inst, computation, wanted))


def origin(program: Program, inst: Instruction, computation: str, wanted: Callable[[Frame], bool]) -> tuple[str, tuple[Frame, ...]]:
    """Returns `Collective.op_name` and `Collective.frames`."""
    for near in _near(program, inst, computation):
        frames = tuple(program.frames(near))
        if any(map(wanted, frames)):
            return near.attribute("op_name"), frames
    return inst.attribute("op_name"), ()


def _near(program: Program, inst: Instruction, computation: str, most: int = 16) -> Iterator[Instruction]:
    """`inst`, the instructions whose results it takes, nearest first; then those that take its own."""
    names, users = program.names[computation], program.users[computation]
    for around in (lambda i: [names[o] for o in i.operands if o in names], lambda i: users.get(i.name, ())):
        queue, seen = [inst], 0
        while queue and seen < most:
            near, seen = queue.pop(0), seen + 1
            yield near
            queue += around(near)
