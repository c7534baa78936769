"""The cost of a step before it runs: memory, communication and time, read off the compiled program.

The program is the one that runs: compiled for the devices at hand, or by the same compiler for
absent GPUs.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from zerojax import tables
from zerojax.errors import PlanError
from zerojax.hlo import schedule
from zerojax.hlo.program import Program
from zerojax.layout.report import Layout
from zerojax.layout.topology import Topology
from zerojax.plan import audit, compiler, hints, memory, traffic, uncounted
from zerojax.plan.compiler import Call
from zerojax.plan.demand import Demand
from zerojax.plan.finding import Finding
from zerojax.plan.memory import Memory
from zerojax.plan.reading import Reading
from zerojax.plan.traffic import Traffic
from zerojax.tables import Sheet, quantity, seconds, size

MOST = 10  # findings in an error
_BACKWARD = re.compile(r"transpose\(\w+\(")  # in the names of operations of a backward pass


@dataclasses.dataclass(frozen=True)
class Compute:
    """An estimate of the time of a step on one device, from its schedule (`schedule.ASSUMPTIONS`).

    Attributes:
      flops: operations of products per step, including those that rematerialization repeats.
      model_flops: `flops` without the repeated operations and without those of the optimizer.
      seconds: seconds per step.
      busy: seconds bound by "compute", by "memory", by the "launch" of kernels, and waiting for the
        "network".
      arithmetic: seconds that `flops` take at the GPU's peak for their dtypes.
      mfu: seconds that `model_flops` take at that peak, divided by `seconds`.
    """

    flops: float
    model_flops: float
    seconds: float
    busy: Mapping[str, float]
    arithmetic: float
    mfu: float

    @property
    def bound(self) -> str:
        """The key of `busy` with the most seconds."""
        return max(self.busy, key=self.busy.__getitem__)


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(tables.Printed):
    """The cost of a compiled step per device. Prints as tables; `check` raises if it is not ZeRO.

    Attributes:
      title: stage, devices, dtypes.
      memory: bytes by kind, beside ZeRO's formula, and whether they fit.
      communication: the bytes sent, by kind, dtype, axes and place.
      zero_bytes: the bytes that each device sends per step by ZeRO's formula.
      compute: an estimate of the time; None for devices whose speed is not known.
      findings: everything that ZeRO does not explain, and notes for the user.
      reading: the compiled step that the plan was read off.
    """

    title: str
    memory: Memory
    communication: tuple[Traffic, ...]
    zero_bytes: float
    compute: Compute | None
    findings: tuple[Finding, ...]
    reading: Reading

    @property
    def sent(self) -> float:
        """Bytes that each device sends per step."""
        return sum(t.bytes for t in self.communication)

    @property
    def between(self) -> float | None:
        """Bytes that each device sends to other hosts per step; None if they are not known."""
        return None if self.topology is None else sum(t.between or 0 for t in self.communication)

    @property
    def fits(self) -> bool | None:
        """See `Memory.fits`."""
        return self.memory.fits

    @property
    def layout(self) -> Layout:
        """The layout of the state among the arguments."""
        return self.reading.layout

    @property
    def topology(self) -> Topology | None:
        """The GPUs that the step was compiled for; None for devices whose speed is not known."""
        return self.reading.topology

    @property
    def hlo(self) -> str:
        """The optimized program, as the compiler prints it."""
        return self.reading.compiled.text

    @property
    def figures(self) -> Mapping[str, int]:
        """The compiler's bytes per device."""
        return self.reading.figures

    @property
    def compile_seconds(self) -> float:
        """The compiler's time, in seconds; if `cached`, that of the earlier, identical plan."""
        return self.reading.compiled.seconds

    @property
    def cached(self) -> bool:
        """Whether the program came from the cache on disk."""
        return self.reading.compiled.cached

    @property
    def program(self) -> Program:
        """The program, parsed."""
        return self.reading.program

    @property
    def runs(self) -> Mapping[str, schedule.Run]:
        """The simulated schedule of each computation; empty for devices whose speed is not
        known."""
        return self.reading.runs

    def check(self, allow: str | None = None) -> "Plan":
        """Returns the plan if ZeRO explains all communication and the placement of the state.

        Args:
          allow: regex for findings to accept, searched in their text:
            `allow="dot_general|model.py:12"`.

        Raises:
          PlanError: otherwise. The text has up to ten findings, each with the reason why ZeRO does
            not explain it, and the user's line that it comes from.
        """
        wrong = [f for f in self.findings if f.wrong and not (allow and re.search(allow, str(f)))]
        if wrong:
            raise PlanError(self._refusal(wrong))
        return self

    def _refusal(self, wrong: list[Finding]) -> str:
        sent = sum(f.bytes for f in wrong if f.instruction)
        lines = [f"- {f}" for f in wrong[:MOST]]
        if len(wrong) > MOST:
            lines.append(f"- and {len(wrong) - MOST} more: see plan.findings")
        return (f"{self.title}: {quantity(len(wrong), 'finding')} that ZeRO does not explain; "
                f"{size(sent)} of the {size(self.sent)} that each device sends per step are not "
                f"ZeRO's, which would be {size(self.zero_bytes)}:\n" + "\n".join(lines))

    def compare(self, other: "Plan") -> Sheet:
        """Returns both plans side by side, with the ratio of this one to the other."""
        ours, theirs = _summary(self), _summary(other)
        rows = [(name, show(n), show(theirs[name][0]), _ratio(n, theirs[name][0]))
                for name, (n, show) in ours.items() if name in theirs]
        return Sheet(f"A: {self.title}\nB: {other.title}", ("", "A", "B", "A / B"), tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values, without the program's text."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.name != "reading"}
        plain = json.loads(json.dumps(fields, default=dataclasses.asdict))
        topology = self.topology and self.topology.text
        return plain | {"figures": dict(self.figures), "compile_seconds": self.compile_seconds,
                        "cached": self.cached, "topology": topology, "fits": self.fits,
                        "sent": self.sent, "between": self.between,
                        "ok": not any(f.wrong for f in self.findings)}

    def parts(self) -> list:
        sheets = [_memory_sheet(self.memory), _traffic_sheet(self)]
        lines = [_time(self.compute)] if self.compute else []
        lines += [("! " if f.wrong else "- ") + str(f) for f in self.findings]
        if not any(f.wrong for f in self.findings):
            lines.append("ZeRO explains all of this communication.")
        below = [part for sheet in sheets for part in ("", *sheet.parts())]
        return [self.title, *below, "", *lines]


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else ""


def _percent(x: float) -> str:
    return f"{x:.0%}"


def _summary(plan: Plan) -> dict[str, tuple[float, Callable[[float], str]]]:
    kinds: dict[str, tuple] = {f"memory: {k}": (v, size) for k, v in plan.memory.kinds.items()}
    kinds |= {"memory: peak": (plan.memory.peak, size), "sent per step": (plan.sent, size),
              "sent off host": (plan.between or 0.0, size),
              "ZeRO's": (plan.zero_bytes, size)}
    if plan.compute:
        kinds |= {"step, estimated": (plan.compute.seconds, seconds),
                  "waiting for the network": (plan.compute.busy["network"], seconds),
                  "MFU": (plan.compute.mfu, _percent)}
    return kinds


def _memory_sheet(m: Memory) -> Sheet:
    rows = [(k, size(v), _or_nothing(m.zero.get(k), size)) for k, v in m.kinds.items()]
    rows.append(("peak", size(m.peak), ""))
    notes = [""] * len(m.kinds) + [_verdict(m)]
    if m.host:
        rows.append(("in the host's memory", size(m.host), ""))
        notes.append("")
    return Sheet("peak memory per device", ("", "compiled", "ZeRO's formula"), tuple(rows),
                 tuple(notes))


def _verdict(m: Memory) -> str:
    if m.capacity is None or m.usable is None:
        return ""
    fits = "fits" if m.fits else "does NOT fit"
    return f"{fits} {size(m.usable)} ({size(m.capacity)} less {memory.MARGIN:.0%})"


def _traffic_sheet(plan: Plan) -> Sheet:
    several = plan.topology is not None and plan.topology.hosts > 1
    rows = [_traffic_row(t, several) for t in plan.communication]
    between = (size(plan.between or 0),) * several
    count = _share(plan.communication)
    times = ("", "")
    if plan.compute:
        times = (seconds(sum(t.seconds or 0 for t in plan.communication)),
                 seconds(sum(t.exposed or 0 for t in plan.communication)))
    rows.append(("all", "", "", "", count, size(plan.sent), *between, *times))
    rows.append(("ZeRO's", "", "", "", "", size(plan.zero_bytes), *("",) * several, "", ""))
    columns = ("", "dtype", "over", "where", "async/all", "sent", *("off host",) * several, "takes",
               "exposed")
    return Sheet("sent by each device per step", columns, tuple(rows))


def _share(rows: Sequence[Traffic]) -> str:
    """Returns how many instructions are asynchronous, of how many."""
    return f"{sum(t.asynchronous for t in rows)}/{sum(t.count for t in rows)}"


def _traffic_row(t: Traffic, several: bool) -> tuple[str, ...]:
    where = "backward, " if t.backward else ""
    where += f"in a loop, {t.trips} x" if t.trips > 1 else "once"
    over = ", ".join(t.axes) if t.axes else "other groups"
    return (t.kind, t.dtype, over, where, _share([t]), size(t.bytes),
            *(_or_nothing(t.between, size),) * several, _or_nothing(t.seconds, seconds),
            _or_nothing(t.exposed, seconds))


def _or_nothing(x: float | None, show: Callable[[float], str]) -> str:
    return "" if x is None else show(x)


def _time(c: Compute) -> str:
    busy = ", ".join(f"{seconds(s)} {name}" for name, s in c.busy.items())
    return (f"step: about {seconds(c.seconds)} ({busy}), bound by {c.bound}; {c.flops / 1e12:.3g} "
            f"TFLOP per device, {seconds(c.arithmetic)} at the peak; MFU about {c.mfu:.0%}.\n"
            f"An estimate: {schedule.ASSUMPTIONS}.")


def make(demand: Demand, layout: Layout, batch_bytes: float, call: Call, *,
         cache: bool = True) -> Plan:
    """Compiles a call and describes it.

    Args:
      demand: the collectives that ZeRO allows it.
      layout: of the state among the arguments; `batch_bytes`: of the batch, on one device.

    Raises:
      CompileError, ModelError, MissingExtraError, PolicyError: see `compiler.compile`.
    """
    mesh = demand.policy.mesh
    compiled = compiler.compile(call, mesh, cached=cache)
    demand = dataclasses.replace(demand, differentiates=bool(_BACKWARD.search(compiled.text)))
    return read(Reading(demand, layout, batch_bytes, compiled, Topology.of(mesh), call.options))


def read(reading: Reading) -> Plan:
    """Returns the `Plan` of a compiled step."""
    account = memory.account(reading)
    findings = (*_judged(reading), *hints.of(reading, account), *uncounted.of(reading))
    return Plan(title(reading.demand, reading.topology), account, traffic.rows(reading),
                reading.demand.total, _compute(reading), findings, reading)


def _judged(reading: Reading) -> list[Finding]:
    mesh = reading.demand.policy.mesh
    if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
        return [Finding("compiled for CPUs, whose compiler never forms a reduce-scatter: "
                        "communication is "
                        'judged on zj.make_mesh(topology="h200:1x8").', wrong=True)]
    return audit.of(reading.demand, reading.program, reading.collectives)


def title(demand: Demand, topology: Topology | None) -> str:
    p = demand.policy
    axes = ", ".join(f"{name}={n}" for name, n in p.mesh.shape.items())
    way = "per device" if demand.per_device else "one loss"
    way += f" ({demand.why})" if demand.why else ""
    count = quantity(demand.accumulate, "microbatch")
    return (f"stage {p.stage} on {_devices(p.mesh, topology)}, {axes}; compute "
            f"{p.precision.compute_dtype}, reduce {p.precision.reduce_dtype}, {way}; {count}")


def _devices(mesh: Any, topology: Topology | None) -> str:
    if not topology:
        return quantity(mesh.size, "device")
    hosts = f"{quantity(topology.hosts, 'host')} of {topology.per_host}"
    return f"{topology.devices} x {topology.gpu.name} ({hosts})"


def _compute(reading: Reading) -> Compute | None:
    if not reading.topology:
        return None
    gpu = reading.topology.gpu
    done = schedule.total_flops(reading.program)
    run = reading.runs[reading.program.entry]
    of_model = schedule.total_flops(reading.program, audit.is_models)
    model = {dtype: n for (dtype, redone), n in of_model.items() if not redone}
    at_peak = sum(n / gpu.flops(dtype) for (dtype, _), n in done.items())
    model_at_peak = sum(n / gpu.flops(dtype) for dtype, n in model.items())
    mfu = model_at_peak / run.seconds if run.seconds else 0.0
    return Compute(sum(done.values()), sum(model.values()), run.seconds, run.busy, at_peak, mfu)
