"""The cost of one instruction: operations by dtype, and bytes of device memory read and written.

A fusion costs what it touches: a slice of an operand if it reads only a slice, and the update if it
writes a result in place. Needs no devices and no jax.
"""

import math
from collections import Counter

from zerojax.hlo.program import Instruction, Program, Shape

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"}
_SLICES = {"dynamic-slice", "gather", "slice"}


def flops(program: Program, inst: Instruction, computation: str) -> Counter:
    """Returns the operations of an instruction's products.

    The keys are (dtype of the operands, whether rematerialization repeats the product). A
    multiply-add is two operations. The bodies of loops and conditionals are not counted here: they
    are computations of their own.
    """
    if inst.op in FREE:
        return Counter()
    found = Counter()
    again = "rematted_computation" in inst.attribute("op_name")
    if inst.op == "dot" or "__cublas$" in inst.attributes:
        contracted = _contracted(program, inst, computation)
        found[_dtype(program, inst, computation), again] = 2 * inst.shapes[0].elements * contracted
    elif inst.op == "convolution" or "__cudnn$conv" in inst.attributes:
        found[_dtype(program, inst, computation), again] = _convolution(program, inst, computation)
    for called in inst.called:
        found += _all_flops(program, called)
    return found


def _all_flops(program: Program, computation: str) -> Counter:
    if computation not in program.flops:
        body = program.computations.get(computation, ())
        counts = (flops(program, inst, computation) for inst in body)
        program.flops[computation] = sum(counts, Counter())
    return program.flops[computation]


def _operand(program: Program, inst: Instruction, computation: str, index: int) -> Shape:
    return program.names[computation][inst.operands[index]].shapes[0]


def _dtype(program: Program, inst: Instruction, computation: str) -> str:
    return _operand(program, inst, computation, 0).dtype


def _contracted(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the number of elements that each element of the product sums over."""
    text = (inst.attribute("lhs_contracting_dims")
            or _config(inst, "lhs_contracting_dimensions"))
    dims = _operand(program, inst, computation, 0).dims
    return math.prod(dims[int(i)] for i in text.split(",") if i)


def _config(inst: Instruction, name: str) -> str:
    _, _, rest = inst.attributes.partition(f'"{name}":[')
    return rest.partition("]")[0].replace('"', "")


def _convolution(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the operations of a convolution or of one of its gradients.

    Each element of the forward result sums over a kernel without its output features.
    """
    first, second = (_operand(program, inst, computation, i) for i in (0, 1))
    forward, kernel = inst.shapes[0], second
    if "convBackwardFilter" in inst.attributes:
        forward, kernel = second, inst.shapes[0]
    elif "convBackwardInput" in inst.attributes:
        forward = first
    labels = inst.attributes.partition("dim_labels=")[2]  # such as b01f_o01i->b01f
    kernel_labels = labels.partition("->")[0].partition("_")[2]
    features = kernel.dims[kernel_labels.index("o")]
    return 2 * forward.elements * kernel.elements // features


def touched(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the bytes of device memory that an instruction reads and writes."""
    if inst.op in FREE or inst.op.endswith("-done"):
        return 0
    names = program.names[computation]
    sizes = {i: names[o].bytes for i, o in enumerate(inst.operands) if o in names}
    called = inst.called[0] if inst.op == "fusion" and inst.called else ""
    if body := program.computations.get(called, ()):
        reads = sum(_read(body, i, size) for i, size in sizes.items())
        return reads + _written(program, called, inst)
    if inst.op == "dynamic-update-slice":
        return 2 * list(sizes.values())[1]
    return 2 * inst.bytes if inst.op in _SLICES else sum(sizes.values()) + inst.bytes


def _read(body: tuple[Instruction, ...], index: int, size: int) -> int:
    """Returns the bytes that a fusion reads of an operand: the slices, if it reads only those."""
    mine = next((i.name for i in body
                 if i.op == "parameter" and i.arguments.strip() == str(index)), None)
    consumers = [i for i in body if mine in i.operands]
    if not consumers or any(i.operands[0] != mine for i in consumers):
        return size
    if all(i.op in _SLICES for i in consumers):
        return min(size, sum(i.bytes for i in consumers))
    return 0 if all(i.op == "dynamic-update-slice" for i in consumers) else size


def _written(program: Program, called: str, inst: Instruction) -> int:
    """Returns the bytes that a fusion writes: the update of each result that it writes in place."""
    names, body = program.names[called], program.computations[called]
    root = next((i for i in body if i.root), body[-1])
    results = [names[o] for o in root.operands] if root.op == "tuple" else [root]
    return sum(_update(names, result) for result in results) or inst.bytes


def _update(names: dict[str, Instruction], inst: Instruction) -> int:
    while inst.op in ("bitcast", "copy", "convert") and inst.operands[0] in names:
        inst = names[inst.operands[0]]
    return names[inst.operands[1]].bytes if inst.op == "dynamic-update-slice" else inst.bytes
