"""The arrays that are alive at the peak of a compiled program's memory, by what they hold.

Follows buffers through the schedule: views, tuples, loops (which update what they carry in place)
and fusions that write into an operand. The result of a gather is "gathered". Operands and results
of a reduction are "gradients". A stack into which one of these is written becomes the same kind.
Arguments and results of the program do not count: they have their own memory. Needs no devices and
no jax.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from zerojax.hlo.program import Instruction, Program, Shape

GATHERED, GRADIENTS, OTHER = "gathered", "gradients", "other"
_VIEWS = {"bitcast", "opt-barrier", "get-tuple-element", "after-all"}
_REDUCTIONS = {"reduce-scatter", "all-reduce", "reduce-scatter-start", "all-reduce-start"}
_GATHERS = {"all-gather", "all-gather-start"}
_CASTS = {"fusion", "convert", "copy", "bitcast", "get-tuple-element"}
_ENTERED = {"while", "call", "conditional"}
_NOTHING = collections.Counter()


@dataclasses.dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
      kind: what it holds; OTHER until an instruction shows that it is one of the other kinds.
    """

    bytes: int
    kind: str = OTHER

    def holds(self, kind: str) -> None:
        if self.kind == OTHER:
            self.kind = kind


Value = Buffer | tuple  # of values


def peak(program: Program) -> dict[str, int]:
    """Returns the bytes alive by kind, at the moment when their total is largest."""
    entry = _Body(program, program.entry, None)
    result = entry.root or entry.body[-1]
    for buffer in _flat(entry.values[result.name]):
        buffer.bytes = 0  # the result has its own memory
    return dict(entry.peak())


def _flat(value: Value) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    else:
        for v in value:
            yield from _flat(v)


class _Body:
    """One computation: the buffers of each value, made in the order of the schedule.

    Args:
      parameter: the value that its caller passes; None for the program's arguments.
    """

    def __init__(self, program: Program, name: str, parameter: Value | None):
        self.program = program
        self.name = name
        self.body = program.computations[name]
        self.root = next((i for i in self.body if i.root), None)
        self.parameter = parameter
        self.values: dict[str, Value] = {}
        self.inner: dict[str, list[_Body]] = {}  # by the instruction that enters them
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
        """Returns new memory, or that of an operand if the instruction updates it in place."""
        shapes = inst.shapes
        if inst.op.endswith("-start"):  # its type also has the operands; that of its done, results
            consumers = self.program.consumers[self.name].get(inst.name, ())
            shapes = next((i.shapes for i in consumers if i.op.endswith("-done")), shapes)
        into = _updated(self.program, inst)
        into += [None] * (len(shapes) - len(into))
        made = [_buffer(s, None if i is None else operands[i])
                for s, i in zip(shapes, into, strict=False)]
        return made[0] if len(made) == 1 else tuple(made)

    def _mark(self, inst: Instruction, operands: list[Value], value: Value) -> None:
        """Gives the buffers of an instruction their kinds."""
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
        """Gives a stack the kind of the arrays in it, and a copy that of its original."""
        others = [b for b in operands if b is not made]
        copies = shape.dims if made in operands else (1,)  # any dimension can be the stacked one
        same = [b.kind for b in others
                if b.kind != OTHER and shape.bytes in [b.bytes * n for n in copies]]
        if same and (made in operands or len(others) == 1):
            made.holds(same[0])

    def _gradient(self, name: str, elements: int, depth: int = 8) -> None:
        """Marks an operand of a reduction, and the arrays of which it is a cast or a copy."""
        source = self.program.names[self.name].get(name)
        if source is None or not depth:
            return
        if not isinstance(self.values[name], tuple):
            _hold(self.values[name], GRADIENTS)
        if source.op in _CASTS:
            for o in source.operands:
                if any(s.elements == elements for s in self._shapes(o)):
                    self._gradient(o, elements, depth - 1)

    def _shapes(self, name: str) -> tuple[Shape, ...]:
        inst = self.program.names[self.name].get(name)
        return inst.shapes if inst else ()

    def _enter(self, inst: Instruction, operands: list[Value]) -> Value:
        """Follows the computations that an instruction calls, and returns its result."""
        names = [inst.attribute("body")] if inst.op == "while" else list(inst.called)
        outer = operands[0] if len(operands) == 1 else tuple(operands)
        bodies = []
        for name in (n for n in names if n in self.program.computations):
            carry = _without_bytes(outer)
            bodies.append(_Body(self.program, name, carry))
            for here, there in zip(list(_flat(outer)), _flat(carry), strict=True):
                if there.kind != OTHER:
                    here.holds(there.kind)
        self.inner[inst.name] = bodies
        return outer if inst.op == "while" else _new(inst, None)

    def peak(self) -> collections.Counter:
        """Returns the bytes alive by kind at the peak of this computation."""
        last = self._last_uses()
        ends = collections.defaultdict(list)  # buffers by the index of their last use
        now, most = collections.Counter(), collections.Counter()
        seen = set()
        for i, inst in enumerate(self.body):
            for b in set(_flat(self.values[inst.name])) - seen:
                seen.add(b)
                now[b.kind] += b.bytes
                ends[last.get(b, i)].append(b)
            inner = self._inner_peak(inst)
            if now.total() + inner.total() > most.total():
                most = now + inner
            for b in ends.pop(i, ()):
                now[b.kind] -= b.bytes
        return most

    def _inner_peak(self, inst: Instruction) -> collections.Counter:
        """Returns the largest peak of the computations that an instruction enters."""
        peaks = (body.peak() for body in self.inner.get(inst.name, ()))
        return max(peaks, key=collections.Counter.total, default=_NOTHING)

    def _last_uses(self) -> dict[Buffer, int]:
        """Returns the index of the last instruction that uses each buffer."""
        last = {}
        for i, inst in enumerate(self.body):
            for b in self._used(inst):
                last[b] = i
        if self.root:
            last.update(dict.fromkeys(_flat(self.values[self.root.name]), len(self.body)))
        return last

    def _used(self, inst: Instruction) -> Iterator[Buffer]:
        if inst.op not in ("tuple", *_VIEWS):  # these name a value, and use none of it
            for o in inst.operands:
                yield from _flat(self.values.get(o, ()))


def _new(inst: Instruction, size: int | None) -> Value:
    """Returns new buffers for the results of an instruction, of their own size or a given one."""
    buffers = tuple(Buffer(s.bytes if size is None else size) for s in inst.shapes)
    return buffers[0] if len(buffers) == 1 and not inst.type.startswith("(") else buffers


def _buffer(shape: Shape, target: Value | None) -> Buffer:
    """Returns the buffer that a result is written into: `target`, or a new one."""
    return target if isinstance(target, Buffer) else Buffer(shape.bytes)


def _without_bytes(value: Value) -> Value:
    """Returns `value` without bytes, for a loop: its carry is counted outside the loop."""
    if isinstance(value, Buffer):
        return Buffer(0, value.kind)
    return tuple(_without_bytes(v) for v in value)


def _hold(value: Value, kind: str) -> None:
    for buffer in _flat(value):
        buffer.holds(kind)


def _view(inst: Instruction, operands: list[Value]) -> Value:
    if inst.op != "get-tuple-element":
        return operands[0] if operands else ()
    index, source = int(inst.attribute("index")), operands[0]
    return source[index] if isinstance(source, tuple) and index < len(source) else source


def _updated(program: Program, inst: Instruction) -> list[int | None]:
    """Returns, for each result, the index of the operand that it is written into, or None."""
    if inst.op == "dynamic-update-slice":
        return [0]
    called = inst.called[0] if inst.op == "fusion" and inst.called else ""
    if called not in program.computations:
        return [None]
    names, body = program.names[called], program.computations[called]
    root = next((i for i in body if i.root), body[-1])
    results = [names[o] for o in root.operands] if root.op == "tuple" else [root]
    return [_destination(names, result) for result in results]


def _destination(names: dict[str, Instruction], inst: Instruction) -> int | None:
    """Returns the number of the parameter that a fusion's result is written into, or None."""
    inst = _through(names, inst, ("bitcast", "copy"))
    if inst.op != "dynamic-update-slice":
        return None
    target = _through(names, names[inst.operands[0]], ("bitcast", "copy"))
    return int(target.arguments) if target.op == "parameter" else None


def _through(names: dict[str, Instruction], inst: Instruction, ops: Sequence[str]) -> Instruction:
    """Returns the instruction before a chain of some ops."""
    while inst.op in ops and inst.operands and inst.operands[0] in names:
        inst = names[inst.operands[0]]
    return inst
