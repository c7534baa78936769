"""The calls of several processes, simulated by connections within one process.

tests/multiprocess/test_hangs.py has real ones.
"""

import concurrent.futures
import logging
import os
import re
import socket
import time

import pytest

import zerojax as zj
from zerojax.processes import ending, hub, monitor
from zerojax.processes.roll_call import Call


class Job:
    """A hub, and one member per process."""

    def __init__(self, processes=3, heartbeat=100, watchdog=None):
        pairs = [monitor._pair() for _ in range(processes)]
        self.hub = hub.Hub({i: theirs for i, (_, theirs) in enumerate(pairs)}, heartbeat, watchdog)
        self.hub.start()
        self.members = [monitor.Member(ours, grace=5.0) for ours, _ in pairs]
        self.all = tuple(range(processes))

    def call(self, name="save", line=1, members=(), key=""):
        return Call(members, name, f"train.py:{line}", key or name)


@pytest.fixture
def ends(monkeypatch):
    """The arguments with which processes were ended."""
    seen = []
    monkeypatch.setattr(ending, "soon", lambda *arguments: seen.append(arguments))
    return seen


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def error_of(future):
    with pytest.raises(zj.ClusterError) as caught:
        future.result(20)
    return str(caught.value)


def test_a_call_returns_when_all_have_made_it(threads, ends):
    job = Job()
    for number in range(5):
        early = [threads.submit(member.meet, job.call(line=number)) for member in job.members[:2]]
        done, _ = concurrent.futures.wait(early, 0.05)
        assert not done
        job.members[2].meet(job.call(line=number))
        assert [future.result(20) for future in early] == [None, None]
    assert not ends


def test_calls_are_compared_in_order_whether_or_not_a_process_waits(threads, ends):
    job = Job(2)
    for member in job.members:
        for _ in range(1000):
            member.report(job.call("train_step"), waits=False)
    both = [threads.submit(member.meet, job.call("save")) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_processes_that_wait_in_different_calls_raise_and_go_on(threads, ends):
    job = Job(2)
    both = [threads.submit(member.meet, job.call(name, line))
            for member, name, line in zip(job.members, ("save", "restore"), (4, 9), strict=True)]
    assert {error_of(future) for future in both} == {
        "the processes are at different calls: save at train.py:4 on process 0; restore at "
        "train.py:9 on process 1. All of them must make the same calls in the same order; move "
        "calls out of branches that depend on jax.process_index()."}
    both = [threads.submit(member.meet, job.call()) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_a_process_that_does_not_wait_is_ended(threads, ends):
    job = Job()
    waits = threads.submit(job.members[0].meet, job.call("save"))
    for member in job.members[1:]:
        member.report(job.call("train_step", 7), waits=False)
    text = error_of(waits)
    assert ("save at train.py:1 (the first) on process 0; train_step at train.py:7 on processes 1-2"
            in text)
    wait_until(lambda: len(ends) == 3)
    assert set(ends) == {(text, False, 5.0)}


def test_the_same_call_on_another_line_is_the_same_call(threads, ends):
    """Process 0 has a loop of its own, with a progress bar."""
    job = Job(2)
    both = [threads.submit(member.meet, job.call(line=n)) for n, member in enumerate(job.members)]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_two_functions_are_different_calls_although_they_have_one_name(ends):
    """Such as two functions of `zero.jit`, one of which process 0 calls alone."""
    job = Job(2)
    for process, key in ((0, "digest of norm"), (1, "digest of double")):
        job.members[process].report(job.call("Jitted", 5 + process, key=key), waits=False)
    wait_until(lambda: len(ends) == 2)
    assert "Jitted at train.py:5 on process 0; Jitted at train.py:6 on process 1" in ends[0][0]


def test_a_first_call_is_not_a_later_call(threads, ends):
    """A step that was made again compiles again, and its processes exchange more."""
    job = Job(2)
    first = threads.submit(job.members[0].meet, job.call("EvalStep"))
    job.members[1].report(job.call("EvalStep"), waits=False)
    assert "EvalStep at train.py:1 (the first) on process 0" in error_of(first)
    wait_until(lambda: len(ends) == 2)


def interrupted(meet):
    """Calls a function whose wait Ctrl-C ends."""
    def wait_for(predicate):
        time.sleep(0.1)
        raise KeyboardInterrupt

    news = meet.__self__._news
    news.wait_for = wait_for
    with pytest.raises(KeyboardInterrupt):
        meet(Call((), "save", "train.py:1", "save"))
    del news.wait_for


def test_a_call_that_was_interrupted_is_forgotten(threads, ends):
    job = Job(2)
    interrupted(job.members[0].meet)
    both = [threads.submit(member.meet, job.call()) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_a_call_that_others_have_made_cannot_be_forgotten(threads, ends):
    job = Job(2)
    other = threads.submit(job.members[1].meet, job.call())
    interrupted(job.members[0].meet)
    assert other.result(20) is None
    wait_until(lambda: len(ends) == 2)
    assert ends[0][0] == ("process 0 was interrupted in save at train.py:1, which the others have "
                          "made.")


def test_groups_are_independent(threads, ends):
    job = Job(4)
    early = [threads.submit(job.members[process].meet, job.call("restore", members=(2, 3)))
             for process in (2, 3)]
    assert [future.result(20) for future in early] == [None, None]
    late = threads.submit(job.members[0].meet, job.call(members=(0, 1)))
    job.members[1].meet(job.call(members=(0, 1)))
    assert late.result(20) is None and not ends


def test_a_late_process_is_named_once(threads, ends, caplog):
    job = Job(heartbeat=0.2)
    other = threads.submit(job.members[1].meet, job.call("train_step", 7))
    with caplog.at_level(logging.WARNING, "zerojax"):
        early = threads.submit(job.members[0].meet, job.call("train_step", 7))
        wait_until(lambda: len(caplog.records) == 3)
        time.sleep(1.2)
    assert {record.message for record in caplog.records} == {
        "processes 0-1 called train_step at train.py:7, more than 0.2 s ago, and process 2 did "
        "not, although all must. Last calls: none on process 2."}
    assert len(caplog.records) == 3
    for line in (7, 8):  # it is reported once in each round
        job.members[2].meet(job.call("train_step", line))
        assert early.result(20) is other.result(20) is None and not ends
        if line == 7:
            early, other = (threads.submit(member.meet, job.call("train_step", 8))
                            for member in job.members[:2])
            with caplog.at_level(logging.WARNING, "zerojax"):
                wait_until(lambda: len(caplog.records) == 6)


@pytest.mark.parametrize("first", ["the end", "the call"])
def test_a_call_of_a_process_that_has_ended_ends_all(threads, ends, first):
    """Each order: process 1 ends before process 0 makes its next call, or after."""
    job = Job(2)
    for member in job.members:
        member.report(job.call("train_step", 7), waits=False)
    if first == "the end":
        job.members[1].leave(["left"])
    waits = threads.submit(job.members[0].meet, job.call("save", 9))
    if first == "the call":
        job.members[1].leave(["left"])
    assert error_of(waits) == (
        "process 1 ended, but process 0 called save at train.py:9, a call that processes 0-1 must "
        "make together. Last calls: train_step at train.py:7 on process 1.")
    wait_until(lambda: len(ends) == 2)


def test_processes_that_end_after_the_same_calls_are_left_alone(ends):
    job = Job(2)
    for member in job.members:
        member.report(job.call(), waits=False)
        member.leave(["left"])
        member.channel.connection.shutdown(2)
    wait_until(lambda: not job.hub.is_alive())
    assert not ends


@pytest.mark.parametrize("process", [0, 2])
def test_an_error_is_reported_to_the_others(threads, ends, process):
    job = Job()
    waits = threads.submit(job.members[1].meet, job.call())
    job.members[process].leave(["failed", "ValueError: no such file"])
    assert error_of(waits) == f"process {process} failed: ValueError: no such file"
    wait_until(lambda: len(ends) == 2)


def test_a_process_that_is_killed_ends_the_others(threads, ends):
    job = Job()
    job.members[1].report(job.call("train_step", 7), waits=False)
    waits = threads.submit(job.members[2].barrier, "snapshot 3", "")
    time.sleep(0.1)
    job.members[1].channel.connection.shutdown(2)
    text = ("process 1 was killed, aborted or disconnected. Last calls: train_step at train.py:7 "
            "on process 1.")
    assert error_of(waits) == text
    assert error_of(threads.submit(job.members[0].meet, job.call())) == text


def test_the_watchdog_ends_all_with_their_stacks(threads, ends):
    """It blames neither those that wait for others, nor those that have ended."""
    job = Job(3, watchdog=0.3)
    time.sleep(0.8)
    assert not ends  # it begins with the first call
    job.members[2].leave(["left"])
    waits = threads.submit(job.members[1].meet, job.call("save", 7, members=(0, 1)))
    text = ("process 0 made no call of zerojax for more than 0.3 s. Last calls: none on processes "
            "0, 2; save at train.py:7 on process 1. The watchdog ends the job.")
    assert error_of(waits) == text
    wait_until(lambda: len(ends) == 3)
    assert set(ends) == {(text, True, 5.0)}


def test_a_barrier_compares_values(threads, ends):
    job = Job(2)
    both = [threads.submit(member.barrier, "snapshot 3", f"step {number}")
            for number, member in enumerate(job.members, 7)]
    assert {error_of(future) for future in both} == {
        "the processes differ at snapshot 3: step 7 on process 0; step 8 on process 1."}
    assert not ends


def test_a_barrier_that_a_process_has_left_ends_all(threads, ends):
    job = Job(2)
    waits = threads.submit(job.members[0].barrier, "snapshot 3", "")
    job.members[1].leave(["left"])
    assert error_of(waits) == ("process 1 ended before snapshot 3, which all must make.")
    wait_until(lambda: len(ends) == 2)


def test_a_process_that_calls_again_after_its_end_is_back(threads, ends):
    """A function of `atexit` may close a checkpointer."""
    job = Job(2)
    for member in job.members:
        member.leave(["left"])
    both = [threads.submit(member.meet, job.call()) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_process_0_may_end_first(ends):
    """After `jax.distributed.shutdown()`, the others may go on alone."""
    job = Job(2)
    job.members[0].leave(["left"])
    wait_until(lambda: job.members[1]._may_close)
    for channel in list(job.hub.channels.values()):
        channel.connection.shutdown(2)
    time.sleep(0.3)
    assert not ends


def test_threads_meet_at_barriers_of_different_names(threads, ends):
    job = Job()
    names = ["snapshot 1", "snapshot 2"]
    waits = [threads.submit(member.barrier, name, "")
             for member in job.members[:2] for name in names]
    done, _ = concurrent.futures.wait(waits, 0.05)
    assert not done
    for name in reversed(names):
        job.members[2].barrier(name, "")
    assert [future.result(20) for future in waits] == [None] * 4
    again = [threads.submit(member.barrier, names[0], "") for member in job.members]
    assert [future.result(20) for future in again] == [None] * 3 and not ends


def test_a_process_that_sends_nonsense_is_lost(ends):
    job = Job(2)
    job.members[1].channel.send([["call", 7, False]])
    wait_until(lambda: len(ends) == 2)
    assert {text for text, *_ in ends} == {
        "process 1 was killed, aborted or disconnected. Last calls: none on process 1.",
        "process 0 was killed, aborted or disconnected."}  # what process 1 sees


def test_the_call_is_that_of_the_users_line():
    """Not a frame of zerojax, nor one of the libraries through which the user's loop goes."""
    seen = []

    class Reports:
        def report(self, call, waits):
            seen.append(call)

    before, monitor._member = monitor._member, Reports()
    try:
        exchanges = {"__name__": "zerojax.data.made_up", "monitor": monitor}
        exec("def outer(*_):\n    inner()\n    return ''\n\n"
             "def inner():\n    monitor.called((0, 1), '')", exchanges)
        re.sub("a", exchanges["outer"], "a")
    finally:
        monitor._member = before
    (call,) = seen
    assert (call.name, call.key) == ("outer", "inner")
    assert call.place.startswith(f"{os.path.basename(__file__)}:")


def test_a_process_that_is_alone_reports_nothing():
    assert monitor._member is None
    monitor.called((0,), ""), monitor.meet((0,)), monitor.barrier("a", ""), monitor.left()
    monitor.failed("nothing")


def test_process_0_waits_after_an_error_for_the_end_of_the_others(threads, ends):
    """Its own end would abort them, without the reason."""
    job = Job(2)
    leaves = threads.submit(job.members[0].leave, ["failed", "an error"])
    wait_until(lambda: ends == [("process 0 failed: an error", False, 5.0)])
    assert not leaves.done()
    job.members[1].channel.connection.shutdown(socket.SHUT_RDWR)
    leaves.result(10)


def test_a_forked_child_keeps_no_connection(ends):
    """The death of its parent would be noticed only when the child ends."""
    job = Job(2)
    before, monitor._member = monitor._member, job.members[0]
    child = os.fork()
    if child == 0:
        monitor._forget([job.hub.forget])
        time.sleep(30)
        os._exit(0)
    monitor._member = before
    time.sleep(0.5)
    fds = os.listdir(f"/proc/{child}/fd")
    held = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in fds]
    own = {os.fstat(c.connection.fileno()).st_ino for c in job.hub.channels.values()}
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not any(f"socket:[{number}]" in held for number in own)
