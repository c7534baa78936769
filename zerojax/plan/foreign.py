"""Why an array that a collective moves is none of ZeRO's."""

from collections.abc import Sequence

import jax.numpy as jnp

from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Shape
from zerojax.layout.rules import Leaf
from zerojax.plan import provenance
from zerojax.plan.demand import Demand
from zerojax.plan.moves import Move
from zerojax.trees import itemsize
from zerojax.wire import GATHERS

_FLOATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


def reason(demand: Demand, c: Collective, s: Shape) -> str:
    """Returns the reason why an array is none of ZeRO's; empty if it is one."""
    axes = set(c.axes(demand.policy.mesh.shape) or ())
    if c.kind == "all-reduce":
        return _reduction(demand, c, s, _leaves(demand.owners(s)), axes)
    if moves := demand.owners(s, c.kind, axes):
        return _wide(demand, c, s, moves)
    owners = _leaves(demand.owners(s))
    if c.kind not in {move.kind for move in demand.moves} | {"all-gather", "reduce-scatter"}:
        return ("ZeRO moves nothing this way: an array changes its layout between devices, for "
                "example a batch that is reshaped into microbatches (train_step(accumulate=...) "
                "splits it without), or a table read at indices that other devices hold")
    if not owners:
        return ("no parameter has this shape: it is the batch, an activation or its gradient. "
                "Either the parameters are not read through zerojax, so that XLA moves "
                "activations in their place, or the model contracts over the batch")
    if c.kind == "reduce-scatter" and not any(leaf.trained for leaf in owners):
        return f"{owners[0].path} is frozen, but a gradient of it is reduced"
    wanted = [sorted(move.axes) for move in demand.owners(s, c.kind)]
    if not wanted:
        return (f"a parameter is moved by {c.kind}, where ZeRO's kinds are "
                f"{', '.join(dict.fromkeys(move.kind for move in demand.owners(s)))}")
    return (f"a parameter is moved over {sorted(axes) or 'other groups'}, not over "
            f"{' or '.join(dict.fromkeys(map(str, wanted)))}")


def _leaves(moves: Sequence[Move]) -> list[Leaf]:
    return list(dict.fromkeys(move.leaf for move in moves))


def _wide(demand: Demand, c: Collective, s: Shape, moves: Sequence[Move]) -> str:
    """Returns the reason why a parameter moves in too wide a dtype, or an empty string."""
    dtypes = [move.dtype for move in moves]
    wanted = min(dtypes, key=itemsize)
    if s.dtype in map(hlo_name, dtypes) or itemsize(wanted) * s.elements >= s.bytes:
        return ""
    if c.kind == "all-gather":
        setting = "Wire gather" if wanted in GATHERS else "Precision compute"
        return (f"a parameter is gathered as {s.dtype}, not as {hlo_name(wanted)} ({setting}="
                f"{wanted!r}): it is cast after the gather; train_step and zero.gathered "
                "cast before it")
    return (f"a parameter is reduced as {s.dtype}, not as {hlo_name(wanted)} (Precision reduce="
            f"{wanted!r}): the product that it comes from is of that dtype")


def _reduction(demand: Demand, c: Collective, s: Shape, owners: Sequence[Leaf],
               axes: set[str]) -> str:
    if axes == {demand.policy.replica_axis}:
        return "" if s.elements <= demand.summed + demand.scattered else (
            "only shards of gradients are summed over the copies")
    if s.elements <= demand.summed and (not owners or demand.is_whole(s)):
        return ""
    if c.op_name and not c.differentiated and not provenance.by_the_pair(c.frames):
        return "it is outside of the loss and its gradient: something else in the step communicates"
    if owners and "scatter" in c.op_name and c.trips > demand.accumulate:
        return ("the gradient of a table that is looked up in a loop is summed in each iteration: "
                "look it up before the loop, or return zj.Loss, so that each device adds up its "
                "own part first")
    models = ", ".join(sorted(axes - set(demand.policy.batch_axes)))
    if models and not demand.per_device:
        return (f"gradients of parameters that are not split over {models} are summed over "
                f"{models} and the batch at once, and are whole on every device. Return zj.Loss, "
                "so that each device reduces the gradients of its own part")
    return _summed_whole(demand, c, s, owners)


def _summed_whole(demand: Demand, c: Collective, s: Shape, owners: Sequence[Leaf]) -> str:
    padded = [leaf for leaf, place in demand.sharded if place.kept and leaf.trained]
    if padded and not demand.per_device and c.backward:
        return (f"gradients are summed whole, for example that of {padded[0].path}, which is "
                "padded (Zero(uneven='pad')): with one loss the padding precedes the sum. Return "
                "zj.Loss, so that each device pads its own part's")
    computes = hlo_name(demand.policy.precision.compute_dtype)
    cast = (f"; or the model computes in {s.dtype} where Precision(compute=...) says {computes}, "
            "and the cast keeps XLA from reducing to shards: give its layers that dtype, or "
            "return zj.Loss"
            if c.backward and s.dtype != computes else "")
    if owners:
        return ("the gradient of a sharded parameter is summed whole on every device; a "
                "reduce-scatter would leave each its shard. The parameter is not read through "
                "zerojax, or it is looked up at indices that do not depend on the example "
                "(positions), or twice after one read (gradients='per_device' adds up first)"
                + cast)
    return ("activations are summed over the batch's devices, as in tensor parallelism, or "
            "gradients are summed whole where a reduce-scatter would leave each device its shard: "
            "parameters are not read through zerojax, several are stacked or concatenated and "
            "used as one, the model contracts over the batch, or a table is looked up at indices "
            "that do not depend on the example (positions: make them a parameter of their own "
            "shape, or return zj.Loss)" + cast)


def hlo_name(dtype: str) -> str:
    """Returns HLO's name of a dtype.

    >>> hlo_name("bfloat16"), hlo_name("uint8"), hlo_name("float8_e4m3fn")
    ('bf16', 'u8', 'f8e4m3fn')
    """
    if dtype in _FLOATS:
        return _FLOATS[dtype]
    short = dtype.replace("float8_", "f8").replace("float4_", "f4")
    if not jnp.issubdtype(dtype, jnp.integer):
        return short
    return short.replace("uint", "u").replace("int", "s")
