"""The content of a save: the arrays of a state as they are stored, and the manifest beside them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from zerojax import trees
from zerojax.checkpoint import digest, entries, json_values
from zerojax.checkpoint.manifest import Manifest, optimizer_kinds
from zerojax.errors import CheckpointError
from zerojax.layout import padded
from zerojax.policy import Policy
from zerojax.processes import exchange
from zerojax.train import donation


def checked_step(state: Any, step: int | None, data_state: Any, metrics: Any) -> int:
    """Returns the step of a state, after checking that the state can be saved with the rest.

    Raises:
      StateError: the state's arrays were deleted.
      CheckpointError: something cannot be saved, or `step` is not the state's.
    """
    step = step_of(state, step)
    check_arrays(state)
    json_values.encoded("data_state", position_of(data_state))
    json_values.encoded("metrics", jax.device_get(metrics))
    return step


def step_of(state: Any, step: int | None) -> int:
    """Returns the step of a state, which waits for the device.

    Raises:
      StateError: the state's arrays were deleted.
      CheckpointError: the state has none, or `step` is not it.
    """
    donation.check_alive("save", state)
    is_dict = isinstance(state, Mapping)
    own: Any = state.get("step") if is_dict else getattr(state, "step", None)
    if step is None and own is None:
        raise CheckpointError(f"save was given a state ({type(state).__name__}) without a `step`; "
                              "write save(state, step=...).")
    if isinstance(own, jax.ShapeDtypeStruct):
        raise CheckpointError("save was given shapes, not arrays; give the state that a step "
                              "returned.")
    step = int(own) if step is None else whole(step)
    if own is not None and int(own) != step:
        raise CheckpointError(f"save was given step={step} and a state of step {int(own)}; give "
                              "the state's own step.")
    return step


def whole(step: Any) -> int:
    """Returns a step.

    Raises:
      CheckpointError: it is not a whole number.
    """
    if type(step) is not int or step < 0:
        raise CheckpointError(f"save was given step={step!r}; write a whole number, 0 or more.")
    return step


def check_arrays(state: Any) -> None:
    """Checks that the leaves of a state can be saved.

    Raises:
      StateError: the state's arrays were deleted.
      CheckpointError: there is no leaf, or some are neither arrays nor numbers.
    """
    donation.check_alive("save", state)
    leaves = entries.by_path(state)
    if not leaves:
        raise CheckpointError("save was given a state that contains no array.")
    invalid = [p for p, x in leaves.items() if not _is_numeric(x)]
    if invalid:
        raise CheckpointError(f"save was given a state whose leaves {invalid[:entries.MOST]} are "
                              "neither arrays nor numbers; remove functions and text from it, for "
                              "example with eqx.filter(model, eqx.is_array).")


def _is_numeric(x: Any) -> bool:
    """Whether `x` is an array or a number, not an object, text or a date."""
    return isinstance(x, jax.Array | padded.Padded) or np.asarray(x).dtype.kind not in "OUSMm"


def arrays(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays to write; those of size zero are left out, because Orbax refuses them."""
    return {path: _stored(x) for path, x in leaves.items() if np.size(x)}


def _stored(x: Any) -> Any:
    """Returns a leaf as it is on disk.

    Typed keys are stored as their data. Padded arrays are stored with the padding, because devices
    cannot write parts of their shards.
    """
    x = entries.as_array(padded.stored(x))
    if isinstance(x, jax.Array):
        return jax.random.key_data(x) if trees.is_key(x) else x
    return np.asarray(x, x.dtype.newbyteorder("="))


def manifest_of(step: int, state: Any, leaves: Mapping[str, Any], zero: Policy | None,
                data_state: Any, metrics: Any) -> Manifest:
    """Returns the manifest of a save, with the digests of the leaves.

    All processes of the job must call it.
    """
    digests = digest.of([entries.as_array(x) for x in leaves.values()])
    described = {path: entries.of(x, d)
                 for (path, x), d in zip(leaves.items(), digests, strict=True)}
    return Manifest(step, described, optimizer_kinds(state), mesh_of(leaves),
                    zero.stage if zero else None, zero.precision.as_dict() if zero else None,
                    _positions(data_state), jax.device_get(metrics))


def mesh_of(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns the axes and sizes of the first mesh among the leaves' shardings."""
    shardings = [getattr(x, "sharding", None) for x in leaves.values()]
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    return dict(meshes[0].shape) if meshes else {}


def position_of(data_state: Any) -> Any:
    return data_state.get_state() if hasattr(data_state, "get_state") else data_state


def _positions(data_state: Any) -> tuple[Any, ...]:
    """Returns the position of every process in its data; one if they are equal."""
    position = position_of(data_state)
    shared = exchange.everyone().shared(json_values.encoded("data_state", position))
    first, *others = shared.values()
    if all(other == first for other in others):
        return (position,)
    return tuple(map(json_values.decoded, shared.values()))
