"""Reading ahead: a thread makes the next items while the last is in use."""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class Reader:
    """What `make()` returns, call by call, up to `ahead` of them made before they are taken; 0 makes them when they are.

    The thread starts with the first and does not keep the reader: it ends when nobody holds that any more, or the process ends.

    >>> reader = Reader(iter(range(3)).__next__, ahead=2)
    >>> reader.take(), reader.take()
    (0, 1)
    """

    def __init__(self, make: Callable[[], Any], ahead: int):
        self._make, self._ahead, self._thread = make, ahead, None

    def take(self) -> Any:
        """The next item. What `make` raises is raised when its turn comes; it is not called after that."""
        if not self._ahead:
            return self._make()
        if self._thread is None:
            self._start()
        item, error = self._items.get()
        self._room.release()
        if error is not None:
            self._items.put((item, error))
            raise error
        return item

    def _start(self):
        self._items, self._room, self._stop = queue.SimpleQueue(), threading.Semaphore(self._ahead), threading.Event()
        arguments = (self._make, self._items, self._room, self._stop)
        self._thread = threading.Thread(target=_run, args=arguments, daemon=True, name="zerojax feed")
        weakref.finalize(self, _end, self._room, self._stop)
        _threads.add(self._thread)
        self._thread.start()

    def close(self) -> None:
        """Waits until `make` is not being called, nor will be."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """Makes no more; a call of `make` under way goes on."""
        if self._thread is not None:
            _end(self._room, self._stop)


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


def _end(room, stop):
    stop.set()
    room.release()


@atexit.register
def _join():
    """All are told by then. A thread inside of jax would abort the end of the process; one that waits for a file is left."""
    for thread in list(_threads):
        thread.join(1.0)
