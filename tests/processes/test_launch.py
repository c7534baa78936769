"""`zerojax launch` with programs that need no jax: what they are told, who is blamed, and that nobody is left."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

import zerojax as zj
from zerojax.processes import launch


def run(tmp_path, script, *options, env=None, limit=60):
    (tmp_path / "script.py").write_text("import os, sys, time, signal\nme = int(os.environ['JAX_PROCESS_ID'])\n" + script)
    command = [sys.executable, "-m", "zerojax", "launch", *map(str, options), tmp_path / "script.py", "a", "--b"]
    environ = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | (env or {})
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=limit, env=environ)


def report(done):
    return done.stderr[done.stderr.rindex("zerojax launch: "):].splitlines()


def test_what_processes_are_told(tmp_path):
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"]
    done = run(tmp_path, f"print(*[os.environ[n] for n in {names}], sys.argv[1:], file=sys.stderr if me else sys.stdout)", "-n", 2,
               "--devices", 3)
    assert done.returncode == 0
    (out,), (err,) = done.stdout.splitlines(), done.stderr.splitlines()
    assert out.removeprefix("[0] ") == err.removeprefix("[1] ") and out.split()[1].startswith("127.0.0.1:")
    assert out.split()[2:] == ["2", "cpu", "3", "['a',", "'--b']"]


def test_lines_stay_whole_and_progress_bars_are_lines(tmp_path):
    script = "for i in range(200): print(f'\\r{me}:{i}', end='' if i % 2 else '\\n')"
    done = run(tmp_path, script, "-n", 3)
    wanted = [f"[{p}] {p}:{i}" for p in range(3) for i in range(200)]
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == sorted(wanted)


def test_a_progress_bar_is_seen_while_it_moves(tmp_path):
    (tmp_path / "script.py").write_text("import time\nfor i in range(1000):\n    print(f'\\r{i}', end='')\n    time.sleep(0.05)")
    command = [sys.executable, "-m", "zerojax", "launch", "-n", "1", str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert [launcher.stdout.readline() for _ in range(3)] == ["[0] 0\n", "[0] 1\n", "[0] 2\n"]
        launcher.terminate()


def test_a_reader_that_leaves_does_not_hold_the_job(tmp_path):
    script = "import sys\nfor i in range(10**5): sys.stdout.buffer.write(f'line {i} \u2603\\n'.encode())"
    (tmp_path / "script.py").write_text(script)
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} -m zerojax launch -n 2 {tmp_path / 'script.py'}; echo status $? >&2"
    done = subprocess.run(f"({command}) | head -n 1", shell=True, capture_output=True, text=True, timeout=60, env=environ)
    assert done.stdout[3:] == " line 0 \\u2603\n" and done.stderr.endswith("status 0\n")


def test_what_led_to_an_error_is_shown_too(tmp_path):
    script = """
try:
    raise ValueError("old news")
except ValueError:
    print("handled")
try:
    {}["the root cause"]
except KeyError as error:
    raise RuntimeError("what came of it") from error
"""
    lines = report(run(tmp_path, script, "-n", 1))
    assert "KeyError: 'the root cause'" in "\n".join(lines) and lines[-1] == "[0] RuntimeError: what came of it"


def test_a_failure_is_not_hidden_by_one_that_was_told_to_stop(tmp_path):
    done = run(tmp_path, "time.sleep(me); sys.exit(3 if me else 75)", "-n", 2)
    assert done.returncode == 3 and "process 1 of 2 ended with status 3" in done.stderr


def test_the_first_that_fails_is_blamed_and_the_others_end(tmp_path):
    """Also one that minds no SIGTERM, and what the processes have started."""
    script = """
os.system(f"sleep 300 & echo $! > {os.path.dirname(__file__)}/{me}")
if me == 1:
    time.sleep(0.5)
    raise ValueError("it was me")
signal.signal(signal.SIGTERM, signal.SIG_IGN if me == 0 else lambda *_: sys.exit("I was told to"))
time.sleep(300)
"""
    done = run(tmp_path, script, "-n", 3, limit=20)
    lines = report(done)
    assert done.returncode == 1
    assert lines[0] == "zerojax launch: process 1 of 3 ended with status 1, the first to fail; the others were ended."
    assert lines[1] == "[1] Traceback (most recent call last):" and lines[-1] == "[1] ValueError: it was me"
    for child in range(3):
        stat = pathlib.Path(f"/proc/{(tmp_path / str(child)).read_text().strip()}/stat")
        assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("script, status, words", [
    ("sys.exit(7 if me else 0)", 7, "process 1 of 2 ended with status 7"),
    ("os.kill(os.getpid(), signal.SIGKILL) if me else time.sleep(60)", 137, "process 1 of 2 was ended by SIGKILL"),
    ("sys.exit(75)", 75, "the processes were told to stop: status 75"),
    ("me or print('last words', file=sys.stderr); sys.exit(0 if me else 3)", 3, "[0] last words"),
], ids=["status", "signal", "preempted", "no traceback"])
def test_the_status_is_that_of_the_failure(tmp_path, script, status, words):
    done = run(tmp_path, script, "-n", 2, "--devices", 1)
    assert done.returncode == status and words in "\n".join(report(done))


def test_starts_again_with_as_many_as_it_was_told(tmp_path):
    script = "me or print('of', os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS']); sys.exit(1 - me)"
    done = run(tmp_path, script, "-n", "3,2,1", "--restarts", 3)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 1 and [line[2] for line in lines] == ["3", "2", "1", "1"]
    assert len({line[3] for line in lines}) == 4, "each time at another port"
    assert "starts again, 3 of 3" in done.stderr


def test_a_run_that_was_told_to_stop_is_not_started_again(tmp_path):
    done = run(tmp_path, "print('once'); sys.exit(75)", "-n", 1, "--restarts", 3)
    assert (done.returncode, done.stdout) == (75, "[0] once\n")


def test_ctrl_c_is_for_the_processes(tmp_path):
    """The launcher passes it on, and reports no failure; a second one ends those that do not answer."""
    for second in (False, True):
        script = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" * second + "print('up')\ntime.sleep(300)"
        (tmp_path / "script.py").write_text("import time, signal\n" + script)
        with subprocess.Popen([sys.executable, "-m", "zerojax", "launch", "-n", "2", "--devices", "1", str(tmp_path / "script.py")],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
            assert [launcher.stdout.readline()[4:] for _ in range(2)] == ["up\n"] * 2
            for _ in range(1 + second):
                time.sleep(0.3)
                launcher.send_signal(2)
            _, error = launcher.communicate(timeout=30)
        assert launcher.returncode == 130 and "waits for the processes; once more ends them" in error
        assert "the first to fail" not in error and error.count("KeyboardInterrupt") == (0 if second else 2)


@pytest.mark.parametrize("plan, words", [
    (launch.Launch(["x"], [0]), "launch -n 0: write a whole number, 1 or more"),
    (launch.Launch(["x"], [1], devices=0), "launch --devices 0"),
    (launch.Launch(["x"], [1], restarts=-1), "launch --restarts -1"),
], ids=["n", "devices", "restarts"])
def test_numbers_that_can_not_be(plan, words):
    with pytest.raises(zj.ClusterError, match=words):
        launch.launch(plan)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(zj.ClusterError, match="each process takes one GPU, and this machine has 2; write -n 2, or --devices 1"):
        launch.launch(launch.Launch(["x"], [4]))
    told = launch.Launch(["x"], [2]).environment(1, 2, 5)
    assert told["JAX_LOCAL_DEVICE_IDS"] == "1" and "JAX_PLATFORMS" not in told
    monkeypatch.setattr(launch, "gpus", list)
    assert launch.Launch(["x"], [2]).environment(0, 2, 5)["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    assert launch.Launch(["x"], [2]).environment(0, 2, 5).get("JAX_PLATFORMS") is None
    assert launch.Launch(["x"], [2], devices=4).environment(1, 2, 5)["JAX_NUM_CPU_DEVICES"] == "4"
