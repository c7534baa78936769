"""Arrays that are stored with zeros appended, so that their dimensions divide over devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class _Within:
    """The tree key of a `Padded`'s array; empty, so that its path is that of the `Padded`."""

    def __str__(self):
        return ""

    def __eq__(self, other):
        return isinstance(other, _Within)

    def __hash__(self):
        return hash(_Within)


@jax.tree_util.register_pytree_with_keys_class
class Padded:
    """An array of a logical shape, stored in a larger one.

    A pytree whose only leaf is the larger array, which optimizers therefore see. Numpy and jax
    functions see the logical array.

    Attributes:
      kept: the array as it is stored.
      shape: the logical shape.

    >>> x = pad(jnp.arange(3.0), (4,))
    >>> x.shape, x.kept.shape, (x + 1).tolist(), jax.tree.leaves(x)[0].shape
    ((3,), (4,), [1.0, 2.0, 3.0], (4,))
    """

    def __init__(self, kept: Any, shape: Sequence[int]):
        self.kept, self.shape = kept, tuple(shape)

    def tree_flatten_with_keys(self):
        """Returns the stored array with its key, and the logical shape, for jax."""
        return ((_Within(), self.kept),), self.shape

    def tree_flatten(self):
        """Returns the stored array and the logical shape, for jax."""
        return (self.kept,), self.shape

    @classmethod
    def tree_unflatten(cls, shape, children):
        """Returns a padded array with this logical shape, for jax."""
        kept, = children
        return cls(kept, shape)

    @property
    def dtype(self):
        """The dtype."""
        return self.kept.dtype

    @property
    def sharding(self):
        """The sharding of the stored array."""
        return self.kept.sharding

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the logical array."""
        return int(np.prod(self.shape))

    def __jax_array__(self) -> jax.Array:
        return cut(self.kept, self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.__jax_array__(), dtype)

    def __getitem__(self, index):
        return self.__jax_array__()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return iter(self.__jax_array__())

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(jax.Array, name) or not is_padded(self):
            raise AttributeError(f"Padded has no attribute {name!r}")
        return getattr(self.__jax_array__(), name)

    def __repr__(self):
        if not is_padded(self):
            return f"Padded({self.kept!r}, {self.shape})"
        return f"Padded({self.dtype}{list(self.shape)}, kept as {list(self.kept.shape)})"


def _operator(name: str):
    return lambda self, *others: getattr(self.__jax_array__(), name)(*others)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv",
              "matmul", "rmatmul", "pow", "rpow", "neg", "abs"):
    setattr(Padded, f"__{_name}__", _operator(f"__{_name}__"))


def is_padded(x: Any) -> bool:
    """Whether `x` is a padded array or the shape of one.

    False for the `Padded` of a placeholder that optax puts where a transform is masked.
    """
    return isinstance(x, Padded) and len(getattr(x.kept, "shape", ())) == len(x.shape) > 0


def stored(x: Any) -> Any:
    """Returns an array as it is stored, with its padding."""
    return x.kept if is_padded(x) else x


def cut(x: Any, shape: Sequence[int]) -> jax.Array:
    """Returns `x` without the elements beyond a logical shape."""
    if tuple(x.shape) == tuple(shape):
        return x
    return jax.lax.slice(x, [0] * len(shape), list(shape))


def filled(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns `x` with zeros at the ends of its dimensions, in a larger shape."""
    if tuple(x.shape) == tuple(shape):
        return x
    return jnp.pad(x, [(0, n - d) for d, n in zip(x.shape, shape, strict=True)])


def pad(x: jax.Array, shape: Sequence[int] | None) -> Any:
    """Returns `x`, or a `Padded` that stores it in a larger shape."""
    if shape is None or tuple(shape) == tuple(x.shape):
        return x
    return Padded(filled(x, shape), x.shape)


def logical(tree: Any) -> Any:
    """Returns a tree with plain arrays in place of padded ones.

    Each plain array is whole on every device that held a part of the padded one.
    """
    return jax.tree.map(lambda x: x.__jax_array__() if is_padded(x) else x, tree, is_leaf=is_padded)


def mapped(fn: Callable, tree: Any, *others: Any) -> Any:
    """Maps a function over arrays as they are stored, and returns padded arrays again.

    Like `jax.tree.map`, but each of `others` has one leaf where `tree` has a padded array.
    """
    def one(x, *more):
        return Padded(fn(x.kept, *more), x.shape) if is_padded(x) else fn(x, *more)

    return jax.tree.map(one, tree, *others, is_leaf=is_padded)


def structure(tree: Any) -> Any:
    """Returns the tree's structure, in which padded arrays are leaves."""
    return jax.tree.structure(tree, is_leaf=is_padded)


def leaves(tree: Any) -> list[Any]:
    """Returns the tree's leaves, padded arrays among them."""
    return jax.tree.leaves(tree, is_leaf=is_padded)
