"""Being told to stop: a signal is noticed between steps, so that a run can save and end with a status of its own.

Of several processes, whichever is told tells the others, one step before they stop together. (jax's own sync point can't be used
beside Orbax, which sets its counter to another number with every save.)
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from zerojax.errors import CheckpointError, ClusterError
from zerojax.processes import exchange

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Within it, SIGTERM and SIGINT (Ctrl-C) end nothing; they make `requested` true. A Ctrl-C after that is a KeyboardInterrupt.

    Training and evaluation ask between steps, as by `until`; what was saved is then what the run goes on from.

    Several processes, one of which gets a signal, stop after the same step: all call `until` alike.

    Attributes:
      requested: whether a signal came; of several processes, whether all know that one came to one of them.
      status: of the process after `exit()`: 75, "try again" in sysexits.h. An error gives 1, a signal that ends it 128 and more.

    Raises:
      CheckpointError: entered outside of the main thread, to which alone Python gives signals.
      ClusterError: entered before `initialize`.

    >>> with Preemption() as preemption:
    ...     for number in preemption.until(range(5)):
    ...         if number == 2:
    ...             signal.raise_signal(signal.SIGTERM)
    >>> number, preemption.requested
    (2, True)
    """

    status = 75

    def __init__(self):
        self.requested = self._told = False
        self._devices: exchange.Devices = ()
        self._sent = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            raise CheckpointError(f"Preemption was entered in thread {threading.current_thread().name!r}; Python gives signals "
                                  "to the main thread only: enter it there, and hand it over.")
        self._devices = exchange.everyone()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self._told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._told, self.requested = True, self.requested or not self._devices
        # print may not be called while it is at work already
        os.write(2, f"\n{signal.Signals(number).name}: stops after this step\n".encode())

    def until(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, up to the signal; none is taken and not handed out."""
        if not self._devices and exchange.everyone():
            raise ClusterError("Preemption was entered before zj.initialize(), which takes its signals away; enter it after that.")
        source, end = iter(items), object()
        while not self._agreed() and (item := next(source, end)) is not end:
            yield item

    def _agreed(self) -> bool:
        """What was sent a step ago has arrived: reading it keeps no device waiting."""
        if self._devices and not self.requested:
            before, self._sent = self._sent, exchange.send(self._devices, [self._told])
            self.requested = before is not None and any(told[0] for told in exchange.received(self._devices, before).values())
        return self.requested

    def exit(self) -> NoReturn:
        """Ends the process with `status`; to be called when the state is on disk. SIGTERM, of which schedulers send more than one,
        does nothing any more."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(self.status)
