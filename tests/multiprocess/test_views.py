"""Processes that see different checkpoints (fault 19): the first one's view decides, and what fails on one fails on all."""

import pathlib
import shutil

import pytest
import states
from processes import HERE, Job


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("views") / "run"
    states.saved(directory, steps=(1, 2))
    return directory


def restored(tmp_path, first, second, *listed):
    with Job(tmp_path, [HERE / "views.py", first, second, *map(str, listed)], 2, 4) as job:
        assert job.wait(60) == [0, 0], [p.err[-2000:] for p in job]
        return [p.out.splitlines()[-1] for p in job], [p.err for p in job]


def test_one_that_sees_a_later_step(tmp_path, two_steps):
    shutil.copytree(two_steps / "1", tmp_path / "run" / "1")
    assert restored(tmp_path, tmp_path / "run", two_steps)[0] == ["restored 1 {'next': 1}"] * 2


def test_one_that_does_not_list_the_latest_yet(tmp_path, two_steps):
    assert restored(tmp_path, two_steps, two_steps, 1)[0] == ["restored 2 {'next': 2}"] * 2


def test_one_that_has_not_the_latest(tmp_path, two_steps):
    shutil.copytree(two_steps / "1", tmp_path / "run" / "1")
    (first, second), _ = restored(tmp_path, two_steps, tmp_path / "run")
    assert second.startswith("CheckpointError ") and "has no step 2; it has [1]" in second
    assert first.startswith("CheckpointError process 1 of 2 failed; process 1 says: CheckpointError: ") and second[20:80] in first


def test_damage_that_one_sees(tmp_path, two_steps):
    """All pass over the step."""
    shutil.copytree(two_steps, tmp_path / "run")
    for file in pathlib.Path(tmp_path / "run" / "2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-40] + bytes(40))
    said, errors = restored(tmp_path, two_steps, tmp_path / "run")
    assert said == ["restored 1 {'next': 1}"] * 2
    assert all("passed over step 2" in text for text in errors)
