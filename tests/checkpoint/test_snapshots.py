"""Snapshots in shared memory, in one process; tests/multiprocess/test_warm.py has several."""

import json
import os
import pathlib
import threading
import zlib

import disks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import states
from hosts import Killed, files, holder, killed_after, newest, opened, restored

import zerojax as zj
from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import host_copies, manifest, slots, warm
from zerojax.processes import exchange


def test_a_state_is_restored_bit_for_bit(tmp_path, base):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2, 3)))
    assert os.listdir(tmp_path / "c") == [".zerojax-run"]  # no step is on disk
    found = restored(tmp_path)
    assert states.bits(found.state) == states.bits(states.state(seed=3, step=3))
    assert (found.step, found.data_state, found.metrics) == (3, {"next": 3}, {"loss": 1.5})
    shardings = [x.sharding for x in jax.tree.leaves(found.state)]
    assert shardings == [x.sharding for x in jax.tree.leaves(states.target())]


def test_two_slots_take_turns(tmp_path, base):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2, 3)))
    steps = [json.loads(p.read_text())["step"] for p in files(base, "*.json")[:2]]
    assert sorted(steps) == [2, 3] and len(files(base, "*.data")) == 2


def test_the_next_step_may_take_the_memory_of_the_state(tmp_path, base):
    """The step donates its state, so that XLA overwrites the arrays at once."""
    zero = states.zero()
    step = zero.train_step(states.loss_fn, states.tx)
    x = np.ones((8, 64), np.float32)
    state, wanted = states.state(zero), {}
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        for number in range(1, 6):
            state, _ = step(state, x)
            wanted[number] = states.bits(state)
            checkpoints.save(state, step=number)
        state, _ = step(state, x)
        checkpoints.wait()
        raise Killed
    assert states.bits(restored(tmp_path).state) == wanted[5]


@pytest.mark.parametrize("devices, stage", [(4, 3), (1, 0), (2, 1)])
def test_another_mesh(tmp_path, base, devices, stage):
    killed_after(tmp_path, states.state(step=1))
    found = restored(tmp_path, states.target(states.zero(devices, stage)))
    assert states.bits(found.state) == states.bits(states.state(step=1))


@pytest.mark.parametrize("now", [8, 4, 1])
def test_padded_arrays(tmp_path, base, now):
    killed_after(tmp_path, states.state(states.zero(uneven="pad"), step=1))
    zero = states.zero(now, uneven="pad")
    found = restored(tmp_path, states.target(zero))
    made = zj.logical(found.state)
    assert states.bits(made) == states.bits(zj.logical(states.state(zero, step=1)))


def test_all_kinds_of_leaves(tmp_path, base):
    def state(value):
        return {"key": jax.random.key(7 * value), "numpy": np.full(3, value),
                "scalar": np.float64(value), "half": jnp.full(5, value, jnp.bfloat16),
                "complex": jnp.full(4, 1j * value), "flags": jnp.arange(4) > value,
                "int8": jnp.full((2, 2), value, jnp.int8), "empty": jnp.zeros((0, 3)),
                "float8": jnp.full(3, value, jnp.float8_e4m3fn)}

    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(state(2) | {"number": 2}, step=1)
        raise Killed
    found = restored(tmp_path, state(0) | {"number": 0}).state
    assert found.pop("number") == 2 and type(found["scalar"]) is np.float64
    assert states.bits(found) == states.bits(state(2))


def test_what_is_on_disk_counts_too(tmp_path, base):
    """The newest of both is restored, from memory if both have it."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=1), force=True)
        checkpoints.save(states.state(seed=2, step=2))
        checkpoints.save(states.state(seed=3, step=3), force=True)
        checkpoints.wait()
        raise Killed
    reads = []
    with opened(tmp_path) as checkpoints:
        reads += [(step, is_on_disk) for step, is_on_disk, _ in checkpoints._candidates()]
    assert reads == [(3, False), (3, True), (2, False), (1, True)]
    with opened(tmp_path) as checkpoints:  # the end of the context before has freed the memory
        assert [on_disk for _, on_disk, _ in checkpoints._candidates()] == [True, True]


def test_steps_between_are_not_taken(tmp_path, base):
    killed_after(tmp_path, *(states.state(step=s) for s in (1, 2, 3, 4, 5)), snapshot_every=2)
    assert restored(tmp_path).step == 4


def test_a_snapshot_that_was_not_completed_is_not_used(tmp_path, base, monkeypatch):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2)))
    write = slots._replace

    def fails(path, content):
        if path.name.endswith(".json") and path.name != "about.json":
            raise OSError("killed")
        write(path, content)

    monkeypatch.setattr(slots, "_replace", fails)
    with (pytest.raises(zj.CheckpointError, match="snapshot of step 3 in memory failed: killed"),
          opened(tmp_path) as checkpoints):
        checkpoints.restore_latest(states.target())
        checkpoints.save(states.state(seed=3, step=3))
        checkpoints.wait()
    monkeypatch.undo()
    monkeypatch.setattr(slots, "BASE", base)
    found = restored(tmp_path)
    assert found.step == 2
    assert states.bits(found.state) == states.bits(states.state(seed=2, step=2))


def test_an_error_in_the_background_is_raised_by_the_next_save(tmp_path, base, monkeypatch):
    checkpoints = opened(tmp_path)
    monkeypatch.setattr(slots, "_replace", lambda *_: (_ for _ in ()).throw(OSError("no luck")))
    checkpoints.save(states.state(step=1))
    with pytest.raises(zj.CheckpointError, match="step 1 in memory failed: no luck"):
        checkpoints.save(states.state(step=2))
    checkpoints.close()


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_noticed(tmp_path, base, part):
    """The step before is used, with a warning that names the leaf."""
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2)))
    header, data = newest(base)
    parts = [p for of in json.loads(header.read_text())["parts"].values() for p in of]
    _, offset, size, _ = parts[int(part * (len(parts) - 1))]
    content = bytearray(data.read_bytes())
    content[offset + size // 2] ^= 4
    data.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"skipped the snapshot of step 2 in memory: .*another "
                                            "checksum than its header"):
        found = restored(tmp_path)
    assert found.step == 1
    assert states.bits(found.state) == states.bits(states.state(seed=1, step=1))


def test_a_header_without_its_data(tmp_path, base):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2)))
    newest(base)[1].unlink()
    with pytest.warns(RuntimeWarning, match="skipped the snapshot of step 2 in memory: .*without "
                                            "its data"):
        assert restored(tmp_path).step == 1


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'{"digest": 1}', b"cos\nsystem\n(S'true'\ntR.",
    lambda h: h.update(step=9), lambda h: h["parts"].clear(), lambda h: h.update(run=0)],
    ids=["empty", "half", "a list", "no header", "a pickle", "step", "no parts", "run"])
def test_headers_that_were_changed_are_left_out(tmp_path, base, content):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2)))
    header, _ = newest(base)
    if callable(content):
        values = json.loads(header.read_text())
        content(values)
        content = json.dumps(values).encode()
    header.write_bytes(content)
    with pytest.warns(UserWarning, match=f"a snapshot in memory is left out: .*{header.name}, was"):
        assert restored(tmp_path).step == 1


def test_links_are_not_followed(tmp_path, base):
    killed_after(tmp_path, *(states.state(seed=s, step=s) for s in (1, 2)))
    header, _ = newest(base)
    header.rename(tmp_path / "outside")
    header.symlink_to(tmp_path / "outside")
    with pytest.warns(UserWarning, match="a snapshot in memory is left out"):
        assert restored(tmp_path).step == 1


def test_a_directory_that_others_can_write_is_refused(tmp_path, base):
    killed_after(tmp_path, states.state(step=1))
    (folder,) = base.iterdir()
    folder.chmod(0o755)
    with pytest.raises(zj.CheckpointError, match="is not a directory that only this user can read"):
        opened(tmp_path)
    folder.rename(base / "elsewhere")
    folder.symlink_to(base / "elsewhere")
    with pytest.raises(zj.CheckpointError, match="is not a directory that only this user can read"):
        opened(tmp_path)


def test_a_directory_that_was_begun_afresh_has_no_snapshots(tmp_path, base):
    killed_after(tmp_path, states.state(step=7))
    (tmp_path / "c").rename(tmp_path / "old")
    assert restored(tmp_path, if_none="none") is None


def test_the_data_position_of_each_process(tmp_path, base):
    """That of a lost process is known if all were equal in this snapshot."""
    killed_after(tmp_path, states.state(step=1))
    (header,) = (json.loads(p.read_text()) for p in files(base, "0-*.json"))
    of = {n: header | {"process": n, "processes": 2, "position": {"next": n}} for n in (0, 1)}
    snapshot = warm.Snapshot(header["step"], header["attempt"])
    both = {pathlib.Path(str(n)): h for n, h in of.items()}
    found = warm.manifest_of(exchange.Alone(), both, snapshot)
    assert found.data_states == ({"next": 0}, {"next": 1})
    one = {path: h | {"is_alike": False} for path, h in both.items() if h["process"] == 0}
    with pytest.raises(zj.CorruptCheckpointError, match="position in the data of process 1 was in"):
        warm.manifest_of(exchange.Alone(), one, snapshot)
    one = {path: h | {"is_alike": True} for path, h in one.items()}
    assert warm.manifest_of(exchange.Alone(), one, snapshot).data_states == ({"next": 0},)


def test_the_file_system_of_the_checkpoints_may_not_answer(tmp_path, base, monkeypatch):
    """Then the newest step on disk is the one that was seen last."""
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(seed=1, step=1), force=True)
        checkpoints.wait()
        checkpoints.save(states.state(seed=2, step=2))
        checkpoints.wait()
        monkeypatch.setattr(folder, "steps", lambda _: (_ for _ in ()).throw(OSError("stale")))
        checkpoints.save(states.state(seed=3, step=3))
        checkpoints.wait()
        raise Killed
    monkeypatch.undo()
    assert json.loads(newest(base)[0].read_text())["on_disk"] == 1


def test_a_whole_copy_on_the_host_takes_the_place_of_a_damaged_one(tmp_path, base):
    """Two processes of a host may hold the same part."""
    killed_after(tmp_path, states.state(seed=1, step=1))
    header, data = newest(base)
    values = json.loads(header.read_text())
    values.pop("digest")
    values["process"] = 1
    values["digest"] = manifest.sha256(values)
    header.with_name("1-0.json").write_text(json.dumps(values))
    header.with_name("1-0.data").write_bytes(data.read_bytes())
    data.write_bytes(bytes(data.stat().st_size))
    assert states.bits(restored(tmp_path).state) == states.bits(states.state(seed=1, step=1))


@pytest.fixture
def begin(monkeypatch):
    """Lets the background write the snapshots that were started."""
    event, crc = threading.Event(), zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: event.wait(20) and crc(data))
    return event.set


def test_metrics_may_change_after_a_save(tmp_path, base, begin):
    loss = np.float32([1.5])
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        metrics = {"loss": loss[0:1].reshape(())}
        checkpoints.save(states.state(step=1), step=1, metrics=metrics)
        loss[:] = metrics["more"] = 9
        begin()
        raise Killed
    assert restored(tmp_path).metrics == {"loss": 1.5}


def test_the_next_step_may_take_the_memory_of_metrics(tmp_path, base, begin):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    loss = step(jnp.float32(0.5))
    with pytest.raises(Killed), opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(step=1), step=1, metrics={"loss": loss, "note": "a"})
        jax.block_until_ready(step(loss))
        begin()
        raise Killed
    assert restored(tmp_path).metrics == {"loss": 1.5, "note": "a"}


@pytest.mark.parametrize("step", [4.0, True, -1, np.int64(4)], ids=repr)
def test_steps_that_are_no_numbers(tmp_path, base, step):
    with opened(tmp_path) as checkpoints, pytest.raises(zj.CheckpointError,
                                                        match="write a whole number, 0 or more"):
        checkpoints.save(states.state(step=4), step=step)


def test_a_step_that_is_not_the_states(tmp_path, base):
    """It is noticed when the copies are there, because nothing waits for the device."""
    checkpoints = opened(tmp_path)
    checkpoints.save(states.state(step=7), step=9)
    with pytest.raises(zj.CheckpointError, match="given step=9 and a state of step 7"):
        checkpoints.wait()
    checkpoints.close()


def test_an_end_that_fails_keeps_the_memory(tmp_path, base, monkeypatch):
    """Such as one at which another process is missing."""
    checkpoints = opened(tmp_path)
    checkpoints.save(states.state(seed=1, step=1))
    checkpoints.wait()
    monkeypatch.setattr(checkpoints, "_wait", lambda: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        checkpoints.close()
    assert restored(tmp_path).step == 1


def test_the_end_frees_the_memory(tmp_path, base):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(states.state(step=1))
        checkpoints.wait()
        assert len(files(base, "*.data")) == 2
    assert list(base.iterdir()) == []


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Shared memory of 1 MB."""
    with disks.small(tmp_path / "small", 1) as path:
        monkeypatch.setattr(slots, "BASE", path)
        yield path


def test_a_full_shared_memory_is_an_error_before_anything_is_written(tmp_path, small):
    """Without the check, the process would be killed by SIGBUS when it writes."""
    state = {"w": jnp.ones(150_000), "step": 1}
    checkpoints = opened(tmp_path)
    with pytest.raises(zj.CheckpointError, match=r"two snapshots of this process take 2 x 586\.0 "
                                                 r"KiB, and .* has .* left\. Enlarge it"):
        checkpoints.save(state, step=1)
    assert not files(small, "*.data")
    checkpoints.close()
    assert list(small.iterdir()) == []


def test_two_jobs_with_one_directory_on_a_host(tmp_path, base):
    with (holder(base, tmp_path / "c", 0) as other,
          pytest.raises(zj.CheckpointError, match=f"process {other.pid} of this host keeps "
                                                  "snapshots of .*/c too; give each job")):
        opened(tmp_path)
    opened(tmp_path).close()  # the lock of a process that was killed is gone


def test_a_host_without_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "BASE", tmp_path / "none")
    with pytest.raises(zj.CheckpointError, match=r"this host has no .*; write memory=False"):
        opened(tmp_path)


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_invalid_numbers(tmp_path, every):
    with pytest.raises(zj.CheckpointError, match=r"snapshot_every=.*write a whole number, 1 or mo"):
        zj.Checkpointer(tmp_path, memory=True, snapshot_every=every)


def test_a_state_of_another_shape_is_reported(tmp_path, base):
    killed_after(tmp_path, states.state(step=1))
    with pytest.raises(zj.CheckpointError, match="step 1 in memory does not fit the target"):
        restored(tmp_path, states.target(tx=optax.sgd(0.1)))


def test_each_part_is_kept_once():
    state = states.state(states.zero(replica=2))
    for x in jax.tree.leaves({"w": state.params["w"], "odd": state.params["odd"]}):
        parts = list(host_copies.parts(x))
        assert sum(part.size for _, part in parts) == x.size


def test_copies_are_in_the_memory_of_the_host():
    x, y = jnp.ones(4), states.state().params["w"]
    copies = host_copies.started({"x": x, "y": y})
    assert {copy.sharding.memory_kind for copy in copies.values()} == {"pinned_host"}
    assert states.bits(copies["y"]) == states.bits(y)
