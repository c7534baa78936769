"""Lines that only the holders of a secret can make, and connections that carry them."""

import json
import pathlib
import re
import socket

import pytest

from zerojax import processes
from zerojax.processes.sealed import Channel, ForgedError, Seal


def sides(ours="secret", theirs="secret", nonces=(b"1", b"2")):
    return Seal(*nonces, is_server=True, secret=ours), Seal(*nonces, is_server=False, secret=theirs)


def test_lines_are_json_in_order():
    ours, theirs = sides()
    for value in ({"a": [1, None, "line\nbreak"]}, [], "x" * 10**5):
        line = ours.sealed(value)
        assert line.count(b"\n") == 1 and theirs.opened(line) == value
        assert ours.opened(theirs.sealed(value)) == value


def changed(line):
    return line.replace(b"pay 1", b"pay 9")


@pytest.mark.parametrize("forge", [
    lambda ours, theirs: changed(ours.sealed("pay 1")),
    lambda ours, theirs: sides("another")[0].sealed("pay 1"),
    lambda ours, theirs: sides("")[0].sealed("pay 1"),
    lambda ours, theirs: sides(nonces=(b"1", b"3"))[0].sealed("pay 1"),  # of another connection
    lambda ours, theirs: theirs.sealed("pay 1"),  # sent back
    lambda ours, theirs: [ours.sealed("pay 1"), ours.sealed("pay 2")][1],  # the first is missing
    lambda ours, theirs: b"pay 1\n",
    lambda ours, theirs: b"\n",
    lambda ours, theirs: " \N{SNOWMAN}".encode(),
], ids=["changed", "another secret", "no secret", "replayed", "reflected", "left out", "no digest",
        "empty", "not ASCII"])
def test_forged_lines_are_refused(forge):
    ours, theirs = sides()
    with pytest.raises(ForgedError):
        theirs.opened(forge(ours, theirs))


def test_a_line_is_accepted_once():
    ours, theirs = sides()
    line = ours.sealed("pay 1")
    assert theirs.opened(line) == "pay 1"
    with pytest.raises(ForgedError):
        theirs.opened(line)


@pytest.fixture
def channels():
    ends = socket.socketpair()
    both = [Channel(end, seal) for end, seal in zip(ends, sides(), strict=True)]
    yield both
    for channel in both:
        channel.close()


def test_values_arrive_whole_whatever_the_pieces(channels):
    ours, theirs = channels
    values = [{"number": i, "text": "y" * i} for i in range(0, 200_000, 50_000)]
    got = []
    for value in values:
        ours.send(value)
        while len(got) <= values.index(value):
            got += theirs.receive()
    assert got == values
    ours.send(1), ours.send(2)
    assert theirs.receive() == [1, 2]


def test_a_forged_line_and_the_end_are_the_end(channels):
    ours, theirs = channels
    ours.connection.sendall(b"0" * 64 + b' "value"\n')
    with pytest.raises(EOFError):
        theirs.receive()
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()


def test_nothing_is_decoded_before_it_is_checked(channels, monkeypatch):
    ours, theirs = channels
    monkeypatch.setattr(json, "loads", None)
    ours.connection.sendall(b"0" * 64 + b" " + b"[" * 10**5 + b"\n")
    with pytest.raises(EOFError):
        while True:
            theirs.receive()


def test_nothing_that_is_read_is_unpickled():
    """Neither here nor in any other file of the package."""
    root = pathlib.Path(processes.__file__).parent.parent
    unsafe = re.compile(r"import pickle|\bpickle\.|allow_pickle=True|\bmarshal\.|\beval\(|\bexec\(")
    found = {str(p): unsafe.findall(p.read_text()) for p in root.rglob("*.py")}
    assert len(found) > 100 and not {p: words for p, words in found.items() if words}
