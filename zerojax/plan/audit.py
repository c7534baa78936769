"""Which collectives of a compiled step ZeRO explains, and why the others are there.

ZeRO's are gathers and reductions of parameters, over its own axes, in the policy's dtypes, as often as the stage says. An array
counts as a parameter's if its dimensions are those of the parameter or of one layer of a stack of them, as the compiler may
merge or split them. Axes that ZeRO does not use (tensor parallelism) are the model's affair.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Shape
from zerojax.layout import placement
from zerojax.layout.rules import Leaf
from zerojax.plan import provenance
from zerojax.plan.demand import Demand, itemsize, key
from zerojax.plan.finding import Finding
from zerojax.tables import size

HLO_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64", "int8": "s8", "uint8": "u8", "int16": "s16",
             "uint16": "u16", "int32": "s32", "uint32": "u32", "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2"}
SMALL = 2**16  # bytes of an array: norms, losses, batch statistics
TINY = 2**12  # bytes sent in a step that are never worth a word
SLACK = 1.02
_STRUCTURE = {"", "call_exported", "while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation"}


def collectives_of(demand: Demand, found: Sequence[Collective]) -> list[Finding]:
    """A `Finding` for each array that is moved and that ZeRO does not explain, most bytes first."""
    moved = [(c, s) for c in found for s in c.shapes if not _small(demand, c, s) and _over_ours(demand, c)]
    odd, known = [], collections.defaultdict(list)
    for c, s in moved:
        why = _foreign(demand, c, s)
        if why:
            odd.append(_finding(demand, c, s, why))
        else:
            known[c.kind, key(s.dims)].append((c, s))
    odd += [f for pairs in known.values() for f in _too_often(demand, pairs)]
    return sorted(_by_instruction(odd), key=lambda f: -f.bytes)


def _small(demand: Demand, c: Collective, s: Shape) -> bool:
    return s.bytes <= SMALL and c.wire(s) <= max(TINY, 0.01 * demand.total)


def _over_ours(demand: Demand, c: Collective) -> bool:
    axes = c.axes(demand.policy.mesh.shape)
    return axes is None or bool(set(axes) & set(demand.policy.batch_axes))


def _foreign(demand: Demand, c: Collective, s: Shape) -> str:
    """Why an array is none of ZeRO's; empty if it is one."""
    p, axes = demand.policy, set(c.axes(demand.policy.mesh.shape) or ())
    if c.kind in ("all-to-all", "collective-permute"):
        return ("ZeRO moves nothing this way: an array changes its layout between devices, as when a batch is reshaped into "
                "microbatches (train_step(accumulate=...) splits it without) or a table is read by what other devices hold")
    sharded = demand.owners(s)
    if c.kind == "all-reduce":
        return _foreign_reduction(demand, c, s, sharded, axes)
    if not sharded:
        return ("no parameter has this shape: it is of the batch, an activation or its gradient. Either the parameters are not "
                "read through zerojax, so that XLA moves activations in their place, or the model contracts over the batch")
    if axes != set(p.axes):
        return f"a parameter is moved over {sorted(axes) or 'other groups'}, not over {sorted(p.axes)}"
    if c.kind != "all-gather" and not any(leaf.trained for leaf in sharded):
        return f"{next(iter(sharded)).path} is frozen, and a gradient of it is reduced"
    dtypes = lambda leaf: placement.computed(p, leaf) if c.kind == "all-gather" else p.precision.reduced(leaf.path, leaf.dtype)
    wanted = min(map(dtypes, sharded), key=itemsize)
    if s.dtype not in {_hlo_name(dtypes(leaf)) for leaf in sharded} and itemsize(wanted) * s.elements < s.bytes:
        verb, what = ("gathered", "compute") if c.kind == "all-gather" else ("reduced", "reduce")
        return (f"a parameter is {verb} as {s.dtype}, not as {_hlo_name(wanted)} (Precision {what}={wanted!r}): "
                + ("it is cast behind the gather; train_step and zero.gathered cast before it" if c.kind == "all-gather" else
                   "the product that it comes from is of that dtype"))
    return ""


def _foreign_reduction(demand: Demand, c: Collective, s: Shape, sharded: Mapping[Leaf, int], axes: set[str]) -> str:
    if axes == {demand.policy.replica_axis}:
        return "" if s.elements <= _whole(demand) + _shards(demand) else "only shards of gradients are summed over the copies"
    if s.elements <= _whole(demand):
        return ""
    if c.op_name and not c.differentiated and not provenance.by_the_pair(c.frames):
        return "it is outside of the loss and its gradient: the optimizer (or what else the step does) communicates"
    computes = _hlo_name(demand.policy.precision.compute_dtype)
    cast = (f"; or the model computes in {s.dtype} where Precision(compute=...) says {computes}, and the cast keeps XLA from "
            "reducing to shards: give its layers that dtype, or return zj.Loss" if c.backward and s.dtype != computes else "")
    if sharded and "scatter" in c.op_name and c.trips > demand.accumulate:
        return ("the gradient of a table that is looked up in a loop is summed in each turn: look it up before the loop, or return "
                "zj.Loss, so that each device adds up its own part's first")
    padded = [leaf for leaf, place in demand.sharded if place.kept and leaf.trained]
    if padded and not demand.per_device and c.backward:
        return (f"gradients are summed whole, as that of {padded[0].path} is, which is padded (Zero(uneven='pad')): with one loss "
                "the padding stands before the sum. Return zj.Loss, so that each device pads its own part's")
    if sharded:
        return ("the gradient of a sharded parameter is summed whole on every device; a reduce-scatter would leave each its shard. "
                "It is not read through zerojax, or looked up at places that do not depend on the example (positions), or twice "
                "behind one read (gradients='per_device' adds up first)" + cast)
    return ("activations are summed over the batch's devices, as in tensor parallelism, or gradients are summed whole where a "
            "reduce-scatter would leave each device its shard: parameters are not read through zerojax, the model contracts over "
            "the batch, or a table is looked up at places that do not depend on the example (positions: make them a parameter of "
            "their own shape, or return zj.Loss)" + cast)


def _whole(demand: Demand) -> int:
    """Elements of the trained leaves left whole: the compiler joins their gradients' reductions into one."""
    return sum(math.prod(demand.local(leaf, place)) for leaf, place in zip(demand.leaves, demand.places, strict=True)
               if leaf.trained and not place.sharded)


def _shards(demand: Demand) -> float:
    """Elements of one device's shards of what is trained."""
    return sum(math.prod(demand.local(leaf, place)) for leaf, place in demand.sharded if leaf.trained) / demand.policy.shards


def _hlo_name(dtype: str) -> str:
    return HLO_NAMES.get(dtype, dtype)


def _too_often(demand: Demand, pairs: list[tuple[Collective, Shape]]) -> list[Finding]:
    """Findings for arrays of one shape that are moved more often than the stage says.

    Foreign ones and those of long loops are named first. Of gathers, what did not come by `gather` is held to one pass alone: in
    stage 3 it would else hide where weights are gathered once.
    """
    most = _most(demand, *pairs[0])
    odd = _excess(demand, pairs, most)
    if pairs[0][0].kind == "all-gather" and not odd:
        for backward in (False, True):
            allowed = most / 2 if demand.policy.stage == 3 else most * (not backward)
            ours = {c.name for c, _ in pairs if provenance.by_the_pair(c.frames)}
            mine = [(c, s) for c, s in pairs if c.backward == backward]
            odd += [f for f in _excess(demand, mine, allowed) if f.instruction not in ours]
    return odd


def _excess(demand: Demand, pairs: list[tuple[Collective, Shape]], most: float) -> list[Finding]:
    total = moved = sum(s.elements * c.trips for c, s in pairs)
    odd, left = [], sorted(pairs, key=lambda p: (not provenance.by_the_pair(p[0].frames), p[0].trips))
    often = f"{moved / most:.3g} times as much as" if most else "though nothing of it is"
    while left and total > SLACK * most:
        c, s = left.pop()
        total -= s.elements * c.trips
        why = (f"of arrays of this shape, {often} in stage {demand.policy.stage} with {demand.accumulate} microbatch(es): an "
               "activation of a parameter's shape, or a weight that is read twice, in a loop which does not slice it, or in a "
               "block rematerialised within another")
        odd.append(_finding(demand, c, s, why))
    return odd


def _most(demand: Demand, c: Collective, shape: Shape) -> float:
    """Elements, in all turns of all loops, that ZeRO moves in arrays of this shape at most."""
    p = demand.policy
    if c.kind == "all-reduce":
        again = 1 if demand.per_device else 2  # with one loss, XLA reduces each use of a tied weight
        return demand.accumulate * (again * _whole(demand) + (_shards(demand) if p.replicas > 1 else 0))
    if c.kind == "all-gather":
        return demand.wire.gathered * sum(demand.owners(shape).values())
    return demand.wire.reduced * sum(size for leaf, size in demand.owners(shape).items() if leaf.trained)


def _finding(demand: Demand, c: Collective, s: Shape, why: str) -> Finding:
    axes = c.axes(demand.policy.mesh.shape)
    over = f"over {', '.join(axes)}" if axes else f"in {len(c.groups)} groups of {c.size}"
    path = c.op_name.replace("/(", "/").removesuffix(")")  # of a combined instruction: a/(b:c)
    module = "/".join(part for part in path.split("/") if "(" not in part and part not in _STRUCTURE)[-80:]
    what = f"{c.kind} of {s} {over}, {c.trips} x, {size(c.wire(s))} sent a step" + (f"; {module}" if module else "")
    return Finding(f"{c.name} ({what}): {why}.", c.wire(s), c.name, provenance.source(c.frames), True)


def _by_instruction(findings: list[Finding]) -> list[Finding]:
    """The largest of each instruction, with the bytes of all its arrays."""
    groups = collections.defaultdict(list)
    for f in findings:
        groups[f.instruction].append(f)
    first = [(max(g, key=lambda f: f.bytes), g) for g in groups.values()]
    return [dataclasses.replace(f, bytes=sum(x.bytes for x in g),
                                what=f.what + (f" With {len(g) - 1} more arrays." if len(g) > 1 else "")) for f, g in first]
