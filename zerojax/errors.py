"""The errors that zerojax raises, one tree under `ZeroError`, and how a user sees them.

Each class is also a subclass of the builtin that a caller would expect.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

_NOTE = "zerojax called "  # how each note begins that zerojax adds to an exception
_HIDDEN = "JAX_TRACEBACK_FILTERING"  # in the note that jax adds about the frames that it hides
_INTERNAL = ("zerojax", "jax", "flax", "contextlib", "functools")


class ZeroError(Exception):
    """The base class of every error that zerojax raises deliberately."""


class PolicyError(ZeroError, ValueError):
    """An invalid stage, dtype, axis or way to differentiate, or a combination that cannot work."""


class LayoutError(ZeroError, ValueError):
    """A spec or rule that does not fit its leaf, or a pattern that matches no parameter."""


class BatchError(ZeroError, ValueError):
    """An invalid batch, such as one that does not divide over devices and microbatches."""


class LossError(ZeroError, ValueError):
    """A loss function whose result is not a floating scalar, or a `Loss` with an invalid field."""


class ModelError(ZeroError, ValueError):
    """An invalid result of `init_fn`, or an invalid state."""


class StateError(ZeroError, RuntimeError):
    """A state whose arrays were deleted, because a step reused their memory for its result."""


class NonFiniteError(ZeroError, RuntimeError):
    """`max_skipped` consecutive steps with a non-finite loss, gradient or update."""


class PlanError(ZeroError, RuntimeError):
    """A compiled step with communication or memory that ZeRO does not explain."""


class CompileError(ZeroError, RuntimeError):
    """A compiler that failed, aborted or ran out of memory; the text has its last lines."""


class RecipeError(ZeroError, ValueError):
    """A missing `Recipe`, or one that is invalid."""


class CheckpointError(ZeroError, RuntimeError):
    """A checkpoint that cannot be written, is missing, or does not fit the target."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint with damaged files: an array or the manifest is unreadable or was altered."""


class ClusterError(ZeroError, RuntimeError):
    """Processes that cannot connect or would run different programs, or a failure of another."""


class MissingExtraError(ZeroError, ImportError):
    """An optional package that is not installed; the text names the extra to install."""


class _MessageLast(contextlib.AbstractContextManager):
    """Drops jax's note about hidden frames from errors of zerojax and from those that it noted.

    A reader looks for the reason in the last line, where jax puts its note.
    """

    def __exit__(self, kind, error, trace) -> None:
        notes = getattr(error, "__notes__", [])
        if isinstance(error, ZeroError) or any(note.startswith(_NOTE) for note in notes):
            error.__notes__ = [note for note in notes if _HIDDEN not in note]


message_last = _MessageLast()


@contextlib.contextmanager
def noted(text: Callable[[], str]) -> Iterator[None]:
    """Adds a note to an exception of the user's function: how zerojax called it.

    An error of zerojax itself gets no note, and only the innermost call adds one.

    Args:
      text: returns the note, which begins with "zerojax called ".
    """
    try:
        yield
    except ZeroError:
        raise
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if not any(note.startswith(_NOTE) for note in notes):
            error.add_note(text())
        raise


def warn(text: str) -> None:
    """Warns, and names the line of the user's program that led to the warning as its place."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and is_internal(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def is_internal(module: str) -> bool:
    return module.partition(".")[0] in _INTERNAL
