"""Batches: checks of their arrays, their sharding over the devices, and their microbatches."""

import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.errors import BatchError, PolicyError
from zerojax.policy import Policy, has_64_bits

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
    _check_divides(batch, n, f"{policy.parts} devices x {accumulate} microbatches = {n}")


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
            raise BatchError(f"{_name(path)} has no dimension; give arrays whose first dimension "
                             "is that of the examples.")
    sizes = {_name(path): x.shape[0] for path, x in leaves}
    if len(set(sizes.values())) > 1:
        raise BatchError(f"the arrays of a batch differ in their number of examples: {sizes}; "
                         "the first dimension of each must be that of the examples.")
    return next(iter(sizes.values()))


def _check_divides(batch: Any, n: int, over: str) -> None:
    rows = count(batch)
    if rows % n or not rows:
        path, x = jax.tree.leaves_with_path(batch)[0]
        near = max(n, rows // n * n)
        raise BatchError(f"{_name(path)} has {rows} examples (shape {tuple(x.shape)}), which do "
                         f"not divide evenly over {over}; give batches of {near}, and drop a "
                         "shorter last batch or pad it: zj.feed(..., pad=True).")


def check_arrays(batch: Any) -> None:
    """Raises `BatchError` for leaves that are not numbers or arrays of numbers.

    Also raises it for 64-bit integers if 32 bits cannot hold their values.
    """
    for path, x in jax.tree.leaves_with_path(batch):
        if not isinstance(x, _NUMBERS):
            kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
            raise BatchError(f"{_name(path)} is a {kind}; give numpy or jax arrays, such as "
                             "np.asarray(x) returns.")
        if isinstance(x, (np.ndarray, np.generic)):
            _check_numbers(_name(path), np.asarray(x))


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
    """Raises `BatchError` for a batch that a jitted function would misread.

    `check_arrays` finds one kind. With several processes, the other kind is an array of this
    process alone, because each process would take its own array for the whole batch.
    """
    check_arrays(batch)
    if len(policy.processes) < 2:
        return
    for path, x in jax.tree.leaves_with_path(batch):
        if _is_local(x) and x.shape:
            raise BatchError(f"{_name(path)} is an array of process {jax.process_index()} alone, "
                             f"but {len(policy.processes)} processes train together; give the "
                             "share of each process to zj.feed(batches, zero).")


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
        check(policy, arrays)

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
