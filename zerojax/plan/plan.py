"""What a step will cost before it runs: memory, communication and time, read off the compiled program.

The program is the one that runs: compiled for GPUs that are there, or by the same compiler for GPUs that are not.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from zerojax import tables
from zerojax.errors import PlanError
from zerojax.hlo import collectives as moves
from zerojax.hlo import schedule
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Program, parse
from zerojax.layout.report import Layout
from zerojax.layout.topology import Topology
from zerojax.plan import audit, compiler, hints, memory, provenance
from zerojax.plan.demand import Demand
from zerojax.plan.finding import Finding
from zerojax.plan.memory import Memory
from zerojax.tables import Sheet, seconds, size


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, dtype, mesh axes and place.

    Attributes:
      axes: mesh axes; None if the groups are no axes.
      trips: how often the place runs in a step: 1 is once, more is a loop.
      backward: it belongs to the backward pass.
      count: instructions.
      bytes: sent by each device in a step.
      asynchronous: how many have a start and a done.
      seconds, exposed: in a step, at the topology's bandwidths; the latter with nothing else running. None if not known.
      beside: names of what runs beside them.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...] | None
    trips: int
    backward: bool
    count: int
    bytes: float
    asynchronous: int
    seconds: float | None
    exposed: float | None
    beside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Compute:
    """An estimate of a step's time on one device, from its schedule (`schedule.ASSUMPTIONS`).

    Attributes:
      flops: operations of products, those of rematerialised blocks included; `model_flops`: without them.
      seconds: the step.
      busy: seconds bound by "compute", by "memory", by "launch" of kernels, and waiting for the "network".
      arithmetic: seconds that `flops` take at the GPU's peak for their dtypes.
      mfu: seconds that `model_flops` take at that peak, over `seconds`.
    """

    flops: float
    model_flops: float
    seconds: float
    busy: Mapping[str, float]
    arithmetic: float
    mfu: float

    @property
    def bound(self) -> str:
        """What takes most of the time, of `busy`."""
        return max(self.busy, key=self.busy.__getitem__)


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What a compiled step needs and moves, per device. Prints as tables; `check` says whether it is ZeRO.

    Attributes:
      title: stage, devices, dtypes.
      memory: bytes by kind, beside ZeRO's formula, and whether they fit.
      communication: rows by kind, dtype, axes and place; `zero_bytes` is ZeRO's total.
      compute: an estimate of the time; None for devices whose speed is not known.
      findings: what ZeRO does not explain, and what else a user should know.
      hlo: the optimised program, as the compiler prints it; `figures` are its bytes.
      compile_seconds: how long the compiler took; `cached`: in an earlier, identical plan.
    """

    title: str
    memory: Memory
    communication: tuple[Traffic, ...]
    zero_bytes: float
    compute: Compute | None
    findings: tuple[Finding, ...]
    layout: Layout
    topology: Topology | None
    hlo: str
    figures: Mapping[str, int]
    compile_seconds: float = 0.0
    cached: bool = False

    @property
    def sent(self) -> float:
        """Bytes each device sends in a step."""
        return sum(t.bytes for t in self.communication)

    @property
    def fits(self) -> bool | None:
        return self.memory.fits

    @functools.cached_property
    def program(self) -> Program:
        """The program, parsed."""
        return parse(self.hlo)

    @functools.cached_property
    def runs(self) -> Mapping[str, schedule.Run]:
        """By computation: the simulated schedule; empty for devices whose speed is not known."""
        if not self.topology:
            return {}
        return schedule.simulate(self.program, speed_of(self.topology), moves.of(self.program, provenance.is_users))

    def check(self, allow: str | None = None) -> "Plan":
        """Itself, if ZeRO explains everything that is communicated, and state lies as it says.

        Args:
          allow: regex for findings that are meant to be, as they read: `allow="dot_general|model.py:12"`.

        Raises:
          PlanError: otherwise; names each instruction, why it is not ZeRO's, and the user's line that it comes from.
        """
        wrong = [f for f in self.findings if f.wrong and not (allow and re.search(allow, str(f)))]
        if wrong:
            sent = sum(f.bytes for f in wrong if f.instruction)
            rest = f"\n- and {len(wrong) - 10} more: see plan.findings" if len(wrong) > 10 else ""
            raise PlanError(f"{self.title}: {len(wrong)} findings that ZeRO does not explain; {size(sent)} of the {size(self.sent)}"
                            f" that each device sends in a step are not its own (ZeRO's would be {size(self.zero_bytes)}):\n"
                            + "\n".join(f"- {f}" for f in wrong[:10]) + rest)
        return self

    def compare(self, other: "Plan") -> Sheet:
        """Both side by side, with the ratio of this to the other."""
        ours, theirs = _summary(self), _summary(other)
        ratio = lambda name: f"{ours[name][0] / theirs[name][0]:.2f}" if theirs[name][0] else ""
        rows = [(name, show(n), show(theirs[name][0]), ratio(name)) for name, (n, show) in ours.items() if name in theirs]
        return Sheet(f"A: {self.title}\nB: {other.title}", ("", "A", "B", "A / B"), tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the program's text."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("hlo", "layout", "topology")}
        plain = json.loads(json.dumps(fields, default=dataclasses.asdict))
        ok = not any(f.wrong for f in self.findings)
        return plain | {"topology": self.topology and self.topology.text, "fits": self.fits, "sent": self.sent, "ok": ok}

    def __str__(self) -> str:
        return tables.text(*self._parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(*self._parts())

    def _parts(self) -> list:
        sheets = [_memory_sheet(self), _traffic_sheet(self)]
        lines = [_time(self.compute)] if self.compute else []
        lines += [("! " if f.wrong else "- ") + str(f) for f in self.findings]
        return [self.title, *(s.table() for s in sheets), *lines]


def _summary(plan: Plan) -> dict[str, tuple[float, Any]]:
    out = {f"memory: {k}": (v, size) for k, v in plan.memory.kinds.items()} | {
        "memory: peak": (plan.memory.peak, size), "sent a step": (plan.sent, size), "ZeRO's": (plan.zero_bytes, size)}
    if plan.compute:
        out |= {"step, estimated": (plan.compute.seconds, seconds),
                "waiting for the network": (plan.compute.busy["network"], seconds), "MFU": (plan.compute.mfu, lambda x: f"{x:.0%}")}
    return out


def _memory_sheet(plan: Plan) -> Sheet:
    m = plan.memory
    theirs = lambda k: "" if (formula := m.zero.get(k)) is None else size(formula)
    rows = [(k, size(v), theirs(k)) for k, v in m.kinds.items()]
    verdict = "" if m.capacity is None or m.usable is None else (
        f"{'fits' if m.fits else 'does NOT fit'} {size(m.usable)} ({size(m.capacity)} less {memory.MARGIN:.0%})")
    rows.append(("peak", size(m.peak), verdict))
    if m.host:
        rows.append(("in the host's memory", size(m.host), ""))
    return Sheet("memory of a device, at the fullest moment", ("", "compiled", "ZeRO's formula"), tuple(rows))


def _traffic_sheet(plan: Plan) -> Sheet:
    def row(t: Traffic):
        where = ("backward, " if t.backward else "") + (f"in a loop, {t.trips} x" if t.trips > 1 else "once")
        over = ", ".join(t.axes) if t.axes else "other groups"
        times = ("", "") if t.seconds is None or t.exposed is None else (seconds(t.seconds), seconds(t.exposed))
        return (t.kind, t.dtype, over, where, str(t.count), f"{t.asynchronous}", size(t.bytes), *times)

    total = ("all", "", "", "", str(sum(t.count for t in plan.communication)), "", size(plan.sent),
             *(("", "") if plan.compute is None else tuple(seconds(sum(getattr(t, k) for t in plan.communication))
                                                           for k in ("seconds", "exposed"))))
    zero = ("ZeRO's", "", "", "", "", "", size(plan.zero_bytes), "", "")
    return Sheet("sent by a device in a step", ("", "dtype", "over", "where", "count", "async", "sent", "takes", "exposed"),
                 (*map(row, plan.communication), total, zero))


def _time(c: Compute) -> str:
    busy = ", ".join(f"{seconds(s)} {name}" for name, s in c.busy.items())
    return (f"step: about {seconds(c.seconds)} ({busy}), bound by {c.bound}; {c.flops / 1e12:.3g} TFLOP a device, "
            f"{seconds(c.arithmetic)} at the peak; MFU about {c.mfu:.0%}.\nAn estimate: {schedule.ASSUMPTIONS}.")


def make(demand: Demand, layout: Layout, batch_bytes: float, jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
         options: Mapping[str, Any], *, cache: bool = True) -> Plan:
    """Compiles `jitted(*args, **kwargs)` and describes it.

    Args:
      demand: what ZeRO wants of it.
      layout: of the state among the arguments; `batch_bytes`: of the batch, on one device.
      options: compiler options.

    Raises:
      CompileError, ModelError, MissingExtraError, PolicyError: see `compiler.compile`.
    """
    mesh = demand.policy.mesh
    return read(demand, layout, batch_bytes, compiler.compile(jitted, args, kwargs, mesh, options, cache=cache), Topology.of(mesh))


def read(demand: Demand, layout: Layout, batch_bytes: float, compiled: compiler.Compiled, topology: Topology | None) -> Plan:
    """The `Plan` of what the compiler made."""
    program = parse(compiled.text)
    found = moves.of(program, provenance.is_users)
    account = memory.account(demand, layout, batch_bytes, compiled.memory, program, topology and topology.gpu.memory)
    speed = topology and speed_of(topology)
    runs = schedule.simulate(program, speed, found) if speed else {}
    findings = [*_judged(demand, found), *hints.of(demand, layout, compiled.memory, account, program, found)]
    return Plan(title(demand, topology), account, traffic(demand, found, speed, runs), demand.total,
                compute(program, topology, runs) if topology else None, tuple(findings), layout, topology, compiled.text,
                compiled.memory, compiled.seconds, compiled.cached)


def _judged(demand: Demand, found: Sequence[Collective]) -> list[Finding]:
    mesh = demand.policy.mesh
    if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
        return [Finding("compiled for CPUs, whose compiler never forms a reduce-scatter: what is communicated is judged on "
                        'zj.make_mesh(topology="h200:1x8").', wrong=True)]
    return audit.collectives_of(demand, found)


def speed_of(topology: Topology) -> schedule.Speed:
    gpu = topology.gpu
    return schedule.Speed(gpu.flops, gpu.bandwidth, gpu.link, gpu.network, topology.per_host)


def title(demand: Demand, topology: Topology | None) -> str:
    p = demand.policy
    what = f"{p.mesh.size} devices"
    if topology:
        hosts = f"{topology.hosts} host{'s' if topology.hosts > 1 else ''} of {topology.per_host}"
        what = f"{topology.devices} x {topology.gpu.name} ({hosts})"
    axes = ", ".join(f"{name}={n}" for name, n in p.mesh.shape.items())
    way = ("per device" if demand.per_device else "one loss") + (f" ({demand.why})" if demand.why else "")
    return (f"stage {p.stage} on {what}, {axes}; compute {p.precision.compute_dtype}, reduce {p.precision.reduce_dtype}, {way}; "
            f"{demand.accumulate} microbatch{'es' if demand.accumulate > 1 else ''}")


def traffic(demand: Demand, found: Sequence[Collective], speed: schedule.Speed | None, runs: Mapping) -> tuple[Traffic, ...]:
    """Rows, most bytes first. An instruction that moves several dtypes counts in each, its time by bytes."""
    rows = collections.defaultdict(list)
    for c in found:
        for dtype in dict.fromkeys(s.dtype for s in c.shapes):
            axes = c.axes(demand.policy.mesh.shape)
            rows[c.kind, dtype, axes, c.trips, c.backward].append(c)
    return tuple(sorted((_row(key, cs, speed, runs) for key, cs in rows.items()), key=lambda t: -t.bytes))


def _row(key, found: list[Collective], speed: schedule.Speed | None, runs: Mapping) -> Traffic:
    kind, dtype, axes, trips, backward = key
    shares = [sum(s.bytes for s in c.shapes if s.dtype == dtype) / max(c.bytes, 1) for c in found]
    total = lambda of: sum(share * of(c) for share, c in zip(shares, found, strict=True))
    wait = lambda c: runs[c.computation].exposed.get(c.name, 0.0) * c.trips
    beside = [n for c in found if speed for n in runs[c.computation].beside.get(c.name, ())]
    started = sum(c.asynchronous for c in found)
    return Traffic(kind, dtype, axes, trips, backward, len(found), total(lambda c: c.wire_bytes), started,
                   total(lambda c: schedule.transfer(speed, c) * c.trips) if speed else None, total(wait) if speed else None,
                   tuple(dict.fromkeys(beside)))


def compute(program: Program, topology: Topology, runs: Mapping[str, schedule.Run]) -> Compute:
    done, run = schedule.total_flops(program), runs[program.entry]
    at_peak = lambda again: sum(n / topology.gpu.flops(dtype) for (dtype, redone), n in done.items() if again or not redone)
    model = sum(n for (_, redone), n in done.items() if not redone)
    mfu = at_peak(False) / run.seconds if run.seconds else 0.0
    return Compute(sum(done.values()), model, run.seconds, run.busy, at_peak(True), mfu)
