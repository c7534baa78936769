"""One training step, annotated in each way, compiled for GPUs that are not there: (c) compile time, (d) what it communicates.

A decoder-only transformer of 534 M parameters, bfloat16 compute, fp32 Adam, one sequence of 2048 a GPU: scan over 8 layers,
remat. The models and the version by hand are those of `tests/compiled`.
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
KINDS = {"all-gather": {"all-gather"}, "reduce-scatter": {"reduce-scatter"}, "all-reduce": {"all-reduce"},
         "all-to-all, permute": {"all-to-all", "collective-permute"}}
MODEL = models.Transformer(width=2048, layers=8, vocab=32000)
SEQ, TX = 2048, optax.adam(1e-3)
CASE = models.language(MODEL)


@dataclasses.dataclass(frozen=True)
class Way:
    """A name, and for zerojax the policy; `accumulate` microbatches of one sequence a GPU each."""

    name: str
    stage: int | None = None
    gradients: str | None = None
    reduce: str | None = None
    accumulate: int = 1


TEXTBOOK, BY_HAND = Way("textbook annotation"), Way("`shard_map` by hand")
WAYS = (
    TEXTBOOK,
    BY_HAND,
    Way("stage 3, one loss", 3, "global"),
    Way("stage 3, per device, fp32 reduction", 3, "per_device", "float32"),
    Way("stage 2, one loss", 2, "global"),
    Way("stage 2, per device, fp32 reduction", 2, "per_device", "float32"),
    Way("stage 1, per device, fp32 reduction", 1, "per_device", "float32"),
)


@functools.cache
def setting(gpus: int, way: Way):
    """(policy, abstract state, abstract batch)."""
    mesh = zj.make_mesh(devices=topology.devices(f"h200:{max(1, gpus // 8)}x{min(8, gpus)}"))
    precision = zj.Precision(compute="bfloat16", reduce=way.reduce)
    zero = zj.Zero(mesh, 3 if way.stage is None else way.stage, precision=precision, gradients=way.gradients)
    state = zero.abstract(CASE.init, TX, *CASE.example)
    return zero, state, jax.ShapeDtypeStruct((gpus * way.accumulate, SEQ), "int32", sharding=zero.batch_sharding())


def textbook(state, batch):
    """Shardings on the step's inputs and outputs, a constraint on the gradients: what tutorials show."""
    at = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))

    def step(params, opt_state, tokens):
        grads = jax.grad(lambda p: CASE.loss({"params": p}, tokens).total / tokens.size)(params)
        grads = jax.lax.with_sharding_constraint(grads, at[0])
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step, donate_argnums=(0, 1), in_shardings=(*at, NamedSharding(batch.sharding.mesh, P("data"))),
                     out_shardings=at)
    return jitted.lower(state.params, state.opt_state, batch)


def lower(gpus: int, way: Way):
    zero, state, batch = setting(gpus, way)
    if way == TEXTBOOK:
        return textbook(state, batch)
    if way == BY_HAND:
        return reference.lower(zero.mesh, state, batch)
    return zero.train_step(CASE.loss, TX, accumulate=way.accumulate).lower(state, batch)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program: seconds it took, collectives, bytes per device."""

    lowering: float
    compiling: float
    collectives: tuple
    arguments: int
    temporaries: int

    def sent(self) -> list[float]:
        """MiB each device sends in a step, by kind, in the order of `KINDS`."""
        return [sum(c.wire_bytes for c in self.collectives if c.kind in kinds) / MIB for kinds in KINDS.values()]


@functools.cache
def measure(gpus: int, way: Way) -> Measured:
    setting(gpus, way)
    start = time.perf_counter()
    lowered = lower(gpus, way)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=topology.COMPILER_OPTIONS)
    memory = compiled.memory_analysis()
    return Measured(middle - start, time.perf_counter() - middle, collectives.of(parse(compiled.as_text())),
                    memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def predicted(gpus: int, way: Way) -> tuple[float, float]:
    """(MiB of state at rest, MiB sent in a step) by ZeRO's arithmetic, for all parameters."""
    params = jax.tree.leaves(setting(gpus, way)[1].params)
    itemsize = {"float32": 4, "bfloat16": 2, None: 2}[way.reduce]
    sent = 0.0
    for path, x in jax.tree.leaves_with_path(setting(gpus, way)[1].params):
        in_block = "blocks" in jax.tree_util.keystr(path)
        wire = theory.wire(way.stage, way.accumulate, per_device=way.gradients == "per_device", regathered=in_block)
        sent += wire.bytes(x.size, gpus, compute=2, reduce=itemsize)
    return theory.rest_bytes(sum(x.size for x in params), gpus, way.stage) / MIB, sent / MIB


def collectives_table(sizes=(8, 64, 512)) -> str:
    columns = ["GPUs", "way", *KINDS, "sent, MiB", "ZeRO's, MiB", "state, MiB", "ZeRO's, MiB", "temporaries, MiB"]
    rows = []
    for gpus in sizes:
        for way in WAYS:
            m = measure(gpus, way)
            theirs = ("", "") if way.stage is None else tuple(f"{x:,.1f}" for x in predicted(gpus, way))
            sent = [f"{x:,.1f}" for x in (*m.sent(), sum(m.sent()))]
            rows.append([gpus, way.name, *sent, theirs[1], f"{m.arguments / MIB:,.1f}", theirs[0], f"{m.temporaries / MIB:,.0f}"])
    return table(columns, rows)


def compile_table(gpus=8) -> str:
    base = measure(gpus, TEXTBOOK)
    rows = [[way.name, f"{m.lowering:.1f}", f"{m.compiling:.1f}",
             f"{(m.lowering + m.compiling) / (base.lowering + base.compiling):.2f}"] for way in WAYS if (m := measure(gpus, way))]
    return table([f"{gpus} GPUs", "trace and lower, s", "compile, s", "of textbook (aim 1.2)"], rows)


def stage_table(gpus=8, accumulate=4) -> str:
    """The README's: per stage, predicted beside compiled, in a step of `accumulate` microbatches."""
    columns = ["stage", "state predicted, MiB", "compiled", "sent a step predicted, MiB", "compiled", "temporaries compiled, MiB"]
    rows = []
    for stage in range(4):
        way = Way(f"{stage}", stage, "per_device", None, accumulate)
        m, (state, sent) = measure(gpus, way), predicted(gpus, way)
        rows.append([stage, *(f"{x:,.0f}" for x in (state, m.arguments / MIB, sent, sum(m.sent()), m.temporaries / MIB))])
    return table(columns, rows)
