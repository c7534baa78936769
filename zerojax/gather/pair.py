"""The pair that ZeRO is made of: gather makes a shard whole, scatter reduces its cotangent.

    gather    x[spec] params  ->  cast  ->  x[spec] compute  ->  all-gather  ->  w[whole] compute
    scatter   ct[whole] partial sums    ->  reduce-scatter   ->  ct[spec] params

Both are annotations, `with_sharding_constraint` and sums over a mapped axis, for which XLA emits
the collectives. Each annotation has a reason (docs/how_it_works.md has the measurements):

- The cast precedes the gather. Otherwise the wire carries the parameters' dtype.
- A constraint to `spec` separates the cast from the gather. Otherwise XLA moves the cast behind
  the gather.
- In scatter, a constraint to `whole` precedes the one to `spec`. Otherwise the embedding gradient
  of a small batch gathers the activations of the whole batch instead of reducing the table.

A read is `pair.read(x, pair.gather(x))`: the gather passes no cotangent back, and the read scatters
the cotangent to `x`. `rewrite` decides where a program reads.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from zerojax.layout import padded, rules

PARTS = "zerojax_parts"  # the mapped axis over which each device differentiates its own part
SCOPE = "zerojax"  # the named scope of the pair's constraints


class Reduction(enum.Enum):
    """How scatter reduces a cotangent.

    With one loss, XLA knows the cotangent as partial sums, and reduces them where a constraint
    asks for a shard:

    - VIA_WHOLE: The cotangent is constrained to `whole`, then to `spec` (see the module docstring).
    - DIRECT: The cotangent is constrained to `spec` only. With replicas, VIA_WHOLE would all-reduce
      whole gradients over all devices.

    Where each device differentiates its own part, under vmap over `PARTS`, the sum over the parts
    is an operation of the program:

    - SUM_AT_READ: Each read sums its cotangents over the parts.
    - SUM_AT_END: The parts keep their cotangents, which are summed at the end of the step.
    """

    VIA_WHOLE = enum.auto()
    DIRECT = enum.auto()
    SUM_AT_READ = enum.auto()
    SUM_AT_END = enum.auto()


@dataclasses.dataclass(frozen=True)
class Pair:
    """Gather and scatter for one parameter, as a hashable value that jax can cache by.

    Attributes:
      mesh: The mesh of all specs.
      spec, whole: Specs of the shard and of the gathered parameter, one entry per dimension.
      params, compute, reduce: dtypes, as in `Precision`.
      axes: The mesh axes over which ZeRO shards.
      replica: The mesh axis of the copies of a sharded state, or None.
      reduction: How scatter reduces the cotangent.
      wide: With one loss, a wider dtype in which the program also reads the parameter, or "".
      least: The fewest elements for which a slice is gathered on its own.
      extra: The rows of zeros at the end of each dimension of the shard, or () for no padding.
    """

    mesh: Mesh | AbstractMesh
    spec: P
    whole: P
    params: str
    compute: str
    reduce: str
    axes: tuple[str, ...]
    replica: str | None = None
    reduction: Reduction = Reduction.VIA_WHOLE
    wide: str = ""
    least: int = 1
    extra: tuple[int, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether ZeRO shards the parameter."""
        return self.spec != self.whole

    def shards(self, dimension: int) -> bool:
        """Whether ZeRO shards one dimension of the parameter."""
        return self.spec[dimension] != self.whole[dimension]

    @property
    def per_device(self) -> bool:
        """Whether each device differentiates its own part."""
        return self.reduction in (Reduction.SUM_AT_READ, Reduction.SUM_AT_END)

    @property
    def at_end(self) -> bool:
        """Whether cotangents are summed over the parts at the end of the step."""
        return self.reduction is Reduction.SUM_AT_END

    def only(self, dimensions: Sequence[int]) -> "Pair":
        """Returns the pair for an array with only these dimensions, in their order."""
        spec, whole = (P(*(spec[i] for i in dimensions)) for spec in (self.spec, self.whole))
        extra = tuple(self.extra[i] for i in dimensions) if self.extra else ()
        return dataclasses.replace(self, spec=spec, whole=whole, extra=extra)

    def accumulated(self) -> "Pair":
        """Returns the pair for one loss whose cotangent a loop sums before scatter reduces it.

        It passes through `whole` even with replicas: XLA would otherwise reduce the cotangent in
        each iteration.
        """
        return dataclasses.replace(self, reduction=Reduction.VIA_WHOLE)

    def logical(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns a shard's global shape without the rows of zeros."""
        if not self.extra:
            return shape
        return tuple(n - rows for n, rows in zip(shape, self.extra, strict=True))

    def constrain(self, x: jax.Array, spec: P) -> jax.Array:
        """Returns `x` with a constraint to `spec`, in the pair's named scope."""
        with jax.named_scope(SCOPE):
            return jax.lax.with_sharding_constraint(x, rules.sharding(self.mesh, spec))

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns the whole parameter in the compute dtype, with no cotangent."""
        x = jax.lax.stop_gradient(x).astype(self.compute)
        gathered = self.constrain(self.constrain(x, self.spec), self.whole) if self.sharded else x
        return padded.cut(gathered, self.logical(x.shape))

    def read(self, x: jax.Array, gathered: jax.Array, dtype: str | None = None) -> jax.Array:
        """Returns `gathered` with its cotangent scattered to `x`.

        A `dtype` wider than the compute dtype widens the result and its cotangent.
        """
        pair = dataclasses.replace(self, params=str(x.dtype))
        return _read(pair, dtype or self.compute)(x, gathered)

    def scatter(self, ct: jax.Array) -> jax.Array:
        """Returns the cotangent of the shard, from that of the gathered parameter."""
        ct = padded.filled(ct, self._padded(ct.shape))
        match self.reduction:
            case Reduction.SUM_AT_READ:
                return _sum_at_read(self)(ct, jax.lax.axis_index(PARTS))
            case Reduction.SUM_AT_END:
                ct = self.constrain(ct, self.whole)
            case Reduction.VIA_WHOLE if self.sharded:
                ct = self.constrain(self.constrain(ct, self.whole), self.spec)
            case Reduction.DIRECT if self.sharded:
                ct = self.constrain(ct, self.spec)
        return ct.astype(self.params)

    def sum_parts(self, ct: jax.Array) -> jax.Array:
        """Returns the sum over the parts of their cotangents, at `spec`.

        The cotangents `[parts, *shape]`, one part per device, are summed in the reduce dtype, which
        is also the dtype on the wire.
        """
        ct = ct.astype(self.reduce)
        if self.replica is None:
            ct = self.constrain(ct, P(self.axes, *self.whole))
        else:
            ct = self._sum_in_replicas(ct, self.replica)
        return self.constrain(_sum(ct, 0), self.spec).astype(self.params)

    def _sum_in_replicas(self, ct, replica: str):
        """Returns the sums `[replicas, *shape]` within each replica: only shards cross replicas."""
        ct = ct.reshape(self.mesh.shape[replica], -1, *ct.shape[1:])
        ct = self.constrain(ct, P(replica, self.axes, *self.whole))
        return self.constrain(_sum(ct, 1), P(replica, *self.spec))

    def _padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.extra:
            return shape
        return tuple(n + rows for n, rows in zip(shape, self.extra, strict=True))


def _sum(x, axis):
    # jnp.sum would widen bfloat16, on the wire too
    return jax.lax.reduce_sum(x, axes=(axis,))


@functools.lru_cache(maxsize=4096)
def _read(pair: Pair, dtype: str):
    """Returns the function that `Pair.read` applies to the shard and the gathered parameter."""

    @jax.custom_vjp
    def read(x, gathered):
        return gathered.astype(dtype)

    def forward(x, gathered):
        return read(x, gathered), None  # read itself, so that a second derivative sees x

    def backward(_, ct):
        return pair.scatter(ct), None

    read.defvjp(forward, backward)
    return read


@functools.lru_cache(maxsize=4096)
def _sum_at_read(pair: Pair):
    """Returns a function of a cotangent and the index of its part, which sums over the parts."""

    @jax.custom_batching.custom_vmap
    def scatter(ct, part):
        return pair.constrain(ct, pair.spec).astype(pair.params)

    @scatter.def_vmap
    def batched(size, mapped, ct, part):
        ct_mapped, _ = mapped
        if not ct_mapped:  # all parts have the same cotangent
            ct = jnp.broadcast_to(ct, (size, *ct.shape))
        return pair.sum_parts(ct), False

    return scatter
