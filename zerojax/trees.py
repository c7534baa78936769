"""Leaves of pytrees: their paths, sizes and subsets, and tests for arrays and random keys."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY_BYTES = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}  # typed random keys, by generator
_MOST, _LONG = 6, 60  # items and characters in a brief text


def path_of(path: tuple[Any, ...]) -> str:
    """Returns a jax key path as text, such as "blocks/mlp/kernel".

    The array inside a padded array has the path of the padded array.

    >>> path_of((jax.tree_util.DictKey("mlp"), jax.tree_util.SequenceKey(0)))
    'mlp/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/")


def only(tree: Any, flags: Sequence[bool]) -> Any:
    """Returns `tree` with None in place of each leaf whose flag is False.

    >>> only({"a": 1, "b": 2}, [False, True])
    {'a': None, 'b': 2}
    """
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([x if flag else None for x, flag in zip(leaves, flags, strict=True)])


def taken(xs: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """Returns the elements of `xs` whose flag is True.

    >>> taken([1, 2, 3], [True, False, True])
    [1, 3]
    """
    return [x for x, flag in zip(xs, flags, strict=True) if flag]


def merged(flags: Sequence[bool], xs: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Returns the next element of `xs` for each flag that is True, and of `others` for the rest.

    >>> merged([True, False, True], [1, 3], [2])
    [1, 2, 3]
    """
    rest = {True: iter(xs), False: iter(others)}
    return [next(rest[flag]) for flag in flags]


def put(tree: Any, flags: Sequence[bool], new: Sequence[Any]) -> Any:
    """Returns `tree` with new leaves in place of those whose flag is True.

    >>> put({"a": 1, "b": 2}, [False, True], [3])
    {'a': 1, 'b': 3}
    """
    leaves, treedef = jax.tree.flatten(tree)
    rest = iter(new)
    return treedef.unflatten([next(rest) if flag else x
                              for x, flag in zip(leaves, flags, strict=True)])


def is_array(x) -> bool:
    """Whether `x` is an array or the shape of one."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def divided(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns a tree's arrays, and a function that puts other arrays in their places.

    >>> arrays, put = divided({"w": np.ones(2), "name": "a"})
    >>> len(arrays), put([1])
    (1, {'name': 'a', 'w': 1})
    """
    leaves, treedef = jax.tree.flatten(tree)
    flags = [is_array(x) for x in leaves]
    return taken(leaves, flags), lambda arrays: treedef.unflatten(put(leaves, flags, arrays))


def brief(tree: Any, depth: int = 2) -> str:
    """Returns a tree as short text, with the dtype and shape of each array.

    Args:
      depth: the number of levels of dicts, lists and tuples that are written out.

    >>> brief({"x": np.ones((2, 3), np.float32), "labels": [np.ones(2, np.int32), {"a": {}}]})
    "{'x': float32[2,3], 'labels': [int32[2], {...}]}"
    """
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
    if tree is None or isinstance(tree, bool | int | float | str):
        return repr(tree)[:_LONG]
    if isinstance(tree, Mapping):
        return _bracketed("{}", (f"{k!r}: {brief(v, depth - 1)}" for k, v in tree.items()), depth)
    if type(tree) in (list, tuple):
        opening = "[]" if isinstance(tree, list) else "()"
        return _bracketed(opening, (brief(x, depth - 1) for x in tree), depth)
    return f"a {type(tree).__name__}"


def _bracketed(brackets: str, items: Iterable[str], depth: int) -> str:
    """Returns the first items of a container as text; "..." stands for the others."""
    first = list(itertools.islice(items, _MOST + 1))
    shown = first[:_MOST if depth > 0 else 0]
    shown += ["..."] if len(shown) < len(first) else []
    return f"{brackets[0]}{', '.join(shown)}{brackets[1]}"


def kind(x: Any) -> str:
    """Returns the type of a value as text.

    >>> kind(None), kind({}), kind(dict), kind(3), kind(np.ones(1))
    ('None', 'a dict', 'the class dict', 'an int', 'an array float64[1]')
    """
    if x is None or is_array(x):
        return "None" if x is None else f"an array {brief(x)}"
    found = x if isinstance(x, type) else type(x)
    module = found.__module__
    prefix = "" if module in ("builtins", "__main__") or "._" in module else f"{module}."
    name = f"{prefix}{found.__qualname__}"
    article = "an" if name[0] in "aeioAEIO" else "a"
    return f"{'the class' if found is x else article} {name}"


def is_key(x) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_impl(x: Any) -> str:
    """Returns the name of the generator of typed random keys, or "" for anything else.

    >>> key_impl(jax.random.key(0)), key_impl(np.ones(2))
    ('threefry2x32', '')
    """
    if not (hasattr(x, "dtype") and is_key(x)):
        return ""
    names = []  # jax names the generator of an array, and `x` may be a shape
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), x)
    return names[0]


def is_old_key(x) -> bool:
    """Whether an array may be one raw random key, such as `jax.random.PRNGKey` returns.

    >>> is_old_key(jax.random.PRNGKey(0)), is_old_key(jax.random.key(0))
    (True, False)
    """
    return x.dtype == jnp.uint32 and x.shape == jax.random.key_data(jax.random.key(0)).shape


def fold(x: jax.Array, number) -> jax.Array:
    """Returns a random key with a number folded in.

    The key may be typed or raw; in an array of typed keys, the number is folded into each.
    """
    if not is_key(x):
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(x), number))
    return jnp.vectorize(lambda key: jax.random.fold_in(key, number))(x)


def itemsize(dtype: Any) -> int:
    """Returns the bytes of one element of a dtype, which may be given by its name.

    A typed random key takes the bytes of its generator's state.

    >>> itemsize("bfloat16"), itemsize(np.dtype("float32"))
    (2, 4)
    >>> itemsize(jax.random.key(0).dtype), itemsize("key<rbg>")
    (8, 16)
    """
    name = str(dtype)
    return KEY_BYTES.get(name, 8) if name.startswith("key<") else jnp.dtype(dtype).itemsize
