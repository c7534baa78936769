"""`zerojax launch` with programs that need no jax: variables, failures, signals and restarts."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import zerojax as zj
from zerojax.processes import launch

HEAD = "import os, sys, time, signal\nme = int(os.environ['JAX_PROCESS_ID'])\n"


def command(*arguments):
    return [sys.executable, "-m", "zerojax", "launch", *map(str, arguments)]


def run(tmp_path, script, *options, limit=60):
    (tmp_path / "script.py").write_text(HEAD + script)
    environ = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run(command(*options, tmp_path / "script.py", "a", "--b"), text=True,
                          capture_output=True, timeout=limit, env=environ)


def report(done):
    """Returns the last lines of the launcher."""
    return done.stderr[done.stderr.rindex("zerojax launch: "):].splitlines()


def test_the_variables_of_processes(tmp_path):
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS",
             "JAX_NUM_CPU_DEVICES"]
    script = (f"print(*[os.environ[n] for n in {names}], sys.argv[1:], "
              "file=sys.stderr if me else sys.stdout)")
    done = run(tmp_path, script, "-n", 2, "--devices", 3)
    assert done.returncode == 0
    (out,), (err,) = done.stdout.splitlines(), done.stderr.splitlines()
    assert out.removeprefix("[0] ") == err.removeprefix("[1] ")
    assert out.split()[1].startswith("127.0.0.1:")
    assert out.split()[2:] == ["2", "cpu", "3", "['a',", "'--b']"]


def test_the_processes_of_a_job_share_a_secret(tmp_path, monkeypatch):
    """That of the environment, or a random one."""
    monkeypatch.delenv("ZEROJAX_SECRET", raising=False)
    script = "print(os.environ['ZEROJAX_SECRET'])"
    jobs = [{line[4:] for line in run(tmp_path, script, "-n", 2).stdout.splitlines()}
            for _ in range(2)]
    assert len(jobs[0]) == len(jobs[1]) == 1 and jobs[0] != jobs[1]
    monkeypatch.setenv("ZEROJAX_SECRET", "given")
    assert run(tmp_path, script, "-n", 1).stdout == "[0] given\n"


def test_lines_stay_whole_and_progress_bars_are_lines(tmp_path):
    script = "for i in range(200): print(f'\\r{me}:{i}', end='' if i % 2 else '\\n')"
    done = run(tmp_path, script, "-n", 3)
    wanted = [f"[{p}] {p}:{i}" for p in range(3) for i in range(200)]
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == sorted(wanted)


def test_an_end_of_line_may_come_in_two_halves(tmp_path):
    script = "for end in '\\r', '\\n': print('a', end=end); time.sleep(0.3); print('', end='\\n')"
    assert run(tmp_path, script, "-n", 1).stdout == "[0] a\n[0] a\n[0] \n"


def test_a_progress_bar_is_visible_while_it_moves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\n"
                      "for i in range(1000):\n"
                      "    print(f'\\r{i}', end='')\n"
                      "    time.sleep(0.05)")
    with subprocess.Popen(command("-n", 1, script), stdout=subprocess.PIPE, text=True) as launcher:
        lines = [launcher.stdout.readline() for _ in range(3)]
        assert lines == ["[0] 0\n", "[0] 1\n", "[0] 2\n"]
        launcher.terminate()


def test_a_megabyte_without_a_newline_is_one_line(tmp_path):
    done = run(tmp_path, "print('x' * 10**6, end='!')", "-n", 1)
    assert done.returncode == 0 and done.stdout == f"[0] {'x' * 10**6}!\n"


@pytest.mark.parametrize("is_blocking", [True, False])
def test_a_slow_reader_gets_all_lines(tmp_path, is_blocking):
    """Also through a pipe that another program has made non-blocking."""
    (tmp_path / "script.py").write_text("for i in range(9000): print('line', i)")
    ours, its = os.pipe()
    os.set_blocking(its, is_blocking)
    with subprocess.Popen(command("-n", 1, tmp_path / "script.py"), stdout=its), open(ours) as out:
        os.close(its)
        time.sleep(3)  # the process ends before its output is read
        assert out.read().splitlines() == [f"[0] line {i}" for i in range(9000)]


def test_lines_of_both_streams_stay_whole_in_one_pipe(tmp_path):
    (tmp_path / "script.py").write_text("""
import sys, threading
def write(stream, letter):
    for _ in range(300):
        stream.write(letter * 3000 + "\\n")
other = threading.Thread(target=write, args=(sys.stderr, "e"))
other.start()
write(sys.stdout, "o")
other.join()
""")
    done = subprocess.run(command("-n", 1, tmp_path / "script.py"), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    lines = [f"[0] {letter * 3000}" for letter in "eo" for _ in range(300)]
    assert sorted(done.stdout.splitlines()) == lines


@pytest.mark.parametrize("program", [["sleep", "30"], ["yes"]], ids=["silent", "talkative"])
def test_the_end_does_not_wait_for_a_program_that_holds_the_output(tmp_path, program):
    start = f"import subprocess; print('up'); subprocess.Popen({program}, start_new_session=True)"
    (tmp_path / "script.py").write_text(start)
    with subprocess.Popen(command("-n", 1, tmp_path / "script.py"), text=True,
                          stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == "[0] up\n"
        assert set(launcher.stdout) <= {"[0] y\n"}
        assert launcher.wait(10) == 0


def test_a_reader_that_leaves_does_not_block_the_job(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\n"
                      "for i in range(10**5):\n"
                      "    sys.stdout.buffer.write(f'line {i} \u2603\\n'.encode())")
    pipe = f"({' '.join(command('-n', 2, script))}; echo status $? >&2) | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout[3:] == " line 0 \\u2603\n" and done.stderr.endswith("status 0\n")


def test_the_errors_that_led_to_an_error_are_reported(tmp_path):
    script = """
try:
    raise ValueError("old news")
except ValueError:
    print("handled")
try:
    {}["the root cause"]
except KeyError as error:
    raise RuntimeError("the consequence") from error
"""
    lines = report(run(tmp_path, script, "-n", 1))
    assert "KeyError: 'the root cause'" in "\n".join(lines) and "old news" not in "\n".join(lines)
    assert lines[-1] == "[0] RuntimeError: the consequence"


def test_a_failure_is_reported_although_another_process_stopped_on_a_signal(tmp_path):
    done = run(tmp_path, "time.sleep(me); sys.exit(3 if me else 75)", "-n", 2)
    assert done.returncode == 3 and "process 1 of 2 ended with status 3" in done.stderr


def test_the_first_failure_is_reported_and_the_others_end(tmp_path):
    """So do a process that ignores SIGTERM, and the programs that the processes have started."""
    script = """
os.system(f"sleep 300 & echo $! > {os.path.dirname(__file__)}/{me}")
if me == 1:
    time.sleep(0.5)
    raise ValueError("it was me")
signal.signal(signal.SIGTERM, signal.SIG_IGN if me == 0 else lambda *_: sys.exit("on SIGTERM"))
time.sleep(300)
"""
    done = run(tmp_path, script, "-n", 3, limit=20)
    lines = report(done)
    assert done.returncode == 1
    assert lines[0] == ("zerojax launch: process 1 of 3 ended with status 1, the first to fail; "
                        "the others were ended.")
    assert lines[1] == "[1] Traceback (most recent call last):"
    assert lines[-1] == "[1] ValueError: it was me"
    assert not any(is_running((tmp_path / str(process)).read_text()) for process in range(3))


def is_running(pid):
    stat = pathlib.Path(f"/proc/{pid.strip()}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("script, status, words", [
    ("sys.exit(7 if me else 0)", 7, "process 1 of 2 ended with status 7"),
    ("os.kill(os.getpid(), signal.SIGKILL) if me else time.sleep(60)", 137,
     "process 1 of 2 was ended by SIGKILL"),
    ("sys.exit(75)", 75, "the processes stopped on a signal: status 75"),
    ("me or print('last words', file=sys.stderr); sys.exit(0 if me else 3)", 3, "[0] last words"),
], ids=["status", "signal", "preempted", "no traceback"])
def test_the_status_is_that_of_the_failure(tmp_path, script, status, words):
    done = run(tmp_path, script, "-n", 2, "--devices", 1)
    assert done.returncode == status and words in "\n".join(report(done))


def test_restarts_with_other_numbers_of_processes(tmp_path):
    names = "os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS']"
    done = run(tmp_path, f"me or print('of', {names}); sys.exit(me == 0)", "-n", "3,2,1",
               "--restarts", 3)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 1 and [line[2] for line in lines] == ["3", "2", "1", "1"]
    assert len({line[3] for line in lines}) == 4, "another port each time"
    assert "zerojax launch: starts again, 3 of 3" in done.stderr


def test_a_run_that_stopped_on_a_signal_does_not_restart(tmp_path):
    done = run(tmp_path, "print('once'); sys.exit(75)", "-n", 1, "--restarts", 3)
    assert (done.returncode, done.stdout) == (75, "[0] once\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_is_for_the_processes(tmp_path, ignored):
    """The launcher passes it on, and reports no failure; a second one ends those that ignore it.

    It reports them as killed only after the time limit.
    """
    script = tmp_path / "script.py"
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if ignored else ""
    script.write_text(f"import time, signal\n{ignore}print('up')\ntime.sleep(300)")
    with subprocess.Popen(command("-n", 2, "--devices", 1, "--grace", 60, script), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert [launcher.stdout.readline()[4:] for _ in range(2)] == ["up\n"] * 2
        for _ in range(2 if ignored else 1):
            time.sleep(0.3)
            launcher.send_signal(2)
        _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert ("zerojax launch: SIGINT: the processes have 60 s to end (--grace); a second signal "
            "ends them") in error and "zerojax launch: killed" not in error
    assert "the first to fail" not in error
    assert error.count("KeyboardInterrupt") == (0 if ignored else 2)


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeps = subprocess.Popen(["sleep", "300"])
print("up", file=sys.stderr, flush=True)
while True:
    print("x" * 1000, file=sys.STREAM)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_one_signal_ends_processes_that_ignore_it(tmp_path, stream):
    """Also if nobody reads the output, and they have started other programs."""
    (tmp_path / "script.py").write_text(STUBBORN.replace("STREAM", stream))
    with subprocess.Popen(command("-n", 2, "--devices", 1, "--grace", 0.5, tmp_path / "script.py"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            lines = iter(launcher.stderr.readline, "")
            assert "up\n" in (line[4:] for line in lines)
            assert "up\n" in (line[4:] for line in lines)  # of the other process
            sleeps = [c for process in children_of(launcher.pid) for c in children_of(process)]
            time.sleep(1)  # the pipe is full
            launcher.terminate()
            assert launcher.wait(5) == 143
        finally:
            launcher.kill()
        last = "zerojax launch: killed processes 0-1 after 0.5 s; --grace sets another limit"
        assert (last in launcher.stderr.read()) == (stream == "stdout")
        assert len(sleeps) == 2 and not any(map(is_running, sleeps))


BELOW = """
import signal, subprocess, sys, time
def save(*_):
    time.sleep(1.5)
    print("saved", flush=True)
    sys.exit(75)
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, save)
    print("up", flush=True)
    time.sleep(60)
else:
    subprocess.run([sys.executable, __file__, "below"])
"""


def test_sigterm_ends_the_job_although_it_was_ignored_at_the_start(tmp_path):
    """As below a program that `Preemption.exit` is about to end."""
    (tmp_path / "script.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        launcher = subprocess.Popen(command("-n", 1, "--devices", 1, tmp_path / "script.py"),
                                    stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    with launcher:
        try:
            assert launcher.stdout.readline() == "[0] up\n"
            launcher.terminate()
            assert launcher.wait(20) == 143
        finally:
            launcher.kill()


def test_a_program_below_the_one_that_was_launched_may_save(tmp_path):
    (tmp_path / "script.py").write_text(BELOW)
    with subprocess.Popen(command("-n", 1, "--devices", 1, tmp_path / "script.py"),
                          stdout=subprocess.PIPE, text=True) as launcher:
        try:
            assert launcher.stdout.readline() == "[0] up\n"
            launcher.terminate()
            assert launcher.wait(20) == 143 and launcher.stdout.read() == "[0] saved\n"
        finally:
            launcher.kill()


def children_of(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_only_the_process_gets_the_first_signal(tmp_path):
    """A worker that loads its data is needed until the state is saved, and is killed then."""
    (tmp_path / "script.py").write_text("""
import signal, subprocess, sys, time
worker = subprocess.Popen(["sleep", "300"])
def end(*_):
    time.sleep(0.5)
    print(worker.poll(), worker.pid, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("up")
time.sleep(300)
""")
    with subprocess.Popen(command("-n", 1, tmp_path / "script.py"), text=True,
                          stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == "[0] up\n"
        launcher.terminate()
        assert launcher.wait(30) == 75
        _, status, pid = launcher.stdout.readline().split()
    assert status == "None" and not is_running(pid)


def test_a_hangup_that_was_ignored_ends_nothing(tmp_path):
    (tmp_path / "script.py").write_text("print('up')\n"
                                        "import time; time.sleep(2); print('done')")
    line = ["nohup", *command("-n", 1, tmp_path / "script.py")]
    with subprocess.Popen(line, text=True, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == "[0] up\n"
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(30) == 0 and launcher.stdout.read() == "[0] done\n"


def test_what_a_process_that_has_ended_has_started_ends_after_a_failure(tmp_path):
    script = """
import subprocess
if me:
    time.sleep(1)
    sys.exit(3)
quiet = subprocess.DEVNULL
sleep = subprocess.Popen(["sleep", "300"], stdout=quiet, stderr=quiet)
print(sleep.pid)
"""
    done = run(tmp_path, script, "-n", 2)
    assert done.returncode == 3 and not is_running(done.stdout.split()[1])


def test_processes_get_one_signal(tmp_path, monkeypatch):
    """A second one ends `zj.Preemption` without a state.

    The first comes while the processes start; then process 0 fails, which is a reason for another.
    """
    (tmp_path / "script.py").write_text(HEAD + f"""
folder = {str(tmp_path)!r}
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: signals.append(1))
open(f"{{folder}}/{{me}}.up", "w")
while not signals: time.sleep(0.01)
time.sleep(0.5 + me)
open(f"{{folder}}/{{me}}.signals", "w").write(str(len(signals)))
sys.exit(75 if me else 1)
""")
    start = launch._Job._start

    def starts(job, process, environment):
        start(job, process, environment)
        while not (tmp_path / f"{process}.up").exists():
            time.sleep(0.01)
        if process == 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(launch._Job, "_start", starts)
    plan = launch.Launch([sys.executable, str(tmp_path / "script.py")], [2], devices=1)
    assert launch.launch(plan) == 130
    assert [(tmp_path / f"{process}.signals").read_text() for process in range(2)] == ["1", "1"]


def test_a_process_that_cannot_be_killed_is_given_up(tmp_path, monkeypatch, capfd):
    """SIGKILL has no effect as long as the process is inside a system call of some drivers."""
    end = tmp_path / "end"
    script = ("if me: sys.exit(3)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(8)\n"
              f"open({str(end)!r}, 'w')")
    (tmp_path / "script.py").write_text(HEAD + script)
    monkeypatch.setattr(launch, "_send", lambda send, child, number: None)
    plan = launch.Launch([sys.executable, str(tmp_path / "script.py")], [2], devices=1)
    assert launch.launch(plan) == 3 and not end.exists()
    assert "zerojax launch: process 0 cannot be killed" in capfd.readouterr().err


@pytest.mark.parametrize("plan, words", [
    (launch.Launch(["x"], [0]), "launch -n 0: write a number, 1 or more"),
    (launch.Launch(["x"], [1], devices=0), "launch --devices 0"),
    (launch.Launch(["x"], [1], restarts=-1), "launch --restarts -1"),
    (launch.Launch(["x"], [1], grace=-1), "launch --grace -1"),
], ids=["n", "devices", "restarts", "grace"])
def test_invalid_numbers(plan, words):
    with pytest.raises(zj.ClusterError, match=words):
        launch.launch(plan)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("JAX_PLATFORMS")
    words = ("each process takes one GPU, and this machine has 2; write -n 2, or --devices 1 for "
             "CPU devices")
    with pytest.raises(zj.ClusterError, match=words):
        launch.launch(launch.Launch(["x"], [4]))


def test_gpus_or_cpu_devices(monkeypatch):
    def variables(process, **options):
        return launch.Launch(["x"], [2], **options).environment(process, 2, 5)

    monkeypatch.setattr(launch, "gpus", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("JAX_PLATFORMS")
    on_gpu = variables(1)
    assert on_gpu["JAX_LOCAL_DEVICE_IDS"] == "1" and "JAX_PLATFORMS" not in on_gpu
    monkeypatch.setattr(launch, "gpus", list)
    assert variables(0)["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    assert variables(0).get("JAX_PLATFORMS") is None
    assert variables(1, devices=4)["JAX_NUM_CPU_DEVICES"] == "4"
