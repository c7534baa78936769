"""Processes that see different checkpoints.

The first process decides which steps exist, and an error on one process is an error on all.
"""

import json
import pathlib
import re
import shutil

import pytest
import states
from processes import HERE, Job

import zerojax as zj


def damage(directory):
    """Overwrites the end of each array file of step 2."""
    for file in pathlib.Path(directory / "2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-40] + bytes(40))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(reports of both processes by case, their standard error, the directory of the last case)."""
    tmp_path = tmp_path_factory.mktemp("views")
    both, first, damaged, torn = (tmp_path / name for name in ("both", "first", "damaged", "torn"))
    states.saved(both, steps=(1, 2))
    shutil.copytree(both / "1", first / "1")
    shutil.copytree(both, damaged)
    damage(damaged)
    shutil.copytree(both, torn)
    (torn / "2" / "manifest" / "metadata").write_text("{")
    cases = {  # directory of each process, steps that the second process lists, seconds
        "a later step": ([first, both], None, 0),
        "listed late": ([both, both], [1], 0),
        "found late": ([both, both], [1], 1.0),
        "no latest": ([both, first], None, 0),
        "damage": ([both, damaged], None, 0),
        "damage here, nothing there": ([torn, first], None, 0)}
    positions = tmp_path / "positions"
    command = [HERE / "views.py", positions, json.dumps(list(cases.values()), default=str)]
    with Job(tmp_path, command, 2, 4) as job:
        assert job.wait(90) == [0, 0], [p.err[-4000:] for p in job]
        lines = [re.findall(r"^view: (.*)", p.out, re.MULTILINE) for p in job]
        reports = dict(zip([*cases, "not shared", "positions"], zip(*lines, strict=True),
                           strict=True))
        return reports, [p.err for p in job], positions


@pytest.fixture(scope="module")
def reports(job):
    return job[0]


def test_a_process_that_sees_a_later_step(reports):
    assert reports["a later step"] == ("restored 1 {'next': 1}",) * 2


def test_a_process_that_does_not_list_the_latest_step_yet(reports):
    assert reports["listed late"] == ("restored 2 {'next': 2}",) * 2


def test_a_process_that_finds_files_late(reports):
    """Neither the probe of the directory nor the step, because the file system of its host has
    cached that they do not exist."""
    assert reports["found late"] == ("restored 2 {'next': 2}",) * 2


def test_a_process_without_the_latest_step(reports):
    first, second = reports["no latest"]
    kind, text = second.split(" ", 1)
    assert kind == "CheckpointError" and "has no step 2; it has [1]" in text
    assert first == ("CheckpointError process 1 of 2 failed; process 1 reports: "
                     f"CheckpointError: {text}")


def test_damage_that_one_process_sees(job):
    """All processes skip the step."""
    reports, errors, _ = job
    assert reports["damage"] == ("restored 1 {'next': 1}",) * 2
    assert all("skipped step 2" in text for text in errors)


def test_damage_for_one_process_and_no_step_for_the_other(reports):
    """A step that is damaged for one process is skipped on all."""
    assert reports["damage here, nothing there"] == ("restored 1 {'next': 1}",) * 2


def test_a_directory_that_is_not_shared(reports):
    first, second = reports["not shared"]
    assert re.search(r"positions-1 is not the same directory for process 1 as for process 0: "
                     r"\.zerojax-\w+, which process 0 wrote, is missing\. Give", second)
    assert first.startswith("process 1 of 2 failed; process 1 reports: CheckpointError: ")
    assert second in first


def test_each_process_continues_from_its_own_position(job):
    """With the same number of processes; a single process cannot choose between the positions."""
    reports, _, directory = job
    assert reports["positions"] == tuple(f"{{'next': {n}, 'bytes': b'\\x00'}}" for n in (10, 11))
    with zj.Checkpointer(directory) as checkpoints:
        with pytest.raises(zj.CheckpointError, match="saved by 2 processes, each at "):
            checkpoints.restore_latest(states.target())
        assert checkpoints.restore_latest(states.target(), only=".*").data_state is None
