"""Processes that are ended: by SIGKILL at random moments of a save (fault 1), by SIGTERM and SIGINT (21, one process)."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

import zerojax as zj
from zerojax.checkpoint import reading

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"
STEPS = 30


def start(*arguments):
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": path})


def digests(directory, step):
    return {path: entry.digest for path, entry in reading.verify(reading.step_path(directory, step)).leaves.items()}


def never_killed(directory, steps):
    """What the run that nobody ends comes to."""
    out, error = start(HERE / "trainer.py", directory, steps).communicate(timeout=200)
    assert out.split("\n")[-2] == "done", error[-2000:]
    return digests(directory, steps)


def newest(directory):
    return (reading.steps(directory) or [0])[-1]


def killed(directory, steps, rng):
    """Ends a run in the middle of a save; returns (where it went on from, the newest step that it saw whole)."""
    process = start(HERE / "trainer.py", directory, steps)
    first, whole, saves = None, 0, rng.randrange(3, 9)
    for line in process.stdout:
        word, *numbers = line.split()
        first = int(numbers[0]) if word == "from" else first
        whole = max([whole, *map(int, numbers)]) if word == "whole" else whole
        saves -= word == "saving"
        if not saves:
            time.sleep(rng.uniform(0, 0.06))
            break
    process.kill()
    process.communicate(timeout=60)
    return first, whole


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_of_a_save(tmp_path, kills):
    rng, at, steps, directory = random.Random(kills), 0, 9 * kills, tmp_path / "killed"
    for _ in range(kills):
        first, whole = killed(directory, steps, rng)
        assert first is not None and first >= at  # it went on from what was whole, or later
        assert newest(directory) >= whole
        for step in reading.steps(directory)[-2:]:  # as many are kept: one before them may be half removed
            reading.verify(reading.step_path(directory, step))
        at = newest(directory)
    assert at < steps
    assert never_killed(directory, steps) == never_killed(tmp_path / "whole", steps)
    assert sorted(p.name for p in directory.iterdir()) == [str(steps - 1), str(steps)]  # nothing is left of the killed ones


@pytest.mark.slow
def test_the_example_killed_twenty_times(tmp_path):
    command = [EXAMPLES / "train_gpt.py", "--every", "5", "--checkpoint"]
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
    assert reached == sorted(set(reached)) and reached[-1] < 1000  # each in the middle
    out, error = start(*command, tmp_path / "killed").communicate(timeout=600)
    assert "after 1000 steps" in out, error[-2000:]
    assert digests(tmp_path / "killed", 1000) == digests(tmp_path / "whole", 1000)


@pytest.mark.parametrize("number, when", [(signal.SIGTERM, "saving"), (signal.SIGINT, "saving"), (signal.SIGTERM, "evaluating")])
def test_a_signal_ends_a_run_after_a_save(tmp_path, number, when):
    """The step under way is finished and saved, also when the signal comes in an evaluation; the status says why it ended."""
    steps, directory = STEPS if when == "saving" else 3, tmp_path / "ended"
    process = start(HERE / "trainer.py", directory, steps, 0.02)
    seen = 0
    for line in process.stdout:
        if line.startswith(when):
            seen = int(line.split()[-1]) if when == "saving" else steps
            if seen >= 3:
                break
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == zj.Preemption.status == 75 and "done" not in out
    assert f"{number.name}: stops after this step" in error
    assert seen <= newest(directory) <= seen + 1
    reading.verify(reading.step_path(directory, newest(directory)))
    if (number, when) == (signal.SIGTERM, "saving"):
        assert never_killed(directory, STEPS) == never_killed(tmp_path / "whole", STEPS)


def test_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), zj.Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_until_takes_no_item_that_it_does_not_hand_out():
    source = iter(range(10))
    with zj.Preemption() as preemption:
        for item in preemption.until(source):
            if item == 3:
                signal.raise_signal(signal.SIGTERM)
        assert list(preemption.until(source)) == []
    assert next(source) == 4
    with pytest.raises(SystemExit) as left:
        preemption.exit()
    assert left.value.code == 75


def test_threads_get_no_signals():
    import threading

    met = []

    def enter():
        try:
            with zj.Preemption():
                pass
        except zj.CheckpointError as error:
            met.append(str(error))

    thread = threading.Thread(target=enter, name="worker")
    thread.start()
    thread.join()
    assert "entered in thread 'worker'" in met[0]
