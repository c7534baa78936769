"""Formats in which arrays travel between devices.

    encode   x[..., d, ...]  ->  codes[..., d / block, block, ...], scales[..., d / block, 1, ...]
    decode   codes x scales  ->  x[..., d, ...]

A scale is the largest absolute value of its block divided by the largest code, in float32. A block
with a value that is not finite has a scale that is not finite, so that all of it decodes to such
values. No block crosses shards, so that each device encodes its own.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

_SMALLEST = 1e-35  # largest value for which a scale is made; that of a smaller one could be 0
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # codes


@dataclasses.dataclass(frozen=True)
class Format:
    """A dtype on the wire, in blocks with a scale each, or as it is.

    Attributes:
      dtype: the dtype of the codes.
      block: the number of elements that share a scale; 0 for a cast without scales.
      dim: the dimension that is divided into blocks, counted from the last: -1 is the last.

    >>> codes, scales = Format("int8", 2).encode(jnp.array([[0.5, -1.0, 0.0, 2.0]]))
    >>> codes.tolist(), scales.shape
    ([[[64, -127], [0, 127]]], (1, 2, 1))
    """

    dtype: str
    block: int = 0
    dim: int = -1

    def spec(self, spec: P) -> P:
        """Returns the spec of codes and scales, from that of the array."""
        if not self.block:
            return spec
        at = len(spec) + self.dim + 1
        return P(*spec[:at], None, *spec[at:])

    def encode(self, x: jax.Array, dither: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Returns the codes, and the scales if there are any.

        Args:
          x: floating; the size of `dim` is a multiple of `block`.
          dither: uint32 random bits of the shape of `x`, by which values are rounded up or down at
            random, so that the mean is `x` itself; None rounds to the nearest code.
        """
        if not self.block:
            return (x.astype(self.dtype) if dither is None else _rounded_bfloat16(x, dither),)
        x = self._blocks(x.astype(jnp.float32))
        # XLA's maximum may drop NaN
        finite = jnp.all(jnp.isfinite(x), axis=self.dim, keepdims=True)
        largest = jnp.maximum(jnp.max(jnp.abs(x), axis=self.dim, keepdims=True), _SMALLEST)
        scales = jnp.where(finite, largest / _LARGEST[self.dtype], jnp.nan)
        return self._codes(x / scales, dither), scales

    def decode(self, payload: tuple[jax.Array, ...], dtype: str) -> jax.Array:
        """Returns the encoded array in a floating dtype."""
        codes, *scales = payload
        if not scales:
            return codes.astype(dtype)
        x = codes.astype(jnp.float32) * scales[0]
        at = x.ndim + self.dim
        return x.reshape(*x.shape[:at - 1], -1, *x.shape[at + 1:]).astype(dtype)

    def _codes(self, x, dither):
        if not jnp.issubdtype(self.dtype, jnp.integer):
            return x.astype(self.dtype)
        if dither is None:
            return jnp.round(x).astype(self.dtype)
        most = _LARGEST[self.dtype]
        up = self._blocks(dither >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
        return jnp.clip(jnp.floor(x + up), -most, most).astype(self.dtype)

    def _blocks(self, x):
        at = x.ndim + self.dim
        return x.reshape(*x.shape[:at], -1, self.block, *x.shape[at + 1:])


def _rounded_bfloat16(x, dither):
    """Returns bfloat16 numbers: the dither carries into the bits that stay."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + (dither >> 16)
    kept = (bits >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def mixed(seed: jax.Array, number: jax.Array | int) -> jax.Array:
    """Returns a uint32 seed derived from a seed and a number, elementwise.

    Source: the finalizer of a 32-bit hash with low bias (Wellons, "Prospecting for hash
    functions", 2018).
    """
    x = seed + jnp.uint32(0x9E3779B9) * (jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(1))
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def dither(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns random bits, uint32 `[*seeds.shape, *shape]`, that depend on the seed and the index.

    Every device computes those of its own part of the array.
    """
    everything, first = (*seeds.shape, *shape), seeds.ndim
    index = jnp.zeros(everything, jnp.uint32)
    for dim in range(len(shape)):
        stride = math.prod(shape[dim + 1:]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, everything, first + dim) * jnp.uint32(stride)
    return mixed(jax.lax.broadcast_in_dim(seeds, everything, range(first)), index)
