"""Before jax.distributed, whose failures end the process: all processes meet at the coordinator's address, over plain TCP.

Process 0 listens there until all have come, compares what they say of themselves, tells each the verdict, and makes room
for jax's coordinator. Every failure is a Python error that names host and port. Needs no jax.
"""

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from zerojax.errors import ClusterError

_GREETING = b"zerojax rendezvous 1\n"
_LONGEST = 2**24  # bytes of what a process says
_NOTE = 5.0  # seconds until a process that waits says so

Compare = Callable[[dict[int, Any]], str]  # of what each process said, what differs; "" is nothing


def split(address: str) -> tuple[str, int]:
    """
    >>> split("[::1]:80"), split("a:80")
    (('::1', 80), ('a', 80))
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_address(address: str, seconds: float = 0) -> str:
    """Where process 0 listens: at the address that the others are told, and no other; everywhere if a host's name means loopback
    on that host itself, as on Debian.

    >>> bind_address("localhost:80"), bind_address("127.0.0.1:80")
    ('127.0.0.1:80', '127.0.0.1:80')

    Raises:
      ClusterError: no such host, for so many seconds: a cluster's names may come later than its processes.
    """
    host, port = split(address)
    found = _resolved(host, port, time.monotonic() + seconds)
    own_name = ipaddress.ip_address(found).is_loopback and host != "localhost" and host != found
    return joined("0.0.0.0" if own_name else found, port)


def _resolved(host, port, deadline) -> str:
    while True:
        try:
            found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
            return min(found, key=lambda ip: ":" in ip)  # IPv4 first
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"the coordinator's host {host!r} (port {port}) has no address: {error}; write one that every "
                                   "host can resolve, or its IP address.") from None
        time.sleep(0.5)


def hold(bind: str, processes: int, said: Any, compare: Compare, seconds: float) -> None:
    """Process 0: waits for the others, and tells them whether they agree.

    Args:
      bind: "ip:port" to listen at.
      said: JSON values.
      seconds: to wait.

    Raises:
      ClusterError: the port is taken, the address is not of this host; processes did not come, came twice, or differ.
    """
    guests = _Guests(processes, said)
    with _listening(bind, processes) as server:
        trouble = guests.gather(server, bind, time.monotonic() + seconds) or compare(guests.said)
        guests.tell(trouble)
    if trouble:
        raise ClusterError(trouble)


def _listening(bind, processes) -> socket.socket:
    host, port = split(bind)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=processes)
    except OSError as error:
        raise ClusterError(f"process 0 can't listen at {bind}: {error.strerror}; take another port, end what uses it, or, if the "
                           'coordinator\'s address is not one of this host, write initialize(bind_address="0.0.0.0").') from None


class _Guests:
    """Who has come to process 0, and what they said."""

    def __init__(self, processes: int, said: Any):
        self.processes, self.own = processes, said
        self.here: dict[int, tuple[socket.socket, Any]] = {}
        self.sent_off: list[socket.socket] = []
        self.wrong = ""

    @property
    def said(self) -> dict[int, Any]:
        return {0: self.own} | {process: words for process, (_, words) in self.here.items()}

    def gather(self, server, bind, deadline) -> str:
        """What went wrong, or "" when all are there."""
        server.settimeout(0.02)
        while not self.wrong and not self._complete() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                threading.Thread(target=self._receive, args=(connection,), daemon=True).start()
        missing = sorted(set(range(self.processes)) - self.said.keys())
        late = (f"processes {missing[:10]} did not come to {bind} in time: {len(missing)} of {self.processes} are missing; "
                "see their logs.")
        return self.wrong or (late if missing else "")

    def _complete(self) -> bool:
        """Those that have come and ended since do not count: they may come again."""
        if len(self.here) < self.processes - 1:
            return False
        self.here = {process: guest for process, guest in self.here.items() if _alive(guest[0])}
        return len(self.here) == self.processes - 1

    def _receive(self, connection):
        """One guest. Whoever does not speak the language, as a scanner of ports, is sent off."""
        try:
            connection.settimeout(10)
            connection.sendall(_GREETING)
            words = json.loads(_line(connection))
            process, number, said = int(words["process"]), int(words["processes"]), words["said"]
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        if number != self.processes or not 0 < process < number:
            self.wrong = (f"process {process} says that there are {number} processes, process 0 says {self.processes}; start all "
                          "with the same number.")
        elif process in self.here and _alive(self.here[process][0]):
            self.wrong = f"two processes say that they are process {process} of {number}; number them 0 to {number - 1}."
        if self.wrong:
            self.sent_off.append(connection)
        else:
            self.here[process] = connection, said

    def tell(self, trouble: str) -> None:
        connections = [connection for connection, _ in self.here.values()] + self.sent_off
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.settimeout(10)
                connection.sendall(json.dumps({"trouble": trouble}).encode() + b"\n")
        for connection in connections:
            with contextlib.suppress(OSError), connection:  # they close first: the port is then free at once
                connection.settimeout(1)
                connection.recv(1)


def _alive(connection) -> bool:
    """Whether the other end is open: a guest says nothing until it is told."""
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _line(connection) -> bytes:
    got = b""
    while not got.endswith(b"\n") and len(got) < _LONGEST and (more := connection.recv(2**16)):
        got += more
    if not got.endswith(b"\n"):
        raise ValueError("no line")
    return got


def join(address: str, process: int, processes: int, said: Any, connect_timeout: float, seconds: float, note: Callable[[str], None]) -> None:
    """Every other process: comes to `address`, and waits for the verdict.

    Args:
      connect_timeout: seconds until somebody has to listen there.
      seconds: until all have to have come.
      note: is given a line when it takes long.

    Raises:
      ClusterError: nobody listens there, or not zerojax; process 0 left, or says that the processes differ.
    """
    with _reached(address, time.monotonic() + connect_timeout, connect_timeout, note) as connection:
        try:
            connection.sendall(json.dumps({"process": process, "processes": processes, "said": said}).encode() + b"\n")
            connection.settimeout(seconds + _NOTE)  # process 0 is the first to give up: it knows who is missing
            trouble = json.loads(_line(connection))["trouble"]
        except TimeoutError:
            trouble = f"process 0 at {address} waited for other processes for more than {seconds:g} s."
        except (OSError, ValueError):
            trouble = f"process 0 at {address} ended while process {process} waited for the others; its log says why."
    if trouble:
        raise ClusterError(trouble)


def _reached(address, deadline, connect_timeout, note) -> socket.socket:
    noted = time.monotonic() + _NOTE
    while True:
        try:
            return _greeted(address, deadline)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > deadline - 0.1:
            raise ClusterError(
                f"no process 0 at {address} within {connect_timeout:g} s: {why}. Is that its host and port, and open between the hosts? If "
                "it starts later than the others, write initialize(connect_timeout=...), or set $ZEROJAX_CONNECT_TIMEOUT, in seconds.") from None
        if time.monotonic() > noted:
            note(f"nobody at {address} yet ({why}); tries for {deadline - time.monotonic():.0f} s more")
            noted = deadline
        time.sleep(0.1)


def _greeted(address, deadline) -> socket.socket:
    left = max(0.1, deadline - time.monotonic())
    connection = socket.create_connection(split(address), timeout=min(left, 5))
    try:
        if _line(connection) != _GREETING:
            raise ValueError("what listens there is not zerojax's process 0")
    except (OSError, ValueError) as error:
        connection.close()
        raise ValueError("what listens there is not zerojax's process 0, or is about to end") from error
    return connection
