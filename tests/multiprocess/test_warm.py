"""Runs of two processes that are killed, and continue from snapshots in memory.

Each process has a shared memory of its own, as on two hosts.
"""

import re

import pytest
from processes import HERE, Job, launch
from test_ends import digests

TRAINER = HERE / "distributed_trainer.py"
SLOW = pytest.mark.slow


def undisturbed(tmp_path, replica):
    with Job(tmp_path, [TRAINER, tmp_path / "whole", 12], 2,
             env=lambda _: {"REPLICA": replica}) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
    return digests(tmp_path / "whole", 12)


def killed(tmp_path, fault, replica, processes="2", **env):
    """Returns the steps from which the attempts started, and the output of the launcher."""
    (tmp_path / "run").mkdir()
    done = launch("-n", processes, "--devices", 4, "--restarts", 1, TRAINER, tmp_path / "run", 12,
                  env={"FAULT": fault, "HOSTS": tmp_path / "hosts", "REPLICA": replica, **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(step) for step in re.findall(r"\[0\] from (\d+)", done.stdout)], done


@pytest.mark.parametrize("process", [1, pytest.param(0, marks=SLOW)])
def test_a_run_continues_from_memory_at_the_step_before_the_kill(tmp_path, process):
    """The newest step on disk is 5; the end is bit-equal to that of an undisturbed run."""
    starts, done = killed(tmp_path, f"kill {process} 9", 1)
    assert starts[0] == 0 and starts[1] in (7, 8), done.stdout
    assert digests(tmp_path / "run", 12) == undisturbed(tmp_path, 1)
    assert not list((tmp_path / "hosts").glob("*/*"))  # the end frees the memory


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_was_replaced_gets_its_parts_from_the_other_replica(tmp_path, process):
    starts, done = killed(tmp_path, f"lose {process} 9", 2)
    assert starts[0] == 0 and starts[1] in (7, 8), done.stdout
    assert "skipped" not in done.stderr
    assert digests(tmp_path / "run", 12) == undisturbed(tmp_path, 2)


def test_two_checkpointers_with_positions_that_differ_for_a_while(tmp_path):
    """Whether they are equal is known of each snapshot; every process knows what is on disk."""
    with Job(tmp_path, [HERE / "positions.py", tmp_path], 2, devices=1) as job:
        assert job.wait(60) == [0, 0], [p.err[-2000:] for p in job]
        assert all(p.out.endswith("2 False\n3 True\n") for p in job)


@pytest.mark.slow
def test_hosts_in_another_order(tmp_path):
    """What a process has left on a host is of use for another, and is removed in the end."""
    starts, done = killed(tmp_path, "kill 1 9", 2, SWAP=1)
    assert starts[0] == 0 and starts[1] in (7, 8), done.stdout
    assert digests(tmp_path / "run", 12) == undisturbed(tmp_path, 2)
    assert not list((tmp_path / "hosts").glob("*/*"))


@pytest.mark.slow
def test_without_a_replica_the_run_continues_from_disk(tmp_path):
    starts, done = killed(tmp_path, "lose 1 9", 1)
    assert starts == [0, 5]
    assert re.search(r"skipped the snapshot of step [78] in memory: no host has all parts of .*"
                     r"\(the memory of a process is gone\)", done.stderr)
    assert digests(tmp_path / "run", 12) == undisturbed(tmp_path, 1)


@pytest.mark.slow
def test_fewer_processes_continue_from_memory_if_it_has_all_parts(tmp_path):
    """One host remains, and has a whole replica."""
    starts, done = killed(tmp_path, "lose 1 9", 2, processes="2,1")
    assert starts[0] == 0 and starts[1] in (7, 8), done.stdout
