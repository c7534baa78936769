"""Batches: checks of their arrays, their sharding over the devices, and their microbatches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import BatchError, PolicyError
from zerojax.policy import Policy
from zerojax.precision import has_64_bits

_MOST = 6  # items that an error names
_NUMBERS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, int, float)


def sharding(policy: Policy) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension is split over replicas and shards."""
    return NamedSharding(policy.mesh, P(policy.batch_axes))


def parts_of(policy: Policy) -> dict[int, tuple[int, ...]]:
    """Returns which parts of a batch the devices of each process hold.

    Processes that differ only along mesh axes that do not split the batch hold the same parts.
    """
    held: dict[int, set[int]] = {}
    indices = sharding(policy).devices_indices_map((policy.parts,))
    for device, (rows,) in indices.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(parts)) for process, parts in sorted(held.items())}


def local_parts(policy: Policy) -> int:
    """Returns how many parts of a batch the devices of this process hold.

    Raises:
      BatchError: the mesh has no device of this process.
    """
    held, process = parts_of(policy), jax.process_index()
    if process not in held:
        raise BatchError(f"the mesh has no device of process {process}, so this process has no "
                         f"share of a batch; the mesh's devices belong to processes {list(held)}. "
                         "Call feed only there, or make the mesh of the devices of all processes.")
    return len(held[process])


def share(policy: Policy) -> tuple[int, int]:
    """Returns the index of this process's share of a batch, and the number of shares.

    See `Zero.share`.
    """
    local_parts(policy)  # raises if there are none
    held = parts_of(policy)
    distinct = list(dict.fromkeys(held.values()))
    return distinct.index(held[jax.process_index()]), len(distinct)


def check(policy: Policy, batch: Any, accumulate: int = 1) -> None:
    """Raises `BatchError` unless all arrays divide evenly over devices x microbatches."""
    n = policy.parts * accumulate
    over, instead = f"{policy.parts} devices", ""
    if accumulate > 1:
        over += f" x {accumulate} microbatches = {n}"
        instead = _other_numbers(count(batch), policy.parts)
    _check_divides(batch, n, over, instead)


def _other_numbers(rows: int, parts: int) -> str:
    """Returns numbers of microbatches that are possible, as text; "" if there is none."""
    if rows % parts or not rows:
        return ""
    most = rows // parts
    numbers = [str(k) for k in range(1, most + 1) if most % k == 0]
    return f"write accumulate={' or '.join(numbers[-_MOST:])}, or "


def check_share(policy: Policy, arrays: Any) -> None:
    """Raises `BatchError` unless a process's share of a batch divides evenly over its devices."""
    check_arrays(arrays)
    n = local_parts(policy)
    over = f"{n} devices"
    if n < policy.parts:
        over = f"the {over} of process {jax.process_index()}, which brings its own share"
    _check_divides(arrays, n, over)


def count(batch: Any) -> int:
    """Returns the number of examples in a batch.

    Raises:
      BatchError: the batch holds no array, an array has no dimension, or their numbers differ.
    """
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise BatchError(f"the batch {batch!r} holds no array; give arrays whose first dimension "
                         "is that of the examples.")
    for path, x in leaves:
        if not getattr(x, "shape", ()):
            raise BatchError(f"{_name(path)} has no dimension, but the first dimension of an array "
                             f"of a batch is that of the examples; {_not_a_scalar(batch, path)}.")
    by_size = {x.shape[0]: _name(path) for path, x in reversed(leaves)}
    if len(by_size) > 1:
        sizes = [f"{name} has {n}" for n, name in reversed(by_size.items())]
        raise BatchError("the arrays of a batch differ in their number of examples: "
                         f"{', '.join(sizes[:_MOST])}; the first dimension of each must be that of "
                         "the examples. Let the loss close over arrays of other lengths, such as "
                         "class weights. If these are parameters, give the model or state as the "
                         "first argument, and the batch as the second.")
    return next(iter(by_size))


def _not_a_scalar(batch: Any, path: tuple[Any, ...]) -> str:
    """Returns what to write in place of a number in a batch."""
    for i, key in enumerate(path):
        if isinstance(batch, list) and not any(map(jnp.ndim, jax.tree.leaves(batch))):
            return f"jax reads a list as separate numbers, so write np.asarray({_name(path[:i])})"
        batch = _child(batch, key)
    return ("write np.full(n, value) for a number that all n examples share, np.stack(xs) for a "
            "list of examples, and images[:8] in place of images[0]")


def _child(tree: Any, key: Any) -> Any:
    """Returns the subtree at a key of a jax key path; None if there is no such way down."""
    try:
        return tree[key.key] if hasattr(key, "key") else tree[key.idx]
    except (AttributeError, LookupError, TypeError):
        return None


def _check_divides(batch: Any, n: int, over: str, instead: str = "") -> None:
    rows = count(batch)
    if rows % n or not rows:
        path, x = jax.tree.leaves_with_path(batch)[0]
        near = max(n, rows // n * n)
        raise BatchError(f"{_name(path)} has {rows} examples (shape {tuple(x.shape)}), which do "
                         f"not divide evenly over {over}; {instead}give batches of {near}, and "
                         "drop a shorter last batch or pad it: zj.feed(batches, zero, pad=True) "
                         "gives pairs for the step; the loss then takes batch, weight = pair and "
                         "returns zj.Loss((losses * weight).sum(), weight.sum()).")


def check_arrays(batch: Any) -> None:
    """Raises `BatchError` for leaves that are not numbers or arrays of numbers.

    Also raises it for 64-bit integers if 32 bits cannot hold their values.
    """
    for path, x in jax.tree.leaves_with_path(batch):
        if not isinstance(x, _NUMBERS):
            kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
            raise BatchError(f"{_name(path)} is a {kind}; {_not_an_array(x)}.")
        if isinstance(x, (np.ndarray, np.generic)):
            _check_numbers(_name(path), np.asarray(x))


def _not_an_array(x: Any) -> str:
    """Returns what to write in place of a leaf that is no array."""
    if isinstance(x, Iterator):
        return ("it is an iterator of batches, so write: for batch in batches: state, metrics = "
                "step(state, batch)")
    if isinstance(x, Mapping):
        return "jax does not look into it, so write dict(batch)"
    text = "give numpy or jax arrays, such as np.asarray(x) returns"
    if type(x).__module__.startswith("torch"):
        text += (". For a loader of tensors, write zj.feed((jax.tree.map(np.asarray, batch) for "
                 "batch in loader), zero)")
    return text


def _check_numbers(name: str, x: np.ndarray) -> None:
    if x.dtype.kind in "OUSMm":
        raise BatchError(f"{name} has dtype {x.dtype}, which no device computes with; give "
                         "numbers, such as the ids that a tokenizer returns.")
    if x.dtype not in (np.int64, np.uint64) or not x.size or has_64_bits():
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    for value in (int(x.min()), int(x.max())):
        if not limits.min <= value <= limits.max:
            raise BatchError(f"{name} has dtype {x.dtype} and the value {value}, but jax converts "
                             f"it to {limits.dtype}, which holds {limits.min} to {limits.max}, so "
                             "the value would wrap. Map such ids to smaller ones, or turn on "
                             "jax_enable_x64.")


def check_given(policy: Policy, batch: Any) -> None:
    """Raises `BatchError` for a batch that a jitted function cannot take or would misread.

    `check_arrays` finds one kind; shapes, and arrays on other devices than the mesh's, are another.
    With several processes, the third is an array of this process alone, because each process would
    take its own array for the whole batch.
    """
    check_arrays(batch)
    for path, x in jax.tree.leaves_with_path(batch):
        _check_placed(policy, _name(path), x)
        if len(policy.processes) > 1 and _is_local(x) and x.shape:
            raise BatchError(f"{_name(path)} is an array of process {jax.process_index()} alone, "
                             f"but {len(policy.processes)} processes train together; give the "
                             "share of each process to zj.feed(batches, zero).")


def _check_placed(policy: Policy, name: str, x: Any) -> None:
    if isinstance(x, jax.ShapeDtypeStruct):
        raise BatchError(f"{name} is a shape, with which only step.plan and lower work; give an "
                         "array.")
    if elsewhere(policy, [x]):
        raise BatchError(f"{name} is on {devices_of(x)}, but the mesh has {policy.mesh.size} "
                         "devices; give numpy arrays, such as np.asarray(x) returns, or let "
                         "zj.feed([batch], zero) put them on the devices.")


def elsewhere(policy: Policy, arrays: Sequence[Any]) -> list[jax.Array]:
    """Returns the arrays that were put on other devices than those of the mesh, which jit refuses.

    Every step looks through its state, so this is fast if all arrays are on the mesh.
    """
    mesh = policy.mesh
    others = [x for x in arrays if getattr(getattr(x, "sharding", None), "mesh", None) is not mesh]
    devices = set(mesh.devices.flat) if others and isinstance(mesh, Mesh) else ()
    return [x for x in others if devices and isinstance(x, jax.Array) and not isinstance(x, Tracer)
            and x.committed and x.sharding.device_set != devices]


def devices_of(x: Any) -> str:
    """Returns the devices of an array as text.

    >>> devices_of(jax.device_put(1.0, jax.devices()[0]))
    'device 0 alone'
    """
    first, *others = x.sharding.device_set
    return f"{1 + len(others)} devices" if others else f"device {first.id} alone"


def _is_local(x: Any) -> bool:
    """Whether `x` is an array that this process holds alone; traced arrays are not."""
    if isinstance(x, jax.Array):
        return not isinstance(x, Tracer) and x.is_fully_addressable
    return isinstance(x, np.ndarray)


def _name(path: tuple[Any, ...]) -> str:
    return f"batch{jax.tree_util.keystr(path)}"


def check_mesh(policy: Policy, tree: Any) -> None:
    """Raises `PolicyError` for arrays or shapes on another mesh than the policy's."""
    for path, x in jax.tree.leaves_with_path(tree):
        mesh = getattr(getattr(x, "sharding", None), "mesh", policy.mesh)
        if mesh != policy.mesh:
            raise PolicyError(f"plan was given an array (at {jax.tree_util.keystr(path)}) on the "
                              f"mesh {mesh}, but the policy's mesh is {policy.mesh}; make the "
                              "arrays with the same Zero: zero.abstract(init_fn, tx, ...).")


def joined(policy: Policy, arrays: Any) -> Any:
    """Returns the batch of all processes; `arrays` are this process's share of it."""
    if sharding(policy).is_fully_addressable:
        return jax.device_put(arrays, sharding(policy))
    mine = local_parts(policy)

    def join(x):  # device_put would run a program that compares the arrays of the processes
        shape = (x.shape[0] // mine * policy.parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding(policy), np.asarray(x), shape)

    return jax.tree.map(join, arrays)


def placed(policy: Policy, tree: Any) -> Any:
    """Returns shapes with shardings in place of the arrays that have no sharding on a mesh.

    They are split over the devices if their first dimension divides evenly, else whole on each.
    """
    return jax.tree.map(lambda x: _placed(policy, x), tree)


def _placed(policy: Policy, x: Any) -> Any:
    if not hasattr(x, "shape") or isinstance(getattr(x, "sharding", None), NamedSharding):
        return x
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    divides = x.shape and x.shape[0] % policy.parts == 0
    at = sharding(policy) if divides else NamedSharding(policy.mesh, P())
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=at)


def local_bytes(tree: Any) -> int:
    """Returns the bytes on one device of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * trees.itemsize(x.dtype)
               for x in jax.tree.leaves(tree) if hasattr(x, "sharding"))


def spread(policy: Policy, tree: Any) -> Any:
    """Returns `tree` with its arrays split over the devices, and scalars and keys unchanged.

    Raises:
      BatchError: an array does not divide evenly.
    """
    arrays = [x for x in jax.tree.leaves(tree) if getattr(x, "shape", ())]
    if arrays:
        check(policy, jax.tree.map(lambda x: x if getattr(x, "shape", ()) else None, tree))

    def put(x):
        if not getattr(x, "shape", ()):
            return x
        return jax.lax.with_sharding_constraint(x, sharding(policy))

    return jax.tree.map(put, tree)


def microbatches(policy: Policy, batch: Any, accumulate: int) -> Any:
    """Returns arrays `[B, ...]` as `[accumulate, B / accumulate, ...]`; moves no example.

    Microbatch `a` holds the examples a, a + accumulate, a + 2 accumulate, ... Microbatches of
    consecutive examples would send the examples of each device to others, with an all-to-all.
    """
    spec = NamedSharding(policy.mesh, P(None, policy.batch_axes))

    def split(x):
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(split, batch)
