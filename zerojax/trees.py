"""Leaves of pytrees: some of them alone, which are arrays, which are random keys."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_of(path: tuple[Any, ...]) -> str:
    """Returns a jax key path as "blocks/mlp/kernel"; the inside of a padded array has the path of the array.

    >>> path_of((jax.tree_util.DictKey("mlp"), jax.tree_util.SequenceKey(0)))
    'mlp/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/")


def only(tree: Any, flags: Sequence[bool]) -> Any:
    """`tree` with None in place of the leaves that are not wanted.

    >>> only({"a": 1, "b": 2}, [False, True])
    {'a': None, 'b': 2}
    """
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([x if flag else None for x, flag in zip(leaves, flags, strict=True)])


def taken(xs: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """Those of `xs` that are wanted.

    >>> taken([1, 2, 3], [True, False, True])
    [1, 3]
    """
    return [x for x, flag in zip(xs, flags, strict=True) if flag]


def put(tree: Any, flags: Sequence[bool], new: Sequence[Any]) -> Any:
    """`tree` with new leaves in place of those that `only` keeps.

    >>> put({"a": 1, "b": 2}, [False, True], [3])
    {'a': 1, 'b': 3}
    """
    (leaves, treedef), rest = jax.tree.flatten(tree), iter(new)
    return treedef.unflatten([next(rest) if flag else x for x, flag in zip(leaves, flags, strict=True)])


def is_array(x) -> bool:
    """Whether it is an array or the shape of one."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def divided(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """A tree's arrays, and a function that puts others in their places among its other leaves.

    >>> arrays, put = divided({"w": np.ones(2), "name": "a"})
    >>> len(arrays), put([1])
    (1, {'name': 'a', 'w': 1})
    """
    flat, treedef = jax.tree.flatten(tree)
    at = [is_array(x) for x in flat]

    def put(arrays):
        rest = iter(arrays)
        return treedef.unflatten([next(rest) if array else x for x, array in zip(flat, at, strict=True)])

    return taken(flat, at), put


def is_key(x) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_old_key(x) -> bool:
    """Whether an array may be one random key of the old kind, as `jax.random.PRNGKey` makes.

    >>> is_old_key(jax.random.PRNGKey(0)), is_old_key(jax.random.key(0))
    (True, False)
    """
    return x.dtype == jnp.uint32 and x.shape == jax.random.key_data(jax.random.key(0)).shape


def fold(x: jax.Array, number) -> jax.Array:
    """A key, of either kind, or each of an array of keys, with a number folded in."""
    if not is_key(x):
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(x), number))
    one = lambda key: jax.random.fold_in(key, number)
    return jnp.vectorize(one)(x) if x.ndim else one(x)
