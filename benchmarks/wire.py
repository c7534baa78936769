"""Fewer bytes between hosts: bytes and estimated time of each format, and how training converges.

    python benchmarks/run.py wire        # plans of 7 B parameters on 64 GPUs: two minutes
    python benchmarks/run.py converge    # 1,000 steps of examples/train_gpt.py in each format
"""

import pathlib
import sys

import jax
import numpy as np
import optax
from machine import table

import zerojax as zj

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "compiled"))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import models
import train_gpt

TOPOLOGY, SEQ, ROWS = "h100:8x8", 2048, 2
STEPS, BATCH, LAST = 1000, 32, 50
GIB = 2**30
CASE = models.language(models.Transformer(width=4096, layers=32, vocab=32000))
TX = optax.adamw(1e-4)
INT8 = zj.Wire("int8", "int8")
COLUMNS = ("64 H100s, 8 hosts, 6.7 B", "sent, GiB", "off host, GiB", "exposed, ms", "step, ms",
           "peak, GiB")
PLANS = {  # name: (hosts, reduce dtype, settings)
    "flat, bf16": (1, "bfloat16", {}),
    "flat, fp32 reduction": (1, "float32", {}),
    "flat, bf16 exchanged, fp32 sums": (1, "float32", {"wire": zj.Wire(reduce="bfloat16")}),
    "hosts x GPUs, bf16 exchanged": (8, "float32", {"wire": zj.Wire(reduce="bfloat16")}),
    "hosts x GPUs, bf16, second copy": (8, "bfloat16", {"secondary": "data"}),
    "flat, int8 gathers": (1, "bfloat16", {"wire": zj.Wire("int8")}),
    "flat, int8 both": (1, "bfloat16", {"wire": INT8}),
    "hosts x GPUs, int8 both, second copy": (8, "bfloat16", {"secondary": "data", "wire": INT8}),
}
RUNS = {
    "bf16": (1, {}),
    "bf16 exchanged, fp32 sums": (1, {"wire": zj.Wire(reduce="bfloat16")}),
    "bf16 exchanged, two hosts": (2, {"wire": zj.Wire(reduce="bfloat16")}),
    "int8 gathers": (1, {"wire": zj.Wire("int8")}),
    "float8 gathers": (1, {"wire": zj.Wire("float8_e4m3fn")}),
    "int8 both": (1, {"wire": INT8}),
    "int8 both, two hosts, second copy": (2, {"wire": INT8, "secondary": "data"}),
}


def plan(hosts, reduce, settings) -> zj.Plan:
    mesh = zj.make_mesh(topology=TOPOLOGY, hosts=hosts)
    precision = zj.Precision(compute="bfloat16", reduce=reduce)
    zero = zj.Zero(mesh, 3, precision=precision, **settings)
    state = zero.abstract(CASE.init, TX, *CASE.example)
    batch = jax.ShapeDtypeStruct((ROWS * mesh.size, SEQ), "int32")
    return zero.train_step(CASE.loss, TX).plan(state, batch).check()


def wire_table() -> str:
    rows = []
    for name, given in PLANS.items():
        made = plan(*given)
        rows.append([name, f"{made.sent / GIB:.2f}", f"{made.between / GIB:.2f}",
                     f"{made.compute.busy['network'] * 1e3:.0f}",
                     f"{made.compute.seconds * 1e3:.0f}", f"{made.memory.peak / GIB:.2f}"])
    return table(COLUMNS, rows)


def train(hosts, settings) -> tuple[float, float]:
    """Returns the mean loss of the last steps, and that of held-out text."""
    mesh = zj.make_mesh(devices=jax.devices()[:8], hosts=hosts)
    zero = zj.Zero(mesh, 3, precision=zj.Precision(compute="bfloat16"), min_shard=2**10, **settings)
    tx = train_gpt.optimizer(STEPS)
    step, evaluate = zero.train_step(train_gpt.loss_fn, tx, clip_norm=1.0), zero.eval_step(
        train_gpt.loss_fn)
    state, losses = zero.init(train_gpt.init, tx), []
    text, held_out = train_gpt.read_text()
    for batch in zj.feed(train_gpt.windows(text, BATCH, 0, STEPS), zero):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    tested = [evaluate(state, batch)["loss"]
              for batch in zj.feed(train_gpt.windows(held_out, BATCH, 1, 32), zero)]
    return float(np.mean(losses[-LAST:])), float(np.mean(tested))


def converge_table() -> str:
    if len(jax.devices()) < 8:
        return "needs eight devices: JAX_NUM_CPU_DEVICES=8 python benchmarks/run.py converge\n"
    found = {name: train(*given) for name, given in RUNS.items()}
    base = found["bf16"]
    rows = [[name, f"{last:.4f}", f"{last / base[0] - 1:+.2%}", f"{tested:.4f}",
             f"{tested / base[1] - 1:+.2%}"] for name, (last, tested) in found.items()]
    return table((f"{STEPS} steps", f"loss, last {LAST} steps", "to bf16 (aim 0.5 %)",
                  "held-out loss", "to bf16"), rows)
