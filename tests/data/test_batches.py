"""Batches and losses that a step would misread: errors and warnings that name the leaf."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from small import TX, X

import zerojax as zj


class Tensor:
    """A tensor of another library."""

    shape, dtype = (16, 8), "torch.float32"


READ = {
    "a foreign tensor": (lambda: {"x": X, "y": [Tensor()]},
                         r"batch(\[0\])?\['y'\]\[0\] is a \w+.Tensor; give numpy or jax arrays"),
    "text": (lambda: {"x": X, "text": np.array(["a"] * 16)},
             r"batch(\[0\])?\['text'\] has dtype <U1, which no device computes with"),
    "text as it is": (lambda: {"x": X, "text": "abc"},
                      r"batch(\[0\])?\['text'\] is a builtins.str"),
    "objects": (lambda: {"x": X, "o": np.array([None] * 16)},
                r"batch(\[0\])?\['o'\] has dtype object"),
    "ids that wrap": (lambda: {"x": X, "ids": np.full((16,), 2**31)},
                      r"batch(\[0\])?\['ids'\] has dtype int64 and the value 2147483648, "
                      ".* int32, which holds -2147483648 to 2147483647, so the value would wrap"),
    "negative ids that wrap": (lambda: {"x": X, "ids": np.full((16,), -2**31 - 1)},
                               "the value -2147483649"),
    "unsigned ids that wrap": (lambda: {"x": X, "ids": np.full((16,), 2**32, np.uint64)},
                               "jax converts it to uint32"),
}


@pytest.mark.parametrize("where", ["train_step", "eval_step", "jit", "feed"])
@pytest.mark.parametrize("name", READ)
def test_batches_that_would_be_misread(name, where):
    make, text = READ[name]
    zero = small.zero()
    state = zero.init(small.weights, TX)

    def loss(params, batch):
        return (batch["x"] @ params["w"]).mean()

    calls = {
        "train_step": lambda: zero.train_step(loss, TX)(state, make()),
        "eval_step": lambda: zero.eval_step(loss)(state, make()),
        "jit": lambda: zero.jit(lambda state, batch: batch["x"], donate=False)(state, make()),
        "feed": lambda: next(zj.feed([make()], zero)),
    }
    with pytest.raises(zj.BatchError, match=text):
        calls[where]()


def test_64_bit_ids_that_fit_are_taken():
    zero = small.zero()

    def loss(params, batch):
        return (batch["x"] @ params["w"]).mean() + batch["ids"].sum()

    batch = {"x": X, "ids": np.arange(16)}
    _, metrics = zero.train_step(loss, TX)(zero.init(small.weights, TX), batch)
    wanted = (X @ np.full((8, 16), 0.5)).mean() + 120
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)


ONE = {"dict": {"x": X}, "array": X, "tuple": (X, X), "text": "data"}


@pytest.mark.parametrize("name", ONE)
def test_one_batch_is_no_source_of_a_feed(name):
    text = (r"feed was given one batch \(a \w+\); give an iterable of batches: "
            r"zj.feed\(\[batch\], zero\)")
    with pytest.raises(zj.BatchError, match=text):
        zj.feed(ONE[name], small.zero())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_feed_starts_again_if_its_source_can(prefetch):
    feed = zj.feed([X, 2 * X], small.zero(), prefetch=prefetch)
    assert [float(b[0, 0] / X[0, 0]) for _ in range(3) for b in feed] == [1, 2] * 3
    once = zj.feed(iter([X]), small.zero(), prefetch=prefetch)
    assert len(list(once)) == 1
    text = ("this feed has ended, and its source, a list_iterator, can be iterated over only once; "
            "make a new feed for each epoch")
    with pytest.raises(zj.BatchError, match=text):
        list(once)


NOT_PADDED = {
    "a scalar": ({"x": np.float32(3)}, r"batch\['x'\] has no dimension"),
    "no array": ({}, "holds no array"),
    "text": ({"x": "abc"}, r"batch\['x'\] is a builtins.str"),
    "a list": ({"x": [1, 2, 3]}, r"batch\['x'\]\[0\] has no dimension"),
    "other lengths": ({"x": X, "y": X[:5]}, "differ in their number of examples"),
}


@pytest.mark.parametrize("name", NOT_PADDED)
def test_a_batch_that_cannot_be_padded(name):
    batch, text = NOT_PADDED[name]
    with pytest.raises(zj.BatchError, match=text):
        next(zj.feed([batch], small.zero(), pad=True))


MEANS = {
    "mean, rows": (lambda y: zj.Loss(jnp.square(y).mean(), 16), True),
    "mean, size": (lambda y: zj.Loss(jnp.mean(jnp.square(y)), y.size), True),
    "masked mean, mask": (lambda y: zj.Loss((y * (y > 0)).sum() / (y > 0).sum(), (y > 0).sum()),
                          True),
    "in float32": (lambda y: zj.Loss(jnp.square(y).mean().astype(jnp.float32),
                                     jnp.float32(y.shape[0])), True),
    "optax": (lambda y: zj.Loss(optax.squared_error(y).mean(), y.shape[0]), True),
    "sum": (lambda y: zj.Loss(jnp.square(y).sum(), 16), False),
    "sum of means": (lambda y: zj.Loss(jnp.square(y).mean(1).sum(), 16), False),
    "sum, scaled": (lambda y: zj.Loss(jnp.square(y).sum() / 16, 16), False),
    "mean, one": (lambda y: zj.Loss(jnp.square(y).mean(), 1), False),
    "mean times rows": (lambda y: zj.Loss(jnp.square(y).mean() * 16, 16), False),
    "sum over a constant that is the size": (lambda y: zj.Loss(jnp.square(y)[:, 0].sum() / 16, 16),
                                             False),
    "bare mean": (lambda y: jnp.square(y).mean(), False),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_in_place_of_a_sum_is_told(name):
    make, warns = MEANS[name]
    zero = small.zero()
    step = zero.train_step(lambda p, x: make(x @ p["w"]), TX)
    state = zero.init(small.weights, TX)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.lower(state, X)
    assert any("Loss.total is a mean" in str(w.message) for w in caught) == warns
