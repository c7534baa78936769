"""Tensors of a file seen as leaves: transposed, reshaped, cut or stacked, and read part by part.

A pattern names the dimensions of a tensor and of a leaf in the notation of einops (Rogozhnikov,
ICLR 2022). In addition, `k/n` is part k of n equal parts, and `name=a:b/n` is parts a to b.

    out in -> in out                             a linear layer of PyTorch as a kernel of Flax
    (heads dim) in -> in heads dim               the same with a dimension for heads
    (...) in -> in ...                           either of these, whichever the leaf has
    in (1/3 ...) -> in ...                       the second of three fused projections
    out in height width -> height width in out   a convolution
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from zerojax.errors import CheckpointError

Index = tuple[slice, ...]  # a slice with a start and a stop for each dimension
_WHOLE = re.compile(r"[A-Za-z_]\w*")
_PART = re.compile(r"(\d+)/(\d+)")
_PARTS = re.compile(r"([A-Za-z_]\w*)=(\d+):(\d+)/(\d+)")


class View(Protocol):
    """An array that is read part by part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self, index: Index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, stacked along a new first dimension."""

    tensors: Sequence[View]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensors), *self.tensors[0].shape)

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    def read(self, index: Index) -> np.ndarray:
        return np.stack([tensor.read(index[1:]) for tensor in self.tensors[index[0]]])


@dataclasses.dataclass(frozen=True)
class Computed:
    """A function of a whole tensor, computed when it is first read.

    Attributes:
      function: its result has the shape `shape`.
      dtype: the dtype of the tensor.
    """

    tensor: View
    function: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @functools.cached_property
    def whole(self) -> np.ndarray:
        every = tuple(slice(0, size) for size in self.tensor.shape)
        made = np.asarray(self.function(self.tensor.read(every)))
        if made.shape != tuple(self.shape):
            raise CheckpointError(f"a transform made {made.dtype}{list(made.shape)} of a tensor "
                                  f"{self.tensor.dtype}{list(self.tensor.shape)}, but the leaf "
                                  f"needs the shape {list(self.shape)}.")
        return made

    def read(self, index: Index) -> np.ndarray:
        return self.whole[index]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a tensor.

    Attributes:
      name: the name in the pattern; "" for an axis that the leaf lacks.
      size: the size in the tensor; 0 while it is unknown.
      start, stop: the part that the leaf has; all of it if both are 0.
    """

    name: str
    size: int = 0
    start: int = 0
    stop: int = 0

    @property
    def kept(self) -> int:
        """The size in the leaf."""
        return self.stop - self.start if self.stop else self.size


@dataclasses.dataclass(frozen=True)
class Rearranged:
    """A tensor in the order of a leaf's dimensions.

    Attributes:
      tensor: the tensor.
      axes: the axes in each dimension of the tensor.
      names: the names of the axes in each dimension of the leaf.
    """

    tensor: View
    axes: Sequence[Sequence[Axis]]
    names: Sequence[Sequence[str]]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes in the leaf of the axes by name."""
        return {axis.name: axis.kept for axes in self.axes for axis in axes if axis.name}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[name] for name in names) for names in self.names)

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self, index: Index) -> np.ndarray:
        bounds: dict[str, tuple[int, int]] = {}
        shape, cuts = [], []
        for names, at in zip(self.names, index, strict=True):
            covering, cut = _covering([self.sizes[name] for name in names], at)
            bounds |= dict(zip(names, covering, strict=True))
            shape.append(math.prod(stop - start for start, stop in covering))
            cuts.append(cut)
        return self._read(bounds).reshape(shape)[tuple(cuts)]

    def _read(self, bounds: Mapping[str, tuple[int, int]]) -> np.ndarray:
        """Returns the named axes within bounds, in the order of the leaf."""
        places = [_places(axes, bounds) for axes in self.axes]
        x = self.tensor.read(tuple(slice(int(at.min()), int(at.max()) + 1) for at in places))
        for dim, at in reversed(list(enumerate(places))):
            x = np.take(x, at - at.min(), axis=dim)
        order = [axis.name for axes in self.axes for axis in axes]
        x = x.squeeze(tuple(i for i, name in enumerate(order) if not name))
        left = [name for name in order if name]
        return x.transpose([left.index(name) for names in self.names for name in names])


def _covering(sizes: Sequence[int], at: slice) -> tuple[list[tuple[int, int]], slice]:
    """Returns bounds of the axes of a merged dimension that cover a part, and the part in them.

    >>> _covering([3, 4], slice(5, 7))
    ([(1, 2), (0, 4)], slice(1, 3, None))
    """
    row = math.prod(sizes[1:])
    first, last = at.start // row, -(-at.stop // row)
    bounds = [(first, last), *((0, size) for size in sizes[1:])][:len(sizes)]
    return bounds, slice(at.start - first * row, at.stop - first * row)


def _places(axes: Sequence[Axis], bounds: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns the positions in a dimension of a tensor, as an array over its axes."""
    sizes = [axis.size for axis in axes]
    places = np.zeros([1] * len(axes), int)
    for i, axis in enumerate(axes):
        start, stop = bounds[axis.name] if axis.name else (0, 1)
        positions = (np.arange(start, stop) + axis.start) * math.prod(sizes[i + 1:])
        places = places + positions.reshape([-1 if j == i else 1 for j in range(len(axes))])
    return places


def rearranged(pattern: str, tensor: View, shape: Sequence[int]) -> Rearranged:
    """Returns a tensor in the order of a leaf's dimensions.

    Args:
      pattern: the axes of the tensor and of the leaf, see the module.
      tensor: the tensor.
      shape: the shape of the leaf, from which the sizes of axes follow.

    Raises:
      CheckpointError: the pattern is invalid, or the tensor would not get this shape.
    """
    try:
        left, right = _sides(_spelled(pattern, len(tensor.shape), len(shape)))
        axes = [[_axis(word) for word in words] for words in left]
        _check_names(axes, right)
        view = Rearranged(tensor, _sized(axes, right, tensor.shape, shape), right)
        if view.shape != tuple(shape):
            raise ValueError(f"it makes {list(view.shape)}")
        return view
    except ValueError as error:
        raise CheckpointError(f"the pattern {pattern!r} does not turn {tensor.dtype}"
                              f"{list(tensor.shape)} into {list(shape)}: {error}.") from None


def _spelled(pattern: str, tensor_dims: int, leaf_dims: int) -> str:
    """Returns a pattern with names in place of the dots.

    >>> _spelled("(...) in -> in ...", 2, 3)
    '(_0 _1) in -> in _0 _1'
    """
    n = 1
    for side, dims in zip(pattern.split("->"), (tensor_dims, leaf_dims), strict=False):
        words = re.sub(r"\([^()]*\)", "group", side).split()
        n = dims + 1 - len(words) if "..." in words else n
    return pattern.replace("...", " ".join(f"_{i}" for i in range(n)))


def _sides(pattern: str) -> list[list[list[str]]]:
    """Returns the words of each dimension, of both sides.

    >>> _sides("(heads dim) in -> in heads dim")
    [[['heads', 'dim'], ['in']], [['in'], ['heads'], ['dim']]]
    """
    sides = [re.findall(r"\([^()]*\)|\S+", side) for side in pattern.split("->")]
    if len(sides) != 2:
        raise ValueError("write the dimensions of the tensor, '->' and those of the leaf")
    return [[[word for word in group.strip("()").split() if word != "1" or side is sides[0]]
             for group in side] for side in sides]


def _axis(word: str) -> Axis:
    """Returns the axis that a word denotes; its size is 0 if the word does not specify it.

    >>> _axis("1/3"), _axis("heads=0:32/48")
    (Axis(name='', size=3, start=1, stop=2), Axis(name='heads', size=48, start=0, stop=32))
    """
    if _WHOLE.fullmatch(word):
        return Axis(word)
    if match := _PARTS.fullmatch(word):
        axis = Axis(match[1], int(match[4]), int(match[2]), int(match[3]))
    elif match := _PART.fullmatch("0/1" if word == "1" else word):
        axis = Axis("", int(match[2]), int(match[1]), int(match[1]) + 1)
    else:
        raise ValueError(f"{word!r} is not an axis; write a name, k/n or name=a:b/n")
    if not axis.start < axis.stop <= axis.size:
        raise ValueError(f"{word} is not within {axis.size} parts, which are counted from 0")
    return axis


def _check_names(axes: Sequence[Sequence[Axis]], names: Sequence[Sequence[str]]):
    left = [axis.name for dimension in axes for axis in dimension if axis.name]
    right = [name for dimension in names for name in dimension]
    if sorted(left) != sorted(right) or len(set(left)) < len(left):
        raise ValueError(f"its left side has the axes {left} and its right side {right}; each must "
                         "be once on either side")


def _sized(axes: Sequence[Sequence[Axis]], names: Sequence[Sequence[str]], tensor: Sequence[int],
           leaf: Sequence[int]) -> list[list[Axis]]:
    """Returns the axes with their sizes, which follow from the shapes of the leaf and the tensor.
    """
    if (len(axes), len(names)) != (len(tensor), len(leaf)):
        raise ValueError(f"its sides have {len(axes)} and {len(names)} dimensions")
    by_name = {axis.name: axis for dimension in axes for axis in dimension}
    in_leaf = [[(name, by_name[name].kept) for name in dimension] for dimension in names]
    in_tensor = [[(axis.name, axis.size) for axis in dimension] for dimension in axes]
    sizes: dict[str, int] = {}
    for dimensions, shape in [(in_leaf, leaf), (in_tensor, tensor), (in_leaf, leaf)]:
        for dimension, size in zip(dimensions, shape, strict=True):
            _solve(dimension, size, sizes)
    unknown = [name for name, axis in by_name.items() if not axis.size and name not in sizes]
    if unknown:
        raise ValueError(f"the size of {', '.join(unknown)} does not follow from them")
    sized = [[dataclasses.replace(axis, size=axis.size or sizes[axis.name])
              for axis in dimension] for dimension in axes]
    needed = [math.prod(axis.size for axis in dimension) for dimension in sized]
    if needed != list(tensor):
        raise ValueError(f"it needs a tensor of shape {needed}")
    return sized


def _solve(dimension: Sequence[tuple[str, int]], size: int, sizes: dict[str, int]):
    """Adds the size of the only axis of a dimension that has none yet."""
    open_ = [name for name, n in dimension if not n and name not in sizes]
    rest = math.prod(n or sizes.get(name, 1) for name, n in dimension)
    if len(open_) == 1 and rest and size % rest == 0:
        sizes[open_[0]] = size // rest
