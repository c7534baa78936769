"""A digest of each array, made on the devices that hold it and the same on every mesh.

An array is the words of its bytes (8, 16 or 32 bit, row by row), word w at position i counts as mix(w ^ (i + 1) * G), and the
digest is their sum, modulo 2^32. The order of a sum does not matter, so each device sums what it holds. `mix` (the last
step of MurmurHash3) is a bijection: any change of one word changes the digest; any other, but for one in 2^32.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.layout import padded, rules
from zerojax.processes import exchange

_GOLDEN = np.uint32(0x9E3779B9)
_CHUNKS = 1024  # of a row or so: they stay in the nearest cache


def of(arrays: Sequence[Any]) -> list[str]:
    """Eight hexadecimal digits for each array, jax's (of any sharding; typed keys and padded ones too) or numpy's.

    >>> of([np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(6.0, dtype=np.float32)])
    ['db2f183b', 'db2f183b']
    """
    sums = [_sums_over(*_placed(x.kept if padded.is_padded(x) else x), padded.is_padded(x) and x.shape) for x in arrays]
    held = jax.device_get([[part.data for part in x.addressable_shards] for x in sums])
    own = np.array([np.sum(parts, dtype=np.uint32) for parts in held], np.uint32)
    shared = [x for x in sums if not x.is_fully_addressable]  # with other processes, each of which has some of the sum
    if shared:
        said = exchange.words(exchange.devices_of(shared[0].sharding.mesh), own)  # pyright: ignore[reportAttributeAccessIssue]
        total = np.sum(list(said.values()), axis=0, dtype=np.uint32)
        own = np.where([not x.is_fully_addressable for x in sums], total, own)
    return [f"{n:08x}" for n in own]


def _placed(x) -> tuple[jax.Array, Mesh, P]:
    """An array over a mesh; of numpy's, 64-bit words in halves, which jax would cut short."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh):
        return x, x.sharding.mesh, x.sharding.spec
    x = np.ascontiguousarray(x, np.asarray(x).dtype.newbyteorder("=")).reshape(np.shape(x))
    x = x[..., None].view(np.uint32) if x.dtype.itemsize >= 8 else x
    alone = Mesh(np.array([_host()]), ("device",))
    return jax.device_put(x, NamedSharding(alone, P())), alone, P()


def _host():
    """The host's processor as a device, if jax was told of it: the others have no memory to spare."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _sums_over(x: jax.Array, mesh: Mesh, spec: P, shape: Any) -> jax.Array:
    with jax.set_mesh(mesh):  # another one may be set
        spec = rules.full(spec, x.ndim)
        return _sums_within(x, mesh, spec, shape) if shape else _sums(x, mesh, spec)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sums_within(x: jax.Array, mesh: Mesh, spec: P, shape: tuple[int, ...]) -> jax.Array:
    """As `_sums`, of what is within a logical shape; the first of copies does it."""
    copies = tuple(axis for axis in mesh.axis_names if axis not in rules.axes_of(spec))
    strides = [math.prod(shape[d + 1:]) % 2**32 for d in range(x.ndim)]

    def local(part):
        starts = [jax.lax.axis_index(entry) * size if entry else 0 for entry, size in zip(spec, part.shape, strict=True)]
        places = [jax.lax.broadcasted_iota(jnp.uint32, part.shape, d) + jnp.uint32(start) for d, start in enumerate(starts)]
        within = functools.reduce(jnp.logical_and, [place < d for place, d in zip(places, shape, strict=True)])
        words = _mixed(part, sum(place * np.uint32(stride) for place, stride in zip(places, strides, strict=True)))
        total = jnp.sum(jnp.where(within[..., None], words, 0), dtype=jnp.uint32)
        return jnp.where(jax.lax.axis_index(copies) == 0 if copies else True, total, 0)[None]

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False)(x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """uint32[devices]: what each device adds; copies share the work, or one does it."""
    copies = tuple(axis for axis in mesh.axis_names if axis not in rules.axes_of(spec))
    n = math.prod(mesh.shape[axis] for axis in copies)
    strides = [math.prod(x.shape[d + 1:]) % 2**32 for d in range(x.ndim)]

    def local(part):
        starts = [jax.lax.axis_index(entry) * size if entry else 0 for entry, size in zip(spec, part.shape, strict=True)]
        first = sum(np.uint32(stride) * jnp.uint32(start) for stride, start in zip(strides, starts, strict=True))
        copy = jax.lax.axis_index(copies) if n > 1 else jnp.int32(0)
        shared = next((d for d, size in enumerate(part.shape) if size and size % n == 0), None)
        if shared is not None and n > 1:
            rows = part.shape[shared] // n
            part = jax.lax.dynamic_slice_in_dim(part, copy * rows, rows, shared)
            first = first + jnp.uint32(copy * rows) * np.uint32(strides[shared])
        total = jax.lax.platform_dependent(part, jnp.uint32(first), default=functools.partial(_sum, strides),
                                           cpu=functools.partial(_sum_in_chunks, strides))
        return jnp.where((shared is not None) | (copy == 0), total, 0)[None]

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False)(x)


def _sum(strides, part, first):
    return jnp.sum(_mixed(part, _positions(strides, part.shape, first)), dtype=jnp.uint32)


def _sum_in_chunks(strides, part, first):
    """As `_sum`. The CPU compiler would make a copy of all words first, at ten times the time."""
    if not part.size or not part.ndim:
        return _sum(strides, part, first)
    axis = int(np.argmax(part.shape))
    rows = max(1, part.shape[axis] // _CHUNKS)
    chunks, rest = divmod(part.shape[axis], rows)
    chunk = lambda i: jax.lax.dynamic_slice_in_dim(part, i * rows, rows, axis)
    start = _positions(strides, jax.eval_shape(chunk, 0).shape, first)
    ahead = lambda i: jnp.uint32(i * rows) * np.uint32(strides[axis])
    add = lambda i, total: total + _mixed(chunk(i), start + ahead(i))
    total = jax.lax.fori_loop(0, chunks, add, jnp.zeros_like(_mixed(chunk(0), start)))
    tail = jax.lax.slice_in_dim(part, chunks * rows, chunks * rows + rest, axis=axis)
    return jnp.sum(total, dtype=jnp.uint32) + _sum(strides, tail, first + ahead(chunks))


def _positions(strides, shape, first):
    """uint32[shape]: the place of each element in the whole array."""
    along = [jax.lax.broadcasted_iota(jnp.uint32, shape, d) * np.uint32(stride) for d, stride in enumerate(strides)]
    return sum(along, jnp.broadcast_to(first, shape))


def _mixed(part, positions):
    words = _words(part)  # [..., words of an element]
    n = words.shape[-1]
    at = positions[..., None] * np.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    h = words ^ ((at + 1) * _GOLDEN)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _words(x):
    """uint32[..., words]: the bits of each element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.concatenate([_words(x.real), _words(x.imag)], -1)
    if x.dtype == bool:
        return x.astype(jnp.uint32)[..., None]
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    words = jax.lax.bitcast_convert_type(x, f"uint{min(info(x.dtype).bits, 32)}")
    return words.astype(jnp.uint32) if words.ndim > x.ndim else words.astype(jnp.uint32)[..., None]
