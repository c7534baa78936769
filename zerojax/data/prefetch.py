"""Prefetching: a thread calls a function ahead of the use of its results."""

import atexit
import functools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Prefetcher:
    """The results of `make()`, call by call; a thread makes up to `ahead` of them in advance.

    The thread starts with the first `take`. It ends with the process, or when nothing refers to the
    prefetcher any more. If `ahead` is 0, there is no thread: `take` calls `make`.

    >>> prefetcher = Prefetcher(iter(range(3)).__next__, ahead=2)
    >>> prefetcher.take(), prefetcher.take()
    (0, 1)
    """

    def __init__(self, make: Callable[[], Any], ahead: int):
        self._make = make
        self._ahead = ahead
        self._worker: _Worker | None = None

    def take(self) -> Any:
        """Returns the next result, or raises the error of the call that was to make it.

        After an error, the thread makes no more calls, and every `take` raises this error.
        """
        if not self._ahead:
            return self._make()
        if self._worker is None:
            self._worker = _Worker(self._make, self._ahead)
            weakref.finalize(self, self._worker.stop)
        return self._worker.take()

    def stop(self) -> None:
        """Prevents further calls on the thread; a call under way continues."""
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """Stops the thread, and waits until it has ended."""
        if self._worker is not None:
            self._worker.stop()
            self._worker.thread.join()


class _Worker:
    """A thread that calls `make`, and the queue of its results. Has no reference to the prefetcher.

    Attributes:
      thread: a daemon, so that the process can end while `make` waits for a file.
    """

    def __init__(self, make: Callable[[], Any], ahead: int):
        self._make = make
        self._results = queue.SimpleQueue()  # of (result, error)
        self._room = threading.Semaphore(ahead)
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="zerojax feed")
        _workers.add(self)
        _stop_at_exit()
        self.thread.start()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._stopped.is_set():
                return
            try:
                self._results.put((self._make(), None))
            except BaseException as error:
                self._results.put((None, error))
                return

    def take(self) -> Any:
        result, error = self._results.get()
        self._room.release()
        if error is not None:
            self._results.put((None, error))  # for the next `take`
            raise error
        return result

    def stop(self) -> None:
        self._stopped.set()
        self._room.release()


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@functools.cache  # once
def _stop_at_exit() -> None:
    atexit.register(_stop_all)


def _stop_all(seconds: float = 1.0) -> None:
    """Stops all threads, and waits for each: one that is inside jax would abort the process's end.

    A thread that does not end in this time waits for its source, and is left.
    """
    workers = list(_workers)
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.thread.join(seconds)
