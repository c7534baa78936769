"""The digest against its definition in numpy, and the changes that it notices."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.checkpoint import digest


def sum_by_definition(words, positions):
    h = words ^ ((positions.astype(np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return int((h ^ (h >> 16)).sum(dtype=np.uint32))


def by_definition(x):
    bits = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    words = np.ascontiguousarray(x).reshape(-1).view(bits).astype(np.uint32)
    return f"{sum_by_definition(words, np.arange(words.size)):08x}"


def mesh(names=("data",), shape=(8,)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names),
                         devices=jax.devices()[:int(np.prod(shape))])


TWO = mesh(("replica", "data"), (2, 4))
PLACES = [(mesh(), P("data")), (mesh(), P(None, "data")), (mesh(), P()),
          (mesh(shape=(4,)), P("data")), (TWO, P(None, "data")), (TWO, P("replica", "data")),
          (TWO, P("data", "replica")), (TWO, P(("replica", "data"))), (TWO, P("replica"))]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint16", "int32", "bool",
          "complex64"]


def numbers(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape) * 5
    return x > 0 if dtype == "bool" else x.astype(getattr(ml_dtypes, dtype, dtype))


def check(dtype, places):
    x = numbers(dtype, (16, 24))
    want = by_definition(x)
    assert digest.of([x, jnp.asarray(x)]) == [want, want]
    placed = [jax.device_put(x, NamedSharding(*place)) for place in places]
    assert digest.of(placed) == [want] * len(places)


def test_the_same_on_every_mesh():
    check("float32", PLACES)


@pytest.mark.parametrize("dtype, places", [
    (dtype, [PLACES[i % len(PLACES)], PLACES[(i + 4) % len(PLACES)]])
    for i, dtype in enumerate(DTYPES[1:])], ids=DTYPES[1:])
def test_every_dtype(dtype, places):
    """On two of the meshes: the words of an element do not depend on where it is."""
    check(dtype, places)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2051,), (3, 2051), (2050, 3), (5, 7, 11)],
                         ids=str)
def test_any_shape(shape):
    x = numbers("float32", shape)
    assert digest.of([x]) == digest.of([jnp.asarray(x)]) == [by_definition(x)]


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_sixty_four_bits_of_the_host(dtype):
    x = numbers(dtype, (5, 3))
    swapped = x.astype(x.dtype.newbyteorder(">"))
    assert digest.of([x]) == digest.of([swapped]) == [by_definition(x)]


def test_the_program_for_gpus_has_the_same_result(monkeypatch):
    """It is one sum, compiled for the CPU here."""
    xs = [jax.device_put(numbers("bfloat16", shape), NamedSharding(mesh(), P("data")))
          for shape in ((2056, 3), (16, 24))]
    want = digest.of(xs)
    monkeypatch.setattr(digest, "_sum_in_chunks", digest._sum)
    jax.clear_caches()
    assert digest.of(xs) == want == [by_definition(np.asarray(x)) for x in xs]


def test_every_bit_counts():
    """Bit i is flipped in word i."""
    x = numbers("float32", (32,)).view(np.uint32)
    flipped = [np.where(np.arange(32) == i, x ^ np.uint32(1 << i), x) for i in range(32)]
    digests = digest.of([x, *flipped])
    assert len(set(digests)) == len(digests)


def test_changes_that_a_sum_of_weighted_words_misses():
    x = numbers("float32", (64, 64))
    changed = [np.array(x) for _ in range(6)]
    changed[0][[3, 9], [5, 2]] *= -1  # two signs: twice 2^31
    changed[1][[0, 1]] = x[[1, 0]]  # rows swapped
    changed[2][:] = x.T
    changed[3][7, 7] = 0
    changed[4] = np.roll(x, 1)
    changed[5][5] = 0
    zeros = [np.zeros((64, 64), np.float32), np.zeros((64, 63), np.float32)]
    digests = digest.of([x, *changed, *zeros])
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("sum_of_part", [digest._sum, digest._sum_in_chunks])
@pytest.mark.parametrize("shape, start", [
    ((2**20, 2**17), (2**19 + 5, 2**16)),  # strides below 2^32, positions above
    ((6, 2**17 + 1, 3 * 2**14 + 1), (5, 2**17 - 9, 7)),  # a stride of 2^32 + 2^31 + 180,225
    ((3, 2**33 + 5), (2, 2**31 + 1)),  # a stride of 2 * 2^32 + 5
], ids=str)
def test_positions_beyond_32_bits(sum_of_part, shape, start):
    """Positions are exact modulo 2^32: here, those of a small part of a very large array."""
    part = numbers("float32", (5, 3, 4)[:len(shape)])
    positions = np.zeros(part.shape, object)  # of Python's integers
    for index in itertools.product(*map(range, part.shape)):
        position = 0
        for i, first, size in zip(index, start, shape, strict=True):
            position = position * size + first + i
        positions[index] = position % 2**32
    strides = digest._strides(shape)
    found = sum_of_part(strides, jnp.asarray(part), digest._position(strides, start))
    assert int(found) == sum_by_definition(part.view(np.uint32), positions)


def test_a_program_for_positions_beyond_32_bits():
    x = jax.ShapeDtypeStruct((8, 2**16, 2**17), jnp.bfloat16,
                             sharding=NamedSharding(mesh(), P("data")))
    sums = jax.eval_shape(lambda x: digest._sums(x, mesh(), P("data", None, None)), x)
    assert (sums.shape, sums.dtype) == ((8,), jnp.uint32)


def test_with_another_mesh_set():
    x = numbers("float32", (16, 24))
    alone = Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.set_mesh(mesh(shape=(4,))):
        placed = [jax.device_put(x, NamedSharding(m, P())) for m in (mesh(), alone)]
        found = digest.of([x, *placed])
    assert found == [by_definition(x)] * 3


def test_keys():
    key = jax.random.key(5)
    assert digest.of([key]) == [by_definition(np.asarray(jax.random.key_data(key)))]
