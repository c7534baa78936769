"""Reading ahead: a thread makes the next items while the last is in use."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Reader:
    """What `make()` returns, call by call, up to `ahead` of them made before they are taken; 0 makes them when they are.

    The thread does not keep the reader: it ends when nobody holds that any more, or the process ends.

    >>> reader = Reader(iter(range(3)).__next__, ahead=2)
    >>> reader.take(), reader.take()
    (0, 1)
    """

    def __init__(self, make: Callable[[], Any], ahead: int):
        self._make, self._thread = make, None
        if ahead:
            items, room, stop = queue.SimpleQueue(), threading.Semaphore(ahead), threading.Event()
            self._thread = threading.Thread(target=_run, args=(make, items, room, stop), daemon=True, name="zerojax feed")
            self._items, self._room, self._stop = items, room, stop
            self._end = weakref.finalize(self, _end, room, stop, self._thread, 1.0)
            self._thread.start()

    def take(self) -> Any:
        """The next item. What `make` raises is raised when its turn comes; it is not called after that."""
        if self._thread is None:
            return self._make()
        item, error = self._items.get()
        self._room.release()
        if error is not None:
            self._items.put((item, error))
            raise error
        return item

    def close(self) -> None:
        """Waits until `make` is not being called, nor will be."""
        if self._thread is not None and self._end.detach():
            _end(self._room, self._stop, self._thread, None)


def _run(make, items, room, stop):
    while True:
        room.acquire()
        if stop.is_set():
            return
        try:
            items.put((make(), None))
        except BaseException as error:
            items.put((None, error))
            return


def _end(room, stop, thread, seconds):
    """At the end of the process, a thread that is inside of jax would abort it; one that waits for a file is left."""
    stop.set()
    room.release()
    thread.join(seconds)
