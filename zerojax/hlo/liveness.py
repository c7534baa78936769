"""Which arrays of a compiled program are alive at its fullest moment, and what they are for.

Follows buffers through the schedule: views, tuples, loops (whose carries are updated in place) and fusions that write into an
operand. A gather's result is "gathered"; what a reduction takes and gives is "gradients"; a stack that either is written into
becomes the same. Arguments and results of the program are not counted: they have their own places. Needs no devices, no jax.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from zerojax.hlo.program import Instruction, Program, Shape

GATHERED, GRADIENTS, OTHER = "gathered", "gradients", "other"
_VIEWS = {"bitcast", "opt-barrier", "get-tuple-element", "after-all"}
_REDUCTIONS = {"reduce-scatter", "all-reduce", "reduce-scatter-start", "all-reduce-start"}
_GATHERS = {"all-gather", "all-gather-start"}
NOTHING = collections.Counter()
_ENTERED = {"while", "call", "conditional"}


@dataclasses.dataclass(eq=False)
class Buffer:
    """One piece of memory; `kind` is what it turns out to hold."""

    bytes: int
    kind: str = OTHER

    def holds(self, kind: str) -> None:
        if self.kind == OTHER:
            self.kind = kind


Value = Buffer | tuple  # of values


def peak(program: Program) -> dict[str, int]:
    """Bytes alive by kind, at the moment at which they are most in all."""
    entry = _Body(program, program.entry, None)
    for buffer in _flat(entry.values[entry.body[-1].name] if not entry.root else entry.values[entry.root.name]):
        buffer.bytes = 0  # a result's own place
    return dict(entry.fullest())


def _flat(value: Value) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    else:
        for v in value:
            yield from _flat(v)


class _Body:
    """One computation: the buffers of each value, made in the order of the schedule."""

    def __init__(self, program: Program, name: str, parameter: Value | None):
        self.program, self.name, self.body = program, name, program.computations[name]
        self.root = next((i for i in self.body if i.root), None)
        self.parameter, self.values, self.inner = parameter, {}, {}
        for inst in self.body:
            self.values[inst.name] = self._value(inst)

    def _value(self, inst: Instruction) -> Value:
        operands = [self.values[o] for o in inst.operands if o in self.values]
        if inst.op == "parameter":
            return _new(inst, 0) if self.parameter is None else self.parameter
        if inst.op == "tuple":
            return tuple(operands)
        if inst.op in _VIEWS or inst.op.endswith("-done"):
            return _view(inst, operands)
        if inst.op in _ENTERED:
            return self._enter(inst, operands)
        value = self._written(inst, operands)
        self._mark(inst, operands, value)
        return value

    def _written(self, inst: Instruction, operands: list[Value]) -> Value:
        """New memory, or an operand's where the instruction updates it in place."""
        into = _updated(self.program, inst)
        shapes = inst.shapes
        if inst.op.endswith("-start"):  # its type lists the operands first; the done's, what comes out
            users = self.program.users[self.name].get(inst.name, ())
            shapes = next((i.shapes for i in users if i.op.endswith("-done")), shapes)
        made = [Buffer(s.bytes) if i is None or not isinstance(operands[i], Buffer) else operands[i]
                for s, i in zip(shapes, into + [None] * (len(shapes) - len(into)), strict=False)]
        return made[0] if len(made) == 1 else tuple(made)

    def _mark(self, inst: Instruction, operands: list[Value], value: Value) -> None:
        if inst.op in _GATHERS:
            _hold(value, GATHERED)
        elif inst.op in _REDUCTIONS:
            _hold(value, GRADIENTS)
            for o in inst.operands:
                for shape in self._shapes(o):
                    self._gradient(o, shape.elements)
        elif inst.op in ("copy", "dynamic-update-slice", "fusion"):
            for shape, buffer in zip(inst.shapes, _flat(value), strict=False):
                self._inherit(shape, buffer, list(_flat(tuple(operands))))

    def _inherit(self, shape: Shape, made: Buffer, operands: list[Buffer]) -> None:
        """A stack of arrays of a kind is of that kind, and so is one in another layout."""
        others = [b for b in operands if b is not made]
        turns = shape.dims if made in operands else (1,)  # the stacked dimension may be any
        same = [b.kind for b in others if b.kind != OTHER and shape.bytes in [b.bytes * n for n in turns]]
        if same and (made in operands or len(others) == 1):
            made.holds(same[0])

    def _gradient(self, name: str, elements: int, depth: int = 8) -> None:
        """What a reduction takes is a gradient, and so is what that is a cast or another layout of."""
        source = self.program.names[self.name].get(name)
        if source is None or not depth:
            return
        if not isinstance(self.values[name], tuple):
            _hold(self.values[name], GRADIENTS)
        if source.op in ("fusion", "convert", "copy", "bitcast", "get-tuple-element"):
            for o in source.operands:
                if any(s.elements == elements for s in self._shapes(o)):
                    self._gradient(o, elements, depth - 1)

    def _shapes(self, name: str) -> tuple[Shape, ...]:
        inst = self.program.names[self.name].get(name)
        return inst.shapes if inst else ()

    def _enter(self, inst: Instruction, operands: list[Value]) -> Value:
        names = [inst.attribute("body")] if inst.op == "while" else list(inst.called)
        outer = operands[0] if len(operands) == 1 else tuple(operands)
        bodies = []
        for name in (n for n in names if n in self.program.computations):
            carry = _places(outer)
            bodies.append(_Body(self.program, name, carry))
            ours = list(_flat(outer))
            for here, there in zip(ours, _flat(carry), strict=True):
                if there.kind != OTHER:
                    here.holds(there.kind)
        self.inner[inst.name] = bodies
        return outer if inst.op == "while" else _new(inst, None)

    def fullest(self) -> collections.Counter:
        last = {}
        for i, inst in enumerate(self.body):
            for b in self._used(inst):
                last[b] = i
        if self.root:
            last.update(dict.fromkeys(_flat(self.values[self.root.name]), len(self.body)))
        seen, now, most, ends = set(), collections.Counter(), collections.Counter(), collections.defaultdict(list)
        for i, inst in enumerate(self.body):
            for b in set(_flat(self.values[inst.name])) - seen:
                seen.add(b)
                now[b.kind] += b.bytes
                ends[last.get(b, i)].append(b)
            inner = max((body.fullest() for body in self.inner.get(inst.name, ())), key=lambda c: c.total(), default=NOTHING)
            if now.total() + inner.total() > most.total():
                most = now + inner
            for b in ends.pop(i, ()):
                now[b.kind] -= b.bytes
        return most

    def _used(self, inst: Instruction) -> Iterator[Buffer]:
        if inst.op not in ("tuple", *_VIEWS):  # these name a value, and use none of it
            for o in inst.operands:
                yield from _flat(self.values.get(o, ()))


def _new(inst: Instruction, size: int | None) -> Value:
    buffers = tuple(Buffer(s.bytes if size is None else size) for s in inst.shapes)
    return buffers[0] if len(buffers) == 1 and not inst.type.startswith("(") else buffers


def _places(value: Value) -> Value:
    """As `value`, of no bytes of its own: what a loop carries is counted around it."""
    return Buffer(0, value.kind) if isinstance(value, Buffer) else tuple(_places(v) for v in value)


def _hold(value: Value, kind: str) -> None:
    for buffer in _flat(value):
        buffer.holds(kind)


def _view(inst: Instruction, operands: list[Value]) -> Value:
    if inst.op != "get-tuple-element":
        return operands[0] if operands else ()
    index, source = int(inst.attribute("index")), operands[0]
    return source[index] if isinstance(source, tuple) and index < len(source) else source


def _updated(program: Program, inst: Instruction) -> list[int | None]:
    """For each result: the operand that it is written into, or None for memory of its own."""
    if inst.op == "dynamic-update-slice":
        return [0]
    if inst.op != "fusion" or not inst.called or inst.called[0] not in program.computations:
        return [None]
    names, body = program.names[inst.called[0]], program.computations[inst.called[0]]
    root = next((i for i in body if i.root), body[-1])
    results = [names[o] for o in root.operands] if root.op == "tuple" else [root]
    return [_destination(names, r) for r in results]


def _destination(names: dict[str, Instruction], inst: Instruction) -> int | None:
    inst = _through(names, inst, ("bitcast", "copy"))
    if inst.op != "dynamic-update-slice":
        return None
    target = _through(names, names[inst.operands[0]], ("bitcast", "copy"))
    return int(target.arguments) if target.op == "parameter" else None


def _through(names: dict[str, Instruction], inst: Instruction, ops: Sequence[str]) -> Instruction:
    while inst.op in ops and inst.operands and inst.operands[0] in names:
        inst = names[inst.operands[0]]
    return inst
