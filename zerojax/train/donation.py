"""States whose memory a step takes for the new one: each array is still there, is there once, and is on the mesh."""

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
    """Raises `StateError` for arrays whose memory is gone.

    >>> check_alive("save", {"w": jax.numpy.ones(3)})
    """
    if not any(_is_array(x) and x.is_deleted() for x in jax.tree.leaves(tree)):
        return
    gone = [trees.path_of(path) for path, x in jax.tree.leaves_with_path(tree) if _is_array(x) and x.is_deleted()]
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    raise StateError(f"{where} was given a state whose memory an earlier step took for the one that it returned (donation): "
                     f"{gone[0]}{more}. Go on with the state returned last: state, metrics = step(state, batch). If that call was "
                     "interrupted, restore a checkpoint or begin anew; zero.jit(donate=False) keeps what it is given.")


def ready(where: str, mesh: Any, state: Any, dtypes: Sequence[Any] = (), others: Any = ()) -> Any:
    """A state to donate. An array that is in it twice, as an average that begins as the parameters themselves, is copied; numbers
    that were set by hand, as a learning rate, get the dtype and place that a step expects, so that nothing is compiled again.

    Args:
      dtypes: that the leaves are to have.
      others: arguments that are not donated; an array that is among them too is copied.

    Raises:
      StateError: see `check_alive`.
    """
    check_alive(where, state)
    flat, treedef = jax.tree.flatten(state)
    seen = {id(x) for x in jax.tree.leaves(others)}
    if len(seen.union(map(id, flat))) == len(seen) + len(flat) and not any(_is_loose(mesh, x) for x in flat):
        return state
    wanted = dtypes if len(dtypes) == len(flat) else [None] * len(flat)
    return treedef.unflatten(_once((_placed(mesh, x, dtype) for x, dtype in zip(flat, wanted, strict=True)), seen))


def _once(leaves: Iterator[Any], seen: set[int]) -> Iterator[Any]:
    for x in leaves:
        yield jax.numpy.copy(x) if _is_array(x) and id(x) in seen else x
        seen.add(id(x))


def _placed(mesh: Any, x: Any, dtype: Any) -> Any:
    if not _is_loose(mesh, x):
        return x
    x = np.array(x)  # on devices, the step would take the memory of the user's own
    same_kind = dtype is not None and np.can_cast(x.dtype, dtype, "same_kind")
    x = x.astype(dtype if same_kind else jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.device_put(x, NamedSharding(mesh, P()))


def _is_loose(mesh: Any, x: Any) -> bool:
    """Whether it is a number that no mesh holds."""
    if getattr(x, "ndim", 0) or not isinstance(mesh, Mesh):
        return False
    return not x.committed and not trees.is_key(x) if _is_array(x) else isinstance(x, (bool, int, float, np.generic, np.ndarray))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)
