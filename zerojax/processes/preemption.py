"""A request to stop, which a run notices between steps, so that it can save before it ends.

The process that receives the signal tells the others one step before all stop together. jax's own
sync point cannot be used beside Orbax, which sets its counter to another number with every save.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from zerojax.errors import CheckpointError, ClusterError
from zerojax.processes import exchange
from zerojax.processes.outcome import PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context in which SIGTERM and SIGINT (Ctrl-C) do not end the process, but set `requested`.

    A Ctrl-C after the first signal raises KeyboardInterrupt. Training and evaluation check between
    steps, for example with `until`. If all processes of a job take their items from `until`, a
    signal to one of them stops all of them after the same step.

    Attributes:
      requested: whether a signal has arrived; with several processes, whether all of them know
        about it.
      status: the exit status of `exit()`: 75, "try again" in sysexits.h. An error gives 1, and a
        signal that ends the process gives 128 or more.

    Raises:
      CheckpointError: entered outside the main thread, the only one that receives signals.
      ClusterError: entered before `initialize`.

    >>> with Preemption() as preemption:
    ...     for number in preemption.until(range(5)):
    ...         if number == 2:
    ...             signal.raise_signal(signal.SIGTERM)
    >>> number, preemption.requested
    (2, True)
    """

    status = PREEMPTED

    def __init__(self):
        self.requested = False
        self._signalled = False
        self._group: exchange.Group = exchange.Alone()
        self._sent = None

    def __enter__(self) -> "Preemption":
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            raise CheckpointError(f"Preemption was entered in thread {thread.name!r}, but Python "
                                  "delivers signals to the main thread only; enter it there, and "
                                  "pass it to the thread.")
        self._group = exchange.everyone()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        self.requested |= self._group.size == 1  # there is nobody to agree with
        # a signal may interrupt print, which must not be called again before it returns
        os.write(2, f"\n{signal.Signals(number).name}: stops after this step\n".encode())

    def until(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items, up to the signal. Takes no item that it does not yield."""
        if self._group != exchange.everyone():
            raise ClusterError("Preemption was entered before zj.initialize(), which replaces its "
                               "signal handlers; enter it after zj.initialize().")
        source = iter(items)
        end = object()
        while not self._agreed() and (item := next(source, end)) is not end:
            yield item

    def _agreed(self) -> bool:
        """Whether all stop now.

        Reads the words that were sent one step before, so no device waits for them.
        """
        if not self.requested:
            before = self._sent
            self._sent = self._group.send([self._signalled])
            words = {} if before is None else self._group.received(before)
            if any(signalled for signalled, in words.values()):
                self.requested = True
        return self.requested

    def exit(self) -> NoReturn:
        """Ends the process with `status`; to be called when the state is on disk.

        Schedulers may send SIGTERM more than once; later ones are ignored.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(self.status)
