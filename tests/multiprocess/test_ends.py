"""Processes that die, stop, raise or are told to end (faults 2, 14, 15, 17, 21), and runs that go on after them."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from distributed_trainer import HEARTBEAT
from processes import HERE, Job, environment, launch

import zerojax as zj
from zerojax.checkpoint import reading

TRAINER = HERE / "distributed_trainer.py"
SOON = HEARTBEAT + 5  # seconds


def notes(directory):
    """What each step there says of itself, after its arrays were compared with their digests."""
    return {step: reading.verify(reading.step_path(directory, step)) for step in reading.steps(directory)}


def digests(directory, step):
    return {path: entry.digest for path, entry in notes(directory)[step].leaves.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a run of two processes that nobody disturbs: 12 steps."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    with Job(tmp_path, [TRAINER, tmp_path / "run", 12], 2) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        assert [p.out.splitlines()[-1] for p in job] == ["done 12"] * 2
    return tmp_path / "run"


@pytest.mark.parametrize("kind, process", [
    ("stop", 1), ("kill", 0),
    pytest.param("kill", 1, marks=pytest.mark.slow), pytest.param("stop", 0, marks=pytest.mark.slow)])
def test_a_process_that_dies_or_stops_ends_all(tmp_path, kind, process):
    """No half step is there then, though the one before was being saved."""
    run = tmp_path / "run"
    run.mkdir()
    with Job(tmp_path, [TRAINER, run, 12], 2, env=lambda _: {"FAULT": f"{kind} {process} 5"}) as job:
        job[process].wait_for("step 5")
        (status,) = job.wait(SOON, but=[process])
        assert status not in (0, 75)
    whole = notes(run)
    assert max(whole) in (3, 4)  # that it had begun to save 4 may have been in vain


def test_a_run_goes_on_after_a_kill(tmp_path, undisturbed):
    """By itself, from the last checkpoint: bit for bit on the same mesh."""
    run = tmp_path / "run"
    run.mkdir()
    done = launch("-n", 2, "--devices", 4, "--restarts", 2, TRAINER, run, 12, env={"FAULT": "kill 1 7"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 of 2 was ended by SIGKILL" in done.stderr and done.stderr.count("starts again") == 1
    first, second = re.findall(r"\[0\] from (\d+)", done.stdout)
    assert (first, int(second) in (5, 6)) == ("0", True)
    assert digests(run, 12) == digests(undisturbed, 12)


def test_a_run_goes_on_with_fewer_processes(tmp_path, undisturbed):
    run = tmp_path / "run"
    run.mkdir()
    done = launch("-n", "2,1", "--devices", 4, "--restarts", 1, TRAINER, run, 12, env={"FAULT": "kill 0 7"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert notes(run)[12].mesh == {"data": 4} and notes(undisturbed)[12].mesh == {"data": 8}
    with zj.Checkpointer(run) as ours, zj.Checkpointer(undisturbed) as theirs:
        wanted = notes(run)[12].leaves
        assert wanted.keys() == notes(undisturbed)[12].leaves.keys()
        a, b = (dict(reading.arrays(c.directory / "12", notes(c.directory)[12], list(wanted))) for c in (ours, theirs))
    for path in wanted:
        np.testing.assert_allclose(np.float64(a[path]), np.float64(b[path]), rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("process, when", [(1, "step 4"), (0, "evaluating"), (1, "from")])
def test_one_that_is_told_to_stop_stops_all_after_the_same_step(tmp_path, process, when):
    """In training, in an evaluation, and while the step compiles."""
    slow = {"SLOW_TO_TRACE": "2"} if when == "from" else {}
    with Job(tmp_path, [TRAINER, tmp_path / "run", 4 if when == "evaluating" else 1000, 0.05], 2, env=lambda _: slow) as job:
        job[process].wait_for(when)
        job[process].signal(signal.SIGTERM)
        assert job.wait(60) == [75, 75], [p.err[-2000:] for p in job]
        stopped, other = (p.out.splitlines()[-1] for p in job)
        assert stopped == other and stopped.startswith("stopped at")
        assert "SIGTERM: stops after this step" in job[process].err
    step = int(stopped.split()[-1])
    assert max(notes(tmp_path / "run")) == step
    if when == "step 4":
        assert 4 <= step <= 8


def test_one_that_raises_ends_all_with_its_traceback(tmp_path):
    (tmp_path / "run").mkdir()
    started = time.monotonic()
    done = launch("-n", 2, "--devices", 4, TRAINER, tmp_path / "run", 10**6, env={"FAULT": "raise 1 3"}, limit=60)
    assert done.returncode == 1 and time.monotonic() - started < 60
    report = done.stderr.split("zerojax launch: ")[-1].splitlines()
    assert report[0] == "process 1 of 2 ended with status 1, the first to fail; the others were ended."
    assert report[1] == "[1] Traceback (most recent call last):" and report[-1] == "[1] ValueError: process 1 has had enough"


def test_one_that_raises_does_not_wait_for_the_others(tmp_path):
    """Without a launcher that would end it; jax would keep it until the shutdown's time-out."""
    (tmp_path / "run").mkdir()
    with Job(tmp_path, [TRAINER, tmp_path / "run", 1000], 2, env=lambda _: {"FAULT": "raise 1 3"}) as job:
        job[1].wait_for("step 3")
        assert job.wait(12, but=[0]) == [1]  # jax would wait for 25 s
        assert job[1].err.splitlines()[-1] == "ValueError: process 1 has had enough"
        assert job.wait(SOON, but=[1])[0] not in (0, 75)


@pytest.mark.parametrize("processes", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_more_and_fewer_processes_restore_what_two_saved(tmp_path, undisturbed, processes):
    """At another stage, bit for bit."""
    with Job(tmp_path, [HERE / "restores.py", undisturbed], processes, 8 // processes) as job:
        assert job.wait(120) == [0] * processes, [p.err[-2000:] for p in job]
        assert [json.loads(p.out.splitlines()[-1]) for p in job] == [digests(undisturbed, 12)] * processes


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 75), (signal.SIGINT, 75), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_launcher_ends_its_processes_when_it_is_ended(tmp_path, number, status):
    """They may answer SIGTERM and Ctrl-C by saving; of SIGKILL it can't tell them."""
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        silent = number == signal.SIGKILL  # one that prints would end by its broken pipe
        arguments = ["launch", "-n", 2, "--devices", 1, TRAINER, tmp_path / "run", 1000, 300 if silent else 0.05]
        command = [sys.executable, "-m", "zerojax", *map(str, arguments)]
        launcher = subprocess.Popen(command, env=environment(), stdout=out, stderr=err)
    end = time.monotonic() + 90
    try:
        while f"[1] step {1 if silent else 3}" not in (tmp_path / "out").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        pids = [int(p) for p in pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(pids) == 2
        launcher.send_signal(number)
        assert launcher.wait(30) == status
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        launcher.kill()
    if status == 75:
        assert max(notes(tmp_path / "run")) >= 3
        assert (tmp_path / "err").read_text().splitlines()[-1] == "zerojax launch: the processes were told to stop: status 75"


def _alive(pid):
    """A process that has ended and that nobody has waited for does not count."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
