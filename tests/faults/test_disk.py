"""Disks that are full, and directories that can't be written (faults 6 and 7)."""

import os
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
import states
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.checkpoint import safetensors


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; where mounting is not permitted, limits on this process's files can't stand in for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def large(step):
    """3 MB that can't be compressed."""
    x = np.random.default_rng(step).integers(0, 2**32, (768, 1024), np.uint32)
    return {"step": step, "w": jax.device_put(x, NamedSharding(states.zero().mesh, P("data")))}


def test_a_full_disk_is_an_error_by_the_next_step(small_disk):
    checkpoints = zj.Checkpointer(small_disk / "c", keep=None, every=10)
    for step in (10, 20):
        checkpoints.save(large(step))
        checkpoints.wait()
    checkpoints.save(large(30))
    with pytest.raises(zj.CheckpointError, match=r"save into .* failed: (.|\n)*No space left") as error:
        for step in range(31, 40):  # none that is saved: each call tells of the failure
            time.sleep(0.5)
            checkpoints.save(None, step=step)
    assert "Steps [10, 20] are whole, what the failed save left is removed; make room for it" in str(error.value)
    assert sorted(p.name for p in (small_disk / "c").iterdir()) == ["10", "20"]
    for step in (10, 20):
        assert states.bits(checkpoints.restore(step, large(0)).state["w"]) == states.bits(large(step)["w"])
    shutil.rmtree(small_disk / "c/10")
    assert checkpoints.save(large(40))  # there is room now, and the same checkpointer goes on
    checkpoints.close()
    assert states.bits(zj.Checkpointer(small_disk / "c").restore_latest(large(0)).state["w"]) == states.bits(large(40)["w"])


def test_leaving_the_block_tells_too(small_disk):
    with pytest.raises(zj.CheckpointError, match="No space left"), zj.Checkpointer(small_disk / "c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(large(step))


def test_an_export_to_a_full_disk_leaves_nothing(small_disk, tmp_path):
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(large(1) | {"v": large(2)["w"], "u": large(3)["w"]})
    with pytest.raises(zj.CheckpointError, match="No space left"):
        safetensors.export_safetensors(tmp_path / "c", small_disk / "m.safetensors", only="[uvw]")
    assert list(small_disk.iterdir()) == []


def test_the_first_save_removes_what_others_left(tmp_path):
    """Not before: another process that restores may not end the save of the one that trains."""
    states.saved(tmp_path, [1])
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-1700000000"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state/d").write_bytes(b"x" * 100)
    (tmp_path / "notes").mkdir()  # not ours
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore_latest(states.target())
        assert len(list(tmp_path.iterdir())) == 4 and checkpoints.steps() == [1]
        checkpoints.save(states.state(step=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "notes"]


@pytest.mark.parametrize("why", ["below a file", "a file itself", "read only"])
def test_a_directory_that_cannot_be_written(tmp_path, why):
    """Before the first step. (Permissions do not stop root; a file system that is read only does.)"""
    (tmp_path / "file").write_text("")
    where = {"below a file": tmp_path / "file/c", "a file itself": tmp_path / "file", "read only": "/sys/zerojax"}[why]
    with pytest.raises(zj.CheckpointError, match=rf"{where} can't be written: .*; give a directory that can"):
        zj.Checkpointer(where)


def test_a_file_system_turned_read_only(small_disk):
    checkpoints = zj.Checkpointer(small_disk / "c")
    checkpoints.save(large(1))
    checkpoints.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(zj.CheckpointError, match=r"failed: (.|\n)*Read-only file system"):
        checkpoints.save(large(2))
        checkpoints.wait()
    assert os.listdir(small_disk / "c") == ["1"]
    assert states.bits(checkpoints.restore(1, large(0)).state["w"]) == states.bits(large(1)["w"])
