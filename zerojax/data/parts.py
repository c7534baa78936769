"""A process's part of each batch: taken from its source, filled up if that is wanted, put on its devices."""

import copy
import dataclasses
import enum
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from zerojax.data import batch as batches
from zerojax.errors import BatchError
from zerojax.policy import Policy, has_64_bits
from zerojax.processes import fingerprint

_NOTHING = object()


class Status(enum.IntEnum):
    """Of what a process brings."""

    READY = 1
    ENDED = 2  # with padding alone, if anything
    EMPTY = 3  # ended before the first
    FAILED = 4


@dataclasses.dataclass
class Part:
    """A batch of global arrays out of this process's part, and its source's position after it; or why there is none."""

    status: Status
    batch: Any = None
    position: Any = None
    shapes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marks: tuple[int, int] = (0, 0)  # of the shapes of one device's part; of the contents, where others bring the same
    error: Exception | None = None

    def words(self) -> np.ndarray:
        """uint32[3]: what the other processes have to know of it."""
        return np.array([self.status, *self.marks], np.uint32)


class Parts:
    """Makes them, one a call; after the last, what ended them again."""

    def __init__(self, source: Any, policy: Policy, pad: bool | int):
        self.source, self.policy, self.pad = source, policy, pad
        self.ended, self.failed = False, None
        self.rows, self.filler = 0 if pad is True else pad, None  # of padding: how many, and one of them
        self.x64 = has_64_bits()  # of the thread that asks, which may have set it for itself
        held = list(batches.parts_of(policy).values())
        self.told, self.twice = len(held) > 1, len(set(held)) < len(held)

    def position(self) -> Any:
        """The source's; a copy, since some sources give the dict that they go on with."""
        return copy.deepcopy(self.source.get_state()) if hasattr(self.source, "get_state") else None

    def __call__(self) -> Part:
        with jax.enable_x64(self.x64):
            return self.failed or self._next()

    def _next(self) -> Part:
        try:
            item = _NOTHING if self.ended else next(self.source, _NOTHING)
            if item is not _NOTHING:
                return self._part(item, Status.READY)
            self.ended = True
            if self.filler is None:
                return Part(Status.EMPTY if self.pad else Status.ENDED)
            return self._part(jax.tree.map(lambda x: x[:0], self.filler), Status.ENDED)
        except Exception as error:  # the good batches before it come first
            self.failed = Part(Status.FAILED, error=error)
            return self.failed

    def _part(self, item, status) -> Part:
        item = self._padded(item) if self.pad else item
        batches.check_part(self.policy, item)
        part = Part(status, batches.joined(self.policy, item), self.position())
        return dataclasses.replace(part, shapes=fingerprint.shapes(item), marks=self._marks(item)) if self.told else part

    def _marks(self, item) -> tuple[int, int]:
        parts = batches.local_parts(self.policy)
        each = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), item)
        contents = [np.asarray(x).tobytes() for x in jax.tree.leaves(item)] if self.twice else []
        return zlib.crc32(repr(fingerprint.shapes(each)).encode()), zlib.crc32(b"".join(contents))

    def _padded(self, item) -> tuple[Any, np.ndarray]:
        """(arrays of `rows` examples, the weight of each)."""
        n = len(jax.tree.leaves(item)[0])
        if self.filler is None:
            parts = batches.local_parts(self.policy)
            self.rows, self.filler = self.rows or -(-n // parts) * parts, jax.tree.map(lambda x: np.array(x[:1]), item)
        if n > self.rows:
            raise BatchError(f"a batch of {n} examples can't be filled up to {self.rows}, as the first had, or pad={self.pad} "
                             "says; write pad=N with the largest number.")
        fill = lambda x, one: np.concatenate([x, np.repeat(one, self.rows - n, 0)])
        return jax.tree.map(fill, item, self.filler), (np.arange(self.rows) < n).astype(np.float32)
