"""The end of a process that cannot continue, which jax alone would delay until the others end."""

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

_GRACE = 3.0  # seconds after an uncaught exception for other threads, such as a checkpoint's


def now() -> None:
    """Ends the process with status 1, at once."""
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(0.5)  # longer if nobody reads the output
    os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()


def _end_after(seconds: float) -> None:
    """Ends the process after some seconds, whatever its other threads do."""
    timer = threading.Timer(seconds, now)
    timer.daemon = True
    timer.start()


def soon(text: str, stacks: bool, grace: float) -> None:
    """Prints why the process ends, and ends it with status 1 if it does not end by itself.

    Args:
      text: the reason.
      stacks: whether to print the stacks of all threads too.
      grace: seconds for the process to end by itself.
    """
    _end_after(grace)  # first, because writing waits for a reader
    write(f"zerojax: {text}")
    if stacks:
        faulthandler.dump_traceback(2, all_threads=True)


def write(line: str) -> None:
    """Writes a line to the standard error of the process, whatever replaces sys.stderr."""
    with contextlib.suppress(Exception):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def on_errors(report: Callable[[str], None], leave: Callable[[], None]) -> None:
    """Ends the process after an uncaught exception, which Python passes to sys.excepthook.

    Notebooks do not use sys.excepthook, so a cell that fails ends nothing.

    Args:
      report: takes the exception's text.
      leave: is called at the end of the program, if there was no such exception.
    """
    before = sys.excepthook
    failed = threading.Event()

    def fail(error):
        failed.set()
        _end_after(_GRACE)
        report(" ".join(traceback.format_exception_only(error)[-1].split()))

    def hook(kind, error, trace):
        before(kind, error, trace)
        fail(error)

    def end():
        if not failed.is_set() and _uncaught() is not None:  # another hook has replaced this one
            fail(_uncaught())
        if failed.is_set():
            now()
        leave()

    sys.excepthook = hook
    atexit.register(end)  # runs before jax's own function, which waits for the other processes


def _uncaught() -> BaseException | None:
    """Returns the exception that ends the program, except in an interactive one."""
    return None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)


def with_launcher() -> None:
    """Ends the process when `zerojax launch` is killed, which cannot end it then."""
    launcher = os.getppid()
    if os.environ.get("ZEROJAX_LAUNCH") == str(launcher):
        threading.Thread(target=_end_without, args=(launcher,), daemon=True).start()


def _end_without(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    now()
