"""Batches: to devices, and into microbatches."""

import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.errors import BatchError, PolicyError
from zerojax.policy import Policy, has_64_bits


def sharding(policy: Policy) -> NamedSharding:
    """Of a batch: the first dimension over replicas and shards."""
    return NamedSharding(policy.mesh, P(policy.batch_axes))


def parts_of(policy: Policy) -> dict[int, tuple[int, ...]]:
    """Which of the parts of a batch each process's devices hold. Along other axes than the batch's, processes hold the same."""
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding(policy).devices_indices_map((policy.parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(parts)) for process, parts in sorted(held.items())}


def local_parts(policy: Policy) -> int:
    """How many of them this process's devices hold.

    Raises:
      BatchError: none: the mesh has no device of this process.
    """
    held = parts_of(policy).get(jax.process_index())
    if held is None:
        raise BatchError(f"the mesh has no device of process {jax.process_index()}, which has no part of a batch then; its devices "
                         f"are of processes {list(parts_of(policy))}.")
    return len(held)


def share(policy: Policy) -> tuple[int, int]:
    """(which, of how many): see `Zero.share`."""
    distinct = list(dict.fromkeys(parts_of(policy).values()))
    local_parts(policy)
    return distinct.index(parts_of(policy)[jax.process_index()]), len(distinct)


def check(policy: Policy, batch: Any, accumulate: int = 1) -> None:
    """Raises `BatchError` for a leaf whose first dimension does not divide by devices x accumulate."""
    _check(batch, policy.parts * accumulate, f"{policy.parts} devices x {accumulate} microbatches = {policy.parts * accumulate}")


def check_part(policy: Policy, part: Any) -> None:
    """Raises `BatchError` for a process's part of a batch that does not divide over its devices."""
    check_arrays(part)
    n = local_parts(policy)
    alone = n == policy.parts
    _check(part, n, f"{n} devices" if alone else f"the {n} devices of process {jax.process_index()}, which brings its own part")


def check_arrays(batch: Any) -> None:
    """Raises `BatchError` for leaves that are no arrays of numbers, and for 64-bit integers that would wrap in 32 bits."""
    for path, x in jax.tree.leaves_with_path(batch):
        where, kind = f"batch{jax.tree_util.keystr(path)}", f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        if not isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, int, float)):
            raise BatchError(f"{where} is a {kind}; give numpy or jax arrays, as np.asarray(x) makes.")
        if isinstance(x, (np.ndarray, np.generic)):
            _check_numbers(where, np.asarray(x))


def _check_numbers(where: str, x: np.ndarray):
    if x.dtype.kind in "OUSMm":
        raise BatchError(f"{where} is of dtype {x.dtype}, which no device computes with; give numbers, as a tokenizer's.")
    if x.dtype not in (np.int64, np.uint64) or not x.size or has_64_bits():
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    for value in (int(x.min()), int(x.max())):
        if not limits.min <= value <= limits.max:
            raise BatchError(f"{where} is of dtype {x.dtype} and has {value}, but jax makes that {limits.dtype}, which ends at "
                             f"{limits.max}: it would wrap. Map such ids to smaller ones, or turn jax_enable_x64 on.")


def _check(batch, n, what):
    sizes = {}
    if not jax.tree.leaves(batch):
        raise BatchError(f"the batch {batch!r} holds no array; give arrays whose first dimension is that of the examples.")
    for path, x in jax.tree.leaves_with_path(batch):
        where = f"batch{jax.tree_util.keystr(path)}"
        if not getattr(x, "shape", ()):
            raise BatchError(f"{where} has no dimension; every array of a batch starts with the dimension of its examples.")
        if x.shape[0] % n or x.shape[0] == 0:
            near = max(n, x.shape[0] // n * n)
            raise BatchError(f"{where} has {x.shape[0]} examples (shape {tuple(x.shape)}), which do not divide by {what}; write "
                             f"batches of {near}, drop the last one, or fill it up: zj.feed(..., pad=True).")
        sizes[where] = x.shape[0]
    if len(set(sizes.values())) > 1:
        raise BatchError(f"the arrays of a batch differ in their number of examples: {sizes}.")


def check_given(policy: Policy, batch: Any) -> None:
    """Raises `BatchError` for what a jitted function would misread: see `check_arrays`; and arrays of this process alone where
    several train, each of which would take its own for the whole batch."""
    check_arrays(batch)
    if len(policy.processes) > 1:
        for path, x in jax.tree.leaves_with_path(batch):
            own = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_fully_addressable)
            if own and x.shape:
                raise BatchError(f"batch{jax.tree_util.keystr(path)} is an array of process {jax.process_index()} alone, but "
                                 f"{len(policy.processes)} processes train together; give each's part to zj.feed(batches, zero).")


def joined(policy: Policy, part: Any) -> Any:
    """The batch of all processes, out of each one's part."""
    if sharding(policy).is_fully_addressable:
        return jax.device_put(part, sharding(policy))
    mine = local_parts(policy)  # device_put would compare the processes' arrays, by a program of its own
    whole = lambda x: (x.shape[0] // mine * policy.parts, *x.shape[1:])
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding(policy), np.asarray(x), whole(x)), part)


def placed(policy: Policy, tree: Any) -> Any:
    """Arrays as shapes with shardings: those without one are split over the devices where they divide, else whole on each."""
    def place(x):
        if not hasattr(x, "shape") or isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        x = jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))
        divides = x.shape and x.shape[0] % policy.parts == 0
        return x.update(sharding=sharding(policy) if divides else NamedSharding(policy.mesh, P()))

    return jax.tree.map(place, tree)


def check_mesh(policy: Policy, tree: Any) -> None:
    """Raises `PolicyError` for arrays or shapes that lie over another mesh than the policy's."""
    for path, x in jax.tree.leaves_with_path(tree):
        there = getattr(getattr(x, "sharding", None), "mesh", policy.mesh)
        if there != policy.mesh:
            raise PolicyError(f"plan was given arrays (at {jax.tree_util.keystr(path)}) over {there}, but the policy is over "
                              f"{policy.mesh}; make them with the same Zero: zero.abstract(init_fn, tx, ...).")


def local_bytes(tree: Any) -> int:
    """Bytes on one device, of arrays or shapes with shardings."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 8)
    return sum(size(x) for x in jax.tree.leaves(tree) if hasattr(x, "sharding"))


def spread(policy: Policy, tree: Any) -> Any:
    """`tree` with its arrays split over the devices; scalars (and keys) are left as they are.

    Raises:
      BatchError: an array does not divide.
    """
    arrays = [x for x in jax.tree.leaves(tree) if getattr(x, "shape", ())]
    if arrays:
        check(policy, arrays)
    put = lambda x: jax.lax.with_sharding_constraint(x, sharding(policy)) if getattr(x, "shape", ()) else x
    return jax.tree.map(put, tree)


def microbatches(policy: Policy, batch: Any, accumulate: int) -> Any:
    """`[B, ...]` to `[accumulate, B / accumulate, ...]` without moving an example between devices.

    Microbatch `a` holds examples a, a + accumulate, a + 2 accumulate, ...: splitting off contiguous ones instead would
    send each device's examples to others (an all-to-all).
    """
    spec = NamedSharding(policy.mesh, P(None, policy.batch_axes))
    split = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(split(x), spec), batch)
