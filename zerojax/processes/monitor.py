"""This process's calls, reported to the hub in process 0, and the hub's answers.

A call that only some processes make would wait for ever, or abort the process without a reason.
Before zerojax lets processes exchange data it reports the call, and waits until all have made it;
the calls of training steps are reported without waiting. Does nothing in a process that is alone.
Needs no jax.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import queue
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

from zerojax.errors import ClusterError, is_internal
from zerojax.processes import ending, sealed
from zerojax.processes.hub import Hub
from zerojax.processes.roll_call import Call, Members
from zerojax.processes.sealed import Channel, Seal

_LOG = logging.getLogger("zerojax")
_GRACE = 2.5  # seconds in which a process may end by itself when the job ends
_HERE = ("zerojax.processes.monitor", "zerojax.processes.exchange", "zerojax.processes.agreement")
_LONG = 0.5  # seconds after which the start of a call is reported
_PAUSE = 0.02  # seconds in which calls that nobody waits for are collected
_STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_member: "Member | None" = None


def start(channels: Mapping[int, Channel], process: int, heartbeat: float,
          watchdog: float | None) -> None:
    """Connects this process to the hub; starts the hub in process 0.

    Args:
      channels: the connection to process 0, or, in process 0, those to all others.
      heartbeat: seconds after which jax aborts the processes if one of them does not answer. Calls
        that others have not made are reported after half of it.
      watchdog: see `Hub`.
    """
    global _member
    forget = []
    if process == 0:
        ours, theirs = _pair()
        hub = Hub({0: theirs, **channels}, heartbeat / 2, watchdog)
        hub.start()
        forget.append(hub.forget)
    else:
        ours = channels[0]
    # process 0 ends last, because jax aborts the others when it does
    _member = Member(ours, grace=_GRACE if process else _GRACE + 1)
    os.register_at_fork(after_in_child=functools.partial(_forget, forget))


def _pair() -> tuple[Channel, Channel]:
    """Returns both ends of a connection within this process."""
    ends, numbers = socket.socketpair(), (sealed.nonce(), sealed.nonce())
    ours, theirs = (Channel(end, Seal(*numbers, is_server=end is ends[1])) for end in ends)
    return ours, theirs


def is_running() -> bool:
    """Whether this process is connected to the hub."""
    return _member is not None


def _forget(others: list[Callable[[], None]]) -> None:
    """Closes the connections in a forked child, such as a data loader's, which would keep them."""
    global _member
    if _member is not None:
        _member.channel.close()
        _member = None
        for forget in others:
            forget()


def called(members: Members, key: str) -> None:
    """Reports a call that these processes make, and does not wait.

    Args:
      members: the processes; () for all.
      key: what is called. It must be the same for all.
    """
    if _member is not None:
        _member.report(_call(members, key), waits=False)


@contextlib.contextmanager
def calling(members: Members, key: str) -> Iterator[None]:
    """Reports a call that is made in the context, unless it fails, for example in its trace.

    If the call takes long, for example because it waits for others, its start is reported first.
    """
    if _member is None:
        yield
        return
    begun = _member.begin(_call(members, key))
    try:
        yield
    except BaseException:
        _member.cancel(begun)
        raise
    _member.commit(begun)


def meet(members: Members) -> None:
    """Reports an exchange between these processes, and waits until all have begun it.

    Raises:
      ClusterError: others have made another call, or have ended.
    """
    if _member is not None:
        _member.meet(_call(members, ""))


def barrier(tag: str, value: str) -> None:
    """Waits until all processes of the job have come to the barrier of this name.

    Any thread may wait, for several barriers at once.

    Args:
      value: what must be equal.

    Raises:
      ClusterError: others have ended, or came with another value.
    """
    if _member is not None:
        _member.barrier(tag, value)


def failed(text: str) -> None:
    """Reports an error that ends this process."""
    if _member is not None:
        _member.leave(["failed", text])


def left() -> None:
    """Reports that this process makes no more calls."""
    if _member is not None:
        _member.leave(["left"])


@dataclasses.dataclass(eq=False)
class Begun:
    """A call that has begun.

    Attributes:
      at: when, in seconds of `time.monotonic`.
      is_reported: whether its start is reported.
    """

    call: Call
    at: float
    is_reported: bool = False


class Member:
    """A process's side of its connection to the hub.

    Args:
      grace: seconds in which the process may end by itself when the job ends; at its own end, it
        waits as long until the others know.
    """

    def __init__(self, channel: Channel, grace: float):
        self.channel = channel
        self._grace = grace
        self._table: dict[Call, int] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._last_word: list[Any] = []  # how this process ends
        self._may_close = False  # process 0 has left
        self._trouble = ""  # why the job ends
        self._begun: list[Begun] = []  # calls that are neither made nor have failed
        self._out: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._noted = threading.Event()  # by the hub, that this process has left
        self._news = threading.Condition()
        self._answers: dict[int, str] = {}  # by number of the call
        self._passed: dict[str, str] = {}  # barriers, and the trouble with each
        for run in (self._send, self._receive):
            threading.Thread(target=run, name="zerojax monitor", daemon=True).start()

    def report(self, call: Call, waits: bool) -> int:
        """Reports a call; returns its number."""
        with self._lock:
            self._out.put(["call", self._entry(call), waits])
            self._number += 1
            number = self._number
        if waits:
            self._urgent.set()
        return number

    def _entry(self, call: Call) -> int:
        """Returns the entry of a call in the table, which the hub has too."""
        if call not in self._table:
            self._table[call] = len(self._table)
            self._out.put(["name", *call])
        return self._table[call]

    def begin(self, call: Call) -> Begun:
        begun = Begun(call, time.monotonic())
        with self._lock:
            self._begun.append(begun)
        return begun

    def commit(self, begun: Begun) -> None:
        """Reports a call that has begun."""
        with self._lock:
            self._begun.remove(begun)
        self.report(begun.call, waits=False)

    def cancel(self, begun: Begun) -> None:
        """Forgets a call that has failed."""
        with self._lock:
            self._begun.remove(begun)
            if begun.is_reported:
                self._out.put(["begun", None])

    def _report_begun(self) -> None:
        with self._lock:
            for begun in self._begun:
                if not begun.is_reported and time.monotonic() - begun.at > _LONG:
                    begun.is_reported = True
                    self._out.put(["begun", self._entry(begun.call)])

    def meet(self, call: Call) -> None:
        number = self.report(call, waits=True)
        try:
            with self._news:
                self._news.wait_for(lambda: self._trouble or number in self._answers)
                trouble = self._answers.pop(number, "") or self._trouble
        except BaseException:  # such as Ctrl-C in a notebook
            self._out.put(["withdrawn", self._table[call], number])
            raise
        if trouble:
            raise ClusterError(trouble)

    def barrier(self, tag: str, value: str) -> None:
        self._out.put(["barrier", tag, value])
        self._urgent.set()
        with self._news:
            self._news.wait_for(lambda: self._trouble or tag in self._passed)
            trouble = self._passed.pop(tag, "") or self._trouble
        if trouble:
            raise ClusterError(trouble)

    def leave(self, message: list[Any]) -> None:
        """Reports the end of this process; several threads may."""
        with self._lock:
            is_new, self._last_word = self._last_word != message, message
        if is_new:
            self._noted.clear()
            self._out.put(message)
            self._urgent.set()
        self._noted.wait(self._grace)

    def _send(self) -> None:
        """Sends what is to be sent, in batches."""
        try:
            while True:
                self.channel.send(self._batch())
                self._urgent.wait(_PAUSE)
        except OSError:  # process 0 has ended
            self._noted.set()

    def _batch(self) -> list[list[Any]]:
        """Waits for messages; returns them all."""
        while True:
            self._report_begun()
            with contextlib.suppress(queue.Empty):
                batch = [self._out.get(timeout=_LONG / 2)]
                self._urgent.clear()
                while not self._out.empty():
                    batch.append(self._out.get())
                return batch

    def _receive(self) -> None:
        try:
            while True:
                for kind, *arguments in self.channel.receive():
                    getattr(self, f"_take_{kind}")(*arguments)
        except EOFError:
            self._noted.set()
            if not self._last_word and not self._may_close:
                self._take_end("process 0 was killed, aborted or disconnected.", False)
        except Exception as error:  # nobody else would notice that this thread has ended
            self._take_end(f"the messages of process 0 cannot be read: {error!r}", False)

    def _take_answer(self, number: int, trouble: str) -> None:
        with self._news:
            self._answers[number] = trouble
            self._news.notify_all()

    def _take_barrier(self, tag: str, trouble: str) -> None:
        with self._news:
            self._passed[tag] = trouble
            self._news.notify_all()

    def _take_left(self) -> None:
        self._may_close = True

    def _take_noted(self) -> None:
        self._noted.set()

    def _take_note(self, text: str) -> None:
        """Logs a text in another thread, because the user's handlers may fail or wait."""
        with contextlib.suppress(RuntimeError):  # no thread starts at the end of the program
            threading.Thread(target=_LOG.warning, args=("%s", text), daemon=True).start()

    def _take_end(self, text: str, stacks: bool) -> None:
        """Ends this process, by an error if it waits for others."""
        with self._news:
            self._trouble = text
            self._news.notify_all()
        ending.soon(text, stacks, self._grace)


def _call(members: Members, key: str) -> Call:
    """Returns the call of the user's program that led here.

    Args:
      key: what is called; by default, the function of zerojax that exchanges data.
    """
    frame, called, exchanging = sys._getframe(2), "", ""
    while frame.f_back is not None and _is_library(frame.f_code, _module(frame)):
        if _module(frame).startswith("zerojax."):
            called = frame.f_code.co_qualname
            exchanging = exchanging or called * (_module(frame) not in _HERE)
        frame = frame.f_back
    place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    name = called.removesuffix(".__call__").removesuffix(".__next__")
    return Call(members, name, place, key or exchanging)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


@functools.cache
def _is_library(code: CodeType, module: str) -> bool:
    file = code.co_filename
    return (is_internal(module) or file.startswith((_STDLIB, "<frozen "))
            or any(packages in file for packages in _PACKAGES))
