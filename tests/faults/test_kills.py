"""Processes that end during a run: by SIGKILL at random moments of a save, by SIGTERM and SIGINT.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import quick

import zerojax as zj
from zerojax.checkpoint import reading
from zerojax.checkpoint.directory import step_path, steps

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"
STEPS = 30


def start(*arguments):
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": path})


def digests(directory, step):
    leaves = reading.verify(step_path(directory, step)).leaves
    return {path: entry.digest for path, entry in leaves.items()}


def uninterrupted(directory, last):
    """Runs a trainer to its end; returns the digests of its last state."""
    out, error = start(HERE / "trainer.py", directory, last).communicate(timeout=200)
    assert out.split("\n")[-2] == "done", error[-2000:]
    return digests(directory, last)


def newest(directory):
    return max(steps(directory), default=0)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills, seed", quick.some(
    [(50, 0), *((250, seed) for seed in range(1, 5))], (50, 0).__eq__))
def test_kill_9_at_random_moments(tmp_path, kills, seed):
    """Of start-up, restore, compilation, steps, saves to disk and snapshots in memory.

    No life starts before the newest step that was on disk, and the end is bit-equal.
    """
    done = start(HERE / "lives.py", tmp_path, kills, seed)
    out, error = done.communicate(timeout=3600)
    assert done.returncode == 0, error[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["equal"] and sum(found["phases"].values()) == kills
    assert found["sources"]["memory"] > kills / 10
    rare = {"restore"} if kills > 50 else set()
    assert {"start", "save"} | rare <= found["phases"].keys()
    assert found["last"] > kills / 5


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 21 starts and 2,000 steps, perhaps beside other tests
def test_the_example_killed_twenty_times(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # it runs longer than it compiles
    command = [EXAMPLES / "train_gpt.py", "--every", "20", "--checkpoint"]
    assert "after 1000 steps" in start(*command, tmp_path / "whole").communicate(timeout=600)[0]
    rng, reached = random.Random(0), [0]
    for _ in range(20):
        process = start(*command, tmp_path / "killed")
        while process.poll() is None and newest(tmp_path / "killed") == reached[-1]:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate(timeout=60)
        reached.append(newest(tmp_path / "killed"))
    assert reached == sorted(set(reached)) and reached[-1] < 1000  # no kill came after the end
    out, error = start(*command, tmp_path / "killed").communicate(timeout=600)
    assert "after 1000 steps" in out, error[-2000:]
    assert digests(tmp_path / "killed", 1000) == digests(tmp_path / "whole", 1000)


@pytest.mark.parametrize("number, when", quick.some(
    [(signal.SIGTERM, "saving"), (signal.SIGINT, "saving"), (signal.SIGTERM, "evaluating")],
    (signal.SIGINT, "saving").__eq__))
def test_a_signal_ends_a_run_after_a_save(tmp_path, number, when):
    """The current step is finished and saved, also if the signal comes during an evaluation.

    The exit status says why the run ended.
    """
    last, directory = STEPS if when == "saving" else 3, tmp_path / "ended"
    process = start(HERE / "trainer.py", directory, last, 0.02)
    seen = 0
    for line in process.stdout:
        if line.startswith(when):
            seen = int(line.split()[-1]) if when == "saving" else last
            if seen >= 3:
                break
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == zj.Preemption.status == 75 and "done" not in out
    assert f"{number.name}: stops after this step" in error
    assert seen <= newest(directory) <= seen + 1
    reading.verify(step_path(directory, newest(directory)))
    if (number, when) == (signal.SIGTERM, "saving"):
        assert uninterrupted(directory, STEPS) == uninterrupted(tmp_path / "whole", STEPS)


def test_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), zj.Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_until_takes_no_item_that_it_does_not_yield():
    source = iter(range(10))
    with zj.Preemption() as preemption:
        for item in preemption.until(source):
            if item == 3:
                signal.raise_signal(signal.SIGTERM)
        assert list(preemption.until(source)) == []
    assert next(source) == 4
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        preemption.exit()
    assert left.value.code == 75 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


def test_threads_get_no_signals():
    errors = []

    def enter():
        try:
            with zj.Preemption():
                pass
        except zj.CheckpointError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter, name="worker")
    thread.start()
    thread.join()
    assert "entered in thread 'worker'" in errors[0]
