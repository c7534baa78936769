"""Where batches come from: sources that know their position, so that a resumed run reads what the other would have read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from zerojax.data.batch import parts_of
from zerojax.data.parts import Part, Parts, Status
from zerojax.data.prefetch import Reader
from zerojax.errors import BatchError, ClusterError
from zerojax.policy import Policy
from zerojax.processes import agreement, exchange


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
    """What `feed` returns: an iterator of sharded batches, with the source's position if the source has one.

    With several processes, each tells the others what it has one batch ahead, so that nobody waits for the news.
    """

    def __init__(self, batches: Iterable, policy: Policy, prefetch: int, pad: bool | int):
        _check_batches(batches)
        self.batches: Any = batches
        self.source: Any = iter(batches)
        self.policy, self.prefetch, self.pad = policy, prefetch, pad
        self.known = hasattr(self.source, "get_state")
        self._devices, self._held = exchange.devices_of(policy.mesh), parts_of(policy)
        self._restart()

    def _restart(self):
        parts = Parts(self.source, self.policy, self.pad)
        self.position, self.number, self._next, self._over = parts.position(), 0, None, None
        self._reader = Reader(parts, self.prefetch)

    def __iter__(self) -> "Feed":
        """Itself; from the start, once it has ended, if `batches` can be read again.

        Raises:
          BatchError: it has ended, and they can't.
        """
        if self._over is not True:
            return self
        if self.source is self.batches:
            raise BatchError(f"this feed has ended, and its source, a {type(self.source).__name__}, gives its batches once: make a "
                             "new feed for each epoch, or give a list or loader that can be iterated over again.")
        self.source = iter(self.batches)
        self._restart()
        return self

    def __next__(self):
        if self._over is not None:
            raise self._over if isinstance(self._over, Exception) else StopIteration
        part, told = self._next or self._told(self._reader.take())
        self._next = self._told(self._reader.take()) if self._devices and self.prefetch else None
        self._check(part, told)
        self.position, self.number = part.position, self.number + 1
        return part.batch

    def _told(self, part: Part):
        """A part, and what is under way to the other processes of it."""
        return part, exchange.send(self._devices, part.words()) if self._devices else None

    def _check(self, part: Part, told):
        """Raises what ends the batches, on all processes alike."""
        said = exchange.received(self._devices, told) if self._devices else {jax.process_index(): part.words()}
        try:
            self._check_failed(part, said)
            self._check_ended(said)
            self._check_alike(part, said)
        except Exception as error:
            self._over = True if isinstance(error, StopIteration) else error
            self._next = None
            self._reader.stop()
            raise

    def _check_failed(self, part, said):
        if part.error is not None:
            raise part.error
        failed = [process for process, (status, *_) in said.items() if status == Status.FAILED]
        if failed:
            raise ClusterError(f"batch {self.number} could not be made on process {agreement.ranges(failed)}, whose log says why; "
                               "all processes end.")

    def _check_ended(self, said):
        ended = [process for process, (status, *_) in said.items() if status != Status.READY]
        empty = [process for process, (status, *_) in said.items() if status == Status.EMPTY]
        if len(ended) == len(said) or (ended and not self.pad):
            raise StopIteration
        if empty:
            raise BatchError(f"process {agreement.ranges(empty)} has no batch at all, of which pad=True could make others of "
                             "weight 0; give every process one example or more.")

    def _check_alike(self, part, said):
        if len({shapes for _, shapes, _ in said.values()}) > 1:
            shapes = exchange.shared(self._devices, part.shapes)
            raise BatchError(f"batch {self.number}: {agreement.difference(shapes)}\nEvery process brings as many examples, of the "
                             "same shapes; for a last batch that is shorter write zj.feed(..., pad=True), or drop it.")
        for process, (_, _, contents) in said.items():
            first = next(p for p in said if self._held[p] == self._held[process])
            if contents != said[first][2]:
                raise BatchError(f"batch {self.number}: the devices of processes {first} and {process} hold the same examples, but "
                                 "they brought different ones; zero.share() says which share of a batch a process brings.")

    def get_state(self) -> Any:
        """The source's position after the batch handed out last; those fetched ahead do not count.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check_known()
        return self.position

    def set_state(self, state: Any) -> None:
        """Goes on at a position; what was fetched ahead is dropped.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check_known()
        self._reader.close()
        self.source.set_state(state)
        self._restart()

    def _check_known(self):
        if not self.known:
            raise BatchError(f"feed was given a {type(self.source).__name__}, which has no get_state and set_state: where it is "
                             "can't be saved. Give zj.Indexed(make_batch), a grain iterator, or another that has both.")


def _check_batches(batches: Any):
    one = isinstance(batches, (Mapping, str, np.ndarray, jax.Array))
    if one or (isinstance(batches, tuple) and all(isinstance(x, (np.ndarray, jax.Array)) for x in batches)):
        raise BatchError(f"feed was given one batch (a {type(batches).__name__}); give an iterable of batches: "
                         "zj.feed([batch], zero), or a generator of them.")


def feed(batches: Iterable, zero: Policy, *, prefetch: int = 2, pad: bool | int = False) -> Feed:
    """Batches of numpy arrays as sharded device arrays, made on a thread (from the first `next` on) while others are in use.

    Of several processes, each gives its own part of every batch, and they end together: where the first has no more, or, if
    `pad`, the last. All call `next` alike, from their main thread.

    If the source has `get_state` and `set_state` (`Indexed`, grain's iterators), so has what is returned, and what was
    fetched ahead does not count: the position is that after the batch last handed out.

    Args:
      batches: an iterable of pytrees of arrays, each `[B, ...]` with the same B, divisible by the mesh's devices (of this
        process). The batch is the processes' parts in the order of the mesh's devices: `zero.share()`. Once it has ended, a
        second `for` begins anew, if the iterable can.
      zero: the policy that will use them.
      prefetch: how many are made before they are asked for; 0 makes them on the caller's thread.
      pad: a batch that is shorter than the first (or than this number of examples of this process, which a run that goes on
        late in its data needs) is filled up with copies of one example. What is handed out is then `(batch, weight)`, weight
        float32[B] of 1 for what was there and 0 for what was added: multiply the losses by it.

    Raises:
      BatchError: B does not divide by the number of devices, or differs between arrays or processes.
      ClusterError: another process could not make its part.

    >>> import numpy as np, zerojax as zj
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]))
    >>> [b.sharding.spec for b in zj.feed([np.zeros((4, 3))], zero)]
    [P('data',)]
    >>> [weight.tolist() for _, weight in zj.feed([np.zeros((4, 3)), np.zeros((1, 3))], zero, pad=True)]
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    return Feed(batches, zero, prefetch, pad)
