"""Calls that only one of two processes makes, which would wait for ever."""

import re

import pytest
from hangs import WATCHDOG
from processes import HERE, Job

SLOW = pytest.mark.slow
SOON = 6  # seconds: 5, and those of a busy machine


def job(tmp_path, case):
    return Job(tmp_path, [HERE / "hangs.py", case, tmp_path / "run"], 2, devices=2)


DIFFERENT = ("the processes are at different calls: {} at hangs.py:\\d+.* on process 0; {} at "
             "hangs.py:\\d+ on process 1. ")
CASES = {  # by case of hangs.py: the reason, which the processes print
    "save": DIFFERENT.format("Checkpointer.save", "TrainStep"),
    "evaluate": DIFFERENT.format("EvalStep", "TrainStep"),
    "end": "process 1 ended, but process 0 called TrainStep at hangs.py:\\d+, a call that "
            "processes 0-1 must make together. Last calls: Feed at hangs.py:\\d+ on process 1.",
    "another function": "the processes are at different calls: Jitted at hangs.py",
    "exit": "process 1 failed: SystemExit: 3",
    "exit of the first": "process 0 failed: SystemExit: 3",
    "kill": "process 1 was killed, aborted or disconnected. Last calls: \\w+ at hangs.py:\\d+ on "
            "process 1.",
    "error": "process 1 failed: IndexError: list index out of range",
    "another save": "Checkpointer.save: the processes differ, and would not run the same program:"
                    "\\n  step: 2 on process 0; 3 on process 1",
}


@pytest.mark.parametrize("case", [case if case in ("save", "exit") else
                                  pytest.param(case, marks=SLOW) for case in CASES])
def test_all_processes_end_with_the_reason(tmp_path, case):
    with job(tmp_path, case) as both:
        for process in both:
            process.wait_for("step 3")
        statuses = both.wait(SOON)
        assert set(statuses) == {1, 3} if "exit" in case else not {0, 75} & set(statuses)
        errors = both[0].err + both[1].err
        assert re.search(CASES[case], errors), errors


@pytest.mark.slow
def test_a_call_that_fails_on_one_process_is_not_awaited(tmp_path):
    """Its error was caught, so that the job goes on."""
    with job(tmp_path, "caught") as both:
        assert both.wait(90) == [0, 0], [process.err[-2000:] for process in both]


@pytest.mark.slow
def test_a_program_of_ones_own_that_waits_is_ended_by_the_watchdog(tmp_path):
    """The stacks of both show where they wait."""
    with job(tmp_path, "own program") as both:
        both.wait(90)
        errors = [process.err for process in both]
    text = (f"process.* made no call of zerojax for more than {WATCHDOG} s. Last calls: .* on "
            "process.* The watchdog ends the job.")
    assert all(re.search(text, error) for error in errors), errors
    waits = [re.search(r"hangs\.py\", line \d+ in (\S+)", error)[1] for error in errors]
    assert waits == ["<lambda>", "main"]


@pytest.mark.slow
def test_a_late_process_is_reported_and_awaited(tmp_path):
    with job(tmp_path, "late") as both:
        assert both.wait(90) == [0, 0], [process.err[-2000:] for process in both]
        for process in both:
            assert re.search("WARNING:zerojax:process 0 called Checkpointer.save at hangs.py:\\d+, "
                             "more than 1 s ago, and process 1 did not", process.err)
