"""Two files per process in the host's shared memory, which outlive the process and take turns.

A slot has the bytes of a snapshot, and a JSON header beside them that is renamed into place when
all bytes are written: a slot without a header has no snapshot. The bytes are allocated before they
are written, because a process that writes to memory that the host does not have is killed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np

from zerojax.errors import CheckpointError
from zerojax.tables import size

BASE = pathlib.Path("/dev/shm")  # of Linux: a file system in memory
_LARGEST_HEADER = 100 * 2**20  # bytes
_ABOUT = "about.json"


def folder_of(checkpoints: str) -> pathlib.Path:
    """Returns the directory of the snapshots beside a directory of checkpoints."""
    name = hashlib.sha256(checkpoints.encode()).hexdigest()[:16]
    return BASE / f"zerojax-{os.getuid()}-{name}"


class Slots:
    """The slots of one process of a job.

    Args:
      checkpoints: the directory of checkpoints.
      process: the index of the process.

    Raises:
      CheckpointError: the host has no shared memory, another user owns the directory, or another
        process uses the slots.
    """

    def __init__(self, checkpoints: str, process: int):
        self.checkpoints, self.process = checkpoints, process
        self.folder = folder_of(checkpoints)
        self._created()
        self._lock = self._locked()
        self._maps: dict[int, np.memmap] = {}

    def _created(self) -> None:
        if not BASE.is_dir():
            raise CheckpointError(f"memory=True: this host has no {BASE}, the shared memory of "
                                  "Linux; write memory=False.")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not is_private or found.st_uid != os.getuid():
            raise CheckpointError(f"memory=True: {self.folder} is not a directory that only this "
                                  "user can read; remove it, after a look at who made it.")
        about = json.dumps({"snapshots of": self.checkpoints})
        _replace(self.folder / _ABOUT, about.encode())

    def _locked(self) -> int:
        """Locks the slots until this process ends or closes them; returns the file.

        Children of the process, such as a data loader's, do not inherit the lock.
        """
        path = self.folder / f"{self.process}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(file, 100).decode()
            os.close(file)
            raise CheckpointError(f"memory=True: process {holder} of this host keeps snapshots of "
                                  f"{self.checkpoints} too; give each job a directory of its own."
                                  ) from None
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        return file

    def headers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the number and the header of each slot that has a snapshot."""
        for number in (0, 1):
            with contextlib.suppress(OSError, ValueError):
                yield number, read_header(self.folder / f"{self.process}-{number}.json")

    def write(self, number: int, header: dict[str, Any], parts: list[np.ndarray],
              offsets: list[int], total: int) -> None:
        """Writes a snapshot; until it is complete, the slot has none.

        Args:
          parts: the bytes of each part, uint8[n].
          offsets: the place of each part.
          total: the bytes of all.

        Raises:
          CheckpointError: the shared memory is full.
        """
        self.clear(number)
        memory = self._memory(number, total)
        for offset, part in zip(offsets, parts, strict=True):
            memory[offset:offset + part.size] = part
        _replace(self.folder / f"{self.process}-{number}.json", json.dumps(header).encode())

    def clear(self, number: int) -> None:
        """Removes the header of a slot, and keeps its memory."""
        (self.folder / f"{self.process}-{number}.json").unlink(missing_ok=True)

    def allocate(self, total: int) -> None:
        """Allocates the memory of both slots.

        Raises:
          CheckpointError: the shared memory is full.
        """
        try:
            for number in (0, 1):
                self._memory(number, total)
        except CheckpointError:
            self._unlink(f"{self.process}-[01].*")
            raise

    def _unlink(self, pattern: str) -> None:
        """Removes files, headers first: a header without its data would look damaged."""
        for path in sorted(self.folder.glob(pattern), key=lambda path: path.suffix != ".json"):
            path.unlink(missing_ok=True)

    def _memory(self, number: int, total: int) -> np.memmap:
        if number not in self._maps or self._maps[number].size != total:
            path = self.folder / f"{self.process}-{number}.data"
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, 0o600), "r+b") as file:
                if os.fstat(file.fileno()).st_size != total:
                    self.clear(number)
                    self._maps.pop(number, None)
                    file.truncate(0)
                    self._reserve(file.fileno(), total)
                self._maps[number] = np.memmap(file, np.uint8, "r+", shape=(total,))
        return self._maps[number]

    def _reserve(self, file: int, total: int) -> None:
        try:
            os.posix_fallocate(file, 0, total)
        except OSError as error:
            os.ftruncate(file, 0)
            if error.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"memory=True: two snapshots of this process take 2 x {size(total)}, and {BASE} "
                f"has {size(free)} left. Enlarge it (mount -o remount,size=... {BASE}; in a "
                "container, --shm-size), remove the snapshots of other runs "
                f"({BASE}/zerojax-*), or write memory=False.") from None

    def remove_others(self, processes: int) -> None:
        """Removes slots of processes that an earlier attempt with more processes had.

        Of those, each process removes its share.
        """
        owners = {path.name.partition("-")[0] for path in self.folder.glob("*-[01].*")}
        for owner in filter(str.isdecimal, owners):
            if int(owner) >= processes and int(owner) % processes == self.process:
                self._unlink(f"{owner}-[01].*")

    def release(self) -> None:
        """Unlocks the slots, which keep their snapshots for the next start."""
        self._maps.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Frees the memory, and unlocks the slots."""
        self._unlink(f"{self.process}[-.]*")
        self.release()
        with contextlib.suppress(OSError):  # other processes have slots, or have removed it
            if all(path.name.startswith(_ABOUT) for path in self.folder.iterdir()):
                shutil.rmtree(self.folder)


def read_header(path: pathlib.Path) -> dict[str, Any]:
    """Returns a header.

    Raises:
      OSError, ValueError: it is missing, a link, or not JSON.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        values = json.loads(file.read(_LARGEST_HEADER))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a header")
    return values


def read_data(path: pathlib.Path) -> np.memmap:
    """Returns the bytes of a slot, uint8[n], which are read when they are used."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return np.memmap(file, np.uint8, "r")


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that appears at once, or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
        file.write(content)
    new.rename(path)
