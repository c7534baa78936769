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

from zerojax.processes.outcome import Outcome, status_of

_FLUSH = 0.5  # seconds for the last output
_GRACE = 3.0  # seconds after an uncaught exception for other threads, such as a checkpoint's


def now(status: int = 1) -> None:
    """Ends the process, after what it has written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()
    os._exit(status)


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
    """Ends the process after an uncaught exception, or `sys.exit` with an error.

    A cell of a notebook that fails ends nothing.

    Args:
      report: takes the last line of the exception. Several threads may call it.
      leave: is called at the end of the program, if there was no error.
    """
    end = _End(report, leave)
    sys.excepthook = functools.partial(end.hook, sys.excepthook)
    atexit.register(end.at_exit)  # runs before jax's own function, which waits for other processes
    # atexit waits for non-daemon threads, and `now` for a reader of the output
    for seconds, act in ((_GRACE, now), (_GRACE + _FLUSH, os._exit)):
        threading.Thread(target=end.watch, args=(seconds, act), name="zerojax end",
                         daemon=True).start()


class _End:
    """The end of the program; see `on_errors`."""

    def __init__(self, report: Callable[[str], None], leave: Callable[[], None]):
        self.report, self.leave = report, leave
        self.outcome = Outcome()

    def hook(self, before, kind, error: BaseException, trace) -> None:
        """Reports an uncaught exception, while its traceback may wait for a reader."""
        if self.outcome.is_uncaught(error):
            threading.Thread(target=self.report, args=[_last_line(error)], daemon=True).start()
        before(kind, error, trace)

    def failure(self) -> int:
        """Reports the error that ended the main thread; returns its exit status, or 0."""
        error = self.outcome.error()
        if error is None:
            return 0
        self.report(_last_line(error))
        return status_of(error)

    def at_exit(self) -> None:
        if status := self.failure():
            now(status)
        self.leave()

    def watch(self, seconds: float, end: Callable[[int], None]) -> None:
        """Ends the process some seconds after an error has ended the main thread."""
        threading.main_thread().join()
        limit = time.monotonic() + seconds
        if status := self.failure():
            time.sleep(max(0, limit - time.monotonic()))
            end(status)


def _last_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())


def with_launcher() -> None:
    """Ends the process when `zerojax launch` is killed, which cannot end it then.

    It may have been killed already. Programs that its processes have started are left alone.
    """
    if "ZEROJAX_LAUNCH" not in os.environ:
        return
    launcher = int(os.environ["ZEROJAX_LAUNCH"])
    if os.getppid() == launcher:
        threading.Thread(target=_end_without, args=(launcher,), daemon=True).start()
    elif not _exists(launcher):
        write(f"zerojax: the launcher, process {launcher}, has ended; unset ZEROJAX_LAUNCH to run "
              "without one")
        now()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _end_without(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    now()
