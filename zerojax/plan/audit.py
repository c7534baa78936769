"""Which collectives of a compiled step ZeRO explains, and what is wrong with the others.

ZeRO's collectives gather parameters and reduce their gradients, over its own axes, in the policy's
dtypes, as often as the stage and the reads of the program allow. An array counts as a parameter's
if it has the dimensions of the parameter, or of one layer of a stack, as the compiler may merge or
split them; where the compiler put it does not matter. Collectives over other axes (tensor
parallelism) belong to the model.

Anything that is not understood is a finding: a line that cannot be read, an unknown dtype or
operation, a sharded parameter that nothing gathers.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp

from zerojax.hlo import collectives
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import BITS, Program, Shape
from zerojax.layout import placement
from zerojax.layout.rules import Leaf
from zerojax.plan import provenance
from zerojax.plan.demand import Demand, key
from zerojax.plan.finding import Finding
from zerojax.tables import size
from zerojax.trees import itemsize

SMALL = 2**16  # bytes of one array: norms, losses, batch statistics
STATISTICS = 0.01  # of ZeRO's bytes: all arrays of that kind together
TINY = 2**12  # bytes sent by all of them that are never worth a finding
NEGLIGIBLE = 0.001  # of ZeRO's bytes: what is not explained, all together
SLACK = 1.02
OPTIMIZER = "zerojax_optimizer"  # the scope in which a step calls the optimizer
_FLOATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
_STRUCTURE = {"", "call_exported", "while", "body", "cond", "closed_call", "eval_jaxpr",
              "checkpoint", "rematted_computation"}

Pair = tuple[Collective, Shape]


def of(demand: Demand, program: Program, found: Sequence[Collective]) -> list[Finding]:
    """Returns the findings about a compiled step, most bytes first.

    Args:
      found: the collectives of `program`.
    """
    findings = [*unreadable(program), *missing(demand, program, found),
                *communication(demand, found)]
    return sorted(findings, key=lambda f: -f.bytes)


def communication(demand: Demand, found: Sequence[Collective]) -> list[Finding]:
    """Returns a finding for each instruction that moves arrays which ZeRO does not explain."""
    ours = [pair for c in found if _over_batch(demand, c) for pair in _arrays(c)]
    reduced = _is_scattered(demand, ours)
    groups: dict[bool, list[Pair]] = {True: [], False: []}
    for pair in ours:
        groups[_by_optimizer(pair, reduced)].append(pair)
    odd = _judged(demand, groups[False])
    return [*_by_instruction(_weighed(demand, odd)), *_communicating_optimizer(groups[True])]


def _arrays(c: Collective) -> Iterator[Pair]:
    """Yields each array of an instruction, with a collective that has the name of its own operation
    if the compiler kept one for each: a/(b:c)."""
    common, _, rest = c.op_name.partition("/(")
    names = rest.removesuffix(")").split(":")
    if len(names) != len(c.shapes):
        yield from ((c, s) for s in c.shapes)
        return
    for name, s in zip(names, c.shapes, strict=True):
        yield dataclasses.replace(c, op_name=f"{common}/{name}") if rest else c, s


def _judged(demand: Demand, pairs: Sequence[Pair]) -> list[Finding]:
    statistics = [(c, s) for c, s in pairs if s.bytes <= SMALL]
    many = sum(c.wire(s) for c, s in statistics) > max(TINY, STATISTICS * demand.total)
    odd, left = [], []
    for c, s in pairs if many else [(c, s) for c, s in pairs if s.bytes > SMALL]:
        if why := _foreign(demand, c, s):
            odd.append(_finding(demand, c, s, why))
        else:
            left.append((c, s))
    more, left = _beyond_budget(demand, left, _class, demand.owners)
    # a parameter that moves in several shapes has one budget for all of them
    gathered = [pair for pair in left if pair[0].kind != "all-reduce"]
    return odd + more + _beyond_budget(demand, gathered, _family, demand.relatives)[0]


def _class(demand: Demand, c: Collective, s: Shape) -> tuple:
    """Returns the key of a budget: of all reductions over the same axes, or of one shape."""
    if c.kind == "all-reduce":
        return c.kind, c.axes(demand.policy.mesh.shape)
    return c.kind, key(s.dims)


def _family(demand: Demand, c: Collective, s: Shape) -> tuple:
    """Returns the key of a budget: of all parameters that are related to the owners of an array."""
    return c.kind, demand.family(s)


def _beyond_budget(demand: Demand, pairs: Sequence[Pair], group: Callable,
                   owners: Callable[[Shape], Mapping[Leaf, int]]) -> tuple[list, list[Pair]]:
    """Returns findings for the arrays that exceed the budgets of their groups, and the others."""
    groups = collections.defaultdict(list)
    for pair in pairs:
        groups[group(demand, *pair)].append(pair)
    found, left = [], []
    for mine in groups.values():
        c, s = mine[0]
        findings, rest = _too_often(demand, mine, _most(demand, c, owners(s)))
        found += findings
        left += rest
    return found, left


def _weighed(demand: Demand, odd: list[Finding]) -> list[Finding]:
    """Returns findings that are no fault if all of them together send next to nothing."""
    if sum(f.bytes for f in odd) > NEGLIGIBLE * demand.total:
        return odd
    return [dataclasses.replace(f, wrong=False) for f in odd]


def _over_batch(demand: Demand, c: Collective) -> bool:
    axes = c.axes(demand.policy.mesh.shape)
    return axes is None or bool(set(axes) & set(demand.policy.batch_axes))


def _foreign(demand: Demand, c: Collective, s: Shape) -> str:
    """Returns the reason why an array is none of ZeRO's; empty if it is one."""
    owners = demand.owners(s)
    axes = set(c.axes(demand.policy.mesh.shape) or ())
    if c.kind == "all-reduce":
        return _foreign_reduction(demand, c, s, owners, axes)
    if c.kind not in ("all-gather", "reduce-scatter"):
        return ("ZeRO moves nothing this way: an array changes its layout between devices, for "
                "example a batch that is reshaped into microbatches (train_step(accumulate=...) "
                "splits it without), or a table read at indices that other devices hold")
    if not owners:
        return ("no parameter has this shape: it is the batch, an activation or its gradient. "
                "Either the parameters are not read through zerojax, so that XLA moves "
                "activations in their place, or the model contracts over the batch")
    if axes != set(demand.policy.axes):
        return (f"a parameter is moved over {sorted(axes) or 'other groups'}, "
                f"not over {sorted(demand.policy.axes)}")
    if c.kind == "reduce-scatter" and not any(leaf.trained for leaf in owners):
        return f"{next(iter(owners)).path} is frozen, but a gradient of it is reduced"
    return _wide(demand, c, s, owners)


def _wide(demand: Demand, c: Collective, s: Shape, owners: Mapping[Leaf, int]) -> str:
    """Returns the reason why a parameter moves in too wide a dtype, or an empty string."""
    p, gathers = demand.policy, c.kind == "all-gather"
    dtypes = [placement.computed(p, leaf) if gathers else p.precision.reduced(leaf.path, leaf.dtype)
              for leaf in owners]
    wanted = min(dtypes, key=itemsize)
    if s.dtype in map(hlo_name, dtypes) or itemsize(wanted) * s.elements >= s.bytes:
        return ""
    if gathers:
        return (f"a parameter is gathered as {s.dtype}, not as {hlo_name(wanted)} (Precision "
                f"compute={wanted!r}): it is cast after the gather; train_step and zero.gathered "
                "cast before it")
    return (f"a parameter is reduced as {s.dtype}, not as {hlo_name(wanted)} (Precision reduce="
            f"{wanted!r}): the product that it comes from is of that dtype")


def _foreign_reduction(demand: Demand, c: Collective, s: Shape, owners: Mapping[Leaf, int],
                       axes: set[str]) -> str:
    whole = _whole(demand) + SMALL // 4  # scalars join the compiler's one reduction of them
    if axes == {demand.policy.replica_axis}:
        return "" if s.elements <= whole + _shards(demand) else (
            "only shards of gradients are summed over the copies")
    if s.elements <= whole and (not owners or demand.is_whole(s)):
        return ""
    if c.op_name and not c.differentiated and not provenance.by_the_pair(c.frames):
        return "it is outside of the loss and its gradient: something else in the step communicates"
    if owners and "scatter" in c.op_name and c.trips > demand.accumulate:
        return ("the gradient of a table that is looked up in a loop is summed in each iteration: "
                "look it up before the loop, or return zj.Loss, so that each device adds up its "
                "own part first")
    return _summed_whole(demand, c, s, owners)


def _summed_whole(demand: Demand, c: Collective, s: Shape, owners: Mapping[Leaf, int]) -> str:
    padded = [leaf for leaf, place in demand.sharded if place.kept and leaf.trained]
    if padded and not demand.per_device and c.backward:
        return (f"gradients are summed whole, for example that of {padded[0].path}, which is "
                "padded (Zero(uneven='pad')): with one loss the padding precedes the sum. Return "
                "zj.Loss, so that each device pads its own part's")
    computes = hlo_name(demand.policy.precision.compute_dtype)
    cast = (f"; or the model computes in {s.dtype} where Precision(compute=...) says {computes}, "
            "and the cast keeps XLA from reducing to shards: give its layers that dtype, or "
            "return zj.Loss"
            if c.backward and s.dtype != computes else "")
    if owners:
        return ("the gradient of a sharded parameter is summed whole on every device; a "
                "reduce-scatter would leave each its shard. The parameter is not read through "
                "zerojax, or it is looked up at indices that do not depend on the example "
                "(positions), or twice after one read (gradients='per_device' adds up first)"
                + cast)
    return ("activations are summed over the batch's devices, as in tensor parallelism, or "
            "gradients are summed whole where a reduce-scatter would leave each device its shard: "
            "parameters are not read through zerojax, several are stacked or concatenated and "
            "used as one, the model contracts over the batch, or a table is looked up at indices "
            "that do not depend on the example (positions: make them a parameter of their own "
            "shape, or return zj.Loss)" + cast)


def _whole(demand: Demand) -> int:
    """Returns the elements of the trained leaves left whole, whose gradients the compiler joins."""
    pairs = zip(demand.leaves, demand.places, strict=True)
    return sum(math.prod(demand.local(leaf, place)) for leaf, place in pairs
               if leaf.trained and not place.sharded)


def _shards(demand: Demand) -> float:
    """Returns the elements of one device's shards of the trained parameters, as often as their
    gradients are reduced per step."""
    reduced = [demand.reductions(leaf) * math.prod(demand.local(leaf, place))
               for leaf, place in demand.sharded]
    return sum(reduced) / demand.policy.shards


def hlo_name(dtype: str) -> str:
    """Returns HLO's name of a dtype.

    >>> hlo_name("bfloat16"), hlo_name("uint8"), hlo_name("float8_e4m3fn")
    ('bf16', 'u8', 'f8e4m3fn')
    """
    if dtype in _FLOATS:
        return _FLOATS[dtype]
    short = dtype.replace("float8_", "f8").replace("float4_", "f4")
    if not jnp.issubdtype(dtype, jnp.integer):
        return short
    return short.replace("uint", "u").replace("int", "s")


def _too_often(demand: Demand, pairs: list[Pair], most: float) -> tuple[list[Finding], list[Pair]]:
    """Returns findings for the arrays that exceed a budget of elements, and the other arrays.

    Named first are those that did not come from zerojax's gather and scatter, then those of long
    loops.
    """
    total = moved = sum(s.elements * c.trips for c, s in pairs)
    left = sorted(pairs, key=lambda p: (not provenance.by_the_pair(p[0].frames), p[0].trips))
    often = f"{moved / most:.3g} times as much as" if most else "though none may be moved"
    odd = []
    while left and total > SLACK * most:
        c, s = left.pop()
        total -= s.elements * c.trips
        odd.append(_finding(demand, c, s, (
            f"arrays of these parameters' shapes move {often} in stage {demand.policy.stage} with "
            f"{demand.accumulate} microbatch(es) and this program's reads: an activation of a "
            "parameter's shape, or a weight that is read in a loop which does not slice it")))
    return odd, left


def _most(demand: Demand, c: Collective, owners: Mapping[Leaf, int]) -> float:
    """Returns the number of elements that ZeRO moves of these parameters at most, in all iterations
    of all loops.

    Args:
      c: one of the collectives, all of one kind and, if they are all-reduces, over the same axes.
    """
    if c.kind == "all-reduce":
        # per device, once per step; with one loss, XLA reduces each use of a tied weight
        times = 1 if demand.per_device else 2 * demand.accumulate
        over_copies = c.axes(demand.policy.mesh.shape) == (demand.policy.replica_axis,)
        shards = _shards(demand) if over_copies else 0
        return times * (_whole(demand) + SMALL // 4) + shards
    if c.kind == "all-gather":
        return sum(demand.gathers(leaf) * n for leaf, n in owners.items())
    return sum(demand.reductions(leaf) * n for leaf, n in owners.items())


def missing(demand: Demand, program: Program, found: Sequence[Collective]) -> Iterator[Finding]:
    """Yields a finding for each group of sharded parameters of one shape that are read but not
    gathered whole.

    XLA then computes with shards, as in tensor parallelism. A loop whose count is not known hides
    how much is gathered, so that any gather will do.
    """
    pairs = [(c, s) for one in found if _gathers_parameters(demand, one)
             for c, s in _arrays(one) if not _in_optimizer(c)]
    unknown = any(i.trips_unknown for body in program.computations.values() for i in body)
    groups = collections.defaultdict(list)
    for leaf, place in demand.sharded:
        if demand.is_read(leaf) and leaf.group != "state":
            groups[key(demand.local(leaf, place))].append(leaf)
    for dims, leaves in groups.items():
        there = sum(s.elements * c.trips for c, s in pairs if set(leaves) & demand.owners(s).keys())
        share = sum(min(1.0, demand.gathers(leaf)) for leaf in leaves)
        if not there or (not unknown and there * SLACK < share * math.prod(dims)):
            yield _ungathered(demand, leaves, there / math.prod(dims), share)


def _gathers_parameters(demand: Demand, c: Collective) -> bool:
    axes = set(c.axes(demand.policy.mesh.shape) or ())
    return c.kind == "all-gather" and axes == set(demand.policy.axes)


def _ungathered(demand: Demand, leaves: Sequence[Leaf], there: float, share: float) -> Finding:
    others = f" and {len(leaves) - 1} more of its shape" * (len(leaves) > 1)
    whole = sum(math.prod(leaf.shape) * itemsize(leaf.dtype) for leaf in leaves)
    kept = whole / demand.policy.shards
    return Finding(
        f"{leaves[0].path}{others} are sharded and read, but {there:.3g} of {share:.3g} whole "
        "copies are gathered: XLA computes with shards, as in tensor parallelism. Read parameters "
        "through zerojax (train_step, zero.value_and_grad, zero.gathered).", kept, wrong=True)


def unreadable(program: Program) -> Iterator[Finding]:
    """Yields findings for the parts of a program that the proof does not understand."""
    if program.unread:
        yield Finding(f"{len(program.unread)} lines of the compiled program could not be read, "
                      f"the first: {program.unread[0][:120]!r}. They may communicate.", wrong=True)
    running = [i for name, body in program.computations.items() if program.times[name]
               for i in body]
    odd = {s.dtype: i.name for i in running for s in i.shapes if s.dtype not in BITS}
    for dtype, name in odd.items():
        yield Finding(f"{name} has the dtype {dtype}, whose size is not known: bytes are counted "
                      "as 64 bits per element.", instruction=name, wrong=True)
    for inst in collectives.unknown(program):
        yield Finding(f"{inst.name} ({inst.op}) names groups of devices, but is no known "
                      f"collective ({', '.join(collectives.KINDS)}), or its groups cannot be read: "
                      "it may communicate.", float(inst.bytes), inst.name, wrong=True)
    for inst in collectives.unreached(program):
        yield Finding(f"{inst.name} ({inst.op}) names groups of devices, but no instruction that "
                      "could be read calls its computation: it may communicate.",
                      float(inst.bytes), inst.name, wrong=True)


def _by_optimizer(pair: Pair, reduced: bool) -> bool:
    """Whether the optimizer moves an array. Unless all gradients are `reduced` to shards before, a
    sum in it may be that of a whole gradient."""
    c, s = pair
    if c.kind != "all-reduce":
        return _in_optimizer(c) and s.bytes > SMALL
    # the compiler joins its sums to scalars in one array, under the names of all: a/(b:c)
    return reduced and OPTIMIZER in re.split(r"[/(:)]", c.op_name) and s.bytes > SMALL


def _in_optimizer(c: Collective) -> bool:
    return OPTIMIZER in c.op_name.split("/")


def _is_scattered(demand: Demand, pairs: Sequence[Pair]) -> bool:
    """Whether the gradients of all sharded parameters are reduce-scattered, by their elements."""
    there = sum(s.elements * c.trips for c, s in pairs
                if c.kind == "reduce-scatter" and demand.owners(s))
    wanted = sum(min(1.0, demand.reductions(leaf)) * math.prod(demand.local(leaf, place))
                 for leaf, place in demand.sharded)
    return there * SLACK >= wanted


def _communicating_optimizer(pairs: Sequence[Pair]) -> Iterator[Finding]:
    if pairs:
        sent = sum(c.wire(s) for c, s in pairs)
        first, shape = max(pairs, key=lambda p: p[0].wire(p[1]))
        yield Finding(
            f"the optimizer communicates: {size(sent)} sent per step beside ZeRO's, the most by "
            f"{first.name} ({first.kind} of {shape}). An update that is not element by element "
            "(Muon, Shampoo, Adafactor's factors) reads rows or matrices that other devices hold.",
            sent, first.name, provenance.source(first.frames))


def _finding(demand: Demand, c: Collective, s: Shape, why: str) -> Finding:
    axes = c.axes(demand.policy.mesh.shape)
    over = f"over {', '.join(axes)}" if axes else f"in {len(c.groups)} groups of {c.size}"
    module = _module(c.op_name)
    what = f"{c.kind} of {s} {over}, {c.trips} x, {size(c.wire(s))} sent per step"
    what += f"; {module}" if module else ""
    return Finding(f"{c.name} ({what}): {why}.", c.wire(s), c.name,
                   provenance.source(c.frames), True)


def _module(op_name: str) -> str:
    """Returns the path of the module that asked for an operation; of the first, if several were
    combined.

    >>> _module("jit(step)/jvp(M)/while/body/blocks/up/dot_general")
    'blocks/up/dot_general'
    """
    first = op_name.replace("/(", "/").removesuffix(")").split(":")[0]
    return "/".join(part for part in first.split("/") if "(" not in part and part not in _STRUCTURE)


def _by_instruction(findings: list[Finding]) -> list[Finding]:
    """Returns one finding per instruction: the largest, with the bytes of all its arrays."""
    groups = collections.defaultdict(list)
    for f in findings:
        groups[f.instruction].append(f)
    return [_joined(group) for group in groups.values()]


def _joined(group: list[Finding]) -> Finding:
    first = max(group, key=lambda f: f.bytes)
    more = f" With {len(group) - 1} more arrays." if len(group) > 1 else ""
    return dataclasses.replace(first, what=first.what + more, bytes=sum(f.bytes for f in group))
