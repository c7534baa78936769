"""How the program ends: by itself, by an exception, or by `sys.exit`.

Python tells the functions that run at the end neither the exit status nor the exception.
"""

import dis
import functools
import sys
import threading
import weakref
from types import FrameType
from typing import Any

PREEMPTED = 75  # the exit status of a run that received a signal, and saved


class _Exit(SystemExit):
    """Can be referenced weakly."""


class Outcome:
    """Finds the error that ended the main thread.

    Wraps `sys.exit`, and notes its argument. Does not notice `raise SystemExit`, nor
    `sys.exit(main())` if `main` creates it.
    """

    def __init__(self):
        self._argument: Any = None  # of the sys.exit that ended the program
        self._raised: weakref.ref | None = None  # by the last sys.exit
        self._outermost = _outermost()
        sys.exit = self._noting(sys.exit)

    def _noting(self, exit):
        @functools.wraps(exit)
        def noting(status=None, /):
            if threading.current_thread() is not threading.main_thread():
                exit(status)
            error = _Exit(status)
            self._raised = weakref.ref(error, functools.partial(self._freed, status))
            try:
                raise error
            finally:
                del error  # it refers to this frame
        return noting

    def _freed(self, status: Any, _: weakref.ref) -> None:
        """Notes the argument of an exception that ended the program: nobody has caught it."""
        if threading.current_thread() is threading.main_thread() and not self._is_running():
            self._argument = status

    def _is_running(self) -> bool:
        return _outermost() is self._outermost

    def error(self) -> BaseException | None:
        """Returns the error, once the main thread has ended.

        It is None after the end of the program, `sys.exit(0)` and the like, the status of a run
        that was stopped, and in an interactive session.
        """
        if _is_interactive() or _returns(self._outermost):
            return None
        error = getattr(sys, "last_value", None)  # may also be an error that was only shown
        if error is not None and self._is_through(error):
            return error
        error = SystemExit(self._argument)
        is_good = self._argument in (None, PREEMPTED) or not status_of(error)
        return None if is_good else error

    def is_uncaught(self, error: BaseException) -> bool:
        """Whether an error, with which sys.excepthook is called, ends the program."""
        # a program that is running calls sys.excepthook itself
        return not (self._is_running() or _is_interactive()) and self._is_through(error)

    def _is_through(self, error: BaseException) -> bool:
        trace = error.__traceback__
        return trace is not None and trace.tb_frame is self._outermost


def status_of(error: BaseException) -> int:
    """Returns the exit status of a program that an error ends."""
    code = error.code if isinstance(error, SystemExit) else None
    return code & 0xFF if isinstance(code, int) else 1


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.inspect)  # python -i


def _outermost() -> FrameType:
    """Returns the frame in which the main thread began."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _returns(frame: FrameType) -> bool:
    """Whether a frame has ended by a return, not by an exception: by its last instruction."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
