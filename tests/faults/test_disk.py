"""Disks that are full, and directories that are not writable."""

import os
import shutil
import subprocess
import threading
import time

import disks
import jax
import numpy as np
import pytest
import states
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.checkpoint import lock


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    with disks.small(tmp_path / "disk", 8) as path:
        yield path


def large(step):
    """Returns a state of 3 MB that cannot be compressed."""
    x = np.random.default_rng(step).integers(0, 2**32, (768, 1024), np.uint32)
    return {"step": step, "w": jax.device_put(x, NamedSharding(states.zero().mesh, P("data")))}


def test_a_full_disk_is_an_error_by_the_next_step(small_disk):
    checkpoints = zj.Checkpointer(small_disk / "c", keep=None, every=10)
    for step in (10, 20):
        checkpoints.save(large(step))
        checkpoints.wait()
    checkpoints.save(large(30))
    with pytest.raises(zj.CheckpointError,
                       match=r"save into .* failed: (.|\n)*No space left") as error:
        for step in range(31, 40):  # none of them is due, but each call raises an earlier failure
            time.sleep(0.5)
            checkpoints.save(None, step=step)
    assert ("Steps [10, 20] are intact; the remains of the failed save were removed. Make room and "
            "save again.") in str(error.value)
    assert sorted(p.name for p in (small_disk / "c").iterdir()) == [".zerojax-lock", "10", "20"]
    for step in (10, 20):
        restored = checkpoints.restore(step, large(0)).state
        assert states.bits(restored["w"]) == states.bits(large(step)["w"])
    shutil.rmtree(small_disk / "c/10")
    assert checkpoints.save(large(40))  # now there is room, and the same checkpointer continues
    checkpoints.close()
    restored = zj.Checkpointer(small_disk / "c").restore_latest(large(0)).state
    assert states.bits(restored["w"]) == states.bits(large(40)["w"])


def test_leaving_the_context_raises_the_failure_too(small_disk):
    with (pytest.raises(zj.CheckpointError, match="No space left"),
          zj.Checkpointer(small_disk / "c") as checkpoints):
        for step in (1, 2, 3):
            checkpoints.save(large(step))


def test_an_export_to_a_full_disk_leaves_nothing(small_disk, tmp_path):
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(large(1) | {"v": large(2)["w"], "u": large(3)["w"]})
    with pytest.raises(zj.CheckpointError, match="No space left"):
        zj.export_safetensors(tmp_path / "c", small_disk / "m.safetensors", only="[uvw]")
    assert list(small_disk.iterdir()) == []


def test_the_first_save_removes_the_remains_of_others(tmp_path):
    """Not earlier, because a process that restores must not end the save of one that trains."""
    states.saved(tmp_path, [1])
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-1700000000"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state/d").write_bytes(b"x" * 100)
    (tmp_path / "notes").mkdir()  # the user's
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore_latest(states.target())
        assert len(list(tmp_path.iterdir())) == 5 and checkpoints.steps() == [1]
        checkpoints.save(states.state(step=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".zerojax-lock", "1", "2", "notes"]


@pytest.mark.parametrize("why", ["below a file", "a file itself", "read only"])
def test_a_directory_that_cannot_be_written(tmp_path, why):
    """Raises before the first step.

    Permissions do not stop root, so the last case is a file system that is read only.
    """
    (tmp_path / "file").write_text("")
    where = {"below a file": tmp_path / "file/c", "a file itself": tmp_path / "file",
             "read only": "/sys/zerojax"}[why]
    with pytest.raises(zj.CheckpointError,
                       match=rf"{where} is not writable: .*\. Give a directory that is"):
        zj.Checkpointer(where)


def test_a_file_system_turned_read_only(small_disk):
    checkpoints = zj.Checkpointer(small_disk / "c")
    checkpoints.save(large(1))
    checkpoints.wait()
    lock.release(checkpoints.directory)  # a failing disk turns read-only anyway, `mount` refuses
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = threading.enumerate()
    with pytest.raises(zj.CheckpointError, match=r"disk/c is not writable: .*Read-only file sys"):
        checkpoints.save(large(2))
    assert {t for t in threading.enumerate() if not t.daemon} <= set(before)  # Orbax's would wait
    assert sorted(os.listdir(small_disk / "c")) == [".zerojax-lock", "1"]
    restored = checkpoints.restore(1, large(0)).state
    assert states.bits(restored["w"]) == states.bits(large(1)["w"])
