"""A digest of each array, computed on the devices that hold it, and the same on every mesh.

An array is read as the words of its bytes (8, 16 or 32 bits each, row by row). The word w at
position i contributes mix(w ^ (i + 1) * G), and the digest is the sum of these modulo 2^32. The
order of a sum does not matter, so each device adds up the words that it holds. `mix` (the finalizer
of MurmurHash3) is a bijection, so a change within one word always changes the digest; any other
change goes unnoticed with probability 2^-32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.layout import padded, rules
from zerojax.processes import exchange

_GOLDEN = np.uint32(0x9E3779B9)
_CHUNKS = 1024  # a chunk has a row or so, and stays in the nearest cache


def of(arrays: Sequence[Any]) -> list[str]:
    """Returns eight hexadecimal digits for each array.

    Args:
      arrays: jax arrays of any sharding, typed keys, padded arrays, or numpy arrays.

    >>> of([np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(6.0, dtype=np.float32)])
    ['db2f183b', 'db2f183b']
    """
    sums = [_device_sums(x) for x in arrays]
    held = jax.device_get([[shard.data for shard in x.addressable_shards] for x in sums])
    own = np.array([np.sum(parts, dtype=np.uint32) for parts in held], np.uint32)
    return [f"{n:08x}" for n in _over_processes(sums, own)]


def _over_processes(sums: Sequence[jax.Array], own: np.ndarray) -> np.ndarray:
    """Returns the totals of the sums, of which this process has the parts `own`."""
    is_shared = [not x.is_fully_addressable for x in sums]
    if not any(is_shared):
        return own
    sharding: Any = sums[is_shared.index(True)].sharding
    words = exchange.of_mesh(sharding.mesh).words(own)
    return np.where(is_shared, np.sum(list(words.values()), axis=0, dtype=np.uint32), own)


def _device_sums(x: Any) -> jax.Array:
    """Returns uint32[devices]: the sum over the words that each device adds up."""
    array, mesh, spec = _placed(padded.stored(x))
    with jax.set_mesh(mesh):  # the caller may have set another mesh
        spec = rules.full(spec, array.ndim)
        if padded.is_padded(x):
            return _sums_within(array, mesh, spec, x.shape)
        return _sums(array, mesh, spec)


def _placed(x: Any) -> tuple[jax.Array, Mesh, P]:
    """Returns an array over a mesh, the mesh, and the array's spec.

    A numpy array is put onto one device, with each 64-bit word as two, because jax would truncate
    it.
    """
    if isinstance(x, jax.Array) and trees.is_key(x):
        x = jax.random.key_data(x)
    sharding = x.sharding if isinstance(x, jax.Array) else None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return x, sharding.mesh, sharding.spec
    native = np.dtype(x.dtype).newbyteorder("=")
    x = np.ascontiguousarray(x, native).reshape(np.shape(x))
    x = x[..., None].view(np.uint32) if native.itemsize >= 8 else x
    mesh = Mesh(np.array([_host()]), ("device",))
    return jax.device_put(x, NamedSharding(mesh, P())), mesh, P()


def _host() -> Any:
    """Returns the host's processor as a device if jax has it, because GPUs have no memory to spare.

    Otherwise returns the first device.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """Returns uint32[devices]; devices with the same part share the work."""
    copies = _copy_axes(mesh, spec)
    n = math.prod(mesh.shape[axis] for axis in copies)
    strides = _strides(x.shape)

    def local(part):
        first = _position(strides, _starts(spec, part.shape))
        if n == 1:
            return _sum_on_platform(strides, part, first)
        return _sum_of_share(strides, part, first, jax.lax.axis_index(copies), n)

    return _on_each_device(local, x, mesh, spec)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sums_within(x: jax.Array, mesh: Mesh, spec: P, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32[devices] for the words within a logical shape.

    Of the devices with the same part, the first adds it up.
    """
    copies = _copy_axes(mesh, spec)
    strides = _strides(shape)

    def local(part):
        starts = _starts(spec, part.shape)
        words = _mixed(part, _positions(strides, part.shape, _position(strides, starts)))
        within = _within(part.shape, starts, shape)
        total = jnp.sum(jnp.where(within[..., None], words, 0), dtype=jnp.uint32)
        return jnp.where(jax.lax.axis_index(copies) == 0, total, 0) if copies else total

    return _on_each_device(local, x, mesh, spec)


def _on_each_device(local: Callable, x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """Returns an array of the results of `local` on each device's part of `x`."""
    return jax.shard_map(lambda part: local(part)[None], mesh=mesh, in_specs=spec,
                         out_specs=P(mesh.axis_names), check_vma=False)(x)


def _copy_axes(mesh: Mesh, spec: P) -> tuple[str, ...]:
    """Returns the mesh axes along which devices hold the same part."""
    return tuple(axis for axis in mesh.axis_names if axis not in rules.axes_of(spec))


def _starts(spec: P, shape: tuple[int, ...]) -> list:
    """Returns the index, in the whole array, of the first element of this device's part."""
    return [jax.lax.axis_index(entry) * size if entry else 0
            for entry, size in zip(spec, shape, strict=True)]


def _within(shape: tuple[int, ...], starts: Sequence, logical: tuple[int, ...]) -> jax.Array:
    """Returns bool[shape]: whether each element of a part is within a logical shape."""
    indices = [jax.lax.broadcasted_iota(jnp.uint32, shape, d) + jnp.uint32(start)
               for d, start in enumerate(starts)]
    return functools.reduce(jnp.logical_and,
                            [index < size for index, size in zip(indices, logical, strict=True)])


def _strides(shape: tuple[int, ...]) -> list[np.uint32]:
    """Returns the distance of neighbors along each dimension, in elements, modulo 2^32."""
    return [np.uint32(math.prod(shape[d + 1:]) % 2**32) for d in range(len(shape))]


def _position(strides: Sequence[np.uint32], index: Sequence) -> jax.Array:
    """Returns the position of one element in the whole array, modulo 2^32."""
    position = jnp.uint32(0)
    for i, stride in zip(index, strides, strict=True):
        position += jnp.uint32(i) * stride
    return position


def _positions(strides: Sequence[np.uint32], shape: tuple[int, ...], first: jax.Array) -> jax.Array:
    """Returns uint32[shape]: the position of each element of a part in the whole array.

    Args:
      first: the position of the part's first element.
    """
    positions = jnp.broadcast_to(first, shape)
    for d, stride in enumerate(strides):
        positions += jax.lax.broadcasted_iota(jnp.uint32, shape, d) * stride
    return positions


def _sum_of_share(strides, part, first, copy, n: int) -> jax.Array:
    """Returns the sum over this device's share of a part that `n` devices hold.

    Each takes as many rows, along the first dimension that divides by `n`. If there is none, device
    0 takes all.
    """
    dim = next((d for d, size in enumerate(part.shape) if size and size % n == 0), None)
    if dim is None:
        return jnp.where(copy == 0, _sum_on_platform(strides, part, first), 0)
    rows = part.shape[dim] // n
    share = jax.lax.dynamic_slice_in_dim(part, copy * rows, rows, dim)
    return _sum_on_platform(strides, share, first + jnp.uint32(copy * rows) * strides[dim])


def _sum_on_platform(strides, part, first) -> jax.Array:
    """Returns the sum over a part, in the way that is fast on the platform of the program."""
    return jax.lax.platform_dependent(part, first, default=functools.partial(_sum, strides),
                                      cpu=functools.partial(_sum_in_chunks, strides))


def _sum(strides, part, first) -> jax.Array:
    words = _mixed(part, _positions(strides, part.shape, first))
    return jnp.sum(words, dtype=jnp.uint32)


def _sum_in_chunks(strides, part, first) -> jax.Array:
    """Returns the result of `_sum`, with a loop.

    For `_sum`, the CPU compiler would first copy all words, which takes ten times as long.
    """
    if not part.size or not part.ndim:
        return _sum(strides, part, first)
    axis = int(np.argmax(part.shape))
    rows = max(1, part.shape[axis] // _CHUNKS)
    chunks = part.shape[axis] // rows
    shape = tuple(rows if d == axis else size for d, size in enumerate(part.shape))
    start = _positions(strides, shape, first)

    def offset(i):
        return jnp.uint32(i * rows) * strides[axis]

    def words(i):
        chunk = jax.lax.dynamic_slice_in_dim(part, i * rows, rows, axis)
        return _mixed(chunk, start + offset(i))

    total = jax.lax.fori_loop(0, chunks, lambda i, total: total + words(i),
                              jnp.zeros_like(words(0)))
    rest = jax.lax.slice_in_dim(part, chunks * rows, part.shape[axis], axis=axis)
    return jnp.sum(total, dtype=jnp.uint32) + _sum(strides, rest, first + offset(chunks))


def _mixed(part: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns uint32[..., words of an element]: the term of each word in the digest."""
    words = _words(part)
    n = words.shape[-1]
    within = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    h = words ^ ((positions[..., None] * np.uint32(n) + within + 1) * _GOLDEN)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _words(x: jax.Array) -> jax.Array:
    """Returns uint32[..., words of an element]: the bits of each element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.concatenate([_words(x.real), _words(x.imag)], -1)
    if x.dtype == bool:
        return x.astype(jnp.uint32)[..., None]
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(info(x.dtype).bits, 32)}")
    words = bits if bits.ndim > x.ndim else bits[..., None]
    return words.astype(jnp.uint32)
