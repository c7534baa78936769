"""Processes that die, stop, raise or get a signal, and runs that continue after them."""

import json
import os
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

from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import reading

TRAINER = HERE / "distributed_trainer.py"
SOON = HEARTBEAT + 5  # seconds
SLOW = pytest.mark.slow


def manifests(directory):
    """Returns the manifest of each step, after its arrays were compared with their digests."""
    return {step: reading.verify(folder.step_path(directory, step))
            for step in folder.steps(directory)}


def digests(directory, step):
    return {path: entry.digest for path, entry in manifests(directory)[step].leaves.items()}


def arrays(directory, step):
    manifest = manifests(directory)[step]
    return dict(reading.arrays(folder.step_path(directory, step), manifest, list(manifest.leaves)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of an undisturbed run of two processes, with 12 steps."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    with Job(tmp_path, [TRAINER, tmp_path / "run", 12], 2) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        assert [p.out.splitlines()[-1] for p in job] == ["done 12"] * 2
    return tmp_path / "run"


@pytest.fixture
def run(tmp_path):
    """The directory of a run, which exists before the run starts."""
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("kind, process", [
    pytest.param("stop", 1, marks=SLOW), pytest.param("kill", 0, marks=SLOW),
    pytest.param("kill", 1, marks=SLOW), pytest.param("stop", 0, marks=SLOW)])
def test_a_process_that_dies_or_stops_ends_all(tmp_path, run, kind, process):
    """There is no partial step, although a save was under way."""
    fault = {"FAULT": f"{kind} {process} 5"}
    with Job(tmp_path, [TRAINER, run, 12], 2, env=lambda _: fault) as job:
        job[process].wait_for("step 5")
        (status,) = job.wait(SOON, but=[process])
        assert status not in (0, 75)
    assert max(manifests(run)) in (3, 4)  # the save of step 4 may not have been completed


@pytest.mark.slow
def test_a_run_continues_after_a_kill(run, undisturbed):
    """It restarts from the last checkpoint by itself; on the same mesh, the result is bit-equal."""
    done = launch("-n", 2, "--devices", 4, "--restarts", 2, TRAINER, run, 12,
                  env={"FAULT": "kill 1 7"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 of 2 was ended by SIGKILL" in done.stderr
    assert done.stderr.count("starts again") == 1
    first, second = re.findall(r"\[0\] from (\d+)", done.stdout)
    assert first == "0" and int(second) in (5, 6)
    assert digests(run, 12) == digests(undisturbed, 12)


@pytest.mark.slow
def test_a_run_continues_with_fewer_processes(run, undisturbed):
    done = launch("-n", "2,1", "--devices", 4, "--restarts", 1, TRAINER, run, 12,
                  env={"FAULT": "kill 0 7"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifests(run)[12].mesh == {"data": 4}
    assert manifests(undisturbed)[12].mesh == {"data": 8}
    ours, theirs = arrays(run, 12), arrays(undisturbed, 12)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(np.float64(ours[path]), np.float64(theirs[path]), rtol=1e-4,
                                   atol=1e-6, err_msg=path)


@pytest.mark.parametrize("process, when", [
    pytest.param(1, "step 4", marks=SLOW), pytest.param(0, "evaluating", marks=SLOW),
    pytest.param(1, "from", marks=SLOW)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, process, when):
    """During training, an evaluation, and the compilation of the step."""
    variables = {"SLOW_TO_TRACE": "2"} if when == "from" else {}
    steps = 4 if when == "evaluating" else 1000
    run = tmp_path / "run"
    with Job(tmp_path, [TRAINER, run, steps, 0.05], 2, env=lambda _: variables) as job:
        job[process].wait_for(when)
        job[process].signal(signal.SIGTERM)
        assert job.wait(60) == [75, 75], [p.err[-2000:] for p in job]
        stopped, other = (p.out.splitlines()[-1] for p in job)
        assert stopped == other and stopped.startswith("stopped at")
        assert "SIGTERM: stops after this step" in job[process].err
    step = int(stopped.split()[-1])
    assert max(manifests(run)) == step
    if when == "step 4":
        assert 4 <= step <= 8


@pytest.mark.slow
def test_an_exception_of_one_process_ends_all_with_its_traceback(run):
    started = time.monotonic()
    done = launch("-n", 2, "--devices", 4, TRAINER, run, 10**6, env={"FAULT": "raise 1 3"},
                  limit=60)
    assert done.returncode == 1 and time.monotonic() - started < 60
    report = done.stderr.split("zerojax launch: ")[-1].splitlines()
    assert report[0] == ("process 1 of 2 ended with status 1, the first to fail; "
                         "the others were ended.")
    assert report[1] == "[1] Traceback (most recent call last):"
    assert report[-1] == "[1] ValueError: process 1 fails"


@pytest.mark.slow
def test_a_process_that_raises_does_not_wait_for_the_others(tmp_path, run):
    """Without a launcher that would end it; jax would wait for `shutdown_timeout`, 25 s."""
    with Job(tmp_path, [TRAINER, run, 1000], 2, env=lambda _: {"FAULT": "raise 1 3"}) as job:
        job[1].wait_for("step 3")
        assert job.wait(12, but=[0]) == [1]
        assert job[1].err.splitlines()[-1] == "ValueError: process 1 fails"
        assert job.wait(SOON, but=[1])[0] not in (0, 75)


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=SLOW)])
def test_another_number_of_processes_restores(tmp_path, undisturbed, processes):
    """At another stage, bit for bit."""
    with Job(tmp_path, [HERE / "restores.py", undisturbed], processes, 8 // processes) as job:
        assert job.wait(120) == [0] * processes, [p.err[-2000:] for p in job]
        restored = [json.loads(p.out.splitlines()[-1]) for p in job]
    assert restored == [digests(undisturbed, 12)] * processes


@pytest.mark.parametrize("number, status", [
    pytest.param(signal.SIGTERM, 75, marks=SLOW), pytest.param(signal.SIGINT, 75, marks=SLOW),
    pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=SLOW)])
def test_the_processes_of_a_launcher_that_ends_end_too(tmp_path, number, status):
    """They save on SIGTERM and Ctrl-C; the launcher cannot pass SIGKILL on."""
    killed = number == signal.SIGKILL
    pause = 300 if killed else 0.05  # a process that prints would end by its broken pipe
    out, err = tmp_path / "out", tmp_path / "err"
    arguments = ["-n", 2, "--devices", 1, TRAINER, tmp_path / "run", 1000, pause]
    command = [sys.executable, "-m", "zerojax", "launch", *map(str, arguments)]
    with out.open("w") as stdout, err.open("w") as stderr:
        launcher = subprocess.Popen(command, env=environment(), stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: f"[1] step {1 if killed else 3}" in out.read_text())
        children = children_of(launcher.pid)
        assert len(children) == 2
        launcher.send_signal(number)
        assert launcher.wait(30) == status
        wait_until(lambda: not any(is_running(child) for child in children))
    finally:
        launcher.kill()
    if not killed:
        assert max(manifests(tmp_path / "run")) >= 3
        last = err.read_text().splitlines()[-1]
        assert last == "zerojax launch: the processes stopped on a signal: status 75"


def wait_until(condition, limit=90):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_running(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_whose_launcher_has_ended_ends_at_once():
    """Unless it has been started by one of the launcher's processes, and the launcher runs."""
    with subprocess.Popen(["true"]) as launcher:
        pass
    code = "from zerojax.processes import ending; ending.with_launcher(); print('runs')"
    inner = [sys.executable, "-c", code]
    line = [sys.executable, "-c", f"import subprocess; print(subprocess.run({inner}))"]
    for number, status in (launcher.pid, 1), (os.getpid(), 0):
        done = subprocess.run(line, env=environment(ZEROJAX_LAUNCH=number), text=True,
                              capture_output=True, timeout=60)
        assert f"returncode={status}" in done.stdout and ("runs\n" in done.stdout) == (not status)
