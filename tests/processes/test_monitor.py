"""The calls of several processes, simulated by connections within one process.

tests/multiprocess/test_hangs.py has real ones.
"""

import concurrent.futures
import logging
import os
import re
import threading
import time

import pytest
from jobs import Job, error_of, wait_until

from zerojax.processes import monitor
from zerojax.processes.roll_call import Call


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


SAVE = Call((), "save", "train.py:1", "save")


def interrupted(meet, call=SAVE, then=lambda: None):
    """Calls a function whose wait Ctrl-C ends, after something else."""
    def wait_for(predicate):
        then()
        time.sleep(0.1)
        raise KeyboardInterrupt

    news = meet.__self__._news
    news.wait_for = wait_for
    with pytest.raises(KeyboardInterrupt):
        meet(call)
    del news.wait_for


def test_a_call_that_was_interrupted_is_forgotten(threads, ends):
    job = Job(2)
    interrupted(job.members[0].meet)
    job.settle(0)
    both = [threads.submit(member.meet, job.call()) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_a_call_that_others_have_made_cannot_be_forgotten(threads, ends):
    job = Job(2)
    other = threads.submit(job.members[1].meet, job.call())
    job.wait_for_call_of(1)
    interrupted(job.members[0].meet, then=lambda: wait_until(other.done))
    assert other.result(20) is None
    wait_until(lambda: len(ends) == 2)
    assert ends[0][0] == ("process 0 was interrupted in save at train.py:1, which the others have "
                          "made.")


@pytest.mark.parametrize("members", [(0, 2), (0, 1)])
def test_a_call_is_forgotten_although_another_thread_has_called_since(threads, ends, members):
    job = Job(3)
    first, second = job.call("save", members=(0, 1)), job.call("step", members=members)
    interrupted(job.members[0].meet, first, lambda: job.members[0].report(second, waits=False))
    job.settle(0)
    job.members[members[1]].report(second, waits=False)
    both = [threads.submit(member.meet, first) for member in job.members[:2]]
    assert [future.result(20) for future in both] == [None, None] and not ends


@pytest.fixture
def begun(monkeypatch):
    """A job in which process 1 has begun a call, which takes long, and the call."""
    monkeypatch.setattr(monitor, "_LONG", 0.1)
    job = Job(2, heartbeat=1.0)
    call = job.members[1].begin(job.call("train_step", 7))
    wait_until(lambda: job.hub._roll.begun)
    return job, call


def test_a_call_that_failed_after_a_while_does_not_count(threads, ends, begun):
    """The other process has gone on to another call."""
    job, call = begun
    other = threads.submit(job.members[0].meet, job.call("save"))
    job.members[1].cancel(call)
    time.sleep(1.5)
    assert not job.hub._roll.begun
    job.members[1].meet(job.call("save"))
    assert other.result(20) is None and not ends


def test_a_call_that_takes_long_counts_once_it_is_made(threads, ends, begun):
    job, call = begun
    job.members[0].report(job.call("train_step", 7), waits=False)
    time.sleep(1.5)
    job.members[1].commit(call)
    both = [threads.submit(member.meet, job.call("save")) for member in job.members]
    assert [future.result(20) for future in both] == [None, None] and not ends


def test_a_call_that_is_not_that_of_the_others_for_long_ends_all(ends, begun):
    """It may wait for a call that the others do not make."""
    job, _ = begun
    job.members[0].report(job.call("eval_step", 9), waits=False)
    wait_until(lambda: len(ends) == 2)
    assert ("eval_step at train.py:9 on process 0; train_step at train.py:7 on process 1"
            in ends[0][0])


def test_a_call_that_waits_for_a_process_that_has_ended_ends_all(ends, begun):
    job, _ = begun
    job.members[0].leave(["left"])
    wait_until(lambda: len(ends) == 2)
    assert ends[0][0].startswith("process 0 ended, but process 1 called train_step at train.py:7")


def test_a_process_that_does_not_make_a_call_that_has_begun_is_late(ends, begun, caplog):
    with caplog.at_level(logging.WARNING, "zerojax"):
        wait_until(lambda: len(caplog.messages) == 2)
    assert caplog.messages[0].startswith(
        "process 1 called train_step at train.py:7, more than 1 s ago, and process 0 did not")


def test_groups_that_wait_for_each_other_are_ended(threads, ends):
    """No round can become complete, and nobody is late alone."""
    job = Job(3, heartbeat=0.3)
    waits = [threads.submit(job.members[1].meet, job.call("restore", 2, members=(0, 1)))]
    waits += [threads.submit(job.members[n].meet, job.call("save")) for n in (0, 2)]
    assert {error_of(wait) for wait in waits} == {
        "the processes wait for each other: processes 0, 2 called save at train.py:1; process 1 "
        "called restore at train.py:2, more than 0.3 s ago. All of them must make the same calls "
        "in the same order; move calls out of branches that depend on jax.process_index()."}
    wait_until(lambda: len(ends) == 3)


def test_groups_are_independent(threads, ends):
    job = Job(4)
    early = [threads.submit(job.members[process].meet, job.call("restore", members=(2, 3)))
             for process in (2, 3)]
    assert [future.result(20) for future in early] == [None, None]
    late = threads.submit(job.members[0].meet, job.call(members=(0, 1)))
    job.members[1].meet(job.call(members=(0, 1)))
    assert late.result(20) is None and not ends


def test_a_late_process_is_named_once(threads, ends, caplog):
    job = Job(heartbeat=1.0)
    other = threads.submit(job.members[1].meet, job.call("train_step", 7))
    with caplog.at_level(logging.WARNING, "zerojax"):
        early = threads.submit(job.members[0].meet, job.call("train_step", 7))
        wait_until(lambda: len(caplog.records) == 3)
        time.sleep(1.2)
    assert {record.message for record in caplog.records} == {
        "processes 0-1 called train_step at train.py:7, more than 1 s ago, and process 2 did "
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


def test_a_process_whose_call_was_interrupted_is_late_in_the_next(threads, ends, caplog):
    job = Job(2, heartbeat=0.1)
    with caplog.at_level(logging.WARNING, "zerojax"):
        interrupted(job.members[0].meet, then=lambda: wait_until(lambda: len(caplog.records) == 2))
        job.settle(0)
        other = threads.submit(job.members[1].meet, job.call())
        wait_until(lambda: len(caplog.records) == 4)
    assert caplog.messages[-1].startswith("process 1 called save at train.py:1")
    assert "and process 0 did not" in caplog.messages[-1]
    job.members[0].meet(job.call())
    assert other.result(20) is None and not ends


def test_a_handler_that_fails_stops_no_thread(threads, ends, monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(monitor._LOG, "warning", fail)
    job = Job(2, heartbeat=0.1)
    waits = threads.submit(job.members[0].meet, job.call())
    time.sleep(1)
    job.members[1].meet(job.call())
    assert waits.result(20) is None and not ends


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
