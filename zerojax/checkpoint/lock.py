"""A lock on a directory of checkpoints: one job at a time saves into it.

POSIX locks belong to a process, and the kernel frees them when it ends. Closing any descriptor of
the file would free them too, so a process opens the file once for all its checkpointers.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from datetime import UTC, datetime

from etils import epath

from zerojax.errors import CheckpointError

NAME = ".zerojax-lock"
WAIT = 100.0  # seconds; NFS frees the lock of a dead client late: after its lease, often 90 s
WARN = 5.0  # seconds
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: dict[str, list[int]] = {}  # per directory: the file's descriptor, and its users


def take(directory: epath.Path) -> None:
    """Takes the lock of a directory, or adds a user if this process has it; see `release`.

    It does nothing for a URL, and no other process is excluded if the file system has no locks.

    Raises:
      CheckpointError: a process of another job holds the lock, or the file cannot be created.
    """
    key = str(directory)
    if "://" in key:
        return
    if key not in _held:
        _held[key] = [_locked(key), 0]
    _held[key][1] += 1


def release(directory: epath.Path) -> None:
    """Gives up one use of the lock, and frees it after the last."""
    key = str(directory)
    if key not in _held:
        return
    _held[key][1] -= 1
    if not _held[key][1]:
        os.close(_held.pop(key)[0])


def _locked(directory: str) -> int:
    """Returns the descriptor of the locked file."""
    try:
        file = os.open(os.path.join(directory, NAME), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be locked: {error}. Make it writable, or give "
                              "another directory.") from error
    try:
        _wait(file, directory)
        _sign(file)
    except BaseException:
        os.close(file)
        raise
    return file


def _wait(file: int, directory: str):
    start, warned = time.monotonic(), False
    while not _try(file):
        waited = time.monotonic() - start
        if waited >= WAIT:
            raise CheckpointError(f"{directory} is being saved into by {_holder(file)}; give "
                                  "another directory, or end that job.")
        if waited >= WARN and not warned:
            warned = True
            logging.getLogger("zerojax").warning(
                "%s is being saved into by %s; waits for %g s more", directory, _holder(file),
                WAIT - waited)
        time.sleep(0.1)


def _try(file: int) -> bool:
    """Whether the file is locked now, or cannot be because the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _sign(file: int):
    since = datetime.now(UTC).isoformat(" ", "seconds")
    text = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)
    except OSError:  # a full disk; the lock holds without a name
        pass


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace") or "another process"
