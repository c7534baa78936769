"""The pair that ZeRO is made of: gather (shard to whole, in the compute dtype), scatter (its transpose).

    gather    x[spec] params  ->  cast  ->  x[spec] compute  ->  all-gather  ->  w[whole] compute
    scatter   ct[whole] partial sums    ->  reduce-scatter   ->  ct[spec] params

Both are annotations: `with_sharding_constraint`, and sums over a mapped axis; XLA emits the collectives. Why each
constraint is there (docs/how_it_works.md has the measurements):

- cast before the gather: else the wire carries the parameters' dtype;
- the sharded constraint between cast and gather: else XLA moves the cast behind the gather;
- the whole constraint before the sharded one in scatter: else a small batch's embedding gradient gathers the
  whole batch's activations instead of reducing the table.

A read is `g.read(x, g.top(x))`: the gather has no cotangent of its own, the read has the scatter behind it. `rewrite` says
where a program reads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from zerojax.layout import padded, rules

PARTS = "zerojax_parts"  # the mapped axis over which each device differentiates its own part
SCOPE = "zerojax"  # the name of the pair's constraints


@dataclasses.dataclass(frozen=True)
class Gather:
    """How one parameter becomes whole and how its cotangent is reduced; a value, so jax caches by it.

    Attributes:
      mesh: all specs are over it.
      spec, whole: at rest and gathered, one entry a dimension.
      params, compute, reduce: dtypes, as in `Precision`.
      axes: ZeRO's axes; replica: the axis of copies, or None.
      per_device: each device differentiates its own part, under vmap over `PARTS`.
      local: per device only; the cotangent is left as it is, one a part, for a reduction at the end of the step.
      whole_first: one loss only; the cotangent passes through the whole spec (see above). With replicas this would
        reduce whole gradients over everything, so only what a loop accumulates does: else each turn would reduce.
      wide: one loss only; a wider dtype in which the program also reads it, or "".
      least: a slice of fewer elements is not worth a gather of its own.
      extra: rows of zeros at the end of each dimension, at rest; () of none.
    """

    mesh: Mesh | AbstractMesh
    spec: P
    whole: P
    params: str
    compute: str
    reduce: str
    axes: tuple[str, ...]
    replica: str | None = None
    per_device: bool = False
    local: bool = False
    whole_first: bool = True
    wide: str = ""
    least: int = 1
    extra: tuple[int, ...] = ()

    @property
    def sharded(self) -> bool:
        return self.spec != self.whole

    def at_rest(self, index: int) -> bool:
        """Whether dimension `index` is sharded."""
        return self.spec[index] != self.whole[index]

    def only(self, dims: tuple[int, ...]) -> "Gather":
        """For an array of those dimensions alone, in that order."""
        pick = lambda spec: P(*(spec[i] for i in dims))
        extra = tuple(self.extra[i] for i in dims) if self.extra else ()
        return dataclasses.replace(self, spec=pick(self.spec), whole=pick(self.whole), extra=extra)

    def logical(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array that is kept in another."""
        return tuple(n - more for n, more in zip(kept, self.extra, strict=True)) if self.extra else kept

    def accumulated(self) -> "Gather":
        """For a cotangent that a loop sums."""
        return dataclasses.replace(self, whole_first=True)

    def constrain(self, x: jax.Array, spec: P) -> jax.Array:
        with jax.named_scope(SCOPE):
            return jax.lax.with_sharding_constraint(x, rules.sharding(self.mesh, spec))

    def top(self, x: jax.Array) -> jax.Array:
        """`x` whole in the compute dtype, with no cotangent."""
        x = jax.lax.stop_gradient(x).astype(self.compute)
        whole = self.constrain(self.constrain(x, self.spec), self.whole) if self.sharded else x
        return padded.cut(whole, self.logical(x.shape))

    def read(self, x: jax.Array, gathered: jax.Array, dtype: str | None = None) -> jax.Array:
        """`gathered`, in the wider `dtype` if one is named, whose cotangent is scattered to `x`."""
        return _read(dataclasses.replace(self, params=str(x.dtype)), dtype or self.compute)(x, gathered)

    def _backward(self, ct):
        ct = padded.filled(ct, [d + more for d, more in zip(ct.shape, self.extra, strict=True)]) if self.extra else ct
        if self.local:
            return self.constrain(ct, self.whole).astype(self.params)
        if not self.per_device:
            return self._partial_sums(ct).astype(self.params)
        return _scatter(self)(ct, jax.lax.axis_index(PARTS))

    def _partial_sums(self, ct):
        """One loss: XLA knows `ct` as partial sums, and reduces where it has to be sharded."""
        if not self.sharded:
            return ct
        return self.constrain(self.constrain(ct, self.whole) if self.whole_first else ct, self.spec)

    def sum_parts(self, ct: jax.Array) -> jax.Array:
        """`[parts, *shape]`, one cotangent a device, to their sum `[*shape]` at `spec`, in the reduce dtype on the wire."""
        ct = ct.astype(self.reduce)
        if self.replica is None:
            ct = self.constrain(ct, P(self.axes, *self.whole))
        else:  # shards first, then copies: only a shard crosses between replicas
            ct = ct.reshape(self.mesh.shape[self.replica], -1, *ct.shape[1:])
            ct = self.constrain(ct, P(self.replica, self.axes, *self.whole))
            ct = self.constrain(_sum(ct, 1), P(self.replica, *self.spec))
        return self.constrain(_sum(ct, 0), self.spec).astype(self.params)


def _sum(x, axis):
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (axis,))  # jnp.sum would widen bfloat16, on the wire too


@functools.lru_cache(maxsize=4096)
def _read(g: Gather, dtype: str):
    read = jax.custom_vjp(lambda x, gathered: gathered.astype(dtype))
    # the rule calls the function, so that a second derivative sees x
    read.defvjp(lambda x, gathered: (read(x, gathered), None), lambda _, ct: (g._backward(ct), None))
    return read


@functools.lru_cache(maxsize=4096)
def _scatter(g: Gather):
    """`(ct, part)`: summed over the parts, over which `part` is mapped."""

    @jax.custom_batching.custom_vmap
    def scatter(ct, part):
        return g.constrain(ct, g.spec).astype(g.params)

    @scatter.def_vmap
    def batched(size, mapped, ct, part):
        ct_mapped, _ = mapped  # or it is the same for every part
        return g.sum_parts(ct if ct_mapped else jnp.broadcast_to(ct, (size, *ct.shape))), False

    return scatter
