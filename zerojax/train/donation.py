"""Donation: a step takes the memory of the state it is given for the state it returns.

The state must therefore be on the mesh, hold no array twice, and not have been donated before.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import StateError


def check_alive(where: str, tree: Any) -> None:
    """Raises `StateError` if arrays in a tree were deleted.

    >>> check_alive("save", {"w": jax.numpy.ones(3)})
    """
    if not any(map(_is_deleted, jax.tree.leaves(tree))):
        return
    gone = [trees.path_of(path) for path, x in jax.tree.leaves_with_path(tree) if _is_deleted(x)]
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    raise StateError(f"{where} was given a state whose memory an earlier step took for the state "
                     f"that it returned (donation): {gone[0]}{more}. Continue with the state that "
                     "was returned last: state, metrics = step(state, batch). If that call was "
                     "interrupted, restore a checkpoint or start again; zero.jit(donate=False) "
                     "does not take the memory of its arguments. States that zero.move made of "
                     "each other may share arrays, so a step of one takes them from both.")


def ready(where: str, mesh: Any, state: Any, dtypes: Sequence[Any] = (), others: Any = ()) -> Any:
    """Returns a state that can be donated.

    An array that is in the state twice is copied, such as an average that starts as the parameters
    themselves. Numbers that were set by hand, such as a learning rate, get the dtype and sharding
    that a step expects, so that nothing is compiled again.

    Args:
      dtypes: the dtypes that the step expects of the leaves, if they are known.
      others: the arguments that are not donated; an array that is also among them is copied.

    Raises:
      StateError: see `check_alive`.
    """
    check_alive(where, state)
    leaves, treedef = jax.tree.flatten(state)
    seen = {id(x) for x in jax.tree.leaves(others)}
    is_distinct = len(seen.union(map(id, leaves))) == len(seen) + len(leaves)
    if is_distinct and not any(_is_loose(mesh, x) for x in leaves):
        return state
    expected = dtypes if len(dtypes) == len(leaves) else [None] * len(leaves)
    placed = (_placed(mesh, x, dtype) for x, dtype in zip(leaves, expected, strict=True))
    return treedef.unflatten(_distinct(placed, seen))


def _distinct(leaves: Iterator[Any], seen: set[int]) -> Iterator[Any]:
    """Yields the leaves, with copies of arrays that came before."""
    for x in leaves:
        yield jax.numpy.copy(x) if _is_array(x) and id(x) in seen else x
        seen.add(id(x))


def _placed(mesh: Any, x: Any, dtype: Any) -> Any:
    if not _is_loose(mesh, x):
        return x
    x = np.array(x)  # an array on devices could be the user's, whose memory the step would take
    same_kind = dtype is not None and np.can_cast(x.dtype, dtype, "same_kind")
    x = x.astype(dtype if same_kind else jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.device_put(x, NamedSharding(mesh, P()))


def _is_loose(mesh: Any, x: Any) -> bool:
    """Whether `x` is a number that is not on the mesh."""
    if getattr(x, "ndim", 0) or not isinstance(mesh, Mesh):
        return False
    if _is_array(x):
        return not x.committed and not trees.is_key(x)
    return isinstance(x, (bool, int, float, np.generic, np.ndarray))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _is_deleted(x: Any) -> bool:
    return _is_array(x) and x.is_deleted()
