"""Other notes for the user on a compiled step: leaves left whole, weights kept, state not donated,
reads repeated, products in float32, network exposed, memory that XLA rematerializes to save.

Only a state whose leaves are whole against the policy is a fault.
"""

import collections
import math
import re
from collections.abc import Iterator

from zerojax.hlo import schedule
from zerojax.hlo.program import Program
from zerojax.layout.placement import ELSEWHERE, computed
from zerojax.layout.report import Layout
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import audit, provenance, traffic
from zerojax.plan.demand import Demand
from zerojax.plan.finding import Finding
from zerojax.plan.memory import Memory, kind_of
from zerojax.plan.reading import Reading
from zerojax.tables import quantity, seconds, size
from zerojax.trees import itemsize

SAVED, COMBINED = 0.3, 0.25  # of all parameters, of the peak: less is not reported
WHOLE = 0.1  # of the state
AGAIN = 0.01  # of ZeRO's bytes
CONSTANT = 2**20  # bytes
WIDE = 0.1  # of the operations of products
EXPOSED, WAITED = 1 / 3, 0.02  # of the network's time, of the step's: less is not reported
NEAR = 0.95  # of the peak that XLA allows itself
_REPEATED = re.compile(r"\.remat\d*\b")  # the names that XLA's rematerialization gives
SLOP = "xla_gpu_memory_limit_slop_factor"  # an option, in percent


def of(reading: Reading, account: Memory) -> Iterator[Finding]:
    """Yields findings about memory, repeated reads, the network's time, and loops whose count is
    not known."""
    yield from _whole_leaves(reading.layout)
    yield from _saved_weights(reading, account)
    yield from _lost_donation(reading)
    yield from _combined(reading, account)
    yield from _repeated(reading.demand)
    yield from _constants(reading.program)
    yield from _wide_products(reading)
    yield from _exposed(reading)
    yield from _exchanged(reading)
    yield from _near_the_limit(reading, account)
    yield from _unknown_loops(reading.program)
    yield from _added(reading)


def _added(reading: Reading) -> Iterator[Finding]:
    for option, value in reading.compiled.added.items():
        yield Finding(
            f"the plan is compiled with {option}={value}, because XLA found no tiles for one of "
            "the products. On GPUs, XLA measures several kernels and may choose another; if it "
            "fails there too, pass this option.", 0.0)


def _exchanged(reading: Reading) -> Iterator[Finding]:
    """Gradients that are exchanged over one axis of several hosts: most codes leave the host."""
    topology, policy = reading.topology, reading.demand.policy
    outer = [n for axis, n in policy.mesh.shape.items()
             if axis in policy.axes and axis not in policy.inner_axes]
    if not topology or not policy.wire.reduce or (policy.inner_axes and math.prod(outer) > 1):
        return
    sent = sum(c.between(topology.per_host) for c in reading.collectives if c.kind == "all-to-all")
    if sent:
        yield Finding(f"each device sends {size(sent)} of gradients to other hosts per step: "
                      f"Wire(reduce={policy.wire.reduce!r}) exchanges them over one axis of all "
                      f"devices. On zj.make_mesh(hosts={topology.hosts}) they are summed within "
                      f"each host first, and about {size(sent / topology.per_host)} leave it.",
                      sent)


def _whole_leaves(layout: Layout) -> Iterator[Finding]:
    groups = collections.defaultdict(list)
    for row in layout.whole:
        if "stage 0" not in row.reason and kind_of(row.path):
            groups[row.reason].append(row)
    for reason, rows in groups.items():
        first = max(rows, key=lambda r: r.bytes)
        kept, against = sum(r.bytes for r in rows), reason == ELSEWHERE
        if layout.devices > 1 and (against or kept > min(2**20, WHOLE * layout.bytes)):
            yield Finding(f"{quantity(len(rows), 'leaf')} {'is' if len(rows) == 1 else 'are'} "
                          f"whole on every device, {size(kept)}: {reason} (the largest is "
                          f"{first.path}, {first.shape}).",
                          kept, wrong=against)


def _saved_weights(reading: Reading, account: Memory) -> Iterator[Finding]:
    """Stage 3: many of the gathered weights are alive at once, in a program with a backward
    pass."""
    demand, found = reading.demand, reading.collectives
    gathers = [c for c in found if c.kind == "all-gather"]
    whole = sum(math.prod(demand.local(leaf, place)) * itemsize(computed(demand.policy, leaf))
                for leaf, place in demand.sharded)
    alive = account.kinds["gathered parameters"]
    trains = any(c.backward for c in found)
    if demand.policy.stage == 3 and gathers and trains and alive > SAVED * whole:
        first = max(gathers, key=lambda c: c.bytes * c.trips)
        yield Finding(
            f"{size(alive)} of gathered weights, of {size(whole)} in all, are alive at once (the "
            f"most by {first.name}). Under nn.remat(Block, policy=zj.remat.regather()), a "
            "repeated block gathers its weights again for the backward pass instead of keeping "
            "them.",
            alive, first.name, provenance.source(first.frames))


def _lost_donation(reading: Reading) -> Iterator[Finding]:
    """A new state that does not take the old one's place. Functions that return none have nothing
    to donate."""
    given, figures = reading.layout.bytes, reading.figures
    kept = figures["alias"] + figures["host_alias"]
    made = figures["output"] + figures["host_output"]
    if made > 0.5 * given and kept < 0.98 * given - 2**16:
        yield Finding(
            f"only {size(kept)} of the {size(given)} of state are updated in place: donate the "
            "state (zero.jit does) and return one of the same shapes, dtypes and shardings.",
            given - kept)


def _combined(reading: Reading, account: Memory) -> Iterator[Finding]:
    """A gather of several arrays holds all of them at once."""
    joined = [c for c in reading.collectives if c.kind == "all-gather" and len(c.shapes) > 1]
    first = max(joined, key=lambda c: c.bytes, default=None)
    if first and first.bytes > COMBINED * account.peak:
        largest = max(s.bytes for s in first.shapes)
        option = f"compiler_options={{'xla_gpu_all_gather_combine_threshold_bytes': {largest}}}"
        yield Finding(
            f"{first.name} gathers {len(first.shapes)} arrays at once, {size(first.bytes)} (the "
            f"largest {size(largest)}) of a peak of {size(account.peak)}; {option} keeps them "
            "apart.",
            first.bytes, first.name, provenance.source(first.frames))


def _repeated(demand: Demand) -> Iterator[Finding]:
    """Parameters that the model reads in more scopes than one, which moves more than ZeRO's
    formula."""
    extra = {leaf: _extra(demand, leaf, place) for leaf, place in demand.sharded}
    sent = sum(extra.values())
    if sent > AGAIN * demand.total:
        first = max(extra, key=lambda leaf: extra[leaf])
        count = sum(n > 0 for n in extra.values())
        yield Finding(
            f"{count} parameters move more often than ZeRO's formula counts, {size(sent)} in all, "
            f"because the model reads them in several places: {first.path} is gathered "
            f"{demand.gathers(first):.3g} and reduced {demand.reductions(first):.3g} times per "
            "step. A module applied several times, or a block rematerialized within another, "
            "does that.", sent)


def _extra(demand: Demand, leaf: Leaf, place: Placement) -> float:
    """Returns the bytes that each device sends of a parameter beyond ZeRO's formula."""
    policy, wire = demand.policy, demand.wire
    gathers = max(0, demand.gathers(leaf) - wire.gathered)
    reductions = max(0, demand.reductions(leaf) - wire.reduced)
    moved = (gathers * itemsize(computed(policy, leaf))
             + reductions * itemsize(policy.precision.reduced(leaf.path, leaf.dtype)))
    size_of = math.prod(demand.local(leaf, place))
    return moved * size_of * (policy.shards - 1) / policy.shards


def _constants(program: Program) -> Iterator[Finding]:
    """Arrays that a function closes over are compiled in, whole on every device."""
    kept = [(i, s) for body in program.computations.values() for i in body if i.op == "constant"
            for s in i.shapes]
    total = sum(s.bytes for _, s in kept)
    if total > CONSTANT:
        first, largest = max(kept, key=lambda pair: pair[1].bytes)
        yield Finding(
            f"{size(total)} of constants are part of the program, the largest {largest}: arrays "
            "that the function closes over, whole on every device. Return them from init_fn and "
            "freeze them (zero.init(..., trainable=...)), or pass them as arguments.",
            total, first.name)


def _wide_products(reading: Reading) -> Iterator[Finding]:
    """Products in float32 in a step that gathers 16-bit parameters."""
    compute = reading.demand.policy.precision.compute_dtype
    done = schedule.total_flops(reading.program, audit.is_models)
    wide, total = sum(n for (dtype, _), n in done.items() if dtype == "f32"), sum(done.values())
    if itemsize(compute) == 2 and wide > WIDE * total:
        yield Finding(
            f"{wide / total:.0%} of the operations of products are in float32, although the model "
            f"receives its parameters in {compute}: a Flax layer without a dtype computes in the "
            f"widest dtype of its inputs and parameters. Give the layers dtype={compute!r}, or "
            "cast the inputs of the model.", 0.0)


def _exposed(reading: Reading) -> Iterator[Finding]:
    """The compiler's default schedule leaves much of the network's time exposed."""
    if not reading.runs or reading.options or not any(c.backward for c in reading.collectives):
        return
    rows = traffic.rows(reading)
    whole, waited = (sum(t.seconds or 0 for t in rows), sum(t.exposed or 0 for t in rows))
    if waited > EXPOSED * whole and waited > WAITED * reading.runs[reading.program.entry].seconds:
        yield Finding(
            f"the step waits {seconds(waited)} for the network, {waited / whole:.0%} of the time "
            "of its collectives. `zerojax tune` searches for compiler options that hide more of "
            "it.", 0.0)


def _near_the_limit(reading: Reading, account: Memory) -> Iterator[Finding]:
    """XLA rematerializes by itself to save memory, or is about to."""
    limit = allowed(reading)
    if limit is None:
        return
    names = (i.name for body in reading.program.computations.values() for i in body)
    repeated = sum(bool(_REPEATED.search(name)) for name in names)
    if repeated or account.peak > NEAR * limit:
        what = (f"XLA rematerializes by itself ({quantity(repeated, 'instruction')}) to keep the "
                f"peak at {size(account.peak)}" if repeated else
                f"the peak of {size(account.peak)} is near the {size(limit)} at which XLA "
                "rematerializes by itself")
        yield Finding(
            f"{what}, which takes time. Save less for the backward pass (nn.remat), or use fewer "
            "examples per microbatch.", account.peak)


def is_near_the_limit(reading: Reading, account: Memory) -> bool:
    """Whether the peak is where XLA starts to rematerialize by itself."""
    return any(_near_the_limit(reading, account))


def allowed(reading: Reading) -> float | None:
    """Returns the peak that XLA allows itself before it rematerializes; None if it is not known.

    XLA's own estimate of the peak is higher than the compiled one, so that it may start below. The
    peak is the limit of XLA's scheduler (`GetSchedulerMemoryLimit` in its gpu_hlo_schedule.cc): for
    temporaries, 95 % of what arguments and results leave of 80 % of the memory. With GPUs at hand,
    the memory that jax reserves takes the place of the 80 %.
    """
    if reading.topology is None:
        return None
    figures = reading.figures
    fixed = figures["argument"] + figures["output"] - figures["alias"]
    left = 0.8 * reading.topology.gpu.memory - fixed
    return fixed + left * reading.options.get(SLOP, 95) / 100



def _unknown_loops(program: Program) -> Iterator[Finding]:
    loops = [i.name for name, body in program.computations.items() if program.times[name]
             for i in body if i.trips_unknown]
    if loops:
        yield Finding(
            f"the number of iterations of {', '.join(loops[:3])} is not known before it runs: its "
            "contents are counted once, in bytes sent, operations and time.", 0.0, loops[0])
