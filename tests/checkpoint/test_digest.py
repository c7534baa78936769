"""The digest against its definition in numpy, and what it notices."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.checkpoint import digest


def by_definition(x):
    bits = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    words = np.ascontiguousarray(x).reshape(-1).view(bits).astype(np.uint32)
    h = words ^ ((np.arange(words.size, dtype=np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return f"{int((h ^ (h >> 16)).sum(dtype=np.uint32)):08x}"


def mesh(names=("data",), shape=(8,)):
    n = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:n])


TWO = mesh(("replica", "data"), (2, 4))
PLACES = [(mesh(), P("data")), (mesh(), P(None, "data")), (mesh(), P()), (mesh(shape=(4,)), P("data")), (TWO, P(None, "data")),
          (TWO, P("replica", "data")), (TWO, P("data", "replica")), (TWO, P(("replica", "data"))), (TWO, P("replica"))]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint16", "int32", "bool", "complex64"]


def numbers(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape) * 5
    return x > 0 if dtype == "bool" else x.astype(getattr(ml_dtypes, dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_every_mesh(dtype):
    x = numbers(dtype, (16, 24))
    want = by_definition(x)
    assert digest.of([x, jnp.asarray(x)]) == [want, want]
    assert digest.of([jax.device_put(x, NamedSharding(m, spec)) for m, spec in PLACES]) == [want] * len(PLACES)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2051,), (3, 2051), (2050, 3), (5, 7, 11)], ids=str)
def test_any_shape(shape):
    x = numbers("float32", shape)
    assert digest.of([x]) == digest.of([jnp.asarray(x)]) == [by_definition(x)]


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_sixty_four_bits_of_the_host(dtype):
    x = numbers(dtype, (5, 3))
    assert digest.of([x]) == digest.of([x.astype(x.dtype.newbyteorder(">"))]) == [by_definition(x)]


def test_the_cpus_way_is_the_others(monkeypatch):
    """What a GPU runs is one sum; here, it is compiled for the CPU."""
    xs = [jax.device_put(numbers("bfloat16", shape), NamedSharding(mesh(), P("data"))) for shape in ((2056, 3), (16, 24))]
    want = digest.of(xs)
    monkeypatch.setattr(digest, "_sum_in_chunks", digest._sum)
    jax.clear_caches()
    assert digest.of(xs) == want == [by_definition(np.asarray(x)) for x in xs]


def test_what_a_sum_of_weighted_words_misses():
    x = numbers("float32", (64, 64))
    changed = [np.array(x) for _ in range(6)]
    changed[0][[3, 9], [5, 2]] *= -1  # two signs: twice 2^31
    changed[1][[0, 1]] = x[[1, 0]]  # rows swapped
    changed[2][:] = x.T
    changed[3][7, 7] = 0
    changed[4] = np.roll(x, 1)
    changed[5][5] = 0
    digests = digest.of([x, *changed, np.zeros((64, 64), np.float32), np.zeros((64, 63), np.float32)])
    assert len(set(digests)) == len(digests)


def test_places_beyond_32_bits():
    """Strides are taken modulo 2^32, as positions are."""
    shape = jax.ShapeDtypeStruct((8, 2**16, 2**17), jnp.bfloat16, sharding=NamedSharding(mesh(), P("data")))
    assert jax.eval_shape(lambda x: digest._sums(x, mesh(), P("data", None, None)), shape).shape == (8,)


def test_where_another_mesh_is_set():
    x = numbers("float32", (16, 24))
    alone = Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.set_mesh(mesh(shape=(4,))):
        found = digest.of([x, *(jax.device_put(x, NamedSharding(m, P())) for m in (mesh(), alone))])
    assert found == [by_definition(x)] * 3


def test_keys():
    assert digest.of([jax.random.key(5)]) == [by_definition(np.asarray(jax.random.key_data(jax.random.key(5))))]
