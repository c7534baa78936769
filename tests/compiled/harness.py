"""Compiles training steps for simulated GPUs, and returns what ZeRO expects of them."""

import dataclasses
import functools
import re
from typing import Any

import jax
import models
import optax

import zerojax as zj
from zerojax.hlo import collectives
from zerojax.hlo.program import Shape, parse
from zerojax.layout import topology
from zerojax.plan import provenance, theory
from zerojax.trees import path_of

LARGE = 64 * 1024  # bytes; smaller collectives are those of scalars and of leaves that stay whole
WAYS = {"global": "global", "per_device": "per_device", "own": None, "own_sum": None}
BY_PARTS = ("per_device", "own_sum")
ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A program: a model of `models.CASES`, a policy, and the examples per device and microbatch.

    Attributes:
      way: a way to differentiate, or a user's own loop whose loss is a mean ("own") or a sum
        ("own_sum").
    """

    case: str
    stage: int
    way: str
    accumulate: int = 1
    replicas: int = 1
    reduce: str = "bfloat16"
    topology: str = "h200:1x8"
    rows: int = 1

    def __str__(self):
        return "-".join(str(v) for v in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled program of a `Spec`."""

    spec: Spec
    zero: zj.Zero
    mesh: dict[str, int]
    params: Any
    collectives: tuple[collectives.Collective, ...]
    text: str
    memory: Any
    batch_bytes: int

    def large(self, kind: str) -> list[tuple[collectives.Collective, Shape]]:
        """Returns the large collectives of a kind, once for each of their arrays."""
        return [(c, s) for c in self.collectives for s in c.shapes
                if c.kind == kind and s.bytes >= LARGE]

    def wire(self, kind: str) -> float:
        """Returns the bytes that each device sends for the large collectives of a kind."""
        return sum(c.wire(s) for c, s in self.large(kind))


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def own_loop(zero, loss, tx, spec):
    """Returns a step as a user of linen writes it."""

    def total(params, batch):
        return loss({"params": params}, batch)

    def mean(params, batch):
        result = total(params, batch)
        return result.total / result.weight

    def step(state, batch):
        how = total if spec.way in BY_PARTS else mean
        _, grads = zero.value_and_grad(how, accumulate=spec.accumulate)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    return step


@functools.lru_cache(maxsize=4)
def program(spec: Spec) -> Program:
    mesh = zj.make_mesh(devices=topology.devices(spec.topology), replica=spec.replicas)
    case, tx = models.CASES[spec.case](), optax.adam(1e-3)
    precision = zj.Precision(compute="bfloat16", reduce=spec.reduce)
    zero = zj.Zero(mesh, spec.stage, gradients=WAYS[spec.way], precision=precision)
    state = zero.abstract(case.init, tx, *case.example)
    batch = case.batch(mesh.size * spec.accumulate * spec.rows)
    options = topology.COMPILER_OPTIONS
    if spec.way.startswith("own"):
        step = zero.jit(own_loop(zero, case.loss, tx, spec), compiler_options=options)
    else:
        step = zero.train_step(case.loss, tx, accumulate=spec.accumulate, compiler_options=options)
    compiled = step.lower(state, batch).compile()
    text = compiled.as_text()
    found = collectives.of(parse(text), provenance.source)
    return Program(spec, zero, dict(mesh.shape), state.params, found, text,
                   compiled.memory_analysis(), nbytes(batch))


def expected(p: Program) -> dict[str, float]:
    """Returns the bytes that each device sends, by kind, if parameters follow `theory.wire`."""
    again = models.CASES[p.spec.case]().again
    shards, replicas = p.mesh["data"], p.spec.replicas
    out = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    for path, x in jax.tree.leaves_with_path(p.params):
        if x.sharding.is_fully_replicated:
            continue
        wire = theory.wire(p.spec.stage, p.spec.accumulate, per_device=p.spec.way in BY_PARTS,
                           regathered=bool(re.match(again, path_of(path))))
        reduced = x.size * wire.reduced * ITEMSIZE[p.spec.reduce]
        out["all-gather"] += x.size * wire.gathered * 2 * (shards - 1) / shards
        out["reduce-scatter"] += reduced * (shards - 1) / shards
        out["all-reduce"] += reduced / shards * 2 * (replicas - 1) / replicas
    return out
