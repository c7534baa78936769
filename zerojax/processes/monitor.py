"""This process's calls, reported to the hub in process 0, and the hub's answers.

A call that only some processes make would wait for ever, or abort the process without a reason.
Before zerojax lets processes exchange data it reports the call, and waits until all have made it;
the calls of training steps are reported without waiting. Does nothing in a process that is alone.
Needs no jax.
"""

import collections
import functools
import logging
import os
import queue
import socket
import sys
import sysconfig
import threading
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from zerojax.errors import ClusterError, is_internal
from zerojax.processes import ending, sealed
from zerojax.processes.hub import Hub
from zerojax.processes.roll_call import Call, Members
from zerojax.processes.sealed import Channel, Seal

_LOG = logging.getLogger("zerojax")
_GRACE = 3.0  # seconds in which a process may end by itself when the job ends
_PAUSE = 0.02  # seconds in which calls that nobody waits for are collected
_LIBRARIES = tuple(filter(None, map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))))
_member: "Member | None" = None


def start(channels: Mapping[int, Channel], process: int, heartbeat: float,
          watchdog: float | None) -> None:
    """Connects this process to the hub; starts the hub in process 0.

    Args:
      channels: the connection to process 0, or, in process 0, those to all others.
      heartbeat, watchdog: see `Hub`.
    """
    global _member
    if process == 0:
        ours, theirs = _pair()
        Hub({0: theirs, **channels}, heartbeat, watchdog).start()
    else:
        ours = channels[0]
    # process 0 ends last, because jax aborts the others when it does
    _member = Member(ours, grace=_GRACE if process else _GRACE + 1)
    os.register_at_fork(after_in_child=_forget)


def _pair() -> tuple[Channel, Channel]:
    """Returns both ends of a connection within this process."""
    ends, numbers = socket.socketpair(), (sealed.nonce(), sealed.nonce())
    ours, theirs = (Channel(end, Seal(*numbers, is_server=end is ends[1])) for end in ends)
    return ours, theirs


def is_running() -> bool:
    """Whether this process is connected to the hub."""
    return _member is not None


def _forget() -> None:
    """Closes the connection in a forked child, such as a data loader's, which would keep it open.
    """
    global _member
    if _member is not None:
        _member.channel.close()
        _member = None


def called(members: Members) -> None:
    """Reports a call that these processes make, and does not wait."""
    if _member is not None:
        _member.report(_call(members), waits=False)


def meet(members: Members) -> None:
    """Reports a call, and waits until all of these processes have made it.

    Raises:
      ClusterError: others have made another call, or have ended.
    """
    if _member is not None:
        _member.meet(_call(members))


def barrier(tag: str) -> None:
    """Waits until all processes of the job have come to the barrier of this name.

    Any thread may wait, for several barriers at once.

    Raises:
      ClusterError: others have ended.
    """
    if _member is not None:
        _member.barrier(tag)


def failed(text: str) -> None:
    """Reports an error that ends this process."""
    if _member is not None:
        _member.leave(["failed", text.split("\n")[0]])


def left() -> None:
    """Reports that this process makes no more calls."""
    if _member is not None:
        _member.leave(["left"])


class Member:
    """A process's side of its connection to the hub.

    Args:
      grace: seconds in which the process may end by itself when the job ends.
    """

    def __init__(self, channel: Channel, grace: float):
        self.channel = channel
        self._grace = grace
        self._table: dict[Call, int] = {}
        self._number = 0
        self._left = False
        self._trouble = ""  # why the job ends
        self._out: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._sent = threading.Event()  # after it has left
        self._news = threading.Condition()
        self._answers: dict[int, str] = {}  # by number of the call
        self._passed: collections.Counter[str] = collections.Counter()  # barriers
        for run in (self._send, self._receive):
            threading.Thread(target=run, name="zerojax monitor", daemon=True).start()

    def report(self, call: Call, waits: bool) -> int:
        """Reports a call; returns its number."""
        if call not in self._table:
            self._table[call] = len(self._table)
            self._out.put(["name", call.members, call.name, call.place])
        self._number += 1
        self._out.put(["call", self._table[call], waits])
        if waits:
            self._urgent.set()
        return self._number

    def meet(self, call: Call) -> None:
        number = self.report(call, waits=True)
        with self._news:
            self._news.wait_for(lambda: self._trouble or number in self._answers)
            trouble = self._answers.pop(number, "") or self._trouble
        if trouble:
            raise ClusterError(trouble)

    def barrier(self, tag: str) -> None:
        self._out.put(["barrier", tag])
        self._urgent.set()
        with self._news:
            self._news.wait_for(lambda: self._trouble or self._passed[tag])
            self._passed[tag] -= 1
        if self._trouble:
            raise ClusterError(self._trouble)

    def leave(self, message: list[Any]) -> None:
        self._left = True
        self._out.put(message)
        self._urgent.set()
        self._sent.wait(1)

    def _send(self) -> None:
        """Sends what is to be sent, in batches."""
        try:
            while not self._sent.is_set():
                batch = [self._out.get()]
                while not self._out.empty():
                    batch.append(self._out.get())
                self._urgent.clear()
                self.channel.send(batch)
                if batch[-1][0] in ("left", "failed"):
                    self._sent.set()
                self._urgent.wait(_PAUSE)
        except OSError:  # process 0 has ended
            self._sent.set()

    def _receive(self) -> None:
        try:
            while True:
                for kind, *arguments in self.channel.receive():
                    getattr(self, f"_take_{kind}")(*arguments)
        except EOFError:
            if not self._left:
                self._take_end("process 0 was killed, or aborted.", False)

    def _take_answer(self, number: int, trouble: str) -> None:
        with self._news:
            self._answers = {number: trouble}  # one call at a time waits
            self._news.notify_all()

    def _take_barrier(self, tag: str) -> None:
        with self._news:
            self._passed[tag] += 1
            self._news.notify_all()

    def _take_note(self, text: str) -> None:
        _LOG.warning("%s", text)

    def _take_end(self, text: str, stacks: bool) -> None:
        """Ends this process, by an error if it waits for others."""
        with self._news:
            self._trouble = text
            self._news.notify_all()
        ending.soon(text, stacks, self._grace)


def _call(members: Members) -> Call:
    """Returns the call of the user's program that led here."""
    inner, frame = _of_user(sys._getframe(2))
    name = inner.co_qualname.removesuffix(".__call__").removesuffix(".__next__")
    place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    return Call(members, name, place)


def _of_user(frame: FrameType) -> tuple[CodeType, FrameType]:
    """Returns the outermost function of zerojax on the stack below the user's frame, and that."""
    inner = frame.f_code
    while frame.f_back is not None and _is_library(frame.f_code, _module(frame)):
        if _module(frame).startswith("zerojax."):
            inner = frame.f_code
        frame = frame.f_back
    return inner, frame


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


@functools.cache
def _is_library(code: CodeType, module: str) -> bool:
    return is_internal(module) or code.co_filename.startswith(_LIBRARIES)
