"""`initialize` in one process: its time limits, and what it logs."""

import logging

import pytest
from processes import free_port

import zerojax as zj
from zerojax.processes import joining, rendezvous
from zerojax.processes.launchers import Job


@pytest.mark.parametrize("given, variable, scheduled, seconds", [
    (None, None, False, 5), (None, None, True, 300), (None, "60", True, 60), (7, "60", True, 7)])
def test_the_time_to_connect(monkeypatch, given, variable, scheduled, seconds):
    """The argument, else the variable, else short for an address that a person wrote."""
    if variable:
        monkeypatch.setenv("ZEROJAX_CONNECT_TIMEOUT", variable)
    job = Job("a test", "a:1", 2, 1, scheduled=scheduled)
    assert joining._connect_timeout(job, given, 300) == seconds


def test_a_process_that_waits_logs_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "_NOTE", 0.2)
    job = Job("a test", f"127.0.0.1:{free_port()}", 2, 1)
    with pytest.raises(zj.ClusterError, match="no process 0 at"):
        joining._met(job, None, {}, 0.5, 5.0)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("zerojax", logging.WARNING)
    assert record.message.startswith(f"process 1 gets no answer from process 0 at {job.address}")


@pytest.mark.parametrize("process, bind, where", [
    (0, None, "127.0.0.1:80"), (0, "0.0.0.0", "0.0.0.0:80"), (0, "[::]", "[::]:80"),
    (1, "0.0.0.0", None)])
def test_where_process_0_listens(process, bind, where):
    assert joining._bound(Job("a test", "127.0.0.1:80", 2, process), bind, 1.0) == where
