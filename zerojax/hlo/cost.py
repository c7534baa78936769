"""What one instruction of a compiled program costs: operations by dtype, bytes of device memory it reads and writes.

Needs no devices and no jax. Fusions are charged for what they touch: a slice of an operand where they read a slice, and the
update of a result that they write in place.
"""

import math
from collections import Counter

from zerojax.hlo.program import Instruction, Program, Shape

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota",
        "partition-id", "replica-id", "opt-barrier"}
_SLICES = {"dynamic-slice", "gather", "slice"}


def flops(program: Program, inst: Instruction, computation: str) -> Counter:
    """Operations of the products in an instruction, by (dtype of the operands, whether a rematerialised block does them again).

    A multiply-add is two. Loops and conditionals are not entered: theirs are their computations'.
    """
    if inst.op in FREE:
        return Counter()
    found = Counter()
    again = "rematted_computation" in inst.attribute("op_name")
    if inst.op == "dot" or "__cublas$" in inst.attributes:
        found[_dtype(program, inst, computation), again] = 2 * inst.shapes[0].elements * _contracted(program, inst, computation)
    elif inst.op == "convolution" or "__cudnn$conv" in inst.attributes:
        found[_dtype(program, inst, computation), again] = _convolution(program, inst, computation)
    for called in inst.called:
        found += _all_flops(program, called)
    return found


def _all_flops(program: Program, computation: str) -> Counter:
    if computation not in program.flops:
        body = program.computations.get(computation, ())
        program.flops[computation] = sum((flops(program, inst, computation) for inst in body), Counter())
    return program.flops[computation]


def _operand(program: Program, inst: Instruction, computation: str, index: int) -> Shape:
    return program.names[computation][inst.operands[index]].shapes[0]


def _dtype(program: Program, inst: Instruction, computation: str) -> str:
    return _operand(program, inst, computation, 0).dtype


def _contracted(program: Program, inst: Instruction, computation: str) -> int:
    text = inst.attribute("lhs_contracting_dims") or _config(inst, "lhs_contracting_dimensions")
    dims = _operand(program, inst, computation, 0).dims
    return math.prod(dims[int(i)] for i in text.split(",") if i)


def _config(inst: Instruction, name: str) -> str:
    _, _, rest = inst.attributes.partition(f'"{name}":[')
    return rest.partition("]")[0].replace('"', "")


def _convolution(program: Program, inst: Instruction, computation: str) -> int:
    """Every element of what the forward convolution makes takes a kernel without its output features."""
    first, second = (_operand(program, inst, computation, i) for i in (0, 1))
    result = inst.shapes[0]
    made, kernel = result, second
    if "convBackwardFilter" in inst.attributes:
        made, kernel = second, result
    elif "convBackwardInput" in inst.attributes:
        made = first
    labels = inst.attributes.partition("dim_labels=")[2].partition("->")[0].partition("_")[2]
    return 2 * made.elements * kernel.elements // kernel.dims[labels.index("o")]


def touched(program: Program, inst: Instruction, computation: str) -> int:
    """Bytes of device memory that an instruction reads and writes."""
    if inst.op in FREE or inst.op.endswith("-done"):
        return 0
    names = program.names[computation]
    body = program.computations.get(inst.called[0], ()) if inst.op == "fusion" and inst.called else ()
    if not body:
        reads = [names[o].bytes for o in inst.operands if o in names]
        if inst.op == "dynamic-update-slice":
            return 2 * reads[1]
        return 2 * inst.bytes if inst.op in _SLICES else sum(reads) + inst.bytes
    reads = [_read(body, i, names[o].bytes) for i, o in enumerate(inst.operands) if o in names]
    return sum(reads) + _written(program, inst.called[0], inst)


def _read(body: tuple[Instruction, ...], index: int, size: int) -> int:
    """Bytes that a fusion reads of its operand `index`: the slices, if it takes nothing else of it."""
    mine = next((i.name for i in body if i.op == "parameter" and i.arguments.strip() == str(index)), None)
    users = [i for i in body if mine in i.operands]
    if users and all(i.op in _SLICES and i.operands[0] == mine for i in users):
        return min(size, sum(i.bytes for i in users))
    if users and all(i.op == "dynamic-update-slice" and i.operands[0] == mine for i in users):
        return 0
    return size


def _written(program: Program, called: str, inst: Instruction) -> int:
    """Bytes that a fusion writes: the updates, where its results are updated in place."""
    names, body = program.names[called], program.computations[called]
    root = next((i for i in body if i.root), body[-1])
    roots = [names[o] for o in root.operands] if root.op == "tuple" else [root]
    return sum(_update(names, r) for r in roots) or inst.bytes


def _update(names: dict[str, Instruction], inst: Instruction) -> int:
    while inst.op in ("bitcast", "copy", "convert") and inst.operands[0] in names:
        inst = names[inst.operands[0]]
    return names[inst.operands[1]].bytes if inst.op == "dynamic-update-slice" else inst.bytes
