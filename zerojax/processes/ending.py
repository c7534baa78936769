"""The end of a process that cannot continue, which jax alone would delay until the others end."""

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

_GRACE = 3.0  # seconds after an uncaught exception for other threads, such as a checkpoint's


def now() -> None:
    """Ends the process with status 1, at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()
    os._exit(1)


def soon(text: str, stacks: bool, grace: float) -> None:
    """Prints why the process ends, and ends it with status 1 if it does not end by itself.

    Args:
      text: the reason.
      stacks: whether to print the stacks of all threads too.
      grace: seconds for the process to end by itself.
    """
    write(f"zerojax: {text}")
    if stacks:
        faulthandler.dump_traceback(2, all_threads=True)
    time.sleep(grace)
    now()


def write(line: str) -> None:
    """Writes a line to the standard error of the process, whatever replaces sys.stderr."""
    with contextlib.suppress(Exception):
        os.write(2, f"{line}\n".encode())


def on_errors(report: Callable[[str], None], leave: Callable[[], None]) -> None:
    """Ends the process after an uncaught exception, which Python passes to sys.excepthook.

    Notebooks do not use sys.excepthook, so a cell that fails ends nothing.

    Args:
      report: takes the exception's text.
      leave: is called at the end of the program, if there was no such exception.
    """
    before = sys.excepthook
    failed = threading.Event()

    def hook(kind, error, trace):
        before(kind, error, trace)
        failed.set()
        report(f"{kind.__name__}: {error}")
        timer = threading.Timer(_GRACE, now)
        timer.daemon = True
        timer.start()

    sys.excepthook = hook
    # runs before jax's own function, which waits for the other processes
    atexit.register(lambda: now() if failed.is_set() else leave())


def with_launcher() -> None:
    """Ends the process when `zerojax launch` is killed, which cannot end it then."""
    launcher = os.getppid()
    if os.environ.get("ZEROJAX_LAUNCH") == str(launcher):
        threading.Thread(target=_end_without, args=(launcher,), daemon=True).start()


def _end_without(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    now()
