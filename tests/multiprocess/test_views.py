"""Processes that see different checkpoints (fault 19): the first one's view decides, and what fails on one fails on all."""

import json
import pathlib
import re
import shutil

import pytest
import states
from processes import HERE, Job

import zerojax as zj


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Case by case, what each process came to; its standard error; where the last case was saved."""
    tmp_path = tmp_path_factory.mktemp("views")
    both, first, damaged, torn = (tmp_path / name for name in ("both", "first", "damaged", "torn"))
    states.saved(both, steps=(1, 2))
    shutil.copytree(both / "1", first / "1")
    shutil.copytree(both, damaged)
    shutil.copytree(both, torn)
    (torn / "2" / "manifest" / "metadata").write_text("{")
    for file in pathlib.Path(damaged / "2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-40] + bytes(40))
    positions = tmp_path / "positions"
    cases = {"a later step": ([first, both], None), "listed late": ([both, both], [1]), "no latest": ([both, first], None),
             "damage": ([both, damaged], None), "damage here, nothing there": ([torn, first], None)}
    with Job(tmp_path, [HERE / "views.py", positions, json.dumps(list(cases.values()), default=str)], 2, 4) as job:
        assert job.wait(90) == [0, 0], [p.err[-2000:] for p in job]
        said = [[line.removeprefix("view: ") for line in p.out.splitlines() if line.startswith("view: ")] for p in job]
        names = [*cases, "not shared", "positions"]
        return dict(zip(names, zip(*said, strict=True), strict=True)), [p.err for p in job], positions


def test_one_that_sees_a_later_step(views):
    assert views[0]["a later step"] == ("restored 1 {'next': 1}",) * 2


def test_one_that_does_not_list_the_latest_yet(views):
    assert views[0]["listed late"] == ("restored 2 {'next': 2}",) * 2


def test_one_that_has_not_the_latest(views):
    first, second = views[0]["no latest"]
    kind, text = second.split(" ", 1)
    assert kind == "CheckpointError" and "has no step 2; it has [1]" in text
    assert first == f"CheckpointError process 1 of 2 failed; process 1 says: CheckpointError: {text}"


def test_damage_that_one_sees(views):
    """All pass over the step."""
    assert views[0]["damage"] == ("restored 1 {'next': 1}",) * 2
    assert all("passed over step 2" in text for text in views[1])


def test_damage_that_one_sees_where_the_other_sees_nothing(views):
    """All do the same: a step that is damaged for one is passed over."""
    assert views[0]["damage here, nothing there"] == ("restored 1 {'next': 1}",) * 2


def test_a_directory_that_is_not_shared(views):
    first, second = views[0]["not shared"]
    assert re.search(r"positions-1 of process 1 is not that of process 0, whose \.zerojax-\w+ is not there; give", second)
    assert first.startswith("process 1 of 2 failed; process 1 says: CheckpointError: ") and second in first


def test_each_process_goes_on_from_its_own_position(views):
    """As many processes do; one alone can't tell which position is its own."""
    said, _, directory = views
    assert said["positions"] == tuple(f"{{'next': {n}, 'bytes': b'\\x00'}}" for n in (10, 11))
    with zj.Checkpointer(directory) as checkpoints:
        with pytest.raises(zj.CheckpointError, match="saved by 2 processes, each at a place of its own"):
            checkpoints.restore_latest(states.target())
        assert checkpoints.restore_latest(states.target(), only=".*").data_state is None
