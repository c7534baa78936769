"""Feeds: sharded batches from a source, with a position from which a resumed run continues."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from zerojax import errors, trees
from zerojax.data.batch import parts_of
from zerojax.data.loading import Loaded, Loader, Status
from zerojax.data.prefetch import Prefetcher
from zerojax.errors import BatchError, ClusterError
from zerojax.policy import Policy
from zerojax.processes import agreement, exchange, naming
from zerojax.processes.exchange import Sent

Reports = Mapping[int, np.ndarray]  # the words of `Loaded`, by process


class Indexed(Iterator):
    """A source of the batches `make(0)`, `make(1)`, ...; its position is the next of these numbers.

    Args:
      make: returns the batch of a number, for example with random numbers from
        `numpy.random.default_rng((seed, number))`.
      stop: the number of batches; None means no limit.

    Attributes:
      next: the number of the next batch.

    Raises:
      BatchError: `make` is not a function.

    >>> source = Indexed(lambda i: i * i, stop=4)
    >>> next(source), next(source), source.get_state()
    (0, 1, {'next': 2})
    >>> source.set_state({"next": 3})
    >>> list(source)
    [9]
    """

    def __init__(self, make: Callable[[int], Any], stop: int | None = None):
        if not callable(make):
            raise BatchError(f"Indexed was given {trees.kind(make)}, not a function; write "
                             "zj.Indexed(make_batch, stop) with a function make_batch(number) that "
                             "returns a batch, or give feed an iterable of batches.")
        self.make = make
        self.stop = stop
        self.next = 0

    def __next__(self):
        if self.stop is not None and self.next >= self.stop:
            raise StopIteration
        with errors.noted(self._note):
            batch = self.make(self.next)
        self.next += 1
        return batch

    def _note(self) -> str:
        name = getattr(self.make, "__qualname__", type(self.make).__name__)
        return (f"zerojax called {name.rpartition('<locals>.')[2]}({self.next}): zj.Indexed calls "
                "its function with the number of a batch.")

    def get_state(self) -> dict:
        """Returns the position, as JSON values."""
        return {"next": self.next}

    def set_state(self, state: dict) -> None:
        """Continues from a position."""
        self.next = state["next"]


class Feed(Iterator):
    """The iterator that `feed` returns: sharded batches, and a position if the source has one.

    Each of several processes reports on its batches to the others one batch ahead, so that no
    process waits for a report.

    Attributes:
      batches, source: the iterable that `feed` was given, and its iterator.
      policy: the `Zero` that `feed` was given.
      prefetch, pad: as given to `feed`.
    """

    def __init__(self, batches: Iterable, policy: Policy, prefetch: int, pad: bool | int):
        _check_policy(policy)
        _check_batches(batches)
        _check_prefetch(prefetch)
        policy.check_devices("feed")
        self.batches: Any = batches
        self.source: Any = iter(batches)
        self.policy = policy
        self.prefetch = prefetch
        self.pad = pad
        self._group = exchange.of_mesh(policy.mesh)
        self._held = parts_of(policy)
        self._restart()

    def _restart(self) -> None:
        loader = Loader(self.source, self.policy, self.pad)
        self.position = loader.position()
        self.number = 0
        self._prefetcher = Prefetcher(loader, self.prefetch)
        self._next: tuple[Loaded, Sent] | None = None
        self._ended = False
        self._error: Exception | None = None

    def __iter__(self) -> "Feed":
        """Returns itself. If it has ended, it starts again, if `batches` can be read again.

        Raises:
          BatchError: it has ended, and `batches` can be read only once.
        """
        if not self._ended:
            return self
        if self.source is self.batches:
            raise BatchError(f"this feed has ended, and its source, a {type(self.source).__name__},"
                             " can be iterated over only once; make a new feed for each epoch, or "
                             "give a list or a loader that can be iterated over again.")
        self.source = iter(self.batches)
        self._restart()
        return self

    def __next__(self):
        if self._error is not None:
            raise self._error
        if self._ended:
            raise StopIteration
        loaded, sent = self._next or self._reported()
        report_ahead = self._group.size > 1 and self.prefetch
        self._next = self._reported() if report_ahead else None
        self._check(loaded, self._group.received(sent))
        self.position = loaded.position
        self.number += 1
        return loaded.batch

    def _reported(self) -> tuple[Loaded, Sent]:
        """Returns the next batch, and the report on it, which is under way to all processes."""
        loaded = self._prefetcher.take()
        return loaded, self._group.send(loaded.words())

    def _check(self, loaded: Loaded, reports: Reports) -> None:
        """Raises StopIteration or an error after the last batch, on all processes alike."""
        try:
            self._check_failed(loaded, reports)
            self._check_ended(reports)
            self._check_shapes(loaded, reports)
            self._check_contents(reports)
        except Exception as error:
            self._ended = isinstance(error, StopIteration)
            self._error = None if self._ended else error
            self._next = None
            self._prefetcher.stop()
            raise

    def _check_failed(self, loaded: Loaded, reports: Reports) -> None:
        if loaded.error is not None:
            raise loaded.error
        failed = _with_status(reports, Status.FAILED)
        if failed:
            raise ClusterError(f"batch {self.number} could not be made on {naming.named(failed)},"
                               " whose log has the reason; all processes end.")

    def _check_ended(self, reports: Reports) -> None:
        ready = _with_status(reports, Status.READY)
        if not ready and self.number == 0 and not hasattr(self.source, "get_state"):
            self._warn_of_nothing()
        if not ready or (len(ready) < len(reports) and not self.pad):
            raise StopIteration
        empty = _with_status(reports, Status.EMPTY)
        if empty:
            raise BatchError(f"{naming.named(empty)} brought no batch at all, so pad=True has no "
                             "example to pad with; give every process at least one example.")

    def _warn_of_nothing(self) -> None:
        """Warns of a source without any batch; one with a position may be at its end."""
        why = ("A loader that drops a short last batch has none if its data set is smaller than a "
               "batch.")
        if self.source is self.batches:
            why = ("It can be iterated over only once, and an earlier loop may have taken its "
                   "batches: make a new one for each feed.")
        errors.warn(f"feed: the source ({trees.kind(self.batches)}) has no batch, so that the loop "
                    f"over the feed makes no step. {why}")

    def _check_shapes(self, loaded: Loaded, reports: Reports) -> None:
        if len({mark for _, mark, _ in reports.values()}) > 1:
            shapes = self._group.shared(loaded.shapes)
            raise BatchError(f"batch {self.number}: {agreement.difference(shapes)}\nAll processes "
                             "must bring the same number of examples, of the same shapes and "
                             "dtypes; if the last batch is shorter, drop it, or write "
                             "zj.feed(..., pad=True).")

    def _check_contents(self, reports: Reports) -> None:
        for process, (_, _, mark) in reports.items():
            first = next(p for p in reports if self._held[p] == self._held[process])
            if mark != reports[first][2]:
                raise BatchError(f"batch {self.number}: the devices of processes {first} and "
                                 f"{process} hold the same examples, but these processes brought "
                                 "different ones; bring the share that zero.share() returns.")

    def get_state(self) -> Any:
        """Returns the source's position after the last batch returned, not the last prefetched.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check_has_position()
        return self.position

    def set_state(self, state: Any) -> None:
        """Continues from a position of the source; prefetched batches are dropped.

        Raises:
          BatchError: the source has no `get_state`.
        """
        self._check_has_position()
        self._prefetcher.close()
        self.source.set_state(state)
        self._restart()

    def _check_has_position(self) -> None:
        if not hasattr(self.source, "get_state"):
            raise BatchError(f"feed was given a {type(self.source).__name__}, which has no "
                             "get_state and set_state, so its position cannot be saved; give "
                             "zj.Indexed(make_batch), a grain iterator, or another iterator that "
                             "has both.")


def _with_status(reports: Reports, status: Status) -> list[int]:
    return [process for process, (reported, *_) in reports.items() if reported == status]


def _check_batches(batches: Any) -> None:
    arrays = (np.ndarray, jax.Array)
    of_arrays = isinstance(batches, tuple) and all(isinstance(x, arrays) for x in batches)
    if of_arrays or isinstance(batches, (Mapping, str, *arrays)):
        raise BatchError(f"feed was given one batch (a {type(batches).__name__}); give an iterable "
                         "of batches: zj.feed([batch], zero), or a generator of them.")
    if inspect.isgeneratorfunction(batches):
        raise BatchError(f"feed was given the generator function {batches.__name__}; call it: "
                         f"zj.feed({batches.__name__}(), zero).")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise BatchError(f"feed was given {trees.kind(batches)}, which is not an iterable of "
                         "batches; give a list, a loader or a generator of them, or, for a "
                         "function that returns batch i, zj.Indexed(make_batch, steps).")


def _check_policy(policy: Any) -> None:
    if not isinstance(policy, Policy):
        raise BatchError(f"feed was given {trees.kind(policy)} as its second argument, not the "
                         "Zero whose steps use the batches; write zj.feed(batches, zero).")


def _check_prefetch(prefetch: Any) -> None:
    if not isinstance(prefetch, int) or prefetch < 0:
        raise BatchError(f"feed(prefetch={prefetch!r}): write the number of batches that are made "
                         "in advance; with 0, each is made when it is asked for.")


def feed(batches: Iterable, zero: Policy, *, prefetch: int = 2, pad: bool | int = False) -> Feed:
    """Returns an iterator over batches of numpy arrays as sharded device arrays.

    A thread makes them in advance; it starts with the first `next`. With several processes, each
    gives its own share of every batch, and all must call `next` alike, from their main threads.
    They end together: when the first of them has no more examples or, with `pad`, when the last
    has none.

    If the source has `get_state` and `set_state` (`Indexed` and grain's iterators do), so does the
    feed. Its position is that after the last batch returned, not after the last one prefetched.

    Args:
      batches: an iterable of pytrees of arrays `[B, ...]`, all with the same B, which must be
        divisible by the number of parts of the batch that this process's devices hold (one per
        device, except with tensor parallelism). The batch consists of the shares of the processes
        in the order of the mesh's devices, see `zero.share()`. A second `for` loop starts again if
        the iterable can be iterated over again.
      zero: the policy of the steps that use the batches.
      prefetch: the number of batches that are made in advance; with 0, the caller's thread makes
        each when it is asked for.
      pad: pads batches that are shorter than the first, or than this number of examples of this
        process, with copies of one example. Give the number if a resumed run can start with a short
        batch. The feed then returns `(batch, weight)`, where weight is float32[B]: 1 for examples
        of the source, 0 for padding. Multiply the losses by it.

    Raises:
      BatchError: B is not divisible by that number, or differs between arrays or processes; an
        array has a dtype or values that the devices cannot hold; `prefetch` is negative; `batches`
        is one batch, or not iterable; or `zero` is not a `Zero`.
      PolicyError: the GPUs of the mesh are simulated.
      ClusterError: another process could not make its share.

    >>> import numpy as np, zerojax as zj
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]))
    >>> [b.sharding.spec for b in zj.feed([np.zeros((4, 3))], zero)]
    [P('data',)]
    >>> padded = zj.feed([np.zeros((4, 3)), np.zeros((1, 3))], zero, pad=True)
    >>> [weight.tolist() for _, weight in padded]
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    return Feed(batches, zero, prefetch, pad)
