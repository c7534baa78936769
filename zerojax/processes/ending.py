"""The end of a process that cannot continue, which jax alone would delay until the others end."""

import atexit
import contextlib
import faulthandler
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

_FLUSH = 0.5  # seconds for the last output
_GRACE = 3.0  # seconds after an uncaught exception for other threads, such as a checkpoint's


def now() -> None:
    """Ends the process with status 1, after what it has written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()
    os._exit(1)


def _end_after(seconds: float) -> None:
    """Ends the process after some seconds, whatever its other threads do.

    Raises:
      RuntimeError: Python does not start threads any more, because the program has ended.
    """
    at_once = functools.partial(os._exit, 1)  # if nobody reads the output, `now` never returns
    for timer in (threading.Timer(seconds, now), threading.Timer(seconds + _FLUSH, at_once)):
        timer.daemon = True
        timer.start()


def soon(text: str, stacks: bool, grace: float) -> None:
    """Prints why the process ends, and ends it with status 1 if it does not end by itself.

    Args:
      text: the reason.
      stacks: whether to print the stacks of all threads too.
      grace: seconds for the process to end by itself.
    """
    is_late = False
    try:
        _end_after(grace)  # first, because writing waits for a reader
    except RuntimeError:
        is_late = True
    write(f"zerojax: {text}")
    if stacks:
        faulthandler.dump_traceback(2, all_threads=True)
    if is_late:
        time.sleep(grace)
        now()


def write(line: str) -> None:
    """Writes a line to the standard error of the process, whatever replaces sys.stderr."""
    with contextlib.suppress(Exception):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def on_errors(report: Callable[[str], None], leave: Callable[[], None]) -> None:
    """Ends the process after an uncaught exception, which Python passes to sys.excepthook.

    Notebooks do not use sys.excepthook, so a cell that fails ends nothing.

    Args:
      report: takes the last line of the exception.
      leave: is called at the end of the program, if there was no such exception. Either may be
        called twice.
    """
    before = sys.excepthook
    failed = threading.Event()

    def hook(kind, error, trace):
        before(kind, error, trace)
        failed.set()
        _end_after(_GRACE)
        report(_last_line(error))

    def tell():
        error = _uncaught()
        if not failed.is_set() and error is not None:  # another hook has replaced this one
            failed.set()
            report(_last_line(error))
        elif not failed.is_set():
            leave()

    def end():
        tell()
        if failed.is_set():
            now()

    def watch():
        threading.main_thread().join()  # ends before threads that are no daemons, which delay `end`
        tell()

    sys.excepthook = hook
    atexit.register(end)  # runs before jax's own function, which waits for the other processes
    threading.Thread(target=watch, name="zerojax end", daemon=True).start()


def _last_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())


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
