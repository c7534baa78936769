"""Real processes that join once, too late, or with other settings or programs.

Processes that differ raise an error before they compile. The meeting itself is tested without jax,
in tests/processes/test_rendezvous.py.
"""

import json
import re
import sys

from processes import HERE, Job, Process, environment, free_port


def started(tmp_path, name, **arguments):
    """Returns a process that calls `initialize` with these arguments."""
    command = [sys.executable, HERE / "meets.py", json.dumps(arguments)]
    return Process(command, environment(), tmp_path / f"{name}.out", tmp_path / f"{name}.err")


def error_of(process):
    """Returns the error that a process printed."""
    assert process.popen.wait(60) == 3, process.err[-2000:]
    return re.search(r"^error: ((?:.|\n)*)", process.out, re.MULTILINE)[1].strip()


def test_a_process_joins_once_and_in_time(tmp_path):
    """Repeats the call without arguments, with the same and with others; calls it after jax."""
    address = f"127.0.0.1:{free_port()}"
    arguments = {"address": address, "processes": 2, "connect_timeout": 30,
                 "heartbeat_timeout": 20, "again": True}
    both = [started(tmp_path, str(i), process=i, **arguments) for i in (0, 1)]
    for i, process in enumerate(both):
        process.popen.wait(60)
        assert f"joined {i} 2" in process.out, process.err[-2000:]
        assert "again: same, same" in process.out
        assert ("again: initialize was called before with other arguments: heartbeat_timeout was "
                "20, and is 5 now. A process joins once.") in process.out
        line = f"INFO:zerojax:process {i} of 2, coordinator {address} (by arguments)"
        assert line in process.err.splitlines()
    late = started(tmp_path, "late", address=address, processes=2, process=1, late=True)
    assert error_of(late).startswith("initialize came too late: jax has initialized its devices")


def test_processes_that_differ_before_they_join(tmp_path):
    arguments = {"address": f"127.0.0.1:{free_port()}", "processes": 2, "connect_timeout": 30}
    both = [started(tmp_path, str(i), process=i, config={"lr": 0.1, "seed": 7 * i}, **arguments)
            for i in (0, 1)]
    for process in both:
        assert "  config.seed: 0 on process 0; 7 on process 1" in error_of(process).splitlines()


PROGRAMS = "the processes differ, and would not run the same program: program"
SOURCE = (HERE / "differ.py").read_text().splitlines()
SCALED, DOUBLED = (1 + next(i for i, line in enumerate(SOURCE) if text in line)
                   for text in (".sum() * scale", "x * (2 if second"))
FAILED = "process 1 of 2 failed; process 1 reports: "
DIFFER = {  # patterns of the error on each process, by the case of differ.py
    "stage": r"zero\.init: .* policy\.stage: 3 on process 0; 1 on process 1",
    "seed": r"zero\.init: .* arguments\.0: key<fry>\[\] \w+ on process 0; key<fry>\[\] \w+ on "
            r"process 1",
    "model": r"zero\.init: .* state\.params/w: float32\[4, 16\] \S+ 'data'\) on process 0; "
             r"float32\[4, 32\] \S+ 'data'\)",
    "precision": r"policy\.precision\.compute: None on process 0; bfloat16 on process 1",
    "mesh": r"mesh\.axes\.data: 8 on process 0; 4 on process 1 .*policy\.replica_axis",
    "optimizer": r"state\.opt_state/0/count: nothing on process 0; int32\[\] P\(\) on process 1",
    "accumulate": r"train_step: .* accumulate: 1 on process 0; 2 on process 1 program",
    "loss": r"train_step: .* loss_fn: loss \w+ on process 0; other_loss \w+ on process 1 program, "
            r"line \d+: ",
    "code": rf"train_step: {PROGRAMS}, line \d+: `.*` at differ\.py:{SCALED} on process 0; `.*` at "
            rf"differ\.py:{SCALED} on process 1$",
    "rate": rf"train_step: {PROGRAMS}, line \d+: `.* dense<-1.0\S+> .*` at differ\.py:\d+ on "
            r"process 0; `.* dense<-2.0\S+> .*` at differ\.py:\d+ on process 1$",
    "loop": rf"program, line \d+: `.* dense<1.0\S+> .*` at differ\.py:{DOUBLED} on process 0; "
            rf"`.* dense<2.0\S+> .*` at differ\.py:{DOUBLED} on process 1$",
    "evaluation": r"eval_step: .* loss_fn: loss \w+ on process 0; other_loss \w+ on process 1",
    "devices": r"zero\.init: .* mesh\.devices: 0:0 0:1 \S+ .* on process 0; 1:\S+",
    "init fails": rf"{FAILED}KeyError: 'wide'|^compiled \[\]: KeyError: 'wide'",
    "loss fails": rf"{FAILED}KeyError: 'v'|^compiled \[\]: KeyError: 'v'",
    "call": r"different calls: Zero\.init at differ\.py:\d+ on process 0; TrainStep at ",
}


def test_a_difference_is_named_on_every_process_before_it_compiles(tmp_path):
    with Job(tmp_path, [HERE / "differ.py"], 2, 4) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        for process in job:
            lines = (line.split(": ", 1) for line in process.out.splitlines())
            found = {line[0]: line[1] for line in lines if line[0] in DIFFER}
            assert found.keys() == DIFFER.keys(), process.out
            for name, pattern in DIFFER.items():
                assert found[name].startswith("compiled []: "), (name, found[name])
                assert re.search(pattern, found[name]), (name, found[name])
