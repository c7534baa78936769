"""The meeting of all processes at the coordinator's address, over plain TCP, before jax starts.

jax.distributed aborts a process that it cannot start; here, every failure is a Python error that
names host and port. Process 0 listens until all have arrived, compares their fields, and sends each
the verdict. Then it leaves the port to jax's coordinator. The connections stay open, for `monitor`.
All that is sent is sealed with the job's secret. Needs no jax.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from zerojax.errors import ClusterError
from zerojax.processes import sealed
from zerojax.processes.sealed import Channel, ForgedError, Seal

_GREETING = b"zerojax rendezvous 2 "  # and a random number
_NOTE = 5.0  # seconds until a process that waits says so
_TICK = 0.1  # seconds between looks at the clock
_PATIENCE = 10.0  # seconds until a connection must have named its process
_MOMENT = 1.0  # the same, if no more files can be opened
_PAUSE = 0.01  # seconds until the next attempt to open one

Compare = Callable[[dict[int, Any]], str]  # the difference between the fields of processes, or ""


def split(address: str) -> tuple[str, int]:
    """Returns the host and the port of an address.

    >>> split("[::1]:80"), split("a:80")
    (('::1', 80), ('a', 80))
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def joined(host: str, port: int) -> str:
    """Returns an address, the inverse of `split`.

    >>> joined("::1", 80), joined("a", 80)
    ('[::1]:80', 'a:80')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_address(address: str, seconds: float = 0) -> str:
    """Returns where process 0 listens: at the address that the other processes use, and no other.

    If the name of a host means loopback on that host, as on Debian, process 0 listens on every
    interface.

    Args:
      address: "host:port" of process 0.
      seconds: how long to retry. The names of a cluster may become known after its processes start.

    Raises:
      ClusterError: the host has no address.

    >>> bind_address("localhost:80"), bind_address("127.0.0.1:80")
    ('127.0.0.1:80', '127.0.0.1:80')
    """
    host, port = split(address)
    found = _resolved(host, port, time.monotonic() + seconds)
    own_name = ipaddress.ip_address(found).is_loopback and host not in ("localhost", found)
    return joined("0.0.0.0" if own_name else found, port)


def _resolved(host: str, port: int, deadline: float) -> str:
    while True:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return min((str(info[4][0]) for info in infos), key=lambda ip: ":" in ip)  # IPv4 first
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the coordinator's host {host!r} (port {port}) has no address: {error}; "
                    "write a name that every host can resolve, or its IP address.") from None
        time.sleep(0.5)


def hold(bind: str, processes: int, fields: Any, compare: Compare,
         seconds: float) -> dict[int, Channel]:
    """Waits in process 0 for all other processes, and sends them the verdict.

    Returns the connection to each.

    Args:
      bind: "ip:port" to listen at.
      processes: the number of processes.
      fields: JSON values of process 0.
      compare: finds the difference between the fields of all processes.
      seconds: the time limit.

    Raises:
      ClusterError: the port is in use, or the address is not one of this host; processes did not
        come, came twice, or differ.
    """
    with _listening(bind, processes) as server, _Guests(server, processes) as guests:
        trouble = guests.gathered(bind, time.monotonic() + seconds)
        trouble = trouble or compare({0: fields} | guests.fields)
        guests.tell(trouble)
        if trouble:
            raise ClusterError(trouble)
        return guests.kept()


def _listening(bind: str, processes: int) -> socket.socket:
    host, port = split(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=processes)
    except OSError as error:
        raise ClusterError(
            f"process 0 cannot listen at {bind}: {error.strerror}; choose another port, end the "
            "program that uses it, or, if the coordinator's address is not one of this host, write "
            'initialize(bind_address="0.0.0.0").') from None


@dataclasses.dataclass(eq=False)
class _Guest:
    """A connection to process 0, and the process at its other end, once it is known."""

    connection: socket.socket
    nonce: bytes = dataclasses.field(default_factory=sealed.nonce)
    received: bytes = b""
    process: int | None = None
    seal: Any = None
    fields: Any = None
    since: float = dataclasses.field(default_factory=time.monotonic)


class _Guests(contextlib.AbstractContextManager):
    """The processes that have come to process 0. One thread serves all connections."""

    def __init__(self, server: socket.socket, processes: int):
        server.setblocking(False)
        self.server = server
        self.processes = processes
        self.here: dict[int, _Guest] = {}
        self.refused: list[_Guest] = []
        self.trouble = ""
        self.strangers = 0  # connections whose other end does not hold the secret
        self.selector = selectors.DefaultSelector()
        self.selector.register(server, selectors.EVENT_READ)

    @property
    def fields(self) -> dict[int, Any]:
        """The fields of the processes that are here."""
        return {process: guest.fields for process, guest in self.here.items()}

    def gathered(self, bind: str, deadline: float) -> str:
        """Waits until all are here; returns the reason if that fails, or ""."""
        looks = 0  # since the last one came
        while not self.trouble and looks < 2 and time.monotonic() < deadline:
            ready = self.selector.select(0 if looks else _TICK)
            self._serve([key.data for key, _ in ready])
            self._drop_silent(_PATIENCE)
            # the second look finds out whether one has left in the meantime
            looks = looks + 1 if len(self.here) == self.processes - 1 else 0
        missing = sorted(set(range(1, self.processes)) - self.here.keys())
        late = (f"processes {missing[:10]} did not come to {bind} in time: {len(missing)} of "
                f"{self.processes} are missing; see their logs.")
        if self.strangers:
            late += f" Connections with another ${sealed.SECRET}: {self.strangers}."
        return self.trouble or (late if missing else "")

    def _serve(self, ready: list[_Guest | None]) -> None:
        """Serves known processes first, because they may leave, and the server (None) last."""
        for guest in sorted(ready, key=lambda g: (g is None, g is None or g.process is None)):
            if guest is None:
                self._accept()
            else:
                self._receive(guest)

    def _unknown(self) -> list[_Guest]:
        """Returns the connections that have named no process, which use up file descriptors."""
        guests = [key.data for key in self.selector.get_map().values() if key.data]
        return [guest for guest in guests if guest.process is None]

    def _drop_silent(self, patience: float) -> None:
        """Drops connections that have named no process for so many seconds."""
        oldest = time.monotonic() - patience
        for guest in self._unknown() if not self.trouble else ():
            if guest.since < oldest:
                self._drop(guest)

    def _accept(self) -> None:
        try:
            connection, _ = self.server.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room(error)
            return
        with contextlib.suppress(OSError):  # it has left already
            connection.setblocking(False)
            guest = _Guest(connection)
            self.selector.register(connection, selectors.EVENT_READ, guest)
            connection.sendall(_GREETING + guest.nonce + b"\n")

    def _make_room(self, error: OSError) -> None:
        """Drops connections that have named no process for a moment, to accept others."""
        if self._unknown():
            self._drop_silent(_MOMENT)
            time.sleep(_PAUSE)  # a process that has come may be about to name itself
        else:
            self.trouble = (f"process 0 may not open more files ({error.strerror}), and needs one "
                            f"for each of {self.processes} processes; raise `ulimit -n`.")

    def _receive(self, guest: _Guest) -> None:
        """Takes what has arrived over a connection; drops it when it is closed at the other end."""
        try:
            more = guest.connection.recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        guest.received += more
        if not more or len(guest.received) > sealed.LONGEST:
            self._drop(guest)
        elif guest.process is None and guest.received.endswith(b"\n"):
            self._meet(guest)

    def _drop(self, guest: _Guest) -> None:
        """Forgets a connection. If it was that of a process, the process may come again."""
        self.selector.unregister(guest.connection)
        guest.connection.close()
        if guest.process is not None:
            self.here.pop(guest.process, None)

    def _meet(self, guest: _Guest) -> None:
        """Finds out who a guest is. Drops a program that is no process, such as a port scanner."""
        nonce, _, line = guest.received.partition(b" ")
        guest.seal = Seal(guest.nonce, nonce, is_server=True)
        try:
            words = guest.seal.opened(line)
            process, number = int(words["process"]), int(words["processes"])
            guest.fields = words["fields"]
        except ForgedError:
            if len(nonce) == len(guest.nonce):
                self.strangers += 1
                self._send(guest, "")  # which the other side cannot open
            self._drop(guest)
            return
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self._drop(guest)
            return
        refusal = self._refusal(process, number)
        if refusal:
            self.trouble = refusal
            self.refused.append(guest)
        else:
            guest.process = process
            self.here[process] = guest

    def _refusal(self, process: int, number: int) -> str:
        """Returns why a process with this number cannot take part, or ""."""
        if number != self.processes or not 0 < process < number:
            return (f"process {process} was started as one of {number} processes, and process 0 as "
                    f"one of {self.processes}; start all with the same number.")
        if process in self.here:
            return (f"two processes were started as process {process} of {number}; number them "
                    f"0 to {number - 1}.")
        return ""

    def tell(self, trouble: str) -> None:
        """Sends the verdict, "" for none, to every process."""
        guests = [*self.here.values(), *self.refused]
        for guest in guests:
            self._send(guest, trouble)
        for guest in guests if trouble else ():
            with contextlib.suppress(OSError):  # the guest closes first: the port is free at once
                guest.connection.settimeout(1)
                guest.connection.recv(1)

    def _send(self, guest: _Guest, trouble: str) -> None:
        with contextlib.suppress(OSError):
            guest.connection.settimeout(10)
            guest.connection.sendall(guest.seal.sealed({"trouble": trouble}))

    def kept(self) -> dict[int, Channel]:
        """Returns the connection to each process, which then outlives this object."""
        for guest in self.here.values():
            self.selector.unregister(guest.connection)
        return {process: Channel(guest.connection, guest.seal)
                for process, guest in sorted(self.here.items())}

    def __exit__(self, *_) -> None:
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # pyright: ignore
        self.selector.close()


def join(address: str, process: int, processes: int, fields: Any, connect_timeout: float,
         seconds: float, note: Callable[[str], None]) -> Channel:
    """Connects a process other than 0 to process 0, and waits for the verdict.

    Args:
      address: "host:port" of process 0.
      process: the index of this process.
      processes: the number of processes.
      fields: JSON values, which process 0 compares.
      connect_timeout: seconds within which process 0 must listen.
      seconds: seconds within which all processes must arrive.
      note: takes a line of text if the connection takes a long time.

    Returns:
      The connection.

    Raises:
      ClusterError: process 0 does not listen, has left, has another secret, or reports a
        difference; another program listens.
    """
    words = {"process": process, "processes": processes, "fields": fields}
    connection, server = _reached(address, process, connect_timeout, note)
    own = sealed.nonce()
    seal = Seal(server, own, is_server=False)
    try:
        connection.sendall(own + b" " + seal.sealed(words))
        connection.settimeout(seconds + _NOTE)  # process 0 is first: it knows who is missing
        line, rest = _line(connection)
        trouble = seal.opened(line)["trouble"]
    except TimeoutError:
        trouble = f"process 0 at {address} waited for the others for more than {seconds:g} s."
    except ForgedError:
        trouble = (f"process 0 at {address} and process {process} do not have the same "
                   f"${sealed.SECRET}; give all processes of a job the same.")
    except (OSError, ValueError):
        trouble = (f"process 0 at {address} ended while process {process} waited for the "
                   "others; see its log for the reason.")
    if trouble:
        connection.close()
        raise ClusterError(trouble)
    return Channel(connection, seal, rest)


def _reached(address: str, process: int, connect_timeout: float,
             note: Callable[[str], None]) -> tuple[socket.socket, bytes]:
    """Returns a connection to process 0, and the random number with which it has greeted."""
    start = time.monotonic()
    deadline = start + connect_timeout
    noted = False
    while True:
        try:
            return _greeted(address, deadline)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        now = time.monotonic()
        if now > deadline - 0.1:
            raise ClusterError(
                f"no process 0 at {address} within {connect_timeout:g} s: {why}. Is that its host "
                "and port, and is the port open between the hosts? If process 0 starts later than "
                "the others, write initialize(connect_timeout=...), or set "
                "$ZEROJAX_CONNECT_TIMEOUT, in seconds.") from None
        if not noted and now > start + _NOTE:
            note(f"process {process} gets no answer from process 0 at {address} yet ({why}); "
                 f"it retries for {deadline - now:.0f} s more")
            noted = True
        time.sleep(0.1)


def _greeted(address: str, deadline: float) -> tuple[socket.socket, bytes]:
    left = max(0.1, deadline - time.monotonic())
    connection = socket.create_connection(split(address), timeout=min(left, 5))
    greeting = b""
    with contextlib.suppress(OSError, ValueError):
        greeting, _ = _line(connection)
    if not greeting.startswith(_GREETING):
        connection.close()
        raise ValueError("the program that listens there is not zerojax's process 0, "
                         "or is about to end")
    return connection, greeting.removeprefix(_GREETING)


def _line(connection: socket.socket) -> tuple[bytes, bytes]:
    """Returns the first line, and the bytes after it that have arrived too."""
    received = b""
    while b"\n" not in received:
        more = connection.recv(2**16)
        received += more
        if not more or len(received) > sealed.LONGEST:
            raise ValueError(f"no end of a line in {len(received)} bytes")
    line, _, rest = received.partition(b"\n")
    return line, rest
