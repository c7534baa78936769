"""Pending parameters: views of sharded parameters that no equation of a program has read yet."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zerojax.gather import formats
from zerojax.gather.pair import Pair


class Parameter:
    """A sharded parameter in one scope: the program itself, or the body of a scan or remat.

    It is gathered once in its scope. Per device its read is shared as well, so that its cotangent
    is reduced once. With one loss each use has a scatter of its own, because XLA adds the shards,
    whereas it would reduce the sum of two unlike products as a whole array.

    Attributes:
      x: The shard.
      gathered: The parameter as gathered at the start of the step, or None.
      pair: How the parameter is gathered and its cotangent scattered.
      path: The parameter's path, for messages.
      seed: That of random rounding, uint32, or None.
    """

    def __init__(self, x: jax.Array, gathered: jax.Array | None, pair: Pair, path: str,
                 seed: jax.Array | None):
        self.x = x
        self.gathered = gathered
        self.pair = pair
        self.path = path
        self.seed = seed
        self._pieces = {}
        self._seeds = itertools.count()

    @functools.cached_property
    def _whole(self):
        return self.pair.gather(self.x) if self.gathered is None else self.gathered

    @functools.cached_property
    def _cast(self):
        return self.x.astype(self.pair.compute)

    @functools.cached_property
    def _shared(self):
        return self.pair.read(self.x, self._whole, seed=self.seed)

    def read(self, dtype: str, accumulated: bool) -> jax.Array:
        """Returns the whole parameter, in the compute dtype or a wider one.

        With `accumulated`, a loop sums the cotangent before it is scattered.
        """
        if self.pair.per_device:
            return self._shared.astype(dtype)
        pair = self.pair.accumulated() if accumulated else self.pair
        # uses in the compute dtype are added before they are widened: XLA sees one reduction
        x = self._cast if dtype == self.pair.compute else self.x
        return pair.read(x, self._whole, dtype)

    def next_seed(self) -> jax.Array | None:
        """Returns a seed for another scope or for a piece, another one at each call."""
        return None if self.seed is None else formats.mixed(self.seed, next(self._seeds))

    def pieces(self, key: Any, cut: Callable[[], list["Pending"]]) -> list["Pending"]:
        """Returns what `cut` returned for the first call with this key.

        Equal pieces thus share their reads.
        """
        if key not in self._pieces:
            self._pieces[key] = cut()
        return self._pieces[key]


@jax.tree_util.register_pytree_node_class
class Pending:
    """A view of a parameter that no equation has read: its dimensions in some order and dtype.

    It is a pytree of its arrays, so that it passes through scan and remat. It comes out as a view
    of a parameter in another scope.
    """

    def __init__(self, parameter: Parameter, order: tuple[int, ...], dtype: str):
        self.parameter = parameter
        self.order = order
        self.dtype = dtype

    @classmethod
    def of(cls, x, gathered, pair: Pair, dtype: str, path: str, seed=None) -> "Pending":
        """Returns a view of all of a new parameter; see `Parameter` for the arguments."""
        return cls(Parameter(x, gathered, pair, path, seed), tuple(range(len(pair.spec))), dtype)

    def tree_flatten(self):
        return (self.x, self.gathered, self.parameter.seed), (self.pair, self.dtype, self.path)

    @classmethod
    def tree_unflatten(cls, aux, children):
        x, gathered, seed = children
        pair, dtype, path = aux
        return cls.of(x, gathered, pair, dtype, path, seed)

    @property
    def x(self):
        """The shard, transposed as the view is."""
        return self._transposed(self.parameter.x)

    @property
    def gathered(self):
        """The parameter as gathered at the start of the step, transposed likewise, or None."""
        return self._transposed(self.parameter.gathered)

    @property
    def pair(self) -> Pair:
        """The pair for the transposed parameter."""
        return self.parameter.pair.only(self.order)

    @property
    def path(self) -> str:
        """The parameter's path, for messages."""
        return self.parameter.path

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole view, without padding."""
        return self.pair.logical(tuple(self.parameter.x.shape[i] for i in self.order))

    def _transposed(self, x):
        if x is None or self.order == tuple(range(len(self.order))):
            return x
        return jax.lax.transpose(x, self.order)

    def read(self, dtype: str | None = None, accumulated: bool = False) -> jax.Array:
        """Returns the whole view, in its dtype or a wider one; see `Parameter.read`."""
        return self._transposed(self.parameter.read(dtype or self.dtype, accumulated))

    def transpose(self, permutation) -> "Pending":
        """Returns a transposed view, which shares the parameter's reads."""
        return Pending(self.parameter, tuple(self.order[i] for i in permutation), self.dtype)

    def widen(self, dtype: str) -> "Pending":
        """Returns a view in a wider dtype, which shares the parameter's gather."""
        return Pending(self.parameter, self.order, dtype)

    def cut(self, pieces_of: Callable[[jax.Array], list], pair: Pair) -> list["Pending"]:
        """Returns the pieces that `pieces_of` cuts an array into, each with a read of its own."""
        xs = pieces_of(self.x)
        gathered = [None] * len(xs) if self.gathered is None else pieces_of(self.gathered)
        return [Pending.of(x, whole, pair, self.dtype, self.path, self.parameter.next_seed())
                for x, whole in zip(xs, gathered, strict=True)]

    def entering(self, slices: int | None = None) -> "Pending":
        """Returns the view with a seed of its own for another scope.

        For a scan, that is one seed for each of the slices into which it cuts the view.
        """
        seed = self.parameter.next_seed()
        if seed is not None and slices is not None:
            seed = formats.mixed(seed, jnp.arange(slices))
        return Pending.of(self.x, self.gathered, self.pair, self.dtype, self.path, seed)

    def sliced(self) -> "Pending":
        """Returns the view without its first dimension, after a scan has sliced its arrays."""
        rest = self.pair.only(range(1, len(self.pair.spec)))
        p = self.parameter
        return Pending.of(p.x, p.gathered, rest, self.dtype, self.path, p.seed)


def array(x: Any) -> Any:
    """Returns `x`, read if it is pending."""
    return x.read() if isinstance(x, Pending) else x
