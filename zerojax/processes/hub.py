"""The hub in process 0: takes the calls of all processes, and notices those that cannot succeed.

Each process sends batches of messages, which are lists of a kind and its arguments:

    ["name", members, name, place, key]   the next entry of its table of calls; no members: all
    ["call", entry, waits]                a call
    ["begun", entry]                      a call that has started; null: it has failed
    ["withdrawn", entry, number]          the process does not wait for that call any more
    ["barrier", tag, value]               waits for all processes, which have the same value
    ["left"], ["failed", text]            makes no more calls, because of an error

and the hub sends

    ["answer", number, trouble]           all have made that call, or why they have not
    ["barrier", tag, trouble]             all have come, perhaps with other values
    ["note", text]                        for the log
    ["left"]                              process 0 makes no more calls, and may end
    ["noted"]                             the others know that this process makes no more calls
    ["end", text, stacks]                 the job cannot continue; whether to print stacks

Needs no jax.
"""

import contextlib
import logging
import selectors
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zerojax.processes import barriers, roll_call
from zerojax.processes.barriers import Barriers
from zerojax.processes.roll_call import Call, Group, Made, RollCall
from zerojax.processes.sealed import Channel

_LOG = logging.getLogger("zerojax")
_TICK = 0.25  # seconds between looks at the clock
_GONE = 1.0  # seconds after its end in which a process may call again, for example by `atexit`


class Hub(threading.Thread):
    """The thread of the hub.

    Args:
      channels: the connection to each process, also to process 0 itself.
      patience: seconds after which a call that others have not made is reported.
      watchdog: seconds without a call of a process after which the job ends; None means never.
    """

    def __init__(self, channels: Mapping[int, Channel], patience: float, watchdog: float | None):
        super().__init__(name="zerojax hub", daemon=True)
        self.channels = dict(channels)
        self.everyone = tuple(sorted(channels))
        self.patience = patience
        self.watchdog = watchdog
        self._roll = RollCall(self.everyone)
        self._tables: dict[int, list[tuple[Group, Call]]] = {p: [] for p in channels}
        self._numbers = dict.fromkeys(channels, 0)
        self._barriers = Barriers(self.everyone)
        self._announced: set[int] = set()  # the processes that have reported their end
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for process, channel in channels.items():
            self._selector.register(channel.connection, selectors.EVENT_READ, process)

    def run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # nobody else would notice that the hub has ended
            self._end(f"the hub of process 0 failed: {error!r}")
            raise

    def _serve(self) -> None:
        looked = time.monotonic()
        while self.channels:
            for key, _ in self._selector.select(_TICK):
                self._receive(key.data)
            if time.monotonic() > looked + _TICK:
                looked = time.monotonic()
                self._look(looked)

    def forget(self) -> None:
        """Closes the connections in a forked child, which would keep them open."""
        for channel in self.channels.values():
            channel.close()

    def _receive(self, process: int) -> None:
        try:
            for batch in self.channels[process].receive():
                for kind, *arguments in batch:
                    getattr(self, f"_take_{kind}")(process, *arguments)
        except EOFError:
            self._lose(process)
        except (ValueError, TypeError, LookupError, AttributeError):
            _LOG.exception("process %d sent what the hub does not understand", process)
            self._lose(process)

    def _take_name(self, process: int, members: Sequence[int], *fields: str) -> None:
        call = Call(tuple(members), *fields)
        self._tables[process].append((self._roll.group(call.members), call))

    def _take_call(self, process: int, entry: int, waits: bool) -> None:
        self._numbers[process] += 1
        group, call = self._tables[process][entry]
        made = Made(call, self._numbers[process], waits, time.monotonic())
        complete = self._roll.add(process, group, made)
        if complete is not None:
            self._compare(complete)

    def _compare(self, complete: Mapping[int, Made]) -> None:
        """Answers a call that all members have made, or ends the job if some do not wait."""
        trouble = roll_call.difference(complete)
        if trouble and not all(made.waits for made in complete.values()):
            self._end(trouble)
            return
        for process, made in complete.items():
            if made.waits:
                self._roll.waiting.pop((process, made.number), None)
                self._send([process], ["answer", made.number, trouble])

    def _take_begun(self, process: int, entry: int | None) -> None:
        self._roll.begun.pop(process, None)
        if entry is not None:
            _, call = self._tables[process][entry]
            self._roll.begun[process] = Made(call, 0, False, time.monotonic())

    def _take_withdrawn(self, process: int, entry: int, number: int) -> None:
        """Forgets a call that was interrupted, unless others have gone on with it."""
        self._roll.waiting.pop((process, number), None)
        group, call = self._tables[process][entry]
        if not group.withdraw(process, number):
            self._end(f"process {process} was interrupted in {call}, which the others have made.")

    def _take_barrier(self, process: int, tag: str, value: str) -> None:
        came = self._barriers.come(process, tag, value, time.monotonic())
        if came is not None:
            self._send(came, ["barrier", tag, barriers.difference(tag, came)])

    def _take_left(self, process: int) -> None:
        self._note_end(process)
        if process == 0:
            self._send(self.everyone[1:], ["left"])
        self._send([process], ["noted"])

    def _take_failed(self, process: int, text: str) -> None:
        self._note_end(process)
        self._end(f"process {process} failed: {text}", but=[process])
        if process != 0:  # process 0 waits for the end of the others, which its own would abort
            self._send([process], ["noted"])

    def _note_end(self, process: int) -> None:
        self._announced.add(process)
        self._roll.left[process] = time.monotonic()

    def _lose(self, process: int) -> None:
        """Notes that a process has ended, which ends the job if it did not announce it."""
        channel = self.channels.pop(process)
        self._selector.unregister(channel.connection)
        channel.close()
        was_announced = process in self._announced
        self._note_end(process)
        if not was_announced:
            self._end(f"process {process} was killed, aborted or disconnected. "
                      f"{self._roll.last_calls([process])}")
        if self.channels.keys() == {0}:
            self._send([0], ["noted"])

    def _look(self, now: float) -> None:
        """Notices what the time shows: calls and barriers that others do not come to, silence."""
        gone = {p for p, at in self._roll.left.items() if now - at > _GONE}
        for trouble in (self._barriers.never(gone), self._roll.never(gone),
                        self._roll.differ(now, self.patience),
                        self._roll.stuck(gone, now, self.patience)):
            if trouble:
                self._end(trouble)
        for members, text in self._roll.late(now, self.patience).items():
            self._send(members, ["note", text])
        for text in self._barriers.late(now, self.patience):
            self._send(self.everyone, ["note", text])
        if self.watchdog:
            silent = self._roll.silent(self._barriers.waiting, now, self.watchdog)
            if silent:
                self._end(f"{silent} The watchdog ends the job.", stacks=True)

    def _end(self, text: str, but: Iterable[int] = (), stacks: bool = False) -> None:
        """Ends the job, once: process 0 last, because the others abort when it ends."""
        if not self._ended:
            self._ended = True
            self._send(set(self.everyone) - {0, *but}, ["end", text, stacks])
            self._send({0} - {*but}, ["end", text, stacks])

    def _send(self, processes: Iterable[int], message: list[Any]) -> None:
        for process in processes:
            with contextlib.suppress(OSError, KeyError):  # it has ended
                self.channels[process].send(message)
