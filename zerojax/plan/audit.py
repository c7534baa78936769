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
from collections.abc import Iterator, Sequence

from zerojax.hlo import collectives
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import BITS, Instruction, Program, Shape
from zerojax.layout.rules import Leaf
from zerojax.plan import budget, finding, foreign, provenance
from zerojax.plan.budget import SMALL, Odd, Pair
from zerojax.plan.demand import Demand, key
from zerojax.plan.finding import Finding
from zerojax.tables import quantity, size
from zerojax.trees import itemsize

STATISTICS = 0.01  # of ZeRO's bytes: all small arrays together that are not ZeRO's
TINY = 2**12  # bytes sent by all of them that are never worth a finding
NEGLIGIBLE = 0.001  # of ZeRO's bytes: what is not explained, all together
OPTIMIZER = "zerojax_optimizer"  # the scope in which a step calls the optimizer
MATRICES = "whole_matrices"  # the scope in which `Zero.whole_matrices` moves them


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
    odd, left = [], []
    for c, s in pairs:
        if why := foreign.reason(demand, c, s):
            odd.append(Odd(c, s, why))
        else:
            left.append((c, s))
    more, left = budget.exceeding(demand, left, budget.by_shape, demand.owners)
    # a parameter that moves in several shapes has one budget for all of them
    gathered = [pair for pair in left if pair[0].kind != "all-reduce"]
    again, _ = budget.exceeding(demand, gathered, budget.by_family, demand.relatives)
    return [finding.moved(demand, *one) for one in _noticeable(demand, [*odd, *more, *again])]


def _noticeable(demand: Demand, odd: Sequence[Odd]) -> list[Odd]:
    """Returns the arrays, without the small ones if these send little together."""
    small = sum(c.wire(s) for c, s, _ in odd if s.bytes <= SMALL)
    many = small > max(TINY, STATISTICS * demand.total)
    return [one for one in odd if many or one.shape.bytes > SMALL]


def _weighed(demand: Demand, odd: list[Finding]) -> list[Finding]:
    """Returns findings that are no fault if all of them together send next to nothing."""
    if sum(f.bytes for f in odd) > NEGLIGIBLE * demand.total:
        return odd
    return [dataclasses.replace(f, wrong=False) for f in odd]


def _over_batch(demand: Demand, c: Collective) -> bool:
    axes = c.axes(demand.policy.mesh.shape)
    return axes is None or bool(set(axes) & set(demand.policy.batch_axes))


def missing(demand: Demand, program: Program, found: Sequence[Collective]) -> Iterator[Finding]:
    """Yields a finding for each group of sharded parameters of one shape that are read but not
    gathered whole.

    XLA then computes with shards, as in tensor parallelism. A loop whose count is not known hides
    how much is gathered, so that any gather will do.
    """
    pairs = [(c, s) for one in found if one.kind == "all-gather"
             for c, s in _arrays(one) if not _in_optimizer(c)]
    unknown = any(i.trips_unknown for body in program.computations.values() for i in body)
    groups = collections.defaultdict(list)
    for leaf, place in demand.sharded:
        if demand.is_read(leaf) and leaf.group != "state":
            groups[key(demand.local(leaf, place))].append(leaf)
    for dims, leaves in groups.items():
        there = sum(s.elements * c.trips for c, s in pairs if set(leaves) & _wholes(demand, c, s))
        share = sum(min(1.0, demand.gathers(leaf)) for leaf in leaves)
        if not there or (not unknown and there * budget.SLACK < share * math.prod(dims)):
            yield _ungathered(demand, leaves, there / math.prod(dims), share)


def _wholes(demand: Demand, c: Collective, s: Shape) -> set[Leaf]:
    """Returns the parameters that an array may be, whole; not their parts or scales."""
    axes = c.axes(demand.policy.mesh.shape) or ()
    return {move.leaf for move in demand.owners(s, c.kind, axes) if move.whole}


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
        return _is_move(c) or (_in_optimizer(c) and s.bytes > SMALL)
    # the compiler joins its sums to scalars in one array, under the names of all: a/(b:c)
    return reduced and OPTIMIZER in re.split(r"[/(:)]", c.op_name) and s.bytes > SMALL


def _in_optimizer(c: Collective) -> bool:
    return OPTIMIZER in c.op_name.split("/")


def _is_scattered(demand: Demand, pairs: Sequence[Pair]) -> bool:
    """Whether the gradients of all sharded parameters are reduce-scattered, by their elements."""
    there = sum(s.elements * c.trips for c, s in pairs
                if c.kind != "all-gather" and _wholes(demand, c, s))
    wanted = sum(min(1.0, demand.reductions(leaf)) * math.prod(demand.local(leaf, place))
                 for leaf, place in demand.sharded)
    return there * budget.SLACK >= wanted


def _communicating_optimizer(pairs: Sequence[Pair]) -> Iterator[Finding]:
    if pairs:
        sent = sum(c.wire(s) for c, s in pairs)
        first, shape = max(pairs, key=lambda p: p[0].wire(p[1]))
        moved = [pair for pair in pairs if _is_move(pair[0])]
        why = _moves(moved) if moved else (
            f"the most by {first.name} ({first.kind} of {shape}). An update that is not element by "
            "element (Muon, Shampoo, Adafactor's factors) reads rows or matrices that other "
            "devices hold; zero.whole_matrices(tx) moves each matrix once")
        yield Finding(f"the optimizer communicates: {size(sent)} sent per step beside ZeRO's, "
                      f"{why}.", sent, first.name, provenance.source(first.frames))


def _is_move(c: Collective) -> bool:
    """Whether `Zero.whole_matrices` moves an array between shards and whole matrices."""
    return MATRICES in c.op_name.split("/")


def _moves(pairs: Sequence[Pair]) -> str:
    sent = sum(c.wire(s) for c, s in pairs)
    kinds = collections.Counter(c.kind for c, _ in pairs)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    return (f"{size(sent)} of them in {quantity(len(pairs), 'move')} between shards and whole "
            f"matrices (whole_matrices; {counts}): before their products, and back after")


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


def is_models(inst: Instruction) -> bool:
    """Whether an instruction belongs to the model, not to the optimizer."""
    return OPTIMIZER not in inst.attribute("op_name").split("/")
