"""The meeting at process 0, in threads of one process: who arrives, who is refused, and the errors.
"""

import concurrent.futures
import contextlib
import errno
import re
import socket
import threading
import time
import types
import weakref

import pytest
from processes import free_port

import zerojax as zj
from zerojax.processes import agreement, fingerprint, rendezvous
from zerojax.processes.sealed import Channel, ForgedError, Seal


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def hold(address, processes, fields=None, seconds=20.0):
    return rendezvous.hold(address, processes, fields, agreement.difference, seconds)


def join(address, process, processes, fields=None, connect_timeout=20.0, note=print):
    return rendezvous.join(address, process, processes, fields, connect_timeout, 20.0, note)


def error_of(future):
    """Returns the text of a ClusterError."""
    with pytest.raises(zj.ClusterError) as caught:
        future.result(30)
    return str(caught.value)


def assert_met(*futures):
    """The first is that of process 0, which has a connection to each of the others."""
    channels, *others = [future.result(30) for future in futures]
    assert len(channels) >= len(others) and all(isinstance(x, Channel) for x in others)
    for channel in (*channels.values(), *others):
        channel.close()


def greeted(address):
    """Returns a connection to process 0, which has greeted."""
    for _ in range(500):
        try:
            connection = socket.create_connection(rendezvous.split(address), timeout=5)
        except OSError:
            time.sleep(0.02)
        else:
            greeting = connection.recv(100)
            assert greeting.startswith(b"zerojax rendezvous 2 ")
            nonces[connection] = greeting.split()[-1]
            return connection
    raise AssertionError(f"nobody at {address}")


nonces = weakref.WeakKeyDictionary()  # of process 0, by connection


def introduce(connection, process, processes, secret=None):
    """Sends the number of a process; returns the connection."""
    seal = seals[connection] = Seal(nonces[connection], b"0" * 32, False, secret)
    words = {"process": process, "processes": processes, "fields": None}
    connection.sendall(b"0" * 32 + b" " + seal.sealed(words))
    return connection


seals = weakref.WeakKeyDictionary()


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "192.0.2.1"])
def test_a_coordinator_that_cannot_be_reached(pool, host):
    """Nobody listens; the name does not exist; there is no answer (a reserved address)."""
    address = f"{host}:{free_port()}"
    started = time.monotonic()
    text = error_of(pool.submit(join, address, 1, 2, connect_timeout=1.5))
    assert time.monotonic() - started < 5
    assert text.startswith(f"no process 0 at {address} within 1.5 s: ")
    assert "initialize(connect_timeout=...)" in text and "$ZEROJAX_CONNECT_TIMEOUT" in text


def test_a_process_that_waits_says_so_once(pool, address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_NOTE", 0.2)
    notes = []
    error_of(pool.submit(join, address, 1, 2, connect_timeout=1.0, note=notes.append))
    (note,) = notes
    assert note.startswith(f"process 1 gets no answer from process 0 at {address} yet (Connection ")
    assert note.endswith("); it retries for 1 s more")


def test_a_port_in_use(pool):
    """Process 0 cannot listen; the other process connects to another program."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        text = error_of(pool.submit(hold, address, 2))
        assert text.startswith(f"process 0 cannot listen at {address}: Address already in use")
        text = error_of(pool.submit(join, address, 1, 2, connect_timeout=1.0))
        assert text.startswith(f"no process 0 at {address} within 1 s: the program that listens "
                               "there is not zerojax's process 0")


def test_an_address_of_another_host(pool):
    """Process 0 gets an address of another host, or a name that does not exist."""
    text = error_of(pool.submit(hold, "192.0.2.1:1234", 2))
    assert text.startswith("process 0 cannot listen at 192.0.2.1:1234: Cannot assign")
    assert 'bind_address="0.0.0.0"' in text
    text = error_of(pool.submit(rendezvous.bind_address, "no-such-host.invalid:1234"))
    assert text.startswith("the coordinator's host 'no-such-host.invalid' (port 1234) has no ")


def test_processes_that_do_not_come(pool, address):
    first = pool.submit(hold, address, 4, seconds=2.0)
    other = pool.submit(join, address, 2, 4)
    assert [error_of(first), error_of(other)] == [
        f"processes [1, 3] did not come to {address} in time: 2 of 4 are missing; see their logs."
    ] * 2


def test_two_processes_of_one_number(pool, address):
    all_three = [pool.submit(hold, address, 3), *(pool.submit(join, address, 1, 3) for _ in "ab")]
    assert {error_of(future) for future in all_three} == {
        "two processes were started as process 1 of 3; number them 0 to 2."}


def test_a_refusal_is_kept_when_others_come_at_once(address):
    with rendezvous._listening(address, 4) as server, rendezvous._Guests(server, 4) as guests:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            both = [threads.submit(greeted, address) for _ in range(2)]
            guests.gathered(address, time.monotonic() + 0.3)
        introduce(both[0].result(), 1, 2)
        introduce(both[1].result(), 2, 4)
        text = guests.gathered(address, time.monotonic() + 0.3)
    assert text.startswith("process 1 was started as one of 2 processes, and process 0 as one of 4")


def test_processes_that_disagree_about_their_number(pool, address):
    both = [pool.submit(hold, address, 2), pool.submit(join, address, 3, 4)]
    assert {error_of(future) for future in both} == {
        "process 3 was started as one of 4 processes, and process 0 as one of 2; start all with "
        "the same number."}


@pytest.mark.parametrize("odd, words", [
    ({"config": {"lr": 0.1, "seed": 7}}, r"  config\.seed: 0 on process 0; 7 on process 1$"),
    ({"versions": fingerprint.versions() | {"jax": "0.9"}},
     r"  versions\.jax: 0\.1\S+ on process 0; 0\.9 on process 1$"),
], ids=["config", "version"])
def test_processes_that_differ(pool, address, odd, words):
    fields = {"versions": fingerprint.versions(), "config": {"lr": 0.1, "seed": 0}}
    first = pool.submit(hold, address, 2, fields)
    other = pool.submit(join, address, 1, 2, fields | odd)
    assert error_of(first) == error_of(other)
    assert re.search(words, error_of(first))


def test_a_process_that_ended_while_it_waited_may_come_again(pool, address):
    first = pool.submit(hold, address, 3)
    introduce(greeted(address), 1, 3).close()
    again = [pool.submit(join, address, process, 3) for process in (1, 2)]
    assert_met(first, *again)


def test_a_process_may_end_after_all_others_have_come(pool, address):
    """Process 0 counts only those that are still there when the last one comes."""
    first = pool.submit(hold, address, 3)
    for _ in range(20):
        introduce(greeted(address), 1, 3).close()
    other = pool.submit(join, address, 2, 3)
    with pytest.raises(concurrent.futures.TimeoutError):
        first.result(1)
    assert_met(first, other, pool.submit(join, address, 1, 3))


def test_a_successor_and_the_end_of_its_predecessor_at_once(address):
    """Process 0 notices both in one look, whatever their order."""
    with rendezvous._listening(address, 3) as server, rendezvous._Guests(server, 3) as guests:
        def missing():
            text = guests.gathered(address, time.monotonic() + 0.3)
            return re.match(r"processes (\[.*\]) did not come", text)[1]

        with concurrent.futures.ThreadPoolExecutor() as threads:
            both = [threads.submit(greeted, address) for _ in range(2)]
            assert missing() == "[1, 2]"
        predecessor, successor = [future.result() for future in both]
        introduce(predecessor, 1, 3)
        assert missing() == "[2]"
        introduce(successor, 1, 3)
        predecessor.close()
        assert missing() == "[2]"


def test_a_process_that_restarts_while_others_come(pool, address):
    """Its successor introduces itself just after it has left, again and again."""
    first = pool.submit(hold, address, 3)
    waits = introduce(greeted(address), 1, 3)
    for _ in range(50):
        successor = greeted(address)
        waits.close()
        waits = introduce(successor, 1, 3)
    other = pool.submit(join, address, 2, 3)
    assert_met(first, other)
    assert seals[waits].opened(waits.recv(1000)) == {"trouble": ""}


def test_process_0_that_ends_while_others_wait(pool):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        other = pool.submit(join, address, 1, 2)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"zerojax rendezvous 2 1234\n")
            nonce, _, line = connection.recv(1000).partition(b" ")
            assert Seal(b"1234", nonce, is_server=True).opened(line)["process"] == 1
    assert error_of(other) == (f"process 0 at {address} ended while process 1 waited for the "
                               "others; see its log for the reason.")


def test_a_stranger_is_refused(pool, address):
    """A port scanner or a browser does not keep the processes from meeting."""
    first = pool.submit(hold, address, 2)
    silent = greeted(address)
    for words in (b"GET / HTTP/1.1\r\n\r\n\n", b"\x00" * 100 + b"\n", b'{"process": "x"}\n',
                  b'{"process": Infinity}\n', b"[" * 10**5 + b"\n"):
        stranger = greeted(address)
        stranger.sendall(words)
        assert stranger.recv(100) == b""
    assert_met(first, pool.submit(join, address, 1, 2))
    assert silent.recv(100) == b""


def test_a_program_with_another_secret_cannot_take_part(pool, address, monkeypatch):
    """It learns why, and process 0 waits for the processes of its job."""
    monkeypatch.setenv("ZEROJAX_SECRET", "ours")
    first = pool.submit(hold, address, 2)
    for secret in ("theirs", ""):
        stranger = introduce(greeted(address), 1, 2, secret)
        with pytest.raises(ForgedError):
            seals[stranger].opened(stranger.recv(1000))
        assert stranger.recv(100) == b""
    assert_met(first, pool.submit(join, address, 1, 2))


def test_processes_with_different_secrets(pool, address, monkeypatch):
    monkeypatch.setenv("ZEROJAX_SECRET", "ours")
    first = pool.submit(hold, address, 2, seconds=1.0)
    introduce(greeted(address), 1, 2, "theirs")
    assert error_of(first).endswith("1 of 2 are missing; see their logs. Connections with another "
                                    "$ZEROJAX_SECRET: 1.")
    first = pool.submit(hold, address, 2, seconds=2.0)
    greeted(address).close()
    monkeypatch.setattr(rendezvous, "Seal", lambda *numbers, is_server, secret=None:
                        Seal(*numbers, is_server=is_server, secret=str(is_server)))
    assert error_of(pool.submit(join, address, 1, 2)) == (
        f"process 0 at {address} and process 1 do not have the same $ZEROJAX_SECRET; give all "
        "processes of a job the same.")
    error_of(first)


def test_a_stranger_that_never_stops_sending_delays_nobody(pool, address):
    first = pool.submit(hold, address, 3)
    stop = threading.Event()

    def flood():
        where = rendezvous.split(address)
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(where, 5) as stranger:
                while not stop.is_set():
                    stranger.sendall(bytes(2**16))

    for _ in range(2):
        pool.submit(flood)
    started = time.monotonic()
    try:
        assert_met(first, *(pool.submit(join, address, process, 3) for process in (1, 2)))
        assert time.monotonic() - started < 10
    finally:
        stop.set()


def test_strangers_that_say_nothing_are_dropped(pool, address, monkeypatch):
    """They would hold file descriptors until the meeting ends."""
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.3)
    first = pool.submit(hold, address, 2)
    stranger = greeted(address)
    stranger.settimeout(5)
    assert stranger.recv(100) == b""
    assert_met(first, pool.submit(join, address, 1, 2))


@pytest.fixture
def limited(address):
    """Process 0 of a job of three, which may open only four files."""
    with rendezvous._listening(address, 20) as server, rendezvous._Guests(server, 3) as guests:
        def accept():
            if len(guests.selector.get_map()) == 4:
                raise OSError(errno.EMFILE, "Too many open files")
            return server.accept()

        guests.server = types.SimpleNamespace(accept=accept)
        yield guests


def test_silent_strangers_do_not_use_up_the_files_of_process_0(pool, address, limited):
    strangers = [socket.create_connection(rendezvous.split(address)) for _ in range(8)]
    others = [pool.submit(join, address, process, 3) for process in (1, 2)]
    assert limited.gathered(address, time.monotonic() + 9) == ""
    limited.tell("")
    for channel in (*limited.kept().values(), *(other.result(9) for other in others)):
        channel.close()
    for stranger in strangers:
        stranger.close()


def test_process_0_may_open_too_few_files(pool, address, limited):
    limited.processes = 5
    others = [pool.submit(join, address, process, 5, connect_timeout=1) for process in (1, 2, 3, 4)]
    text = limited.gathered(address, time.monotonic() + 9)
    assert "may not open more files" in text and "each of 5 processes; raise `ulimit -n`" in text
    limited.tell(text)
    assert text in error_of(next(concurrent.futures.as_completed(others)))


def test_the_port_is_free_after_the_meeting(pool, address):
    """jax's coordinator listens there next."""
    assert_met(pool.submit(hold, address, 2), pool.submit(join, address, 1, 2))
    socket.create_server(rendezvous.split(address)).close()
