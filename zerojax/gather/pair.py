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

Either may take two hops, and either may encode what travels (`formats`):

    two hops    x[spec] -> between hosts -> x[middle], kept for the backward pass -> x[whole]
    encoded     x -> codes and scales -> gather, or exchange and sum -> decoded
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from zerojax import wire
from zerojax.gather import formats
from zerojax.gather.formats import Format
from zerojax.layout import padded, rules

PARTS = "zerojax_parts"  # the mapped axis over which each device differentiates its own part
SCOPE = "zerojax"  # the named scope of the pair's constraints
SECOND_COPY = "zerojax_second_copy"  # the name of what the forward pass keeps for the backward pass


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
      axes: The mesh axes over which ZeRO shards, in the order of the batch's parts.
      replica: The mesh axis of the copies of a sharded state, or None.
      inner: The last of `axes`, over which a second hop runs; () for one hop.
      second_copy: Whether what is between the hops is kept for the backward pass.
      reduction: How scatter reduces the cotangent.
      wide: With one loss, a wider dtype in which the program also reads the parameter, or "".
      least: The fewest elements for which a slice is gathered on its own.
      extra: The rows of zeros at the end of each dimension of the shard, or () for no padding.
      gather_as, reduce_as: The dtypes of codes on the wire, as in `Wire`; "" for none.
      block: The largest number of elements that share a scale.
    """

    mesh: Mesh | AbstractMesh
    spec: P
    whole: P
    params: str
    compute: str
    reduce: str
    axes: tuple[str, ...]
    replica: str | None = None
    inner: tuple[str, ...] = ()
    second_copy: bool = False
    reduction: Reduction = Reduction.VIA_WHOLE
    wide: str = ""
    least: int = 1
    extra: tuple[int, ...] = ()
    gather_as: str = ""
    reduce_as: str = ""
    block: int = 0

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
        x = jax.lax.stop_gradient(x)
        if not self.sharded:
            return padded.cut(x.astype(self.compute), self.logical(x.shape))
        form = self._format(self.gather_as, x.shape) or Format(self.compute)
        payload = tuple(self._made_whole(part, form) for part in form.encode(x))
        return padded.cut(form.decode(payload, self.compute), self.logical(x.shape))

    def _made_whole(self, x: jax.Array, form: Format) -> jax.Array:
        x = self.constrain(x, form.spec(self.spec))
        if self.inner:
            x = self.constrain(x, form.spec(self._middle))
        if self.second_copy:  # what is kept takes the sharding of its use unless both bind it
            x = self.constrain(checkpoint_name(x, SECOND_COPY), form.spec(self._middle))
        return self.constrain(x, form.spec(self.whole))

    @property
    def _middle(self) -> P:
        """The spec between the hops."""
        first = set(self.axes) - set(self.inner)
        return rules.keep(self.spec, lambda axis: axis not in first)

    @property
    def _flat(self) -> P:
        """`spec` with `axes` in the order of the devices, in which XLA forms a reduce-scatter."""
        return P(*(self.axes if set(rules.axes_of(P(entry))) == set(self.axes) else entry
                   for entry in self.spec))

    def _reordered(self, ct):
        """Returns a cotangent at `spec`: with two hops, shards move to their devices."""
        return self.constrain(ct, self.spec) if self.inner else ct

    def _format(self, dtype: str, shape: tuple[int, ...]) -> Format | None:
        """Returns the format with these codes for arrays of the shard's global shape, if any."""
        if dtype not in wire.IN_BLOCKS:
            return Format(dtype) if dtype else None
        dims = [d // self._devices(rules.axes_of(P(entry)))
                for d, entry in zip(shape, self.spec, strict=True)]
        dim, block = wire.blocks_of(dims, self.block) if len(dims) > 1 else (0, 0)
        return Format(dtype, block, dim - len(shape)) if block else None

    def _devices(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def read(self, x: jax.Array, gathered: jax.Array, dtype: str | None = None,
             seed: jax.Array | None = None) -> jax.Array:
        """Returns `gathered` with its cotangent scattered to `x`.

        A `dtype` wider than the compute dtype widens the result and its cotangent. The `seed`,
        uint32, is that of random rounding.
        """
        pair = dataclasses.replace(self, params=str(x.dtype))
        return _read(pair, dtype or self.compute)(x, gathered, seed)

    def scatter(self, ct: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Returns the cotangent of the shard, from that of the gathered parameter."""
        ct = padded.filled(ct, self._padded(ct.shape))
        match self.reduction:
            case Reduction.SUM_AT_READ:
                return _sum_at_read(self)(ct, jax.lax.axis_index(PARTS), seed)
            case Reduction.SUM_AT_END:
                ct = self.constrain(ct, self.whole)
            case Reduction.VIA_WHOLE if self.sharded:
                ct = self._reordered(self.constrain(self.constrain(ct, self.whole), self._flat))
            case Reduction.DIRECT if self.sharded:
                ct = self._reordered(self.constrain(ct, self._flat))
        return ct.astype(self.params)

    def sum_parts(self, ct: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Returns the sum over the parts of their cotangents, at `spec`.

        The cotangents `[parts, *shape]`, one part per device, are summed in the reduce dtype, which
        is also the dtype on the wire, or exchanged in the format `reduce_as` and summed in float32.

        Args:
          seed: a uint32 scalar; only for `reduce_as`.
        """
        hops = self._hops()
        left = [axes for axes, _ in reversed(hops)]
        sizes = list(map(self._devices, left))
        ct = ct.reshape(*sizes, *ct.shape[1:])
        before = self.whole
        for axes, after in hops:
            left.pop()
            sum_over = self._exchange if self.reduce_as and before != after else self._sum
            ct = sum_over(ct, _Hop(tuple(left), axes, before, after), seed)
            before = after
        return ct.astype(self.params)

    def _hops(self) -> list[tuple[tuple[str, ...], P]]:
        """Returns, innermost first, the axes of the parts that are summed and the spec of the sum.

        Only shards cross hosts and replicas.
        """
        hops = [(self.axes, self.spec)]
        if self.sharded and 1 < self._devices(self.inner) < self._devices(self.axes):
            first = self.axes[:len(self.axes) - len(self.inner)]
            hops = [(self.inner, self._middle), (first, self.spec)]
        return hops + ([((self.replica,), self.spec)] if self.replica else [])

    def _sum(self, ct, hop: "_Hop", _):
        """Returns the sum over the last of the leading dimensions: a reduce-scatter over `axes`."""
        ct = self.constrain(ct.astype(self.reduce), P(*hop.left, hop.axes, *hop.before))
        return self.constrain(_sum(ct, len(hop.left)), P(*hop.left, *hop.after))

    def _exchange(self, ct, hop: "_Hop", seed):
        """Returns the same as `_sum`: each device is sent its shards, encoded, and sums them."""
        sizes, shape = ct.shape[:len(hop.left) + 1], ct.shape[len(hop.left) + 1:]
        form = self._format(self.reduce_as, shape)
        if form is None:  # the blocks would be too small
            return self._sum(ct, hop, seed)
        seeds = _of_parts(formats.mixed(seed, len(hop.left)), sizes)
        ct = self.constrain(ct, P(*hop.left, hop.axes, *hop.before))
        payload = form.encode(ct, formats.dither(seeds, shape))
        before, after = form.spec(hop.before), form.spec(hop.after)
        payload = [self.constrain(x, P(*hop.left, hop.axes, *before)) for x in payload]
        payload = tuple(self.constrain(x, P(*hop.left, None, *after)) for x in payload)
        parts = form.decode(payload, "float32")
        return self.constrain(_sum(parts, len(hop.left)), P(*hop.left, *hop.after))

    def _padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.extra:
            return shape
        return tuple(n + rows for n, rows in zip(shape, self.extra, strict=True))


@dataclasses.dataclass(frozen=True)
class _Hop:
    """One step of a sum over the parts.

    Attributes:
      left: The axes of the leading dimensions before the one that is summed.
      axes: The axes of that one.
      before, after: The specs of the other dimensions.
    """

    left: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    before: P
    after: P


def _of_parts(seed: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Returns one seed for each part."""
    parts = math.prod(sizes)
    return formats.mixed(seed, jnp.arange(parts)).reshape(sizes)


def _sum(x, axis):
    # jnp.sum would widen bfloat16, on the wire too
    return jax.lax.reduce_sum(x, axes=(axis,))


@functools.lru_cache(maxsize=4096)
def _read(pair: Pair, dtype: str):
    """Returns the function that `Pair.read` applies to the shard and the gathered parameter."""

    @jax.custom_vjp
    def read(x, gathered, seed):
        return gathered.astype(dtype)

    def forward(x, gathered, seed):
        return read(x, gathered, seed), seed  # read itself, so that a second derivative sees x

    def backward(seed, ct):
        return pair.scatter(ct, seed), None, None

    read.defvjp(forward, backward)
    return read


@functools.lru_cache(maxsize=4096)
def _sum_at_read(pair: Pair):
    """Returns a function that sums a cotangent over the parts, given a part's index and seed."""

    @jax.custom_batching.custom_vmap
    def scatter(ct, part, seed):
        return pair.constrain(ct, pair.spec).astype(pair.params)

    @scatter.def_vmap
    def batched(size, mapped, ct, part, seed):
        if not mapped[0]:  # all parts have the same cotangent
            ct = jnp.broadcast_to(ct, (size, *ct.shape))
        return pair.sum_parts(ct, seed), False

    return scatter
