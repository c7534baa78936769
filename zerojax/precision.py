"""The dtypes of a training run, and the checks of their values. Needs no devices."""

import dataclasses
import difflib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.errors import PolicyError
from zerojax.settings import as_text, check_pattern

DTYPES = ("bfloat16", "float16", "float32", "float64")


def has_64_bits() -> bool:
    """Whether jax keeps 64-bit numbers in this thread (its option jax_enable_x64)."""
    return jax.dtypes.canonicalize_dtype("float64") == np.float64


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a step.

    Args:
      params: dtype of parameters and optimizer state at rest; not float16, in which sums of
        gradients overflow.
      compute: dtype in which the model reads parameters, and which gathers move; None means the
        same as `params`.
      reduce: dtype in which gradients are summed across devices; None means the same as `compute`.
        A dtype other than `compute` requires `gradients="per_device"`, where each device
        differentiates its own part of the batch.
      accumulate: dtype in which gradients of microbatches are added; not float16.
      keep: from a regex for a parameter's whole path, such as "router/.*", to the dtype in which
        that parameter is stored, computed and reduced.

    Raises:
      PolicyError: a dtype is unknown or not possible in its field, or a regex is invalid.

    >>> precision = Precision(compute="bfloat16", keep={"router/.*": "float32"})
    >>> precision.reduce_dtype, precision.computed("mlp/kernel", "float32")
    ('bfloat16', 'bfloat16')
    >>> precision.computed("router/kernel", "float32")
    'float32'
    """

    params: str = "float32"
    compute: str | None = None
    reduce: str | None = None
    accumulate: str = "float32"
    keep: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for field in ("params", "compute", "reduce", "accumulate"):
            if (dtype := getattr(self, field)) is not None:
                object.__setattr__(self, field, self._checked(field, dtype))
        keep = {}
        for pattern, dtype in dict(self.keep).items():
            keep[pattern] = self._checked(f"keep[{pattern!r}]", dtype)
            check_pattern("Precision.keep", pattern)
        object.__setattr__(self, "keep", tuple(keep.items()))

    def __repr__(self) -> str:
        return f"Precision({as_text(self).removeprefix(', ')})"

    def _checked(self, field: str, dtype) -> str:
        """Returns the name of a dtype that is possible in that field."""
        name = _dtype_name(field, dtype)
        if name == "float16" and field not in ("compute", "reduce"):
            raise PolicyError(f'Precision({field}="float16"): sums over a batch overflow above '
                              '65504; write "float32" or "bfloat16" here, and use float16 as '
                              'compute="float16", where the loss is scaled.')
        if name == "float64" and not has_64_bits():
            raise PolicyError(f'Precision({field}="float64"): jax uses float32 instead unless its '
                              "option jax_enable_x64 is on; turn it on first, or write float32.")
        return name

    @property
    def compute_dtype(self) -> str:
        """The compute dtype; that of `params` if `compute` is None."""
        return self.compute or self.params

    @property
    def reduce_dtype(self) -> str:
        """The reduce dtype; the compute dtype if `reduce` is None."""
        return self.reduce or self.compute_dtype

    def kept(self, path: str) -> str | None:
        """Returns the dtype that `keep` gives a parameter, or None.

        Patterns also match the path without linen's leading "params/".
        """
        names = (path, path.removeprefix("params/"))
        return next((dtype for pattern, dtype in dict(self.keep).items()
                     if any(re.fullmatch(pattern, name) for name in names)), None)

    def at_rest(self, path: str) -> str:
        """Returns the dtype of a trained parameter between steps."""
        return self.kept(path) or self.params

    def computed(self, path: str, dtype) -> str:
        """Returns the dtype in which the model reads a parameter stored in `dtype`.

        Parameters of integer and complex dtypes are read as they are stored.
        """
        wanted = self.kept(path) or self.compute
        return wanted if wanted and jnp.issubdtype(dtype, jnp.floating) else str(dtype)

    def reduced(self, path: str, dtype) -> str:
        """Returns the dtype in which a parameter's gradients are summed across devices.

        `dtype` is the one in which the parameter is stored.
        """
        kept = self.kept(path)
        if self.reduce and kept:
            return str(jnp.promote_types(self.reduce, kept))
        return self.reduce or self.computed(path, dtype)

    def as_dict(self) -> dict:
        """Returns the fields as values that JSON can hold."""
        return {**vars(self), "keep": dict(self.keep)}


def _dtype_name(field: str, dtype) -> str:
    """Returns the name of a floating dtype given as text, numpy dtype or scalar type."""
    name = dtype if isinstance(dtype, str) else _name(dtype)
    if name in DTYPES:
        return name
    near = next(iter(difflib.get_close_matches(name, DTYPES, 1, 0.5)), "")
    raise PolicyError(f"Precision({field}={dtype!r}): not a supported dtype; "
                      f"write {_instead(field, near)}.")


def _instead(field: str, near: str) -> str:
    """Returns what to write for an unknown dtype, whose nearest is `near`, "" if there is none."""
    if not near:
        return f"one of {', '.join(DTYPES)}"
    if field != "params" or near not in ("bfloat16", "float16"):
        return f'"{near}"' if field.startswith("keep") else f'zj.Precision({field}="{near}")'
    # `params` is the first argument, so that the field may not be meant
    text = f'zj.Precision(compute="{near}"), which keeps parameters and optimizer state in float32'
    return text + (', or zj.Precision(params="bfloat16"), which does not' if near[0] == "b" else "")


def _name(dtype) -> str:
    """Returns the name of a numpy dtype or scalar type; "" for anything else."""
    if isinstance(dtype, np.dtype):
        return dtype.name
    return getattr(dtype, "__name__", "")
