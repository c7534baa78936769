"""One job at a time saves into a directory, and a shared directory may show files late."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import types

import jax.numpy as jnp
import pytest
from etils import epath

import zerojax as zj
from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import lock

HOLD = """
import sys, time
from etils import epath
from zerojax.checkpoint import lock
lock.take(epath.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def save(directory, step):
    with zj.Checkpointer(directory) as checkpoints:
        checkpoints.save({"w": jnp.ones(4)}, step=step)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(lock, "WAIT", 0.3)
    monkeypatch.setattr(lock, "WARN", 0.1)
    unfinished = tmp_path / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    with pytest.raises(zj.CheckpointError, match=(
            rf"{tmp_path} is being saved into by process {holder.pid} on \S+ since .*\+00:00; "
            "give another directory, or end that job")):
        save(tmp_path, 1)
    assert unfinished.exists() and f"process {holder.pid}" in caplog.text
    holder.kill()
    holder.wait()
    save(tmp_path, 1)
    assert zj.Checkpointer(tmp_path).steps() == [1] and not unfinished.exists()


def test_checkpointers_of_one_process_share_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.0)
    first = zj.Checkpointer(tmp_path)
    first.save({"w": jnp.ones(4)}, step=1)
    first.wait()
    save(tmp_path, 2)  # its close must not free the first one's lock
    code = HOLD.replace("lock.take", "lock.WAIT = 0.0\nlock.take").replace("time.sleep(600)", "")
    refused = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert f"saved into by process {os.getpid()} on" in refused.stderr
    first.close()
    assert not lock._held


def test_a_link_to_a_directory_has_the_same_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.0)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    first = zj.Checkpointer(tmp_path / "real")
    first.save({"w": jnp.ones(4)}, step=1)
    first.wait()
    save(tmp_path / "link", 2)  # its close must not free the first one's lock
    assert len(lock._held) == 1
    code = HOLD.replace("lock.take", "lock.WAIT = 0.0\nlock.take").replace("time.sleep(600)", "")
    refused = subprocess.run([sys.executable, "-c", code, tmp_path / "real"], capture_output=True,
                             text=True)
    assert f"saved into by process {os.getpid()} on" in refused.stderr
    first.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", refuse)
    save(tmp_path, 1)
    assert zj.Checkpointer(tmp_path).steps() == [1]


def test_a_probe_that_appears_late(tmp_path, monkeypatch):
    late = threading.Timer(0.3, (tmp_path / ".probe_0").touch)
    second = types.SimpleNamespace(process=1, of_first=lambda _: ".probe",
                                   everywhere=lambda act, _: act())
    late.start()
    folder.check_shared(epath.Path(tmp_path), second)
    late.join()
    (tmp_path / ".probe_0").unlink()
    monkeypatch.setattr(folder, "WAIT", 0.1)
    with pytest.raises(zj.CheckpointError, match="not the same directory for process 1"):
        folder.check_shared(epath.Path(tmp_path), second)
