"""The hub in process 0: takes the calls of all processes, and notices those that cannot succeed.

Each process sends batches of messages, which are lists of a kind and its arguments:

    ["name", members, name, place]    the next entry of its table of calls; no members: all
    ["call", entry, waits]            a call
    ["barrier", tag]                  waits for all processes
    ["left"], ["failed", text]        makes no more calls, because of an error

and the hub sends

    ["answer", number, trouble]       all have made the call of that number, or why they have not
    ["barrier", tag]                  all have come
    ["note", text]                    for the log
    ["end", text, stacks]             the job cannot continue; whether to print stacks

Needs no jax.
"""

import contextlib
import selectors
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zerojax.processes import roll_call
from zerojax.processes.roll_call import Call, Made, RollCall
from zerojax.processes.sealed import Channel

_TICK = 0.5  # seconds between looks at the clock


class Hub(threading.Thread):
    """The thread of the hub.

    Args:
      channels: the connection to each process, also to process 0 itself.
      heartbeat: seconds after which a call that others have not made is reported.
      watchdog: seconds without a call of a process after which the job ends; None means never.
    """

    def __init__(self, channels: Mapping[int, Channel], heartbeat: float, watchdog: float | None):
        super().__init__(name="zerojax hub", daemon=True)
        self.channels = dict(channels)
        self.everyone = tuple(sorted(channels))
        self.heartbeat = heartbeat
        self.watchdog = watchdog
        self._roll = RollCall()
        self._tables: dict[int, list[Call]] = {process: [] for process in channels}
        self._numbers = dict.fromkeys(channels, 0)
        self._barriers: dict[str, set[int]] = {}
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for process, channel in channels.items():
            self._selector.register(channel.connection, selectors.EVENT_READ, process)

    def run(self) -> None:
        while self.channels:
            for key, _ in self._selector.select(_TICK):
                self._receive(key.data)
            self._look(time.monotonic())

    def _receive(self, process: int) -> None:
        try:
            for batch in self.channels[process].receive():
                for kind, *arguments in batch:
                    getattr(self, f"_take_{kind}")(process, *arguments)
        except (EOFError, ValueError, TypeError, LookupError, AttributeError):
            self._lose(process)  # or it does not send such messages

    def _take_name(self, process: int, members: Sequence[int], name: str, place: str) -> None:
        self._tables[process].append(Call(tuple(members) or self.everyone, name, place))

    def _take_call(self, process: int, entry: int, waits: bool) -> None:
        self._numbers[process] += 1
        call = self._tables[process][entry]
        made = Made(call, self._numbers[process], waits, time.monotonic())
        complete = self._roll.add(process, made)
        if complete is not None:
            self._compare(complete)
        elif self._roll.left:
            self._end_unless_possible()

    def _compare(self, complete: Mapping[int, Made]) -> None:
        """Answers a call that all members have made, or ends the job if some do not wait."""
        trouble = roll_call.difference(complete)
        if trouble and not all(made.waits for made in complete.values()):
            self._end(trouble)
            return
        for process, made in complete.items():
            if made.waits:
                self._send([process], ["answer", made.number, trouble])

    def _take_barrier(self, process: int, tag: str) -> None:
        came = self._barriers.setdefault(tag, set())
        came.add(process)
        if len(came) == len(self.everyone):
            self._send(came, ["barrier", tag])
            del self._barriers[tag]

    def _take_left(self, process: int) -> None:
        self._roll.left.add(process)
        self._end_unless_possible()

    def _end_unless_possible(self) -> None:
        if trouble := self._roll.never():
            self._end(trouble)

    def _take_failed(self, process: int, text: str) -> None:
        self._roll.left.add(process)
        self._end(f"process {process} failed: {text}", but=[process])

    def _lose(self, process: int) -> None:
        """Notes that a process has ended, which ends the job if it did not announce it."""
        channel = self.channels.pop(process)
        self._selector.unregister(channel.connection)
        channel.close()
        if process not in self._roll.left:
            last = self._roll.last.get(process)
            self._roll.left.add(process)
            self._end(f"process {process} was killed, or aborted. Its last call: "
                      f"{last.call if last else 'none'}.")

    def _look(self, now: float) -> None:
        for members, text in self._roll.late(now, self.heartbeat).items():
            self._send(members, ["note", text])
        silent = self._roll.silent(now, self.watchdog) if self.watchdog else ""
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
