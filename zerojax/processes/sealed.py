"""Lines of JSON over a connection, each with a digest that only the holders of a secret can make.

The digest is HMAC-SHA256 (RFC 2104) of the line, its number and its sender, with a key that both
sides derive from the shared secret and a random number of each, so that a line cannot be forged,
replayed, reordered or sent back. Lines are not encrypted. Nothing is decoded before its digest is
checked. Needs no jax.
"""

import hmac
import itertools
import json
import os
import secrets
import socket
import threading
from typing import Any

from zerojax.errors import ClusterError

SECRET = "ZEROJAX_SECRET"  # the variable that all processes of a job have in common
LONGEST = 2**24  # bytes of a line


class ForgedError(ValueError):
    """A line whose sender does not hold the secret."""


def nonce() -> bytes:
    """Returns a random number in hexadecimal digits."""
    return secrets.token_hex(16).encode()


class Seal:
    """Seals the lines of one side of a connection, and opens those of the other.

    Args:
      server, client: the random number of each side.
      is_server: which side this is.
      secret: None means $ZEROJAX_SECRET; without it, anyone can seal lines.

    >>> ours, theirs = Seal(b"1", b"2", True, "key"), Seal(b"1", b"2", False, "key")
    >>> theirs.opened(ours.sealed({"all": "well"}))
    {'all': 'well'}
    """

    def __init__(self, server: bytes, client: bytes, is_server: bool, secret: str | None = None):
        secret = os.environ.get(SECRET, "") if secret is None else secret
        self._key = _mac(os.fsencode(secret), b"zerojax %b %b" % (server, client)).encode()
        self._sides = (b"server", b"client") if is_server else (b"client", b"server")
        self._numbers = (itertools.count(), itertools.count())

    def sealed(self, value: Any) -> bytes:
        """Returns the line of a JSON value."""
        text = json.dumps(value).encode()
        return self._mac(0, text).encode() + b" " + text + b"\n"

    def opened(self, line: bytes) -> Any:
        """Returns the value of a line.

        Raises:
          ForgedError: the other side did not seal it, or sealed it as another line than the next.
        """
        mac, _, text = line.rstrip(b"\n").partition(b" ")
        if not hmac.compare_digest(mac, self._mac(1, text).encode()):
            raise ForgedError("a line with a wrong digest")
        return json.loads(text)

    def _mac(self, side: int, text: bytes) -> str:
        number = next(self._numbers[side])
        return _mac(self._key, b"%b %d %b" % (self._sides[side], number, text))


def _mac(key: bytes, text: bytes) -> str:
    return hmac.digest(key, text, "sha256").hex()


def check_secret() -> None:
    """Raises `ClusterError` for an empty secret, such as one that was not mounted."""
    if os.environ.get(SECRET) == "":
        raise ClusterError(f"${SECRET} is set, but empty; give all processes of the job the same "
                           "random text, or unset it.")


def _keep(connection: socket.socket) -> None:
    """Sends small lines at once, and keeps an idle connection alive in networks that drop those."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)  # seconds


class Channel:
    """Sealed JSON values over a connection. Any thread may send, and one may receive.

    Args:
      received: bytes that have already been read from the connection.
    """

    def __init__(self, connection: socket.socket, seal: Seal, received: bytes = b""):
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            _keep(connection)
        self.connection = connection
        self._seal = seal
        self._received = received
        self._lock = threading.Lock()

    def send(self, value: Any) -> None:
        """Sends a value.

        Raises:
          OSError: the connection is closed.
        """
        with self._lock:
            self.connection.sendall(self._seal.sealed(value))

    def receive(self) -> list[Any]:
        """Waits for bytes; returns the values that they complete.

        Raises:
          EOFError: the connection is closed, or the other side does not hold the secret.
        """
        try:
            more = self.connection.recv(2**16)
        except OSError:
            more = b""
        self._received += more
        if not more or len(self._received) > LONGEST:
            raise EOFError
        *lines, self._received = self._received.split(b"\n")
        try:
            return [self._seal.opened(line) for line in lines]
        except ForgedError:
            raise EOFError from None

    def close(self) -> None:
        self.connection.close()
