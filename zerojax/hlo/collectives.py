"""Collectives of a compiled program: kind, dtypes, bytes, groups of devices, execution counts.

Needs no devices and no jax.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zerojax.hlo.program import Frame, Instruction, Program, Shape

Groups = tuple[tuple[int, ...], ...]  # device numbers, one row per group

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")
_COMMUNICATES = re.compile(r"\b(?:replica_groups|source_target_pairs|channel_id)=")
_GROUPS = re.compile(r"\b(?:replica_groups|source_target_pairs)=(?!\{\})")  # {}: all devices
_SPELLING = re.compile(r"(?:replica_groups|source_target_pairs)="
                       r"(?:mesh\[.*?\].*? \{.*?\}"
                       r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
                       r"|\{\{.*?\}\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[(.*?)\]"
                    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, which can move several arrays.

    Attributes:
      kind: one of `KINDS`.
      shapes: the shapes of the whole arrays: results of a gather, operands of a reduction.
      groups: the numbers of the devices that take part together, one row per group.
      trips: how often it runs in one execution of the program.
      asynchronous: whether it has a start and a done, so that other instructions can run between.
      op_name: the operation that it came from, with the path of its module.
      frames: the lines of Python that it came from, innermost first, if the compiler kept them.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    groups: Groups
    trips: int
    asynchronous: bool
    computation: str
    op_name: str
    frames: tuple[Frame, ...] = ()

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass, where gathers are for rematerialization."""
        return "transpose(" in self.op_name or "rematted_computation" in self.op_name

    @property
    def differentiated(self) -> bool:
        """Whether it belongs to the loss or its gradient."""
        return "jvp(" in self.op_name or "transpose(" in self.op_name

    @property
    def size(self) -> int:
        """The number of devices in a group."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def bytes(self) -> int:
        """The bytes of the whole arrays, for one trip."""
        return sum(s.bytes for s in self.shapes)

    def wire(self, shape: Shape) -> float:
        """Returns the bytes that each device sends for one of its arrays, with ring algorithms.

        They are those of all trips in one execution of the program.
        """
        share = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0,
                  "collective-broadcast": 1.0}.get(self.kind, share)
        return factor * shape.bytes * self.trips

    @property
    def wire_bytes(self) -> float:
        """The bytes that each device sends for all arrays in one execution of the program."""
        return sum(map(self.wire, self.shapes))

    def between(self, per_host: int) -> float:
        """Returns the bytes that each device sends to other hosts, of `wire_bytes`, on average.

        A ring leaves a host once, whatever the number of its devices in a group. All-to-alls send
        as much to each device, and permutations what their pairs say.

        Args:
          per_host: the number of devices in a host; they are numbered host by host.
        """
        hosts = [[device // per_host for device in group] for group in self.groups] or [[0]]
        if self.kind == "collective-permute":
            return self.wire_bytes * sum(a != b for a, b in hosts) / len(hosts)
        here = hosts[0].count(hosts[0][0])
        if here == len(hosts[0]):
            return 0.0
        if "all-to-all" in self.kind:
            return self.wire_bytes * (self.size - here) / (self.size - 1)
        return self.wire_bytes / here

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
        """Returns the mesh axes it runs over; None if no set of axes has its groups.

        Args:
          mesh: names and sizes of the axes; devices are numbered in row-major order.
        """
        return _axes(self.groups, tuple(mesh.items()))


@functools.lru_cache(maxsize=256)
def _axes(groups: Groups, mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...] | None:
    mine = frozenset(map(frozenset, groups))
    names = [name for name, _ in mesh]
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n)
                                            for n in range(len(names) + 1))
    return next((chosen for chosen in subsets if mine == _groups_over(mesh, chosen)), None)


@functools.lru_cache(maxsize=256)
def _groups_over(mesh: tuple[tuple[str, int], ...],
                 chosen: tuple[str, ...]) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, _rows(dict(mesh), chosen)))


def _rows(mesh: Mapping[str, int], chosen: Sequence[str]) -> Groups:
    """Returns the groups of devices whose coordinates differ only on the chosen axes."""
    names, sizes = list(mesh), list(mesh.values())
    rest = [names.index(name) for name in names if name not in chosen]
    inner = [names.index(name) for name in names if name in chosen]
    members = math.prod(mesh[name] for name in chosen)
    return _groups(_numbered(sizes).transpose(rest + inner).reshape(-1, members))


@functools.lru_cache(maxsize=256)
def groups(text: str, devices: int) -> Groups:
    """Returns the groups in `replica_groups` or `source_target_pairs`, in any spelling of HLO.

    >>> groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    if iota := _IOTA.search(text):
        sizes, dims, order = iota.groups()
        return _groups(_numbered(_numbers(dims), order).reshape(_numbers(sizes)))
    if named := _NAMED.search(text):
        return _over_names(*named.groups())
    if listed := _LISTED.search(text):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return (tuple(range(devices)),)


def _over_names(mesh: str, dims: str | None, order: str | None, axes: str) -> Groups:
    """Returns groups over named axes or parts of them.

    `'a':(2)4` is the part of size 4 after a part of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _numbered(_numbers(dims) if dims else [math.prod(sizes.values())], order)
    chosen = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in
              re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    split = []  # each axis as three: before the part, the part, after it
    for name, size in sizes.items():
        before, part = chosen.get(name, (size, 1))
        split += [before, part, size // before // part]
    inner = list(range(1, len(split), 3))
    rest = [i for i in range(len(split)) if i not in inner]
    members = math.prod(part for _, part in chosen.values())
    return _groups(ids.reshape(split).transpose(rest + inner).reshape(-1, members))


def _numbered(dims: Sequence[int], order: str | None = None) -> np.ndarray:
    """Returns the device numbers as an array of these dimensions, transposed to an order."""
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _groups(rows: np.ndarray) -> Groups:
    return tuple(map(tuple, rows.tolist()))


def of(program: Program,
       wanted: Callable[[Sequence[Frame]], Any] = bool) -> tuple[Collective, ...]:
    """Returns the collectives of a program that run, in the order of its text.

    Args:
      wanted: whether the lines of Python that an instruction came from are of use. A collective
        without such lines takes those of the nearest instruction that has them.
    """
    return tuple(_collective(program, inst, computation, wanted)
                 for computation, inst in _running(program) if kind(inst))


def unknown(program: Program) -> tuple[Instruction, ...]:
    """Returns the instructions that run and name groups of devices, but have no known kind, or
    spell the groups in an unknown way.

    The starts and dones of asynchronous collectives have a known kind.
    """
    known = {f"{name}{part}" for name in KINDS for part in ("", "-start", "-done")}
    return tuple(inst for _, inst in _running(program)
                 if _COMMUNICATES.search(inst.attributes)
                 and (inst.op not in known or _misspelled(inst)))


def unreached(program: Program) -> tuple[Instruction, ...]:
    """Returns the instructions that name groups of devices in computations that nothing calls, as
    far as the program could be read."""
    return tuple(inst for computation, body in program.computations.items()
                 if not program.times[computation]
                 for inst in body if _COMMUNICATES.search(inst.attributes))


def _misspelled(inst: Instruction) -> bool:
    named = _GROUPS.search(inst.attributes)
    return bool(named) and not _SPELLING.search(inst.attributes)


def _running(program: Program) -> Iterator[tuple[str, Instruction]]:
    """Yields the instructions that run, each after the name of its computation."""
    for computation, body in program.computations.items():
        if program.times[computation]:
            yield from ((computation, inst) for inst in body)


def kind(inst: Instruction) -> str | None:
    """Returns the kind of a collective or of the start of one; None for other instructions."""
    op = inst.op.removesuffix("-start")
    return op if op in KINDS else None


def _collective(program: Program, inst: Instruction, computation: str,
                wanted: Callable[[Sequence[Frame]], Any]) -> Collective:
    which = inst.op.removesuffix("-start")
    spelled = _SPELLING.search(inst.attributes)
    grouped = groups(spelled[0] if spelled else "", program.devices)
    shapes = _whole(program, inst, computation, len(grouped[0]))
    asynchronous = inst.op.endswith("-start") and '"is_sync":true' not in inst.attributes
    return Collective(inst.name, which, shapes, grouped, program.times[computation], asynchronous,
                      computation, *origin(program, inst, computation, wanted))


def _whole(program: Program, inst: Instruction, computation: str,
           members: int) -> tuple[Shape, ...]:
    """Returns `Collective.shapes` for groups of some number of members."""
    which, shapes = inst.op.removesuffix("-start"), inst.shapes
    if inst.op.endswith("-start"):  # its type also has the operands; that of its done has results
        consumers = program.consumers[computation].get(inst.name, ())
        shapes = next((i.shapes for i in consumers if i.op == f"{which}-done"), shapes)
    if which == "reduce-scatter":  # results are shards of the operands
        axis = int(inst.attribute("dimensions").split(",")[0] or 0)
        shapes = tuple(_times(s, axis, members) for s in shapes)
    return shapes


def _times(shape: Shape, axis: int, factor: int) -> Shape:
    """Returns a shape with one dimension multiplied."""
    dims = tuple(d * factor if i == axis else d for i, d in enumerate(shape.dims))
    return Shape(shape.dtype, dims)


def origin(program: Program, inst: Instruction, computation: str,
           wanted: Callable[[Sequence[Frame]], Any]) -> tuple[str, tuple[Frame, ...]]:
    """Returns `Collective.op_name` and `Collective.frames`.

    The name is that of the nearest instruction with any frame, because the compiler kept its
    origin, and the frames are those of the nearest instruction that has a wanted one.
    """
    name = ""
    for near in _near(program, inst, computation):
        frames = tuple(program.frames(near))
        name = name or (near.attribute("op_name") if frames else "")
        if wanted(frames):
            return name, frames
    return name or inst.attribute("op_name"), ()


def _near(program: Program, inst: Instruction, computation: str,
          most: int = 16) -> Iterator[Instruction]:
    """Yields `inst` and the instructions before it whose results it takes, nearest first.

    Then yields `inst` and the instructions after it that take its result. Yields at most `most` in
    each direction.
    """
    names, consumers = program.names[computation], program.consumers[computation]

    def before(near: Instruction) -> Sequence[Instruction]:
        return [names[operand] for operand in near.operands if operand in names]

    def after(near: Instruction) -> Sequence[Instruction]:
        return consumers.get(near.name, ())

    for neighbors in (before, after):
        queue, seen = [inst], 0
        while queue and seen < most:
            near, seen = queue.pop(0), seen + 1
            yield near
            queue += neighbors(near)
