"""A step as ZeRO wants it, and collectives that move its arrays."""

from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Frame, Shape, parse
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import provenance
from zerojax.plan.demand import Demand, Use

MESH = AbstractMesh((2, 4, 2), ("replica", "data", "model"), (AxisType.Auto,) * 3)
DATA = tuple(tuple(r * 8 + d * 2 + m for d in range(4)) for r in range(2) for m in range(2))
REPLICA = tuple((i, i + 8) for i in range(8))
BATCH = tuple(tuple(r * 8 + d * 2 + m for r in range(2) for d in range(4)) for m in range(2))
MODEL = tuple((i, i + 1) for i in range(0, 16, 2))
NESTED = Leaf("nested", (5, 6, 96, 128), "float32", P(*[None] * 4))
UP = Leaf("blocks/up", (6, 1024, 4096), "float32", P(None, None, "model"))
ODD = Leaf("odd", (333, 777), "float32", P(None, None))
LEAVES = (NESTED, UP, ODD)
PLACES = (Placement(P(None, None, "data", None), P(*[None] * 4)),
          Placement(P(None, "data", "model"), P(None, None, "model")),
          Placement(P(None, None), P(None, None), "indivisible"))


ONCE, AGAIN = Use(1, 1), Use(2, 1)  # read once; and gathered again in the backward pass


def demand(stage=3, accumulate=1, per_device=True, uses=(AGAIN, AGAIN, ONCE), **policy):
    precision = zj.Precision(compute="bfloat16", reduce="float32")
    zero = zj.Zero(MESH, stage, precision=precision, **policy)
    return Demand(zero, LEAVES, PLACES, accumulate, per_device, uses=uses)


def moved(kind, dims, groups=DATA, dtype="bf16", trips=6, backward=False, ours=True, name=None,
          path="jit(step)/jvp(M)/blocks/up"):
    path = "jit(step)/transpose(jvp(M))/blocks/up" if backward else path
    frames = (Frame(str(provenance.PAIR), 1, "top"),) if ours else ()
    return Collective(name or kind, kind, (Shape(dtype, dims),), groups, trips, True, "body",
                      path, frames)


def program(text=""):
    return parse("HloModule m, num_partitions=16\n\nENTRY %main (p: f32[]) -> f32[] {\n" + text
                 + "\n  ROOT %p = f32[] parameter(0)\n}\n")


OPTIMIZER = "jit(step)/zerojax_optimizer/dot"
LAYER = (1024, 2048)  # of 4096, half on each device of "model"
SCATTERED = [moved("reduce-scatter", LAYER, dtype="f32"),
             moved("reduce-scatter", (96, 128), dtype="f32", trips=30)]
GATHERED = [moved("all-gather", (96, 128), trips=30), moved("all-gather", LAYER)]
