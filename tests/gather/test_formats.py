"""Formats on the wire: the size of their errors, and that random rounding is right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from zerojax.gather import formats
from zerojax.gather.formats import Format
from zerojax.wire import blocks_of

INT8, FLOAT8, BFLOAT16 = Format("int8", 64), Format("float8_e4m3fn", 64), Format("bfloat16")
FORMATS = [INT8, FLOAT8, BFLOAT16]
KINDS = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.dtype)
REDUCED = pytest.mark.parametrize("form", [INT8, BFLOAT16], ids=lambda form: form.dtype)


def values(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(np.float32)


def through(form, x, dither=None):
    return np.asarray(form.decode(form.encode(jnp.asarray(x), dither), "float32"))


def step_of(form, x):
    """Returns the distance between neighbouring codes around each value."""
    if form.dtype == "bfloat16":
        return 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    blocks = x.reshape(-1, form.block)
    scales = np.abs(blocks).max(-1, keepdims=True) / {"int8": 127, "float8_e4m3fn": 448}[form.dtype]
    codes = np.abs(blocks / scales)
    if form.dtype == "int8":
        return np.broadcast_to(scales, blocks.shape).reshape(x.shape)
    exponents = np.maximum(np.floor(np.log2(codes)), -6)  # of the smallest normal code
    return (2.0 ** (exponents - 3) * scales).reshape(x.shape)


@KINDS
def test_the_nearest_code_is_chosen(form):
    x = values(6, 128)
    error = np.abs(through(form, x) - x)
    assert np.all(error <= step_of(form, x) * 0.5001)
    assert error.max() > 0


@KINDS
def test_zeros_stay_zeros(form):
    assert not through(form, np.zeros((2, 128), np.float32)).any()


@pytest.mark.parametrize("form", [INT8, FLOAT8], ids=lambda form: form.dtype)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36])
def test_blocks_of_tiny_numbers_stay_finite(form, size):
    found = through(form, np.full((1, 64), size, np.float32))
    assert np.all(np.abs(found) <= 1e-35)


@KINDS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_so(form, bad):
    """In a compiled program, where XLA's maximum may drop NaN, and in every block of an array."""
    x = values(8, 64, 128)
    x[:, :, 70] = bad
    compiled = jax.jit(lambda x, dither: form.decode(form.encode(x, dither), "float32"))
    for dither in (None, formats.dither(jnp.uint32(1), x.shape)):
        if dither is None or form is not FLOAT8:
            for found in (compiled(x, dither), through(form, x, dither)):
                assert not np.isfinite(found[:, :, 70]).any()
                assert np.isfinite(found[:, :, :64]).all()


def test_a_tiny_negative_number_is_not_rounded_to_a_whole_one():
    found = through(INT8, np.full((1, 64), -1e-36, np.float32), jnp.zeros((1, 64), jnp.uint32))
    assert np.all(np.abs(found) < 1e-34)


@REDUCED
def test_random_rounding_is_right_on_average(form):
    x, draws = values(2, 64), 4096
    seeds = formats.mixed(jnp.uint32(7), jnp.arange(draws))
    found = jax.vmap(lambda seed: form.decode(
        form.encode(jnp.asarray(x), formats.dither(seed, x.shape)), "float32"))(seeds)
    found, step = np.asarray(found, np.float64), step_of(form, x)
    assert np.all(np.abs(found - x) <= step * 1.0001)
    assert np.all(np.abs(found.mean(0) - x) < 4.5 * 0.5 * step / np.sqrt(draws) + 1e-7 * np.abs(x))
    nearest = np.abs(through(form, x) - x)
    assert np.any(nearest > 10 * np.abs(found.mean(0) - x))


@REDUCED
def test_codes_are_kept_exactly(form):
    exact = through(form, values(2, 128))
    for number in range(4):
        dither = formats.dither(jnp.uint32(number), exact.shape)
        np.testing.assert_allclose(through(form, exact, dither), exact,
                                   rtol=0, atol=1.01 * step_of(form, exact).max() * (form is INT8))


def test_the_dither_differs_by_seed_and_by_element():
    seeds = formats.mixed(jnp.uint32(3), jnp.arange(64))
    bits = np.asarray(formats.dither(seeds, (16, 8)))
    assert bits.shape == (64, 16, 8) and len(np.unique(bits)) > 0.999 * bits.size
    uniform = bits.reshape(64, -1) / 2.0**32
    correlations = np.corrcoef(uniform) - np.eye(64)
    assert np.abs(correlations).max() < 0.45
    assert abs(uniform.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(uniform.T) - np.eye(128)).max() < 0.65


def test_the_dither_is_the_same_on_every_jax():
    assert np.asarray(formats.dither(jnp.uint32(5), (2, 2))).tolist() == [
        [3533496745, 3726933447], [759973383, 2964277084]]


@pytest.mark.parametrize("dims, most, dim, block", [
    ((4096,), 256, 0, 256), ((96, 64), 256, 0, 96), ((64, 96), 256, 1, 96), ((100, 8), 64, 0, 50),
    ((512, 512), 256, 1, 256), ((4096, 28), 256, 0, 256), ((62, 31), 40, 1, 0), ((), 256, 0, 0)])
def test_the_dimension_with_the_largest_blocks_is_divided(dims, most, dim, block):
    assert blocks_of(dims, most) == (dim, block)


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_any_dimension_can_be_divided(dim):
    x = np.moveaxis(values(3, 2, 128), -1, dim)
    form = Format("int8", 64, dim)
    codes, scales = form.encode(jnp.asarray(x))
    assert codes.shape[dim - 1:][:2] == (2, 64) and scales.size == x.size / 64
    expected = np.moveaxis(through(INT8, np.moveaxis(x, dim, -1)), -1, dim)
    np.testing.assert_array_equal(through(form, x), expected)
    spec = form.spec(P("a", "b", "c"))
    assert len(spec) == 4 and spec[x.ndim + dim + 1] is None
