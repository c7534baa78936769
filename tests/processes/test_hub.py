"""Processes that end, fail or are silent, and barriers, simulated within one process."""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
import socket
import threading
import time

import pytest
from jobs import Job, error_of, wait_until

from zerojax.processes import monitor


def test_a_hub_that_fails_ends_all(ends, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    job = Job(2)
    for member in job.members:
        member._may_close = True  # the hub's connections close
    monkeypatch.setattr(job.hub, "_look", lambda *_: [][0])
    wait_until(lambda: len(ends) == 2)
    assert ends[0][0] == "the hub of process 0 failed: IndexError('list index out of range')"


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
    job.wait_for_call_of(1)
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


@pytest.mark.parametrize("wait", ["meet", "barrier"])
def test_a_process_that_calls_again_after_its_end_is_back(threads, ends, wait):
    """A function of `atexit` may close a checkpointer; no second end is reported."""
    job = Job(2)
    arguments = [job.call()] if wait == "meet" else ["snapshot 1", ""]
    for member in job.members:
        member.leave(["left"])
    both = [threads.submit(getattr(member, wait), *arguments) for member in job.members]
    assert [future.result(20) for future in both] == [None, None]
    time.sleep(1)
    job.members[1].channel.connection.shutdown(socket.SHUT_RDWR)
    time.sleep(0.5)
    assert not ends


def test_an_error_after_the_end_is_reported(ends):
    job = Job(2)
    job.members[1].leave(["left"])
    job.members[1].leave(["failed", "an error of atexit"])
    wait_until(lambda: ends)
    assert ends[0][0] == "process 1 failed: an error of atexit"


def test_the_watchdog_does_not_blame_a_process_at_a_barrier(threads, ends, caplog):
    job = Job(2, heartbeat=0.3, watchdog=1.5)
    with caplog.at_level(logging.WARNING, "zerojax"):
        for member in job.members:
            member.report(job.call("train_step", 7), waits=False)
        waits = threads.submit(job.members[0].barrier, "snapshot 3", "")
        assert error_of(waits).startswith("process 1 made no call of zerojax for more than 1.5 s.")
        wait_until(lambda: len(caplog.messages) == 2)
    assert caplog.messages == 2 * [
        "process 0 came to snapshot 3 more than 0.3 s ago, and process 1 did not, although all "
        "must."]


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


def test_process_0_waits_after_an_error_for_the_end_of_the_others(threads, ends):
    """Its own end would abort them, without the reason."""
    job = Job(2)
    leaves = threads.submit(job.members[0].leave, ["failed", "an error"])
    wait_until(lambda: ends == [("process 0 failed: an error", False, 5.0)])
    assert not leaves.done()
    job.members[1].channel.connection.shutdown(socket.SHUT_RDWR)
    leaves.result(10)


def _files_of(process):
    files = set()
    for link in pathlib.Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            files.add(os.readlink(link))
    return files


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
    own = {f"socket:[{os.fstat(channel.connection.fileno()).st_ino}]"
           for channel in job.hub.channels.values()}
    try:
        wait_until(lambda: not own & _files_of(child))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
