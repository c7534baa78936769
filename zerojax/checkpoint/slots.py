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
import re
import shutil
import stat
import uuid
import weakref
from typing import Any, BinaryIO

import numpy as np

from zerojax.checkpoint.manifest import sha256
from zerojax.errors import CheckpointError
from zerojax.tables import size

BASE = pathlib.Path("/dev/shm")  # of Linux: a file system in memory
_LARGEST_HEADER = 100 * 2**20  # bytes
_ABOUT = "about.json"
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
FORMAT = 1  # of the headers
# of this process, by lock: POSIX locks do not exclude the process that has them
_open: weakref.WeakValueDictionary[str, "Slots"] = weakref.WeakValueDictionary()


def folder_of(checkpoints: str) -> pathlib.Path:
    """Returns the directory of the snapshots beside a directory of checkpoints."""
    name = hashlib.sha256(checkpoints.encode()).hexdigest()[:16]
    return BASE / f"zerojax-{os.getuid()}-{name}"


def is_open(checkpoints: str, process: int) -> bool:
    """Whether a checkpointer of this process, whose index is given, has its slots open."""
    return str(folder_of(checkpoints) / f"{process}.lock") in _open


class Slots:
    """The slots of one process of a job.

    Args:
      checkpoints: the directory of checkpoints.
      process: the index of the process.
    """

    def __init__(self, checkpoints: str, process: int):
        self.checkpoints, self.process = checkpoints, process
        self.folder = folder_of(checkpoints)
        self._lock = -1
        self._maps: dict[int, tuple[int, np.memmap]] = {}  # by slot: the file's inode, its bytes
        self._steps = {0: -1, 1: -1}
        self._left: list[str] = []  # processes of an earlier attempt

    def open(self) -> None:
        """Locks the slots until this process ends or closes them.

        Raises:
          CheckpointError: the host has no shared memory, another user owns the directory, or
            another process or checkpointer uses the slots.
        """
        self._create()
        if str(self._path("lock")) in _open:
            raise CheckpointError("memory=True: another checkpointer of this process keeps "
                                  f"snapshots of {self.checkpoints}; close it first, or give "
                                  "another directory.")
        self._lock = self._locked()
        self._unlink(f"{self.process}-*.new")
        _open[str(self._path("lock"))] = self

    def _path(self, kind: str, number: int | None = None) -> pathlib.Path:
        return self.folder / f"{self.process}{'' if number is None else f'-{number}'}.{kind}"

    def _create(self) -> None:
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
        """Returns the locked file; a process's children, such as a data loader's, do not have it.
        """
        file = os.open(self._path("lock"), os.O_RDWR | os.O_CREAT | _SAFE, 0o600)
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

    def find_left(self) -> None:
        """Finds the slots that processes of an earlier attempt have left on this host.

        Call it once, when all processes of the job have opened theirs: the slots of one that is
        killed later are those of a restart.
        """
        owners = {found[0] for path in self.folder.iterdir()
                  if (found := re.match(r"\d+(?=[-.])", path.name))}
        self._left = [owner for owner in owners - {str(self.process)}
                      if _is_free(self.folder / f"{owner}.lock")]

    def branch(self, run: str, first: float) -> None:
        """Removes snapshots of other runs, and of a step on.

        Of those that were left by other processes, only the newest step stays, until `remove_left`.
        """
        steps = {path.stem: header["step"] for path, header in headers(self.folder, run).items()
                 if header["step"] < first}
        newest = max(steps.values(), default=-1)
        self._steps = {number: steps.get(f"{self.process}-{number}", -1) for number in (0, 1)}
        for number in (n for n, step in self._steps.items() if step < 0):
            self._path("json", number).unlink(missing_ok=True)
        for slot in (f"{owner}-{number}" for owner in self._left for number in (0, 1)):
            if slot not in steps or steps[slot] < newest:
                self._unlink(f"{slot}.*")

    def allocate(self, total: int) -> None:
        """Allocates the memory of both slots, which keep their snapshots.

        The slot that is written last is allocated then, as far as it needs what is left by others.

        Raises:
          CheckpointError: the shared memory is full.
        """
        first = self._next()
        left = sum(path.stat().st_size for owner in self._left
                   for path in self.folder.glob(f"{owner}-*.data"))
        try:
            self._grow(first, total)
            self._grow(1 - first, total, left)
        except OSError as error:
            for number in (n for n, step in self._steps.items() if step < 0):
                self._unlink(f"{self.process}-{number}.*")
            raise self._explained(error, total) from None

    def _next(self) -> int:
        """Returns the number of the slot with the older snapshot, or with none."""
        return min(self._steps, key=lambda number: self._steps[number])

    def write(self, header: dict[str, Any], parts: list[np.ndarray], offsets: list[int],
              total: int) -> None:
        """Writes a snapshot over the older one; until it is complete, the slot has none.

        Args:
          parts: the bytes of each part, uint8[n].
          offsets: the place of each part.
          total: the bytes of all.

        Raises:
          CheckpointError: the shared memory is full.
        """
        if not self.folder.exists():  # someone has removed it
            self._create()
        number = self._next()
        try:
            self._grow(number, total)
        except OSError as error:
            raise self._explained(error, total) from None
        self._path("json", number).unlink(missing_ok=True)
        memory = self._memory(number, total)
        for offset, part in zip(offsets, parts, strict=True):
            memory[offset:offset + part.size] = part
        signed = header | {"digest": sha256(header)}
        _replace(self._path("json", number), json.dumps(signed).encode())
        self._steps[number] = header["step"]

    def _file(self, number: int) -> BinaryIO:
        file = os.open(self._path("data", number), os.O_RDWR | os.O_CREAT | _SAFE, 0o600)
        return os.fdopen(file, "r+b")

    def _grow(self, number: int, total: int, left: int = 0) -> None:
        """Allocates memory beyond what a slot has, except what others have left."""
        with self._file(number) as file:
            if os.fstat(file.fileno()).st_size < total - left:
                os.posix_fallocate(file.fileno(), 0, total - left)

    def _explained(self, error: OSError, total: int) -> Exception:
        """Returns the error to raise if memory for slots cannot be allocated."""
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            return error
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"memory=True: two snapshots of this process take 2 x {size(total)}, and {BASE} has "
            f"{size(free)} left. Enlarge it (mount -o remount,size=... {BASE}; in a container, "
            f"--shm-size), remove the snapshots of runs that have ended ({BASE}/zerojax-*), or "
            "write memory=False.")

    def _memory(self, number: int, total: int) -> np.memmap:
        """Returns the memory of a slot, which is another if someone has removed its file."""
        with self._file(number) as file:
            inode = os.fstat(file.fileno()).st_ino
            before, memory = self._maps.pop(number, (None, None))
            if memory is None or before != inode or memory.size != total:
                file.truncate(total)  # it may have been larger
                memory = np.memmap(file, np.uint8, "r+", shape=(total,))
            self._maps[number] = inode, memory
        return memory

    def _unlink(self, pattern: str) -> None:
        """Removes files, headers first: a header without its data would look damaged."""
        for path in sorted(self.folder.glob(pattern), key=lambda path: path.suffix != ".json"):
            path.unlink(missing_ok=True)

    def remove_left(self) -> None:
        """Removes what processes of an earlier attempt have left on this host."""
        for owner in self._left:
            self._unlink(f"{owner}[-.]*")
        self._left = []

    def release(self) -> None:
        """Unlocks the slots, which keep their snapshots for the next start."""
        self._maps.clear()
        if self._lock >= 0:
            _open.pop(str(self._path("lock")), None)
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Frees the memory, and unlocks the slots."""
        self._unlink(f"{self.process}[-.]*")
        self.remove_left()
        self.release()
        with contextlib.suppress(OSError):  # other processes have slots, or have removed it
            if all(path.name.startswith(_ABOUT) for path in self.folder.iterdir()):
                shutil.rmtree(self.folder)


def _is_free(path: pathlib.Path) -> bool:
    """Whether no process has a lock."""
    if str(path) in _open:
        return False
    try:
        with os.fdopen(os.open(path, os.O_RDWR | _SAFE), "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may be asking too
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def headers(folder: pathlib.Path, run: str) -> dict[pathlib.Path, dict[str, Any]]:
    """Returns the headers of all processes' snapshots of a run in the memory of this host, by file.

    Those that are being replaced, or are damaged, are left out.
    """
    intact = {path: _intact(path) for path in _paths(folder)}
    return {path: header for path, header in intact.items()
            if header and (header.get("format"), header.get("run")) == (FORMAT, run)}


def damaged(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the headers that were changed or cannot be read."""
    return [path for path in _paths(folder) if _intact(path) is None and os.path.lexists(path)]


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-[01].json"))


def _intact(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a header, or None if it is damaged or gone."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        header = _header(path)
        if header.pop("digest") == sha256(header):
            return header
    return None


def _header(path: pathlib.Path) -> dict[str, Any]:
    with os.fdopen(os.open(path, os.O_RDONLY | _SAFE), "rb") as file:
        return json.loads(file.read(_LARGEST_HEADER))


def read_data(path: pathlib.Path) -> np.memmap:
    """Returns the bytes of a slot, uint8[n], which are read when they are used."""
    with os.fdopen(os.open(path, os.O_RDONLY | _SAFE), "rb") as file:
        return np.memmap(file, np.uint8, "r")


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that appears at once, or not at all."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o600), "wb") as file:
        file.write(content)
    new.rename(path)
