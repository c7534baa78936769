"""The frozen settings of a training run, `Policy`, and the checks of their values.

Needs no devices. `Zero` is a `Policy` with methods that act on it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from zerojax.errors import PolicyError
from zerojax.precision import Precision
from zerojax.settings import as_text, check_pattern
from zerojax.wire import Wire

Gradients = Literal["global", "per_device"]


def _given(value) -> str:
    """Returns an argument as text, but of a large one only the type."""
    is_short = value is None or isinstance(value, int | str)
    return repr(value) if is_short else f"a {type(value).__name__}"


def _mesh_for(given) -> str:
    """Returns the call that makes the mesh that an argument of another type stands for."""
    if isinstance(given, str) and ":" in given:
        return f"zj.make_mesh(topology={given!r})"
    return "zj.make_mesh(devices=devices)" if isinstance(given, list | tuple) else "zj.make_mesh()"


def _kind(mesh: Any) -> str:
    """Returns the kind of a mesh's devices."""
    if isinstance(mesh, AbstractMesh):
        return "simulated"
    return mesh.devices.flat[0].device_kind


def _names(given: Any) -> tuple[str, ...]:
    """Returns axes given as one name, several or None."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def _usual_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes over which a state is sharded on a mesh of `make_mesh`."""
    return ("host", "data") if "host" in names else ("data",)


_FULL, _AS_COMPUTED = Precision(), Wire()


@dataclasses.dataclass(frozen=True)
class Policy:
    """A mesh and the ZeRO settings for it; see `Zero`, which adds the methods."""

    mesh: Mesh | AbstractMesh = None  # pyright: ignore[reportAssignmentType]
    stage: int = 3
    _: dataclasses.KW_ONLY
    precision: Precision = _FULL
    axis: tuple[str, ...] | str | None = None
    replica_axis: str | None = None
    secondary: tuple[str, ...] | str | None = None
    wire: Wire = _AS_COMPUTED
    gradients: Gradients | None = None
    rules: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    min_shard: int = 2**16
    uneven: Literal["pad"] | None = None

    def __post_init__(self):
        self._check_types()
        names = self.mesh.axis_names
        if self.axis is None:
            object.__setattr__(self, "axis", _usual_axes(names))
        object.__setattr__(self, "axis", self.axes)
        if self.replica_axis is None and "replica" in names and "replica" not in self.axes:
            object.__setattr__(self, "replica_axis", "replica")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))
        self._check_choices()
        self._check_rules()
        self._check_axes()
        self._check_secondary()
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
        if not isinstance(self.wire, Wire):
            raise PolicyError(f"Zero(wire={self.wire!r}): not a Wire; write "
                              'zj.Wire(gather="int8"), or leave it out.')
        if self.stage == 0 and (self.wire.gather or self.wire.reduce):
            raise PolicyError(f"Zero(stage=0, wire={self.wire!r}): stage 0 keeps everything whole "
                              "and sends no shards; write stage=1, 2 or 3, or leave out wire.")
        for name in ("axis", "replica_axis", "secondary"):
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
            check_pattern("rule", pattern)

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

    def _check_secondary(self):
        chosen, axes = self.secondary_axes, self.axes
        if chosen and (self.stage != 3 or not set(chosen) < set(axes)):
            raise PolicyError(f"Zero(stage={self.stage}, axis={axes}, secondary={chosen}): the "
                              "second copy that stage 3 keeps for the backward pass is sharded "
                              "over some of the axes of the state, but not all; write stage=3 on "
                              'a mesh with an axis of hosts: Zero(zj.make_mesh(hosts=8), 3, '
                              'secondary="data").')
        if chosen and chosen != axes[-len(chosen):]:
            raise PolicyError(f"Zero(axis={axes}, secondary={chosen}): the second copy is sharded "
                              "over the last of the axes, whose devices are nearest to each other; "
                              f"write axis={(*[a for a in axes if a not in chosen], *chosen)}.")

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
        shown = ["mesh", "stage"] + ["axis"] * (self.axes == _usual_axes(self.mesh.axis_names))
        return (f"{type(self).__name__}(mesh of {axes} ({_kind(self.mesh)}), stage={self.stage}"
                f"{as_text(self, *shown)})")

    def __hash__(self):
        return hash((self.mesh, self.stage, self.precision, self.axes, self.replica_axis,
                     self.secondary_axes, self.wire, self.gradients, self.min_shard, self.uneven,
                     tuple(self.rules.items())))

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which one copy of the state is sharded."""
        return _names(self.axis)

    @property
    def secondary_axes(self) -> tuple[str, ...]:
        """The last of `axes`, over which stage 3 shards the copy for the backward pass; or ()."""
        return _names(self.secondary)

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """The last of `axes`, over which gather and scatter take a hop of their own; or ().

        A second copy needs two hops. Gradients that are exchanged take them as well: in one hop,
        each device would send most of its codes to other hosts.
        """
        return self.secondary_axes or (self.axes[1:] if self.wire.reduce else ())

    @property
    def spec_axes(self) -> tuple[str, ...]:
        """`axes` in the order in which a dimension is split over them: the inner ones first.

        The axes that are gathered first must be the minor ones: XLA would otherwise permute shards.
        """
        return self.inner_axes + self.axes[:len(self.axes) - len(self.inner_axes)]

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
