"""A job of several processes, simulated by connections within one process."""

import time

import pytest

import zerojax as zj
from zerojax.processes import hub, monitor
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

    def settle(self, process):
        """Returns when the hub has taken all that a process has sent."""
        self.members[process].meet(self.call(members=(process,)))

    def wait_for_call_of(self, process):
        """Returns when the hub has a call of a process that has made none before."""
        wait_until(lambda: process in self.hub._roll.last)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def error_of(future):
    with pytest.raises(zj.ClusterError) as caught:
        future.result(20)
    return str(caught.value)
