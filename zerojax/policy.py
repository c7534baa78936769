"""Frozen values: what is said of a training run (`Precision`, `Policy`), and why it may not be.

Needs no devices. `Zero` is a `Policy` with verbs.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from zerojax.errors import PolicyError

DTYPES = ("bfloat16", "float16", "float32", "float64")
Gradients = Literal["global", "per_device"]


def has_64_bits() -> bool:
    """Whether jax keeps 64-bit numbers, in this thread: its option jax_enable_x64."""
    return jax.dtypes.canonicalize_dtype("float64") == np.float64


def _dtype_name(field: str, dtype) -> str:
    """The name of a floating dtype given as text, numpy dtype or scalar type."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or np.dtype(dtype).name
    if name in DTYPES:
        return name
    near = [f" (perhaps {n!r})" for n in difflib.get_close_matches(name, DTYPES, 1, 0.5)]
    raise PolicyError(f"Precision({field}={name!r}): no such dtype here; write one of {', '.join(DTYPES)}{''.join(near)}.")


def _check_pattern(what: str, pattern: str):
    try:
        re.compile(pattern)
    except re.error as error:
        raise PolicyError(f"{what} {pattern!r} is no regular expression: {error}.") from None


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a step.

    Args:
      params: dtype of parameters and optimizer state at rest; not float16, whose gradients of sums overflow.
      compute: dtype the model reads parameters in, and gathers move; None is as `params`.
      reduce: dtype that gradients are summed in across devices; None is as `compute`.
        Other than `compute` only where each device differentiates its own part (`gradients="per_device"`).
      accumulate: dtype that gradients of microbatches are added in; not float16 either.
      keep: regex for a parameter's whole path, as "router/.*", to the dtype that it is kept, computed and reduced in.

    Raises:
      PolicyError: an unknown dtype, or one that can't be had there.

    >>> precision = Precision(compute="bfloat16", keep={"router/.*": "float32"})
    >>> precision.reduce_dtype, precision.computed("router/kernel", "float32"), precision.computed("mlp/kernel", "float32")
    ('bfloat16', 'float32', 'bfloat16')
    """

    params: str = "float32"
    compute: str | None = None
    reduce: str | None = None
    accumulate: str = "float32"
    keep: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for field in ("params", "compute", "reduce", "accumulate"):
            if (dtype := getattr(self, field)) is not None:
                object.__setattr__(self, field, _dtype_name(field, dtype))
                self._check(field, getattr(self, field))
        keep = {pattern: _dtype_name(f"keep={pattern!r}", dtype) for pattern, dtype in dict(self.keep).items()}
        object.__setattr__(self, "keep", tuple(keep.items()))
        for pattern, dtype in keep.items():
            _check_pattern("Precision.keep", pattern)
            self._check("params", dtype)

    def _check(self, field: str, dtype: str):
        if dtype == "float16" and field in ("params", "accumulate"):
            raise PolicyError(f'Precision({field}="float16"): sums over a batch overflow above 65504; write '
                              '"float32" or "bfloat16" there, and compute="float16", whose loss is scaled.')
        if dtype == "float64" and not has_64_bits():
            raise PolicyError(f'Precision({field}="float64"): jax makes that float32 unless its option jax_enable_x64 is on; '
                              "turn it on before, or write float32.")

    @property
    def compute_dtype(self) -> str:
        """The compute dtype, also where it is as `params`."""
        return self.compute or self.params

    @property
    def reduce_dtype(self) -> str:
        """The reduce dtype, also where it is as compute."""
        return self.reduce or self.compute_dtype

    def kept(self, path: str) -> str | None:
        """The dtype that a parameter has of its own, or None; also by its path in linen's dict of variables."""
        names = (path, path.removeprefix("params/"))
        return next((dtype for pattern, dtype in dict(self.keep).items() if any(re.fullmatch(pattern, n) for n in names)), None)

    def at_rest(self, path: str) -> str:
        """The dtype of a trained parameter between steps."""
        return self.kept(path) or self.params

    def computed(self, path: str, dtype) -> str:
        """The dtype that the model reads a parameter of some dtype in; one that is not real and floating as it is."""
        wanted = self.kept(path) or self.compute
        return wanted if wanted and jnp.issubdtype(dtype, jnp.floating) else str(dtype)

    def reduced(self, path: str, dtype) -> str:
        """The dtype that gradients of a parameter of some dtype are summed in across devices."""
        computed, kept = self.computed(path, dtype), self.kept(path)
        return str(jnp.promote_types(self.reduce, kept)) if self.reduce and kept else self.reduce or computed

    def as_dict(self) -> dict:
        """As JSON can hold it."""
        return {**vars(self), "keep": dict(self.keep)}


@dataclasses.dataclass(frozen=True)
class Policy:
    """A mesh and what ZeRO does over it; see `Zero`, which adds the verbs."""

    mesh: Mesh | AbstractMesh = None  # pyright: ignore[reportAssignmentType]
    stage: int = 3
    _: dataclasses.KW_ONLY
    precision: Precision = Precision()
    axis: tuple[str, ...] | str = ("data",)
    replica_axis: str | None = None
    gradients: Gradients | None = None
    rules: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    min_shard: int = 2**16
    uneven: Literal["pad"] | None = None

    def __post_init__(self):
        if not isinstance(self.mesh, (Mesh, AbstractMesh)):
            stage = self.mesh if isinstance(self.mesh, int) else self.stage
            raise PolicyError(f"Zero(mesh={self.mesh!r}): the first argument is a mesh; write Zero(zj.make_mesh(), stage={stage}).")
        if not isinstance(self.precision, Precision):
            raise PolicyError(f"Zero(precision={self.precision!r}): write zj.Precision(compute=\"bfloat16\"), for float32 "
                              "parameters that are gathered and multiplied in bfloat16.")
        object.__setattr__(self, "axis", self.axes)
        if self.replica_axis is None and "replica" in self.mesh.axis_names and "replica" not in self.axes:
            object.__setattr__(self, "replica_axis", "replica")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))
        self._check_stage()
        self._check_rules()
        self._check_mesh()

    def _check_stage(self):
        if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
            raise PolicyError(f"Zero(stage={self.stage!r}): stages are 0 (all whole), 1 (optimizer state sharded), "
                              "2 (gradients too) and 3 (parameters too); write one of these integers.")
        if self.uneven not in (None, "pad"):
            raise PolicyError(f'Zero(uneven={self.uneven!r}): write "pad" (parameters none of whose dimensions divides are kept '
                              'with rows of zeros at their ends), or None (they are whole on every device).')
        if self.gradients not in (None, "global", "per_device"):
            raise PolicyError(f'Zero(gradients={self.gradients!r}): write "global" (one loss over the whole batch), '
                              '"per_device" (each device differentiates its own part), or None to let the loss decide.')

    def _check_rules(self):
        for pattern, spec in self.rules.items():
            if not isinstance(spec, PartitionSpec):
                raise PolicyError(f"rule {pattern!r}: {spec!r} is no PartitionSpec; write jax.P({spec!r}).")
            _check_pattern("rule", pattern)

    def _check_mesh(self):
        names = self.mesh.axis_names
        if not self.axes or len(set(self.batch_axes)) < len(self.batch_axes):
            raise PolicyError(f"Zero(axis={self.axis!r}, replica_axis={self.replica_axis!r}): name one axis or more, each once; "
                              f"the mesh has {names}.")
        missing = [a for a in self.batch_axes if a not in names]
        if missing:
            raise PolicyError(f"Zero: the mesh has axes {names}, none of them named {missing}; "
                              f"build it with zj.make_mesh(), or name its own: Zero(mesh, axis={names[-1:]!r}).")
        explicit = [a for a, t in zip(names, self.mesh.axis_types, strict=True) if t != AxisType.Auto]
        if explicit:
            raise PolicyError(f"Zero: mesh axes {explicit} are not of type Auto, which sharding constraints need "
                              "(jax.make_mesh gives Explicit ones by default); write zj.make_mesh(), or "
                              f"jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * {len(names)}).")

    def __hash__(self):
        return hash((self.mesh, self.stage, self.precision, self.axes, self.replica_axis, self.gradients, self.min_shard,
                     self.uneven, tuple(self.rules.items())))

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that one copy of the state is spread over."""
        return (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes that the batch's first dimension is split over: replicas, then shards."""
        return ((self.replica_axis,) if self.replica_axis else ()) + self.axes

    @property
    def shards(self) -> int:
        """Number of devices that one copy of the state is spread over."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    @property
    def replicas(self) -> int:
        """Number of copies of the state."""
        return self.mesh.shape[self.replica_axis] if self.replica_axis else 1

    @property
    def parts(self) -> int:
        """Number of parts the batch is split into: replicas x shards."""
        return self.replicas * self.shards

    @functools.cached_property
    def processes(self) -> tuple[int, ...]:
        """Those whose devices the mesh is made of; none of a mesh of devices that are not there."""
        devices = () if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat
        return tuple(sorted({d.process_index for d in devices}))
