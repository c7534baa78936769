"""Where batches come from: sources that know their position, so that a resumed run reads what the other would have read."""

import collections
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from zerojax import data
from zerojax.errors import BatchError
from zerojax.policy import Policy


class Indexed(Iterator):
    """Batches that are a function of their number: `make(0)`, `make(1)`, ...; its position is that number.

    Args:
      make: the batch of a number; draw from `numpy.random.default_rng((seed, number))`, say.
      stop: how many there are; None is endless.

    >>> source = Indexed(lambda i: i * i, stop=4)
    >>> next(source), next(source), source.get_state()
    (0, 1, {'next': 2})
    >>> source.set_state({"next": 3})
    >>> list(source)
    [9]
    """

    def __init__(self, make: Callable[[int], Any], stop: int | None = None):
        self.make, self.stop, self.next = make, stop, 0

    def __next__(self):
        if self.stop is not None and self.next >= self.stop:
            raise StopIteration
        batch = self.make(self.next)
        self.next += 1
        return batch

    def get_state(self) -> dict:
        return {"next": self.next}

    def set_state(self, state: dict) -> None:
        self.next = state["next"]


class Feed(Iterator):
    """What `feed` returns: an iterator of sharded batches, with the source's position if the source has one."""

    def __init__(self, batches: Iterable, policy: Policy, prefetch: int):
        self.source: Any = iter(batches)
        self.policy, self.prefetch = policy, prefetch
        self.known = hasattr(self.source, "get_state")
        self._restart()

    def _restart(self):
        self.queue: collections.deque = collections.deque()
        self.ended: Exception | None = None
        self.position = self._now()

    def _now(self):
        """The source's position; a copy, since some sources give the dict that they go on with."""
        return copy.deepcopy(self.source.get_state()) if self.known else None

    def __next__(self):
        while self.ended is None and len(self.queue) <= self.prefetch:
            self._fetch()
        if self.queue:
            batch, self.position = self.queue.popleft()
            return batch
        raise self.ended or StopIteration

    def _fetch(self):
        try:
            batch = next(self.source)
            data.check(self.policy, batch)
            put = jax.device_put(batch, data.sharding(self.policy))
            self.queue.append((put, self._now()))
        except Exception as error:  # the end, or a failure: the good batches before it come first
            self.ended = error

    def get_state(self) -> Any:
        """The source's position after the batch handed out last; those fetched ahead do not count.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check()
        return self.position

    def set_state(self, state: Any) -> None:
        """Goes on at a position; what was fetched ahead is dropped.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check()
        self.source.set_state(state)
        self._restart()

    def _check(self):
        if not self.known:
            raise BatchError(f"feed was given a {type(self.source).__name__}, which has no get_state and set_state: where it is "
                             "can't be saved. Give zj.Indexed(make_batch), a grain iterator, or another that has both.")


def feed(batches: Iterable, zero: Policy, *, prefetch: int = 2) -> Feed:
    """Batches of numpy arrays as sharded device arrays, `prefetch` of them under way while one is in use.

    If the source has `get_state` and `set_state` (`Indexed`, grain's iterators), so has what is returned, and what was
    fetched ahead does not count: the position is that after the batch last handed out.

    Args:
      batches: pytrees of arrays, each `[B, ...]` with the same B, divisible by the mesh's devices.
      zero: the policy that will use them.

    Raises:
      BatchError: B does not divide by the number of devices, or differs between arrays.

    >>> import numpy as np, zerojax as zj
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]))
    >>> [b.sharding.spec for b in zj.feed([np.zeros((4, 3))], zero)]
    [P('data',)]
    """
    return Feed(batches, zero, prefetch)
