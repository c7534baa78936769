"""The output of the processes of `zerojax launch`, forwarded in whole lines. Needs no jax."""

import collections
import contextlib
import fcntl
import os
import re
import select
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from typing import IO, TextIO

MOMENT = 0.4  # seconds in which a reader takes the last words, or they are dropped
_PAUSE = 200  # milliseconds
_CHUNK = 2**16  # bytes
_END_OF_LINE = re.compile(rb"(\r?\n|\r)")


class Stream:
    """Standard output or standard error of the launcher, without Python's buffers.

    Python locks and flushes them when the launcher ends, which a reader that stops or leaves would
    delay or turn into an error.
    """

    def __init__(self, stream: TextIO | None, lock: threading.Lock):
        self._stream = stream  # None if the launcher was started without it
        self._lock = lock

    def write(self, text: str) -> None:
        """Writes a text whole, or drops it if the reader has left: the job goes on."""
        if self._stream is None:
            return
        rest = memoryview(text.encode(self._stream.encoding, errors="backslashreplace"))
        with contextlib.suppress(OSError), self._lock:
            while rest:
                rest = rest[_written(self._stream.fileno(), rest):]


def _written(file: int, data: memoryview) -> int:
    """Writes a part of the data, and returns its length."""
    try:
        return os.write(file, data)
    except BlockingIOError:  # whoever started the launcher made the file non-blocking
        _is_ready(file, select.POLLOUT)
        return 0


def _is_ready(file: int, event: int) -> bool:
    """Waits a moment for an event of a file; `select.select` refuses files above 1023."""
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(_PAUSE))


def _identity(stream: TextIO | None) -> tuple[int, int] | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
        found = os.fstat(stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
        return found.st_dev, found.st_ino
    return None


def _streams(out: TextIO | None, err: TextIO | None) -> tuple[Stream, Stream]:
    """Returns both streams, which share a lock if they are one file (2>&1)."""
    lock = threading.Lock()
    is_one = _identity(out) == _identity(err)
    return Stream(out, lock), Stream(err, lock if is_one else threading.Lock())


OUT, ERR = _streams(sys.__stdout__, sys.__stderr__)


def say(text: str) -> None:
    """Writes a line of the launcher to standard error, and waits only a moment for its reader."""
    line = f"zerojax launch: {text}\n"
    writer = threading.Thread(target=ERR.write, args=(line,), daemon=True)
    writer.start()
    writer.join(MOMENT)


def forward(source: IO[bytes], sink: Stream, prefix: str, tail: collections.deque | None,
            over: threading.Event) -> None:
    """Writes the lines of a process to a stream of the launcher, each with a prefix.

    Args:
      source: the output of the process.
      sink: the stream.
      prefix: the prefix of each line.
      tail: gets the lines too.
      over: is set when the process has ended. What it has written until then is forwarded, and
        what other programs write to the source later is not.
    """
    lines = _Lines()
    for data in _chunks(source.fileno(), over):
        _write(lines.add(data), sink, prefix, tail)
    _write(lines.rest(), sink, prefix, tail)


def _chunks(source: int, over: threading.Event) -> Iterator[bytes]:
    while not over.is_set():
        if _is_ready(source, select.POLLIN):
            if not (data := os.read(source, _CHUNK)):
                return
            yield data
    left = _waiting(source)
    while left > 0 and (data := os.read(source, min(left, _CHUNK))):
        yield data
        left -= len(data)


def _waiting(pipe: int) -> int:
    """Returns how many bytes a pipe holds."""
    number = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(number, sys.byteorder)


class _Lines:
    """Divides what a process writes into lines.

    A line ends in a newline, or in a carriage return, like a progress bar.
    """

    def __init__(self):
        self._rest: list[bytes] = []  # the pieces of a line without an end
        self._after_return = False

    def add(self, data: bytes) -> list[bytes]:
        """Returns the lines that these data complete."""
        if self._after_return:
            data = data.removeprefix(b"\n")  # the second half of an end of line
        self._after_return = data.endswith(b"\r")
        *parts, rest = _END_OF_LINE.split(data)  # a text, its end, a text, its end, ..., the rest
        if parts:
            parts[0] = b"".join([*self._rest, parts[0]])
            self._rest = []
        self._rest.append(rest)
        ended = zip(parts[::2], parts[1::2], strict=True)
        return [text for text, end in ended if text or end != b"\r"]

    def rest(self) -> list[bytes]:
        """Returns the last line, if it has no end."""
        rest = b"".join(self._rest)
        return [rest] if rest else []


def _write(lines: Sequence[bytes], sink: Stream, prefix: str, tail: collections.deque | None):
    texts = [line.decode(errors="replace") for line in lines]
    if tail is not None:
        tail.extend(texts)
    sink.write("".join(f"{prefix}{text}\n" for text in texts))
