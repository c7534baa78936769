"""One training step, annotated by several methods and compiled for simulated GPUs.

The tables show compile time, communication and memory. The model is a decoder-only transformer of
534 M parameters: a scan over 8 layers with remat, bfloat16 compute, fp32 Adam, one sequence of 2048
per GPU. The model and the hand-written version are those of `tests/compiled`.
"""

import dataclasses
import functools
import pathlib
import sys
import time

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from machine import table

import zerojax as zj
from zerojax.hlo import collectives
from zerojax.hlo.program import parse
from zerojax.layout import topology
from zerojax.plan import theory

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
import models
import reference

MIB = 2**20
KINDS = {"all-gather": {"all-gather"}, "reduce-scatter": {"reduce-scatter"},
         "all-reduce": {"all-reduce"}, "all-to-all, permute": {"all-to-all", "collective-permute"}}
SEQ = 2048
TX = optax.adam(1e-3)
CASE = models.language(models.Transformer(width=2048, layers=8, vocab=32000))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to annotate the step.

    Attributes:
      name: as in the tables.
      stage, gradients, reduce: the policy, for zerojax.
      accumulate: the number of microbatches, each of one sequence per GPU.
    """

    name: str
    stage: int | None = None
    gradients: str | None = None
    reduce: str | None = None
    accumulate: int = 1


TEXTBOOK = Method("textbook annotation")
BY_HAND = Method("`shard_map` by hand")
METHODS = (
    TEXTBOOK,
    BY_HAND,
    Method("stage 3, one loss", 3, "global"),
    Method("stage 3, per device, fp32 reduction", 3, "per_device", "float32"),
    Method("stage 2, one loss", 2, "global"),
    Method("stage 2, per device, fp32 reduction", 2, "per_device", "float32"),
    Method("stage 1, per device, fp32 reduction", 1, "per_device", "float32"),
)


@functools.cache
def setting(gpus: int, method: Method):
    """Returns the policy, the abstract state and the abstract batch."""
    mesh = zj.make_mesh(devices=topology.devices(f"h200:{max(1, gpus // 8)}x{min(8, gpus)}"))
    zero = zj.Zero(mesh, 3 if method.stage is None else method.stage, gradients=method.gradients,
                   precision=zj.Precision(compute="bfloat16", reduce=method.reduce))
    state = zero.abstract(CASE.init, TX, *CASE.example)
    batch = jax.ShapeDtypeStruct((gpus * method.accumulate, SEQ), "int32",
                                 sharding=zero.batch_sharding())
    return zero, state, batch


def textbook(state, batch):
    """Lowers the step of the tutorials: shardings on inputs, outputs and gradients."""
    at = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))

    def step(params, opt_state, tokens):
        grads = jax.grad(lambda p: CASE.loss({"params": p}, tokens).total / tokens.size)(params)
        grads = jax.lax.with_sharding_constraint(grads, at[0])
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    inputs = (*at, NamedSharding(batch.sharding.mesh, P("data")))
    jitted = jax.jit(step, donate_argnums=(0, 1), in_shardings=inputs, out_shardings=at)
    return jitted.lower(state.params, state.opt_state, batch)


def lower(gpus: int, method: Method):
    zero, state, batch = setting(gpus, method)
    if method == TEXTBOOK:
        return textbook(state, batch)
    if method == BY_HAND:
        return reference.lower(zero.mesh, state, batch)
    return zero.train_step(CASE.loss, TX, accumulate=method.accumulate).lower(state, batch)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program: seconds to lower and compile, collectives, bytes per device."""

    lowering: float
    compiling: float
    collectives: tuple
    arguments: int
    temporaries: int

    @property
    def seconds(self) -> float:
        return self.lowering + self.compiling

    def sent(self) -> list[float]:
        """Returns the MiB that each device sends per step, by kind, in the order of `KINDS`."""
        return [sum(c.wire_bytes for c in self.collectives if c.kind in kinds) / MIB
                for kinds in KINDS.values()]


@functools.cache
def measure(gpus: int, method: Method) -> Measured:
    setting(gpus, method)  # cached, so that its time does not count
    start = time.perf_counter()
    lowered = lower(gpus, method)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=topology.COMPILER_OPTIONS)
    compiling = time.perf_counter() - middle
    memory = compiled.memory_analysis()
    return Measured(middle - start, compiling, collectives.of(parse(compiled.as_text())),
                    memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def predicted(gpus: int, method: Method) -> tuple[float, float]:
    """Returns ZeRO's prediction: MiB of state at rest, and MiB sent per step."""
    params = setting(gpus, method)[1].params
    elements = sum(x.size for x in jax.tree.leaves(params))
    itemsize = {"float32": 4, "bfloat16": 2, None: 2}[method.reduce]
    sent = 0.0
    for path, x in jax.tree.leaves_with_path(params):
        wire = theory.wire(method.stage, method.accumulate,
                           per_device=method.gradients == "per_device",
                           regathered="blocks" in jax.tree_util.keystr(path))
        sent += wire.bytes(x.size, gpus, compute=2, reduce=itemsize)
    return theory.rest_bytes(elements, gpus, method.stage) / MIB, sent / MIB


def collectives_table(sizes=(8, 64, 512)) -> str:
    columns = ["GPUs", "method", *KINDS, "sent, MiB", "predicted, MiB", "state, MiB",
               "predicted, MiB", "temporaries, MiB"]
    return table(columns, [_collectives(gpus, method) for gpus in sizes for method in METHODS])


def _collectives(gpus: int, method: Method) -> list:
    measured = measure(gpus, method)
    state, sent = "", ""
    if method.stage is not None:
        state, sent = (f"{mib:,.1f}" for mib in predicted(gpus, method))
    by_kind = measured.sent()
    return [gpus, method.name, *(f"{mib:,.1f}" for mib in (*by_kind, sum(by_kind))), sent,
            f"{measured.arguments / MIB:,.1f}", state, f"{measured.temporaries / MIB:,.0f}"]


def compile_table(gpus=8) -> str:
    base = measure(gpus, TEXTBOOK)
    rows = []
    for method in METHODS:
        measured = measure(gpus, method)
        ratio = measured.seconds / base.seconds
        rows.append([method.name, f"{measured.lowering:.1f}", f"{measured.compiling:.1f}",
                     f"{ratio:.2f}"])
    columns = [f"{gpus} GPUs", "trace and lower, s", "compile, s", "ratio to textbook (aim 1.2)"]
    return table(columns, rows)


def stage_table(gpus=8, accumulate=4) -> str:
    """Returns the table of the README: predicted and compiled figures for each stage."""
    columns = ["stage", "state predicted, MiB", "compiled", "sent per step predicted, MiB",
               "compiled", "temporaries compiled, MiB"]
    rows = []
    for stage in range(4):
        method = Method(f"{stage}", stage, "per_device", None, accumulate)
        measured = measure(gpus, method)
        state, sent = predicted(gpus, method)
        figures = (state, measured.arguments / MIB, sent, sum(measured.sent()),
                   measured.temporaries / MIB)
        rows.append([stage, *(f"{mib:,.0f}" for mib in figures)])
    return table(columns, rows)
