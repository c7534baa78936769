"""The frozen settings of a training run, `Precision` and `Policy`, and the checks of their values.

Needs no devices. `Zero` is a `Policy` with methods that act on it.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from zerojax.errors import PolicyError

DTYPES = ("bfloat16", "float16", "float32", "float64")
Gradients = Literal["global", "per_device"]


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
            _check_pattern("Precision.keep", pattern)
        object.__setattr__(self, "keep", tuple(keep.items()))

    def __repr__(self) -> str:
        return f"Precision({_others(self).removeprefix(', ')})"

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


def _check_pattern(what: str, pattern: str):
    try:
        re.compile(pattern)
    except re.error as error:
        raise PolicyError(f"{what} {pattern!r} is not a valid regular expression: "
                          f"{error}.") from None


def _given(value) -> str:
    """Returns an argument as text, but of a large one only the type."""
    is_short = value is None or isinstance(value, int | str)
    return repr(value) if is_short else f"a {type(value).__name__}"


def _mesh_for(given) -> str:
    """Returns the call that makes the mesh that an argument of another type stands for."""
    if isinstance(given, str) and ":" in given:
        return f"zj.make_mesh(topology={given!r})"
    return "zj.make_mesh(devices=devices)" if isinstance(given, list | tuple) else "zj.make_mesh()"


def _others(settings: Any, *shown: str) -> str:
    """Returns the settings that differ from their defaults as text, except those already shown."""
    fields = [f for f in dataclasses.fields(settings) if f.name not in shown]
    values = {f.name: getattr(settings, f.name) for f in fields}
    values |= {name: dict(x) for name, x in values.items() if isinstance(x, Mapping)}
    defaults = {name: getattr(type(settings), name, {}) for name in values}  # {}: from a factory
    return "".join(f", {name}={value!r}" for name, value in values.items()
                   if value != defaults[name])


def _kind(mesh: Any) -> str:
    """Returns the kind of a mesh's devices."""
    if isinstance(mesh, AbstractMesh):
        return "simulated"
    return mesh.devices.flat[0].device_kind


@dataclasses.dataclass(frozen=True)
class Policy:
    """A mesh and the ZeRO settings for it; see `Zero`, which adds the methods."""

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
        self._check_types()
        object.__setattr__(self, "axis", self.axes)
        names = self.mesh.axis_names
        if self.replica_axis is None and "replica" in names and "replica" not in self.axes:
            object.__setattr__(self, "replica_axis", "replica")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))
        self._check_choices()
        self._check_rules()
        self._check_axes()
        self._check_auto()

    def _check_types(self):
        if not isinstance(self.mesh, (Mesh, AbstractMesh)):
            stage = self.mesh if isinstance(self.mesh, int) else self.stage
            raise PolicyError(f"Zero(mesh={_given(self.mesh)}): the first argument is a mesh; "
                              f"write zj.Zero({_mesh_for(self.mesh)}, stage={stage}).")
        if not isinstance(self.precision, Precision):
            raise PolicyError(f"Zero(precision={self.precision!r}): not a Precision; write "
                              'zj.Precision(compute="bfloat16"), for float32 parameters that are '
                              "gathered and multiplied in bfloat16.")
        for name in ("axis", "replica_axis"):
            value = getattr(self, name)
            named = value if isinstance(value, tuple | list) else (value,)
            if not all(isinstance(axis, str) for axis in named if value is not None):
                raise PolicyError(f"Zero({name}={value!r}): not the name of an axis; the mesh has "
                                  f"{self.mesh.axis_names}.")

    def _check_choices(self):
        if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
            raise PolicyError(f"Zero(stage={self.stage!r}): the stages are 0 (all whole), "
                              "1 (optimizer state sharded), 2 (gradients too) and "
                              "3 (parameters too); write one of these integers.")
        if self.uneven not in (None, "pad"):
            raise PolicyError(f'Zero(uneven={self.uneven!r}): write "pad" (parameters with no '
                              "divisible dimension are padded with zeros and sharded), "
                              "or None (they stay whole on every device).")
        if self.gradients not in (None, "global", "per_device"):
            raise PolicyError(f'Zero(gradients={self.gradients!r}): write "global" (one loss over '
                              'the whole batch), "per_device" (each device differentiates its own '
                              "part), or None to choose by the loss.")

    def _check_rules(self):
        for pattern, spec in self.rules.items():
            if not isinstance(spec, PartitionSpec):
                raise PolicyError(f"rule {pattern!r}: {spec!r} is not a PartitionSpec; "
                                  f"write jax.P({spec!r}).")
            _check_pattern("rule", pattern)

    def _check_axes(self):
        names = self.mesh.axis_names
        if not self.axes or len(set(self.batch_axes)) < len(self.batch_axes):
            raise PolicyError(f"Zero(axis={self.axis!r}, replica_axis={self.replica_axis!r}): "
                              f"name one axis or more, each once; the mesh has {names}.")
        if self.replica_axis is not None and self.replica_axis not in names:
            raise PolicyError(f"Zero(replica_axis={self.replica_axis!r}): the mesh has the axes "
                              f"{names}; build one with copies by zj.make_mesh(replica=2), which "
                              "needs no replica_axis, or name one of these.")
        missing = [axis for axis in self.axes if axis not in names]
        if missing:
            raise PolicyError(f"Zero: the mesh has axes {names}, but not {missing}; build it with "
                              f"zj.make_mesh(), or name its own: Zero(mesh, axis={names[-1:]!r}).")

    def _check_auto(self):
        """Raises `PolicyError` for mesh axes on which sharding constraints are not possible."""
        names = self.mesh.axis_names
        explicit = [axis for axis, kind in zip(names, self.mesh.axis_types, strict=True)
                    if kind != AxisType.Auto]
        if explicit:
            auto = f"axis_types=(jax.sharding.AxisType.Auto,) * {len(names)}"
            raise PolicyError(f"Zero: mesh axes {explicit} are not of type Auto, which sharding "
                              "constraints need (the default of jax.make_mesh is Explicit); write "
                              f"zj.make_mesh(), or jax.make_mesh(shape, names, {auto}).")

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        return (f"{type(self).__name__}(mesh of {axes} ({_kind(self.mesh)}), stage={self.stage}"
                f"{_others(self, 'mesh', 'stage')})")

    def __hash__(self):
        return hash((self.mesh, self.stage, self.precision, self.axes, self.replica_axis,
                     self.gradients, self.min_shard, self.uneven, tuple(self.rules.items())))

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which one copy of the state is sharded."""
        return (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the batch's first dimension is split: replicas, then shards."""
        return ((self.replica_axis,) if self.replica_axis else ()) + self.axes

    @property
    def shards(self) -> int:
        """The number of devices that share one copy of the state."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def replicas(self) -> int:
        """The number of copies of the state."""
        return self.mesh.shape[self.replica_axis] if self.replica_axis else 1

    @property
    def parts(self) -> int:
        """The number of parts into which the batch is split: replicas x shards."""
        return self.replicas * self.shards

    def check_devices(self, where: str) -> None:
        """Raises `PolicyError` if the mesh is simulated; `where` is the method that needs devices.
        """
        if isinstance(self.mesh, AbstractMesh):
            raise PolicyError(f"{where} over simulated GPUs: nothing can run on them. Use a mesh "
                              "of devices, zj.make_mesh(); or plan a training step or a function "
                              "of zero.jit, with its method plan(state, batch).")

    def check_context(self, where: str) -> None:
        """Raises `PolicyError` if `jax.set_mesh` has set a mesh under which nothing here can run.

        That is one with axes of type Explicit, or with another number of devices.
        """
        current = jax.sharding.get_abstract_mesh()
        if current.empty or AxisType.Manual in current.axis_types:  # within a shard_map
            return
        if AxisType.Explicit in current.axis_types or current.size != self.mesh.size:
            kinds = ", ".join(sorted({kind.name for kind in current.axis_types}))
            raise PolicyError(f"{where} was called under jax.set_mesh with the mesh "
                              f"{dict(current.shape)} (axes of type {kinds}), but the mesh of this "
                              f"Zero is {dict(self.mesh.shape)} (Auto); write "
                              "jax.set_mesh(zero.mesh), or call it without jax.set_mesh.")

    @functools.cached_property
    def processes(self) -> tuple[int, ...]:
        """The indices of the processes that own the mesh's devices; empty for an abstract mesh."""
        devices = () if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat
        return tuple(sorted({device.process_index for device in devices}))
