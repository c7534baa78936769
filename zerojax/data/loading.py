"""Loading: one process's share of each batch, from its source, padded if wanted, to its devices."""

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
from zerojax.policy import Policy
from zerojax.precision import has_64_bits
from zerojax.processes import fingerprint

_NOTHING = object()


class Status(enum.IntEnum):
    """The state of a process's source after it was asked for a batch."""

    READY = 1
    ENDED = 2  # there is no batch, or one of padding alone
    EMPTY = 3  # ended before the first batch, so that there is nothing to pad with
    FAILED = 4


@dataclasses.dataclass
class Loaded:
    """A batch, or the reason why there is none.

    Attributes:
      batch: global arrays, of which this process has its share.
      position: of the source, after this batch.
      shapes: dtypes and shapes of the share, by path; empty for a single process.
      marks: checksums of the shapes of one device's part, and of the share's contents if another
        process brings the same share.
      error: what the source or a check of the batch raised.
    """

    status: Status
    batch: Any = None
    position: Any = None
    shapes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marks: tuple[int, int] = (0, 0)
    error: Exception | None = None

    def words(self) -> np.ndarray:
        """Returns uint32[3], which the other processes compare with their own: status, marks."""
        return np.array([self.status, *self.marks], np.uint32)


class Loader:
    """Makes a batch per call from a source of shares; does not raise, but returns errors.

    After the source has ended or failed, every further call returns the same end or error.

    Args:
      pad: whether to pad short shares, or the number of examples to pad them to.
    """

    def __init__(self, source: Any, policy: Policy, pad: bool | int):
        self.source = source
        self.policy = policy
        self.pad = pad
        self._ended = False
        self._failed: Loaded | None = None
        self._rows = 0 if pad is True else pad  # examples in a padded share; 0 until the first
        self._filler = None  # one example, of which padding consists
        self._x64 = has_64_bits()  # the thread that calls does not have this thread's setting
        held = list(batches.parts_of(policy).values())
        self._several = len(held) > 1
        self._shared = len(set(held)) < len(held)  # some processes bring the same share

    def position(self) -> Any:
        """Returns a copy of the source's position, since some sources change theirs in place."""
        if hasattr(self.source, "get_state"):
            return copy.deepcopy(self.source.get_state())
        return None

    def __call__(self) -> Loaded:
        with jax.enable_x64(self._x64):
            return self._failed or self._next()

    def _next(self) -> Loaded:
        try:
            share = _NOTHING if self._ended else next(self.source, _NOTHING)
            return self._end() if share is _NOTHING else self._loaded(share, Status.READY)
        except Exception as error:  # to be raised after the batches before it were used
            self._failed = Loaded(Status.FAILED, error=error)
            return self._failed

    def _end(self) -> Loaded:
        self._ended = True
        if self._filler is None:
            return Loaded(Status.EMPTY if self.pad else Status.ENDED)
        return self._loaded(jax.tree.map(lambda x: x[:0], self._filler), Status.ENDED)

    def _loaded(self, share: Any, status: Status) -> Loaded:
        share = self._padded(share) if self.pad else share
        batches.check_share(self.policy, share)
        loaded = Loaded(status, batches.joined(self.policy, share), self.position())
        if self._several:
            loaded.shapes = fingerprint.shapes(share)
            loaded.marks = self._marks(share)
        return loaded

    def _marks(self, share: Any) -> tuple[int, int]:
        parts = batches.local_parts(self.policy)
        part = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), share)
        contents = [np.asarray(x).tobytes() for x in jax.tree.leaves(share)] if self._shared else []
        shapes = repr(fingerprint.shapes(part)).encode()
        return zlib.crc32(shapes), zlib.crc32(b"".join(contents))

    def _padded(self, share: Any) -> tuple[Any, np.ndarray]:
        """Returns the padded share, and float32[rows]: 1 for its examples, 0 for padding."""
        batches.check_arrays(share)
        n = batches.count(share)
        if self._filler is None:
            self._start_padding(share, n)
        if n > self._rows:
            size = "the size of the first batch" if self.pad is True else f"as pad={self.pad} asks"
            raise BatchError(f"a batch of {n} examples cannot be padded to {self._rows}, {size}; "
                             "write pad=N with the largest number of examples.")

        def fill(x, example):
            return np.concatenate([x, np.repeat(example, self._rows - n, 0)])

        weight = (np.arange(self._rows) < n).astype(np.float32)
        return jax.tree.map(fill, share, self._filler), weight

    def _start_padding(self, share: Any, n: int) -> None:
        """Takes the example to pad with, and the number of examples if `pad` is no number."""
        parts = batches.local_parts(self.policy)
        self._rows = self._rows or -(-n // parts) * parts
        self._filler = jax.tree.map(lambda x: np.array(x[:1]), share)
