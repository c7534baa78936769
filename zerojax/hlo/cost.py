"""The cost of one instruction: operations by dtype, and bytes of device memory read and written.

A fusion costs what it touches: a slice of an operand if it reads only a slice, and the update if it
writes a result in place. Needs no devices and no jax.
"""

import dataclasses
import math
import re
from collections import Counter

from zerojax.hlo.program import Instruction, Program, Shape

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"}
_SLICES = {"dynamic-slice", "gather", "slice"}
_VIEWS = {"bitcast", "convert", "copy", "reshape", "transpose"}  # a fusion computes what it slices
_MATMUL = ("__cublas$gemm", "__cublas$lt$matmul")
_CONVOLUTION = ("__cudnn$convForward", "__cudnn$convBackward", "__cudnn$convBias")
_ATTENTION = "__cudnn$fmha"
_COUNTED = (*_MATMUL, *_CONVOLUTION, _ATTENTION)
_PLAIN = {  # limited by their bytes
    "", "AllocateBuffer", "MoveToDevice", "MoveToHost", "annotate_device_placement", "Sharding",
    "cu_threefry2x32", "cu_threefry2x32_ffi", "__gpu$TopK", "__cub$DeviceRadixSort",
    "__cudnn$norm", "__cudnn$convReorderFilterAndBias"}


@dataclasses.dataclass(frozen=True)
class Product:
    """The operations of matrix products in one instruction; a multiply-add is two operations.

    Attributes:
      kind: "product" (also a convolution) or "attention" (a kernel that fuses two products).
      dtype: of the operands.
      again: whether rematerialization repeats it.
      flops: the operations.
    """

    kind: str
    dtype: str
    again: bool
    flops: int


def flops(program: Program, inst: Instruction, computation: str) -> Counter:
    """Returns the operations of an instruction's products.

    The keys are (dtype of the operands, whether rematerialization repeats the product).
    """
    found = Counter()
    for product in products(program, inst, computation):
        found[product.dtype, product.again] += product.flops
    return found


def products(program: Program, inst: Instruction, computation: str) -> tuple[Product, ...]:
    """Returns the products of an instruction and of those that it fuses.

    The bodies of loops and conditionals are not counted here: they are computations of their own.
    """
    if inst.op in FREE:
        return ()
    fused = tuple(p for called in inst.called for p in _all_products(program, called))
    count = _counted(program, inst, computation)
    if not count:
        return fused
    kind = "attention" if target(inst).startswith(_ATTENTION) else "product"
    again = "rematted_computation" in inst.attribute("op_name")
    return (Product(kind, _dtype(program, inst, computation), again, count), *fused)


def _all_products(program: Program, computation: str) -> tuple[Product, ...]:
    if computation not in program.products:
        body = program.computations.get(computation, ())
        program.products[computation] = tuple(p for inst in body
                                              for p in products(program, inst, computation))
    return program.products[computation]


def target(inst: Instruction) -> str:
    """Returns the name of the function that a custom call calls; empty for other instructions."""
    return inst.attribute("custom_call_target") if inst.op == "custom-call" else ""


def uncounted(inst: Instruction) -> str:
    """Returns the target of a custom call whose operations are not known, or an empty text."""
    name = target(inst)
    return "" if name in _PLAIN or name.startswith(_COUNTED) else name


def _counted(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the operations of an instruction's own product, without those that it fuses."""
    name = target(inst)
    if inst.op == "dot" or name.startswith(_MATMUL):
        return 2 * inst.shapes[0].elements * _contracted(program, inst, computation)
    if inst.op == "convolution" or name.startswith(_CONVOLUTION):
        return _convolution(program, inst, computation)
    return _attention(program, inst, computation) if name.startswith(_ATTENTION) else 0


def _operand(program: Program, inst: Instruction, computation: str, index: int) -> Shape:
    return program.names[computation][inst.operands[index]].shapes[0]


def _dtype(program: Program, inst: Instruction, computation: str) -> str:
    return _operand(program, inst, computation, 0).dtype


def _contracted(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the number of elements that each element of the product sums over."""
    text = (inst.attribute("lhs_contracting_dims")
            or ",".join(_config(inst, "lhs_contracting_dimensions")))
    dims = _operand(program, inst, computation, 0).dims
    return math.prod(dims[int(i)] for i in text.split(",") if i)


def _config(inst: Instruction, name: str) -> list[str]:
    """Returns the first list of texts or numbers with a name in the backend's configuration."""
    found = re.search(rf'"{name}":\s*\[([^\]]*)\]', inst.attributes)
    return re.findall(r"\w+", found[1]) if found else []


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


def _attention(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the operations of cuDNN's attention, which skips what a mask hides.

    The forward kernel has two products over queries and keys. The backward kernel has five: it
    repeats the first to avoid storing the weights.
    """
    query, value = (_operand(program, inst, computation, i).dims[-1] for i in (0, 2))
    *batch, queries, keys = (int(n) for n in _config(inst, "dimensions"))
    window = re.search(r'"sliding_window_length":\s*(\d+)', inst.attributes)
    seen = min(int(window[1]) if window else 0, keys) or keys
    operations = 1 if "CAUSAL" in inst.attributes and seen == keys else 2  # half of it is hidden
    width = 3 * query + 2 * value if "Backward" in target(inst) else query + value
    return operations * math.prod(batch) * queries * seen * width


def touched(program: Program, inst: Instruction, computation: str) -> int:
    """Returns the bytes of device memory that an instruction reads and writes."""
    known = program.touched.setdefault(computation, {})
    if inst.name not in known:
        known[inst.name] = _touched(program, inst, computation)
    return known[inst.name]


def _touched(program: Program, inst: Instruction, computation: str) -> int:
    if inst.op in FREE or inst.op.endswith("-done"):
        return 0
    names = program.names[computation]
    sizes = {i: names[o].bytes for i, o in enumerate(inst.operands) if o in names}
    is_fusion = inst.op in ("fusion", "fusion-start")
    called = inst.called[0] if is_fusion and inst.called else ""
    if body := program.computations.get(called, ()):
        reads = sum(_read(body, i, size) for i, size in sizes.items())
        return reads + _written(program, called, inst)
    if inst.op == "dynamic-update-slice":
        return 2 * list(sizes.values())[1]
    return 2 * inst.bytes if inst.op in _SLICES else sum(sizes.values()) + inst.bytes


def _read(body: tuple[Instruction, ...], index: int, size: int) -> int:
    """Returns the bytes that a fusion reads of an operand: the slices, if it reads only those."""
    mine = {i.name for i in body if i.op == "parameter" and i.arguments.strip() == str(index)}
    for inst in body:  # in the order of their operands
        if inst.op in _VIEWS and inst.operands[0] in mine and not inst.root:
            mine.add(inst.name)
    consumers = [i for i in body if mine & set(i.operands) and i.name not in mine]
    if not consumers or any(i.operands[0] not in mine for i in consumers):
        return size
    if all(i.op in _SLICES for i in consumers):
        whole = max(1, next(i.shapes[0].elements for i in body if i.name in mine))
        return min(size, sum(i.shapes[0].elements for i in consumers) * size // whole)
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
