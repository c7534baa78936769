"""What a function under `zero.jit` may know of the arrays it was called with: where each is placed.

Within jit, arrays have no shardings; `transforms` asks here where the parameters it is given are at rest.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Sharding

from zerojax import trees
from zerojax.layout import padded, placement
from zerojax.layout.rules import Leaf, Placement
from zerojax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Frame:
    """Shardings of the arguments: by the traced array itself, which is kept so that its id stays its own; by path and shape."""

    traced: Mapping[int, tuple[Any, Sharding | None]]
    named: Mapping[tuple[str, tuple[int, ...]], set]

    @classmethod
    def of(cls, arguments: Any, shardings: Sequence[Sharding | None]) -> "Frame":
        traced, named = {}, {}
        for (path, x), sharding in zip(jax.tree.leaves_with_path(arguments), shardings, strict=True):
            traced[id(x)] = x, sharding
            name = trees.path_of(path)
            for ending in {*placement.endings(name), *placement.endings(name.removesuffix("/value"))}:  # of NNX variables
                named.setdefault((ending, jax.numpy.shape(x)), set()).add(sharding)
        return cls(traced, named)

    def sharding(self, leaf: Leaf, x: Any) -> Sharding | None:
        """Where a parameter is placed: as the argument that it is, else as all arguments whose paths end in its path."""
        x = x.kept if padded.is_padded(x) else x
        if not isinstance(x, Tracer):
            return getattr(x, "sharding", None)
        if id(x) in self.traced:
            return self.traced[id(x)][1]
        like = self.named.get((leaf.path, leaf.shape), ())
        return next(iter(like)) if len(like) == 1 else None


_NOTHING = Frame({}, {})
_frame = contextvars.ContextVar("zerojax_frame", default=_NOTHING)


@contextlib.contextmanager
def within(arguments: Any, shardings: Sequence[Sharding | None]) -> Iterator[None]:
    """A function of these traced arguments is traced."""
    token = _frame.set(Frame.of(arguments, shardings))
    try:
        yield
    finally:
        _frame.reset(token)


def places(policy: Policy, leaves: Sequence[Leaf], xs: Sequence[Any]) -> list[Placement]:
    """Where arrays of a model are at rest; by the policy's rules where nothing is known."""
    frame = _frame.get()
    return [placement.placed(policy, placement.place(policy, leaf), frame.sharding(leaf, x), x)
            for leaf, x in zip(leaves, xs, strict=True)]
