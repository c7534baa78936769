"""What else a user should know of a compiled step: leaves left whole, weights kept, state not donated, loops not counted.

None is a fault but state that was made against the policy.
"""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence

from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Program
from zerojax.layout.placement import ELSEWHERE, computed
from zerojax.layout.report import Layout
from zerojax.plan import provenance
from zerojax.plan.demand import Demand, itemsize
from zerojax.plan.finding import Finding
from zerojax.plan.memory import Memory, kind_of
from zerojax.tables import size

SAVED, COMBINED = 0.3, 0.25  # of all parameters, of the peak: what is worth a word
WHOLE = 0.1  # of the state
CONSTANT = 2**20  # bytes


def of(demand: Demand, layout: Layout, figures: Mapping[str, int], account: Memory, program: Program,
       found: Sequence[Collective]) -> Iterator[Finding]:
    """Findings about memory, and about what could not be read.

    Args:
      figures: the compiler's, as in `compiler.Compiled.memory`.
    """
    yield from _whole_leaves(layout)
    yield from _saved_weights(demand, account, found)
    yield from _lost_donation(layout, figures)
    yield from _combined(account, found)
    yield from _constants(program)
    yield from _unknown_loops(program)


def _whole_leaves(layout: Layout):
    groups = collections.defaultdict(list)
    for row in layout.whole:
        if "stage 0" not in row.reason and kind_of(row.path):
            groups[row.reason].append(row)
    for reason, rows in groups.items():
        first = max(rows, key=lambda r: r.bytes)
        kept, against = sum(r.bytes for r in rows), reason == ELSEWHERE
        if layout.devices > 1 and (against or kept > min(2**20, WHOLE * layout.bytes)):
            yield Finding(f"{len(rows)} leaves are whole on every device, {size(kept)} of it: {reason} (the largest is "
                          f"{first.path}, {first.shape}).", kept, wrong=against)


def _saved_weights(demand: Demand, account: Memory, found: Sequence[Collective]):
    """Stage 3: much of the gathered weights alive at once, in a program with a backward pass."""
    gathers = [c for c in found if c.kind == "all-gather"]
    whole = sum(math.prod(demand.local(leaf, place)) * itemsize(computed(demand.policy, leaf)) for leaf, place in demand.sharded)
    alive = account.kinds["gathered parameters"]
    if demand.policy.stage == 3 and gathers and any(c.backward for c in found) and alive > SAVED * whole:
        first = max(gathers, key=lambda c: c.bytes * c.trips)
        yield Finding(f"{size(alive)} of gathered weights, of {size(whole)} in all, are alive at once (the most by {first.name}). "
                      "Those of a repeating block are gathered again for the backward pass, in place of kept, if it is under "
                      "nn.remat(Block, policy=zj.remat.regather()).", alive, first.name, provenance.source(first.frames))


def _lost_donation(layout: Layout, figures: Mapping[str, int]):
    """A new state that does not take the old one's place; functions that return none, as evaluation, have nothing to donate."""
    given, kept = layout.bytes, figures["alias"] + figures["host_alias"]
    made = figures["output"] + figures["host_output"]
    if made > 0.5 * given and kept < 0.98 * given - 2**16:
        yield Finding(f"only {size(kept)} of the {size(given)} of state are updated in place: donate the state (zero.jit does) and "
                      "return one of the same shapes, dtypes and shardings.", given - kept)


def _combined(account: Memory, found: Sequence[Collective]):
    """One gather of several arrays holds them all at once: told where that is much of all there is."""
    joined = [c for c in found if c.kind == "all-gather" and len(c.shapes) > 1]
    first = max(joined, key=lambda c: c.bytes, default=None)
    if first and first.bytes > COMBINED * account.peak:
        largest = max(s.bytes for s in first.shapes)
        option = f"compiler_options={{'xla_gpu_all_gather_combine_threshold_bytes': {largest}}}"
        yield Finding(f"{first.name} gathers {len(first.shapes)} arrays at once, {size(first.bytes)} (the largest {size(largest)}) "
                      f"of a peak of {size(account.peak)}; {option} keeps them apart.", first.bytes, first.name,
                      provenance.source(first.frames))


def _constants(program: Program):
    """Arrays that a function closes over are compiled in, whole on every device."""
    kept = [(i, s) for body in program.computations.values() for i in body if i.op == "constant" for s in i.shapes]
    total = sum(s.bytes for _, s in kept)
    if total > CONSTANT:
        first, largest = max(kept, key=lambda pair: pair[1].bytes)
        yield Finding(f"{size(total)} of constants are part of the program, the largest {largest}: arrays that the function closes "
                      "over, whole on every device. Return them from init_fn and freeze them (zero.init(..., trainable=...)), or "
                      "pass them as arguments.", total, first.name)


def _unknown_loops(program: Program):
    loops = [i.name for name, body in program.computations.items() if program.times[name] for i in body if i.turns_unknown]
    if loops:
        yield Finding(f"how often {', '.join(loops[:3])} turns is not known before it runs: what is in it is counted once, in "
                      "bytes sent, operations and time.", 0.0, loops[0])
