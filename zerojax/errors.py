"""The errors that zerojax raises: one tree under `ZeroError`.

Each class is also a subclass of the builtin that a caller would expect.
"""


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
