"""The memory of a host: what it has of earlier attempts, and whether it is enough."""

import errno
import os
import shutil

import disks
import numpy as np
import pytest
import states
from hosts import Killed, files, holder, killed_after, opened, restored, steps

import zerojax as zj
from zerojax.checkpoint import slots

KB = 1024


def opened_slots(process=0, first=99):
    made = slots.Slots("/checkpoints", process)
    made.open()
    made.find_left()
    made.branch("run", first)
    return made


def write(made, step, total):
    header = {"format": slots.FORMAT, "run": "run", "step": step}
    made.write(header, [np.full(total, step, np.uint8)], [0], total)


def left(process, total, *taken):
    """Leaves slots as a process that is killed would."""
    made = opened_slots(process)
    made.allocate(total)
    for step in taken:
        write(made, step, total)
    made.release()


def move(base, owner, to):
    """Gives slots another owner, as if the hosts had another order at the restart."""
    for path in files(base, f"{owner}[-.]*"):
        path.rename(path.with_name(f"{to}{path.name.removeprefix(owner)}"))


def test_a_process_takes_over_what_another_has_left(tmp_path, base):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2, 3)))
    move(base, "0", "1")
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(states.target()).step == 3
        checkpoints.save(states.state(seed=4, step=4))
        checkpoints.wait()
        assert steps(base) == [4] and not files(base, "1*")
        raise Killed
    assert restored(tmp_path).step == 4


def test_only_the_newest_that_was_left_stays_until_there_is_another(base):
    for process in (1, 2):
        left(process, KB, 7, 8)
    made = opened_slots()
    assert steps(base) == [8, 8] and len(files(base, "[12]-*.data")) == 2
    made.allocate(KB)
    write(made, 9, KB)
    assert steps(base) == [8, 8, 9]
    made.remove_left()
    assert steps(base) == [9] and not files(base, "[12]*")
    made.remove()
    assert list(base.iterdir()) == []


def test_another_branch_that_was_left_is_removed_before_the_first_snapshot(base):
    left(0, KB, 5)
    left(1, KB, 8, 9)
    made = opened_slots(first=6)
    assert steps(base) == [5]
    made.release()


def test_the_slots_of_a_living_process_stay(base):
    left(1, KB, 8, 9)
    with holder(base, "/checkpoints", 1):
        made = opened_slots(first=1)
        made.remove_left()
        assert steps(base) == [8, 9]
        made.release()


def test_a_link_to_the_directory_has_the_same_snapshots(tmp_path, base):
    killed_after(tmp_path, states.state(step=1))
    (tmp_path / "link").symlink_to("c")
    with zj.Checkpointer(tmp_path / "link", memory=True) as checkpoints:
        assert checkpoints.restore_latest(states.target()).step == 1


def test_the_end_removes_what_was_left(tmp_path, base):
    killed_after(tmp_path, states.state(step=1))
    move(base, "0", "3")
    assert restored(tmp_path).step == 1
    assert list(base.iterdir()) == []


def test_a_kill_in_the_first_snapshot_of_another_mesh(tmp_path, base, monkeypatch):
    """Its slots have another size, and the other slot keeps its snapshot."""
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2, 3)))
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(states.target(states.zero(4)))
        monkeypatch.setattr(slots.Slots, "_memory", lambda *_: (_ for _ in ()).throw(OSError))
        checkpoints.save(found.state.replace(step=found.state.step + 1))
        with pytest.raises(zj.CheckpointError, match="step 4 in memory failed"):
            checkpoints.wait()
        raise Killed
    monkeypatch.undo()
    monkeypatch.setattr(slots, "BASE", base)
    assert states.bits(restored(tmp_path).state) == states.bits(states.state(seed=3, step=3))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Shared memory of 1 MB."""
    with disks.small(tmp_path / "small", 1) as path:
        monkeypatch.setattr(slots, "BASE", path)
        yield path


def test_a_memory_that_is_too_small_for_larger_slots_keeps_the_snapshots(small):
    left(0, 300 * KB, 1, 2)
    made = opened_slots()
    with pytest.raises(zj.CheckpointError, match=r"take 2 x 600\.0 KiB"):
        made.allocate(600 * KB)
    assert steps(small) == [1, 2]
    made.allocate(400 * KB)
    for step in (3, 4, 5):
        write(made, step, 400 * KB)
    assert steps(small) == [4, 5]
    made.release()


def test_a_memory_with_room_for_one_snapshot_only(small):
    """The error has the bytes that are free without the slot that was allocated."""
    made = opened_slots()
    with pytest.raises(zj.CheckpointError, match=r"take 2 x 600.* has 1,0\d\d\.\d KiB left"):
        made.allocate(600 * KB)
    made.release()


def test_what_others_have_left_counts_as_free(small):
    """One process has the parts of two, and there is room for two snapshots only."""
    for process in (0, 1):
        left(process, 200 * KB, 1, 2)
    made = opened_slots()
    made.allocate(400 * KB)
    write(made, 3, 400 * KB)
    assert steps(small) == [2, 2, 3]
    made.remove_left()
    write(made, 4, 400 * KB)
    assert steps(small) == [3, 4]
    made.release()


def test_smaller_slots_give_memory_back(base):
    left(0, 8 * KB, 1, 2)
    made = opened_slots()
    made.allocate(KB)
    for step in (3, 4):
        write(made, step, KB)
    assert [path.stat().st_size for path in files(base, "*.data")] == [KB, KB]
    made.release()


def test_a_host_without_enough_memory_is_like_a_full_one(base, monkeypatch):
    """Such as one with a limit for a container."""
    def refuse(*_):
        raise OSError(errno.ENOMEM, "no memory")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    made = opened_slots()
    with pytest.raises(zj.CheckpointError, match="Enlarge it"):
        made.allocate(KB)
    assert not files(base, "*.data")
    made.release()


def test_two_checkpointers_of_a_process_with_one_directory(tmp_path, base):
    first = opened(tmp_path)
    first.save(states.state(step=1))
    with pytest.raises(zj.CheckpointError, match=r"another checkpointer of this process keeps "
                                                 "snapshots of .*/c; close it first, or give"):
        opened(tmp_path)
    first.save(states.state(step=2))
    first.close()
    opened(tmp_path).close()


@pytest.mark.parametrize("what", ["files", "folder"])
def test_snapshots_go_on_after_somebody_has_removed_them(tmp_path, base, what):
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(states.state(step=step))
            checkpoints.wait()
            if step == 2:
                (folder,) = base.glob("zerojax-*")
                shutil.rmtree(folder)
                if what == "files":
                    folder.mkdir(mode=0o700)
        raise Killed
    assert restored(tmp_path).step == 4
