"""What zerojax raises: one tree under `ZeroError`, each class also the builtin a caller would expect."""


class ZeroError(Exception):
    """Base of every error that zerojax raises on purpose."""


class PolicyError(ZeroError, ValueError):
    """A stage, dtype, axis or way to differentiate that can't be, or can't be together."""


class LayoutError(ZeroError, ValueError):
    """A spec that does not fit its leaf, a rule that matches nothing, or a loop that slices the sharded axis."""


class BatchError(ZeroError, ValueError):
    """A batch that does not divide over devices and microbatches."""


class LossError(ZeroError, ValueError):
    """A loss function that returns no floating scalar, or a `Loss` with a weight, aux or model state that can't be."""


class ModelError(ZeroError, ValueError):
    """An `init_fn` result or a state that is not what it has to be."""


class StateError(ZeroError, RuntimeError):
    """A state whose arrays are gone, since a step has taken their memory for the state that it returned."""


class NonFiniteError(ZeroError, RuntimeError):
    """`max_skipped` steps in a row had a loss, gradient or update that is not finite."""


class PlanError(ZeroError, RuntimeError):
    """A compiled step that communicates or keeps what ZeRO does not explain."""


class CompileError(ZeroError, RuntimeError):
    """The compiler refused, aborted or ran out of memory; the text has its last lines."""


class RecipeError(ZeroError, ValueError):
    """No `Recipe` where one was to be found, or one that is none."""


class CheckpointError(ZeroError, RuntimeError):
    """A checkpoint that can't be written, is not there, or does not fit what it is to be restored into."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose files are damaged: an array or the manifest can't be read, or is not what was saved."""


class ClusterError(ZeroError, RuntimeError):
    """Processes that can't come together, or that differ in what they are about to run."""


class MissingExtraError(ZeroError, ImportError):
    """An optional package is not installed; the text names the extra to install."""
