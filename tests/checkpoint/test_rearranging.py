"""Patterns: views equal numpy's reshapes and transposes, part by part, and wrong patterns raise."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import zerojax as zj
from zerojax.checkpoint import rearranging

X = np.arange(48 * 16, dtype=np.float32).reshape(48, 16)


class Array:
    """An array as a view, which counts the elements that are read."""

    def __init__(self, x):
        self.x, self.read_elements = x, 0
        self.shape, self.dtype = x.shape, str(x.dtype)

    def read(self, index):
        assert len(index) == self.x.ndim
        self.read_elements += self.x[index].size
        return self.x[index]


# pattern: the leaf that it makes of X
PATTERNS = {
    "out in -> in out": X.T,
    "... -> ...": X,
    "(heads dim) in -> in heads dim": X.reshape(6, 8, 16).transpose(2, 0, 1),
    "(...) in -> in ...": X.reshape(6, 8, 16).transpose(2, 0, 1),
    "out (...) -> ... out": X.reshape(48, 2, 8).transpose(1, 2, 0),
    "(1/3 ...) in -> in ...": X[16:32].reshape(2, 8, 16).transpose(2, 0, 1),
    "(heads 2/3 dim) in -> in heads dim": X.reshape(4, 3, 4, 16)[:, 2].transpose(2, 0, 1),
    "(heads=4:6/6 dim) in -> (heads dim) in": X[32:],
    "(kv q=0:4/6 dim) in -> in (kv q) dim":
        X.reshape(2, 6, 4, 16)[:, :4].reshape(8, 4, 16).transpose(2, 0, 1),
    "out in -> 1 (in out)": X.T.reshape(1, -1),
    "out 15/16 -> out": X[:, 15],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_part_is_that_of_numpy(pattern, data):
    want = PATTERNS[pattern]
    view = rearranging.rearranged(pattern, Array(X), want.shape)
    bounds = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
              for size in want.shape]  # no empty part: these are never read
    index = tuple(slice(*bound) for bound in bounds)
    assert view.shape == want.shape and view.dtype == "float32"
    np.testing.assert_array_equal(view.read(index), want[index], strict=True)


def test_only_the_part_is_read():
    tensor = Array(X)
    view = rearranging.rearranged("(2/3 heads dim) in -> in heads dim", tensor, (16, 4, 4))
    view.read((slice(0, 16), slice(2, 4), slice(0, 4)))
    assert tensor.read_elements == 2 * 4 * 16


# pattern: (the shape of the leaf, words of the error)
WRONG = {
    "out in": ((16, 48), "write the dimensions of the tensor, '->' and those of the leaf"),
    "out in -> in": ((16,), "each must be once on either side"),
    "a a -> a a": ((48, 48), "each must be once on either side"),
    "out in -> out in": ((16, 48), r"it needs a tensor of shape \[16, 48\]"),
    "(a b) in -> in (a b)": ((16, 48), "the size of a, b does not follow"),
    "o? in -> in o?": ((16, 48), r"'o\?' is not an axis; write a name, k/n or name=a:b/n"),
    "(3/3 x) in -> in x": ((16, 16), "3/3 is not within 3 parts"),
    "(0/5 x) in -> in x": ((16, 16), r"it needs a tensor of shape \[80, 16\]"),
    "(a b) in -> a (b in)": ((0, 16), r"needs a tensor|does not follow"),
    "out in height -> in out height": ((16, 48, 1), "its sides have 3 and 3 dimensions"),
}


@pytest.mark.parametrize("pattern", WRONG)
def test_a_wrong_pattern(pattern):
    shape, text = WRONG[pattern]
    with pytest.raises(zj.CheckpointError, match=rf"does not turn float32\[48, 16\] .*{text}"):
        rearranging.rearranged(pattern, Array(X), shape)
