"""The arrays that a function under `zero.jit` was called with, while jax traces it.

Traced arrays have no shardings, so `transforms` looks up here the shardings at rest of the
parameters that it is given. It also notes how often the function needs them; the function's plan
compares this with the compiled program.
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
from zerojax.plan.demand import Use
from zerojax.policy import Policy


@dataclasses.dataclass(frozen=True)
class ArgumentShardings:
    """The shardings of the arguments of a function that is being traced.

    Attributes:
      traced: by the id of the traced array. The array is kept too, so that its id is not reused.
      named: by path and shape; a path is registered with each of its endings.
      uses: of the arguments that the function has gathered so far, by the id of the array.
    """

    traced: Mapping[int, tuple[Any, Sharding | None]]
    named: Mapping[tuple[str, tuple[int, ...]], set]
    uses: dict[int, Use] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Any, shardings: Sequence[Sharding | None]) -> "ArgumentShardings":
        traced, named = {}, {}
        flat = jax.tree.leaves_with_path(arguments)
        for (path, x), sharding in zip(flat, shardings, strict=True):
            traced[id(x)] = x, sharding
            for ending in _endings(trees.path_of(path)):
                named.setdefault((ending, jax.numpy.shape(x)), set()).add(sharding)
        return cls(traced, named)

    def find(self, leaf: Leaf, x: Any) -> Sharding | None:
        """Returns the sharding of a parameter, or None if it is not known.

        An array that is not an argument itself, such as a cast of one, has the sharding of the
        arguments with its shape whose paths end in its path, if these agree.
        """
        x = x.kept if padded.is_padded(x) else x
        if not isinstance(x, Tracer):
            return getattr(x, "sharding", None)
        if id(x) in self.traced:
            return self.traced[id(x)][1]
        like = self.named.get((leaf.path, leaf.shape), ())
        return next(iter(like)) if len(like) == 1 else None


def _endings(path: str) -> set[str]:
    """Returns the endings of a path, with and without the key that an NNX variable ends in."""
    return {*placement.endings(path), *placement.endings(path.removesuffix("/value"))}


_NOTHING = ArgumentShardings({}, {})
_known = contextvars.ContextVar("zerojax_argument_shardings", default=_NOTHING)


@contextlib.contextmanager
def tracing(arguments: Any,
            shardings: Sequence[Sharding | None]) -> Iterator[ArgumentShardings]:
    """Makes the shardings of traced arguments known while the function of them is traced."""
    known = ArgumentShardings.of(arguments, shardings)
    token = _known.set(known)
    try:
        yield known
    finally:
        _known.reset(token)


def note_uses(xs: Sequence[Any], uses: Sequence[Use]) -> None:
    """Notes how often the function that is being traced needs some of its arguments.

    Arrays that are not arguments themselves, such as those of a loop within, are passed over.
    """
    known = _known.get()
    for x, use in zip(xs, uses, strict=True):
        if id(x) in known.traced:
            known.uses[id(x)] = known.uses[id(x)] + use if id(x) in known.uses else use


def placements(policy: Policy, leaves: Sequence[Leaf], xs: Sequence[Any]) -> list[Placement]:
    """Returns where a model's arrays are at rest: by the policy's rules where nothing is known."""
    shardings = [_known.get().find(leaf, x) for leaf, x in zip(leaves, xs, strict=True)]
    return [placement.placed(policy, placement.place(policy, leaf), sharding, x)
            for leaf, x, sharding in zip(leaves, xs, shardings, strict=True)]
