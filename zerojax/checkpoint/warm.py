"""A state put together from snapshots in the memory of the hosts.

The parts may be those of another mesh. A part that no process of its host has, because the host was
replaced or the part is damaged, is copied from a device with the same part of the array.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from zerojax.checkpoint import json_values, slots
from zerojax.checkpoint.entries import MOST, Entry
from zerojax.checkpoint.manifest import Manifest
from zerojax.errors import CorruptCheckpointError
from zerojax.layout import padded, rules
from zerojax.processes.exchange import Group

_NOBODY = np.uint32(2**32 - 1)
Header = Mapping[str, Any]
Bounds = tuple[tuple[int, int], ...]  # the first index of each dimension, and that after the last


class Snapshot(NamedTuple):
    """The identity of a snapshot: equal steps of two attempts may have different bits."""

    step: int
    attempt: str


def available(group: Group, headers: Mapping[pathlib.Path, Header],
              on_disk: int) -> list[Snapshot]:
    """Returns the snapshots of which any host has a part, newest first.

    Args:
      on_disk: the newest step on disk, or -1. If a snapshot was taken when a later step was on
        disk, all are left out: the user has moved that step away, to continue from an earlier one.
    """
    newest = max((h["on_disk"] for h in headers.values()), default=-1)
    mine = [newest, sorted({(h["step"], h["attempt"]) for h in headers.values()})]
    shared = group.shared(mine).values()
    if max(newest for newest, _ in shared) > on_disk:
        return []
    return sorted({Snapshot(*s) for _, all_of in shared for s in all_of}, reverse=True)


def manifest_of(group: Group, headers: Mapping[pathlib.Path, Header],
                snapshot: Snapshot) -> Manifest:
    """Returns the manifest of a snapshot, with the data positions of all processes.

    Raises:
      CorruptCheckpointError: positions are missing, and the others differ.
    """
    mine = list(_of(headers, snapshot).values())
    positions: dict[int, Any] = {}
    for shared in group.shared([[h["process"], h["position"]] for h in mine]).values():
        positions |= dict(shared)
    holder = min(p for p, has in group.shared(bool(mine)).items() if has)
    about = [mine[0]["manifest"], mine[0]["processes"], mine[0]["is_alike"]] if mine else None
    values, processes, is_alike = group.shared(about if group.process == holder else None)[holder]
    found = [json_values.decoded(positions[p]) for p in sorted(positions)]
    are_equal = all(position == found[0] for position in found)
    if len(found) < processes and not (is_alike and are_equal):
        gone = sorted(set(range(processes)) - positions.keys())
        raise CorruptCheckpointError(f"the position in the data of process {gone[0]} was in the "
                                     "memory of a host that does not have it any more")
    states = tuple(found[:1] if are_equal else found)
    return dataclasses.replace(Manifest.from_json(values), data_states=states)


def _of(headers: Mapping[pathlib.Path, Header], snapshot: Snapshot) -> dict[pathlib.Path, Header]:
    return {path: h for path, h in headers.items() if (h["step"], h["attempt"]) == snapshot}


def arrays(group: Group, headers: Mapping[pathlib.Path, Header], snapshot: Snapshot,
           manifest: Manifest, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays by path.

    Args:
      sources: the arrays to make by path; see `Entry.source`.

    Raises:
      CorruptCheckpointError: a part is on no host, on any of the processes.
    """
    parts = _Parts(_of(headers, snapshot))
    drafts = group.everywhere(lambda: {path: _Draft(parts, path, manifest.leaves[path], source)
                                       for path, source in sources.items()})
    incomplete = [path for path, draft in drafts.items() if not draft.is_complete]
    for path in sorted({p for paths in group.shared(incomplete).values() for p in paths}):
        drafts[path].complete()
    lost = [path for path, draft in drafts.items() if not draft.is_complete]
    lost = sorted({p for paths in group.shared(lost).values() for p in paths})
    if lost:
        why = "; ".join(parts.damaged.values()) or "the memory of a process is gone"
        raise CorruptCheckpointError(f"no host has all parts of {', '.join(lost[:MOST])} ({why})")
    return {path: draft.array() for path, draft in drafts.items()}


class _Parts:
    """The parts of a snapshot in the memory of this host.

    Attributes:
      damaged: why a part is not used, by its path.
    """

    def __init__(self, headers: Mapping[pathlib.Path, Header]):
        self.damaged: dict[str, str] = {}
        self._by_path: dict[str, dict[Bounds, list[Callable[[], np.ndarray | None]]]] = {}
        for file, header in headers.items():
            try:
                data = slots.read_data(file.with_suffix(".data"))
            except (OSError, ValueError) as error:
                self.damaged[str(file)] = f"a snapshot without its data: {error}"
                continue
            for path, parts in header["parts"].items():
                for bounds, *rest in parts:
                    place = tuple((start, stop) for start, stop in bounds)
                    read = functools.cache(functools.partial(self._read, path, data, *rest))
                    self._by_path.setdefault(path, {}).setdefault(place, []).append(read)

    def _read(self, path: str, data: np.ndarray, offset: int, size: int,
              check: int) -> np.ndarray | None:
        part = data[offset:offset + size]
        if part.size == size and zlib.crc32(part.data) == check:
            return part
        self.damaged[path] = f"a part of {path} has another checksum than its header"
        return None

    def _whole(self, path: str, place: Bounds) -> np.ndarray | None:
        """Returns the bytes of a part, of the first process that has them undamaged."""
        reads = self._by_path.get(path, {}).get(place, ())
        return next((part for read in reads if (part := read()) is not None), None)

    def region(self, path: str, entry: Entry, bounds: Bounds) -> np.ndarray | None:
        """Returns a region of an array, or None if not all of it is here.

        Beyond the logical shape, a padded array has zeros. A region that is one part is not copied.
        """
        if (same := self._whole(path, bounds)) is not None:
            return same.view(entry.dtype).reshape([stop - start for start, stop in bounds])
        region = np.zeros([stop - start for start, stop in bounds], entry.dtype)
        wanted = _common(bounds, tuple((0, n) for n in entry.shape))
        left = _volume(wanted)
        for place in self._by_path.get(path, {}):
            both = _common(wanted, place)
            if left and _volume(both) and (part := self._whole(path, place)) is not None:
                shape = [stop - start for start, stop in place]
                whole = part.view(entry.dtype).reshape(shape)
                region[_within(both, bounds)] = whole[_within(both, place)]
                left -= _volume(both)
        return None if left else region


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(at.indices(n)[:2] for at, n in zip(index, shape, strict=True))


def _common(a: Bounds, b: Bounds) -> Bounds:
    return tuple((max(x[0], y[0]), max(x[0], y[0], min(x[1], y[1])))
                 for x, y in zip(a, b, strict=True))


def _volume(bounds: Bounds) -> int:
    return int(np.prod([stop - start for start, stop in bounds], dtype=np.int64))


def _within(bounds: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """Returns bounds relative to the first index of others."""
    return tuple(slice(start - first, stop - first)
                 for (start, stop), (first, _) in zip(bounds, outer, strict=True))


class _Draft:
    """An array that is being put together: the regions of this process's devices."""

    def __init__(self, parts: _Parts, path: str, entry: Entry, source: Any):
        self.source, self.dtype = source, np.dtype(entry.dtype)
        self.stored = padded.stored(source)
        self.shape = tuple(self.stored.shape)
        region = functools.cache(functools.partial(parts.region, path, entry))
        self.regions = {device: region(bounds) for device, bounds in self._bounds().items()}

    def _bounds(self) -> dict[Any, Bounds]:
        """Returns the place of each device's region; the key None means the host's memory."""
        if self.stored.sharding is None:
            shape = self.source.shape if padded.is_padded(self.source) else self.shape
            return {None: tuple((0, n) for n in shape)}
        places = self.stored.sharding.addressable_devices_indices_map(self.shape)
        return {device: bounds_of(index, self.shape) for device, index in places.items()}

    @property
    def is_complete(self) -> bool:
        return all(region is not None for region in self.regions.values())

    def complete(self) -> None:
        """Copies regions from other devices that have them; all processes of the mesh call it."""
        sharding = self.stored.sharding
        if not self.regions:  # no device of this process takes part
            return
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return
        spec = rules.full(sharding.spec, len(self.shape))
        copies = tuple(a for a in sharding.mesh.axis_names if a not in rules.axes_of(spec))
        if not copies:
            return
        with jax.set_mesh(sharding.mesh):  # the caller may have set another mesh
            words, found = _copied(self._words(sharding.mesh, spec), self._here(sharding.mesh),
                                   sharding.mesh, P(*spec, None), copies)
        has = {shard.device: bool(np.asarray(shard.data)[0]) for shard in found.addressable_shards}
        self.regions = {shard.device: self._region(shard.data) if has[shard.device] else None
                        for shard in words.addressable_shards}

    def _words(self, mesh: Mesh, spec: P) -> jax.Array:
        """Returns uint32[*shape, words]: the bytes of each element, zeros where they are missing.
        """
        empty = np.zeros(self.stored.sharding.shard_shape(self.shape), self.dtype)
        shards = [jax.device_put(_to_words(empty if region is None else region), device)
                  for device, region in self.regions.items()]
        shape = (*self.shape, shards[0].shape[-1])
        return jax.make_array_from_single_device_arrays(
            shape, NamedSharding(mesh, P(*spec, None)), shards)

    def _here(self, mesh: Mesh) -> jax.Array:
        """Returns bool[devices]: which of the devices have their region."""
        shards = [jax.device_put(np.array([region is not None]), device)
                  for device, region in self.regions.items()]
        return jax.make_array_from_single_device_arrays(
            (mesh.size,), NamedSharding(mesh, P(mesh.axis_names)), shards)

    def _region(self, words: jax.Array) -> np.ndarray:
        pieces = np.ascontiguousarray(np.asarray(words).astype(_piece(self.dtype)))
        return pieces.view(self.dtype)[..., 0]

    def array(self) -> Any:
        """Returns the array, in the form of its source."""
        if None in self.regions:
            return np.array(self.regions[None])
        kind = self.stored.sharding.memory_kind
        shards = [jax.device_put(region, SingleDeviceSharding(device, memory_kind=kind),
                                 may_alias=False)  # devices may have the same region
                  for device, region in self.regions.items()]
        array = jax.make_array_from_single_device_arrays(self.shape, self.stored.sharding, shards,
                                                         dtype=self.dtype)
        is_padded = padded.is_padded(self.source)
        return padded.Padded(array, self.source.shape) if is_padded else array


def _piece(dtype: np.dtype) -> np.dtype:
    """Returns the unsigned integer that an element consists of one or more of."""
    return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def _to_words(x: np.ndarray) -> np.ndarray:
    """Returns uint32[*shape, words]."""
    return np.asarray(x, order="C")[..., None].view(_piece(x.dtype)).astype(np.uint32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _copied(words: jax.Array, here: jax.Array, mesh: Mesh, spec: P, copies: tuple[str, ...]):
    """Returns the words of the first device that has them, of those that hold the same region.

    Also returns bool[devices]: whether there is one.
    """

    def local(part, is_here):
        rank = jax.lax.axis_index(copies).astype(jnp.uint32)
        first = jax.lax.pmin(jnp.where(is_here[0], rank, _NOBODY), copies)
        chosen = jnp.where(rank == first, part, 0)
        return jax.lax.psum(chosen, copies), (first < _NOBODY)[None]

    devices = P(mesh.axis_names)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, devices), out_specs=(spec, devices),
                         check_vma=False)(words, here)
