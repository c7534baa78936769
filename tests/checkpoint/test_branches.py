"""Snapshots of runs that went back, or whose snapshots fail, in one process."""

import concurrent.futures
import json

import pytest
import states
from hosts import Killed, files, killed_after, newest, opened, restored

import zerojax as zj
from zerojax.checkpoint import slots
from zerojax.processes import monitor


def test_a_step_that_was_moved_away_takes_later_snapshots_with_it(tmp_path, base):
    """The user continues from an earlier step on disk."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(states.state(seed=step, step=step), force=True)
            checkpoints.wait()
        checkpoints.save(states.state(seed=3, step=3))
        checkpoints.wait()
        raise Killed
    (tmp_path / "c/2").rename(tmp_path / "2")
    assert restored(tmp_path).step == 1


def killed_on_disk(tmp_path, *steps, seed, **options):
    """Continues from the newest step, saves steps to disk, and is killed."""
    with pytest.raises(Killed), opened(tmp_path, **options) as checkpoints:
        checkpoints.restore_latest(states.target(), if_none="none")
        for step in steps:
            checkpoints.save(states.state(seed=seed, step=step), force=True)
        checkpoints.wait()
        raise Killed


@pytest.mark.parametrize("options", [{"snapshot_every": 50}, {"memory": False}], ids=str)
def test_snapshots_of_a_run_that_was_left_never_count_again(tmp_path, base, options):
    """Although the run that continued from an earlier step takes none, and reaches the same step.

    Its step is on disk, and lower than that of the snapshot.
    """
    killed_on_disk(tmp_path, 10, 20, seed=1)
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.restore_latest(states.target())
        checkpoints.save(states.state(seed=1, step=25))
        checkpoints.wait()
        raise Killed
    (tmp_path / "c/20").rename(tmp_path / "20")
    killed_on_disk(tmp_path, 20, seed=2, **options)
    found = restored(tmp_path)
    assert states.bits(found.state) == states.bits(states.state(seed=2, step=20))


def test_a_checkpointer_without_snapshots_beside_one_that_has_them(tmp_path, base):
    """Such as one for the best or the last step of a run."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=1))
        with opened(tmp_path, memory=False) as other:
            other.save(states.state(seed=2, step=2), force=True)
        checkpoints.save(states.state(seed=3, step=3))
        checkpoints.wait()
        raise Killed
    assert restored(tmp_path).step == 3


def test_a_save_that_cannot_begin_a_run_keeps_the_snapshots(tmp_path, base, monkeypatch):
    killed_on_disk(tmp_path, 1, seed=1)
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.restore_latest(states.target())
        checkpoints.save(states.state(seed=2, step=2))
        checkpoints.wait()
        raise Killed
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(1, states.target())
        with monkeypatch.context() as broken:
            broken.setattr(type(checkpoints.directory), "replace", fail)
            with pytest.raises(zj.CheckpointError, match="is not writable: no"):
                checkpoints.save(states.state(seed=3, step=3))
        assert checkpoints.restore_latest(states.target()).step == 2


def fail(*_):
    raise OSError("no")


def test_snapshots_count_until_the_run_that_left_them_writes(tmp_path, base):
    """A run that only reads, such as an evaluation, takes nothing from another."""
    killed_after(tmp_path, states.state(seed=3, step=3))
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(states.target(), if_none="none") is None
    assert restored(tmp_path).step == 3


def test_a_run_that_continues_from_an_earlier_step_forgets_later_snapshots(tmp_path, base):
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=1), force=True)
        for step in (5, 6):
            checkpoints.save(states.state(seed=step, step=step))
        checkpoints.wait()
        raise Killed
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        state = checkpoints.restore(1, states.target()).state
        checkpoints.save(state.replace(step=state.step + 1))
        checkpoints.wait()
        raise Killed
    assert restored(tmp_path).step == 2


def test_going_back_within_a_run(tmp_path, base):
    """Such as after a spike of the loss: steps of the old branch are never used, nor mixed."""
    def state(step, seed):
        return states.state(seed=seed, step=step)

    killed_after(tmp_path, state(10, 1), state(20, 2), state(15, 3))
    assert states.bits(restored(tmp_path).state) == states.bits(state(15, 3))
    killed_after(tmp_path, state(10, 1), state(20, 2), state(15, 3), state(20, 4))
    assert states.bits(restored(tmp_path).state) == states.bits(state(20, 4))


def test_going_back_to_the_same_step(tmp_path, base):
    """The next save is of a new branch, although its step is that of the last snapshot."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=10), force=True)
        checkpoints.save(states.state(seed=1, step=20))
        checkpoints.restore(10, states.target())
        checkpoints.save(states.state(seed=2, step=20))
        checkpoints.wait()
        raise Killed
    assert states.bits(restored(tmp_path).state) == states.bits(states.state(seed=2, step=20))


def test_snapshots_after_the_step_that_was_restored_are_abandoned(tmp_path, base):
    """Also those before the first step that is saved then."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=10), force=True)
        checkpoints.save(states.state(seed=1, step=20))
        checkpoints.wait()
        checkpoints.restore(10, states.target())
        checkpoints.save(states.state(seed=2, step=30))
        checkpoints.wait()
        raise Killed
    steps = [json.loads(p.read_text())["step"] for p in files(base, "0-*.json")]
    assert steps == [30]


def test_two_branches_have_different_identities(tmp_path, base):
    """Otherwise parts of both could be mixed."""
    attempts = []
    with opened(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.save(states.state(step=5))
            checkpoints.wait()
            attempts.append(json.loads(newest(base)[0].read_text())["attempt"])
            checkpoints.save(states.state(step=4))
    assert attempts[0] != attempts[1]


def fails_once(monkeypatch, error):
    """Makes the next write of a slot fail in its middle."""
    write = slots._replace

    def fails(path, content):
        monkeypatch.setattr(slots, "_replace", write)
        raise error

    monkeypatch.setattr(slots, "_replace", fails)


def test_a_failed_snapshot_may_be_repeated(tmp_path, base, monkeypatch):
    """A second failure does not cost the whole one in the other slot."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=4, step=4))
        checkpoints.wait()
        for _ in range(2):
            fails_once(monkeypatch, OSError("no luck"))
            checkpoints.save(states.state(seed=5, step=5))
            with pytest.raises(zj.CheckpointError, match="no luck"):
                checkpoints.wait()
            assert json.loads(newest(base)[0].read_text())["step"] == 4
        checkpoints.save(states.state(seed=5, step=5))
        checkpoints.wait()
        raise Killed
    assert states.bits(restored(tmp_path).state) == states.bits(states.state(seed=5, step=5))


def test_a_failure_outlives_an_interrupted_wait(tmp_path, base, monkeypatch):
    checkpoints = opened(tmp_path)
    fails_once(monkeypatch, OSError("no luck"))
    checkpoints.save(states.state(step=1))
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(concurrent.futures, "wait",
                            lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        checkpoints._snapshots.wait()
    with pytest.raises(zj.CheckpointError, match="no luck"):
        checkpoints.wait()
    checkpoints.close()


def test_a_failure_is_shown_when_another_error_ends_the_run(tmp_path, base, monkeypatch):
    with (pytest.warns(UserWarning, match="step 1 in memory failed: no luck"),
          pytest.raises(Killed), opened(tmp_path) as checkpoints):
        fails_once(monkeypatch, OSError("no luck"))
        checkpoints.save(states.state(step=1))
        raise Killed


def test_all_processes_have_a_snapshot_before_any_overwrites_the_one_before(tmp_path, base,
                                                                            monkeypatch):
    """Two checkpointers of a job do not meet each other; a process that fails tells the others."""
    met = []

    def barrier(tag, value):
        whole = sorted(json.loads(p.read_text())["step"] for p in files(base, "0-*.json"))
        met.append((tag, value, whole))

    monkeypatch.setattr(monitor, "barrier", barrier)
    one, two = opened(tmp_path), zj.Checkpointer(tmp_path / "d", memory=True)
    for step in (1, 2, 3):
        one.save(states.state(step=step))
        one.wait()
    fails_once(monkeypatch, OSError("no luck"))
    one.save(states.state(step=4))
    with pytest.raises(zj.CheckpointError, match="no luck"):
        one.wait()
    one.close()
    assert [(value, whole) for _, value, whole in met] == [
        ("step 1", [1]), ("step 2", [1, 2]), ("step 3", [2, 3]), ("step 4, which failed", [3])]
    two.save(states.state(step=1))
    two.wait()
    two.close()
    tags = [tag for tag, *_ in met]
    assert len(set(tags)) == 5 and tags[0].startswith("snapshot 1 of checkpointer ")
