"""What a function under `zero.jit` may know of the arrays it was called with: where each is placed.

Within jit, arrays have no shardings; `transforms` asks here where the parameters it is given are at rest.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from zerojax import layout
from zerojax.policy import Policy
from zerojax.specs import Leaf, Placement

_frame: contextvars.ContextVar[Mapping[str, list] | None] = contextvars.ContextVar("zerojax_frame", default=None)


@contextlib.contextmanager
def of(arguments: Any) -> Iterator[None]:
    """Within it, arrays are placed as these shapes with shardings."""
    known = {}
    for path, x in jax.tree.leaves_with_path(arguments):
        for name in {full := layout.path_of(path), full.removesuffix("/value")}:  # of NNX's variables, and linen's boxes
            for ending in layout.endings(name):
                known.setdefault(ending, []).append(x)
    token = _frame.set(known)
    try:
        yield
    finally:
        _frame.reset(token)


def places(policy: Policy, leaves: Sequence[Leaf]) -> list[Placement]:
    """Where parameters are at rest: as an argument whose path ends in theirs and which has their shape, else by the rules."""
    known = _frame.get() or {}

    def place(leaf):
        like = next((x for x in known.get(leaf.path, ()) if x.shape == leaf.shape), None)
        return layout.placed(policy, layout.place(policy, leaf), getattr(like, "sharding", None), leaf.shape)

    return list(map(place, leaves))
