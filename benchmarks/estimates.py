"""Estimated speeds beside those that others measured: plans of published training runs.

    python benchmarks/estimates.py          # the tables of results.md; plans are kept on disk
    python benchmarks/estimates.py --fit    # the constants that fit half of the rows best

The rows of published.csv are from
- mosaicml/llm-foundry, scripts/train/benchmarking/README.md, H100 80GB BF16: PyTorch FSDP;
- AI-Hypercomputer/maxtext, src/maxtext/configs/gpu/a3/llama_2_7b/README.md: JAX, FSDP within a host
  and replicas over hosts, TFLOP/s converted to tokens/s by MaxText's count at the time (6 N, whole
  attention);
- pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: FSDP with
  torch.compile.

An estimate is compared in tokens/s, so that the definition of MFU does not matter. Constants are
fitted to the rows of llm-foundry with an even index in the file; all others are held out.
"""

import csv
import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import decoders
import jax
import jax.numpy as jnp
import optax
from machine import table

import zerojax as zj
from zerojax.hlo import schedule, speed
from zerojax.layout import gpus

H100 = gpus.GPUS["h100"]
HARDWARE = {  # by table
    "llm-foundry": H100,  # the network is not stated
    "maxtext": dataclasses.replace(H100, network=12.5e9),  # A3 High: 800 Gb/s for 8 GPUs
    "torchtitan": dataclasses.replace(H100, bandwidth=2_400_000_000_000),  # HBM2e
}
ATTENTION = {  # of the dense peak, by table
    "llm-foundry": 0.18,  # the kernels of 2023, fitted
    "maxtext": speed.ATTENTION,  # cuDNN's
    "torchtitan": 0.35,  # FlashAttention-2 on the H100, according to FlashAttention-3's abstract
}
COLUMNS = ("model", "GPUs", "sequence", "microbatch", "repeated", "stage", "published MFU, %",
           "estimated MFU, %", "error", "network, %", "constants")
SUMMARY = ("source", "rows", "median error", "worst", "bias", "pairs in order",
           "pairs that differ by 5 % in order")


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run.

    Attributes:
      microbatch: the examples per GPU and microbatch.
      remat: the blocks that are repeated in the backward pass: "full", "selective" or "none".
      stage: of ZeRO; PyTorch's FULL_SHARD is 3, SHARD_GRAD_OP is 2.
      tokens: the published tokens per second and GPU.
      mfu: the published MFU in percent, by the definition of the table.
    """

    table: str
    model: str
    gpus: int
    sequence: int
    microbatch: int
    accumulate: int
    remat: str
    stage: int
    tokens: float
    mfu: float

    @property
    def tokens_per_step(self) -> int:
        """The tokens per GPU and step."""
        return self.microbatch * self.accumulate * self.sequence


def rows() -> list[Row]:
    """Returns the rows of published.csv."""
    text = (pathlib.Path(__file__).parent / "published.csv").read_text()
    lines = list(csv.reader(line for line in text.splitlines() if not line.startswith("#")))
    kinds = [field.type for field in dataclasses.fields(Row)]
    return [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True)))
            for line in lines[1:]]


def plan(row: Row) -> zj.Plan:
    """Returns the plan of the run, compiled or from the cache on disk."""
    mesh = _mesh(row)
    zero = zj.Zero(mesh, row.stage, precision=zj.Precision(compute="bfloat16"),
                   replica_axis="replica" if "replica" in mesh.shape else None)
    model, tx = decoders.of(row.model, row.remat, mesh), optax.adamw(1e-4)
    example = jax.ShapeDtypeStruct((row.gpus, row.sequence), jnp.int32)
    state = zero.abstract(model.init, tx, jax.random.key(0), example)
    step = zero.train_step(functools.partial(decoders.loss, model), tx, accumulate=row.accumulate,
                           clip_norm=1.0)
    batch = (row.gpus * row.microbatch * row.accumulate, row.sequence)
    return step.plan(state, jax.ShapeDtypeStruct(batch, jnp.int32))


def _mesh(row: Row):
    """MaxText shards within hosts and replicates over hosts; the others shard over all GPUs."""
    hosts = max(1, row.gpus // 8)
    topology = zj.Topology(HARDWARE[row.table], hosts, row.gpus // hosts)
    replicas = hosts if row.table == "maxtext" and hosts > 1 else None
    return zj.make_mesh(topology=topology, **({"replica": replicas} if replicas else {}))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row and its plan."""

    index: int
    row: Row
    plan: zj.Plan

    @property
    def fitted(self) -> bool:
        """Whether it is among the rows to which constants were fitted."""
        return self.row.table == "llm-foundry" and self.index % 2 == 0

    def run(self, products: float, attention: float) -> schedule.Run:
        reading = self.plan.reading
        reached = dataclasses.replace(reading.speed, products=products, attention=attention)
        return schedule.simulate(reading.program, reached, reading.collectives)[
            reading.program.entry]

    def ratio(self, products: float, attention: float) -> float:
        """Returns the estimated speed, divided by the published one."""
        seconds = self.run(products, attention).seconds
        return self.row.tokens_per_step / seconds / self.row.tokens


def cases() -> list[Case]:
    return [Case(i, row, plan(row)) for i, row in enumerate(rows())]


def fit(found: Sequence[Case]) -> tuple[float, float]:
    """Returns the parts of the peak that products and llm-foundry's attention kernels reach, in
    steps of 0.01, with the smallest mean absolute error."""
    mine = [case for case in found if case.fitted]
    grid = [n / 100 for n in range(10, 81)]

    @functools.cache
    def error(products: float, attention: float) -> float:
        return statistics.mean(abs(c.ratio(products, attention) - 1) for c in mine)

    best, before = (0.7, 0.2), None
    while best != before:
        before = best
        best = (min(grid, key=lambda products: error(products, best[1])), best[1])
        best = (best[0], min(grid, key=lambda attention: error(best[0], attention)))
    return best


def ratios(found: Iterable[Case]) -> dict[Case, float]:
    return {c: c.ratio(speed.PRODUCTS, ATTENTION[c.row.table]) for c in found}


def rows_table(found: Iterable[Case]) -> str:
    return table(COLUMNS, [_line(case) for case in found])


def _line(case: Case) -> list[str]:
    row, run = case.row, case.run(speed.PRODUCTS, ATTENTION[case.row.table])
    ratio = row.tokens_per_step / run.seconds / row.tokens
    return [row.model + ("" if case.plan.fits else " \\*"), row.gpus, row.sequence,
            f"{row.microbatch} x {row.accumulate}", row.remat, row.stage, f"{row.mfu:.1f}",
            f"{row.mfu * ratio:.1f}", f"{ratio - 1:+.1%}",
            f"{run.busy['network'] / run.seconds:.1%}", "fitted" if case.fitted else "held out"]


def summary(found: Sequence[Case]) -> str:
    made = ratios(found)
    halves = {"llm-foundry, fitted half": lambda c: c.fitted,
              "llm-foundry, held out": lambda c: c.row.table == "llm-foundry" and not c.fitted,
              "maxtext": lambda c: c.row.table == "maxtext",
              "torchtitan": lambda c: c.row.table == "torchtitan"}
    return table(SUMMARY, [_judged(name, {c: r for c, r in made.items() if choose(c)})
                           for name, choose in halves.items()])


def _judged(name: str, made: dict[Case, float]) -> list:
    errors = [ratio - 1 for ratio in made.values()]
    worst = max(errors, key=abs)
    return [name, len(errors), f"{statistics.median(map(abs, errors)):.1%}", f"{worst:+.1%}",
            f"{statistics.median(errors):+.1%}", _in_order(made, 1.0), _in_order(made, 1.05)]


def _in_order(made: dict[Case, float], least: float) -> str:
    """Returns how many pairs have the published order of MFU, of those whose MFU differs by a
    factor."""
    right = []
    for (a, x), (b, y) in itertools.combinations(made.items(), 2):
        if max(a.row.mfu, b.row.mfu) >= least * min(a.row.mfu, b.row.mfu):
            right.append((a.row.mfu > b.row.mfu) == (a.row.mfu * x > b.row.mfu * y))
    return f"{sum(right)} of {len(right)}"


def markdown() -> str:
    found = cases()
    tables = dict.fromkeys(case.row.table for case in found)
    parts = [f"{name}:\n\n{rows_table([c for c in found if c.row.table == name])}"
             for name in tables]
    note = "\\* does not fit the GPU's memory by the plan; XLA then repeats operations.\n"
    return "\n".join([summary(found), *parts, note])


if __name__ == "__main__":
    if "--fit" in sys.argv:
        print("products {}, attention of llm-foundry {}".format(*fit(cases())))
    else:
        print(markdown())
