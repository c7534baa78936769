"""Damaged files: flipped bits, and files that were truncated, deleted or replaced."""

import json
import os
import random
import shutil
import warnings

import jax
import numpy as np
import pytest
import states
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.checkpoint import manifest, reading


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    return directory, states.saved(directory, [1, 2])


@pytest.fixture
def damaged(pristine, tmp_path):
    """A copy of steps 1 and 2 to damage, and the bits of each step."""
    directory, bits = pristine
    shutil.copytree(directory, tmp_path / "c")
    return tmp_path / "c", bits


def files(directory, step=2):
    return sorted(p for p in (directory / str(step)).rglob("*") if p.is_file())


def data_files(directory):
    """Returns the files of step 2 that hold arrays."""
    return [p for p in files(directory) if p.parent.name == "d"]


def latest(directory):
    """Restores the newest state; returns (its step, its bits, the warnings of skipped steps)."""
    with warnings.catch_warnings(record=True) as seen, zj.Checkpointer(directory) as checkpoints:
        warnings.simplefilter("always")
        found = checkpoints.restore_latest(states.target())
    skipped = [str(w.message) for w in seen if "skipped step" in str(w.message)]
    return found.step, states.bits(found.state), skipped


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def noise(step):
    """Returns a state of random words, which the files contain unchanged: they do not compress."""
    w = np.random.default_rng(step).integers(0, 2**32, (64, 32), np.uint32)
    return {"step": step, "w": jax.device_put(w, NamedSharding(states.zero().mesh, P("data")))}


@pytest.fixture
def raw(tmp_path):
    """Steps 1 and 2 of noise, and each device's part of step 2: its file, first bit and length."""
    directory = tmp_path / "raw"
    with zj.Checkpointer(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(noise(step))
    parts = [np.asarray(shard.data).tobytes() for shard in noise(2)["w"].addressable_shards]
    found = [(path, 8 * path.read_bytes().find(part), 8 * len(part))
             for part in parts for path in data_files(directory)]
    return directory, [place for place in found if place[1] >= 0]


def test_bits_flipped_in_arrays(raw):
    """A flipped bit in any device's part is noticed, although Orbax restores it silently."""
    directory, places = raw
    rng = random.Random(0)
    assert len(places) == 8
    for path, first, length in places:
        at = first + rng.randrange(length)
        flip(path, at)
        with (zj.Checkpointer(directory) as checkpoints,
              pytest.warns(RuntimeWarning, match=r"skipped step 2(.|\n)*  w: its digest is")):
            found = checkpoints.restore_latest(noise(0))
        assert found.step == 1
        assert states.bits(found.state["w"]) == states.bits(noise(1)["w"])
        flip(path, at)


def test_bits_flipped_anywhere_do_no_harm(damaged):
    """In any file, such as an index: the restored state is the saved one, or the step before."""
    directory, bits = damaged
    rng = random.Random(1)
    for path in files(directory):
        if length := path.stat().st_size:
            at = rng.randrange(8 * length)
            flip(path, at)
            step, got, skipped = latest(directory)
            assert got == bits[step] and len(skipped) == (step == 1), (path, at)
            flip(path, at)


def test_a_bit_flipped_in_the_manifest(damaged):
    """The own digest of the manifest covers the fields beside the leaves, such as the position."""
    directory, _ = damaged
    path = directory / "2/manifest/metadata"
    content = path.read_bytes()
    assert content.count(b'"next": 2') == 1
    path.write_bytes(content.replace(b'"next": 2', b'"next": 3'))
    step, _, skipped = latest(directory)
    assert step == 1 and "the manifest's own digest does not match" in skipped[0]


def test_the_error_names_leaf_digest_step_and_what_to_do(raw):
    directory, places = raw
    flip(*places[3][:2])
    note = json.loads((directory / "2/manifest/metadata").read_text())
    with (zj.Checkpointer(directory) as checkpoints,
          pytest.raises(zj.CorruptCheckpointError) as error):
        checkpoints.restore(2, noise(0))
    text = str(error.value)
    assert (f"step 2 in {directory}: at least 1 of 2 leaves are damaged; use another step (1) or a "
            "copy of this one") in text
    assert "\n  w: its digest is " in text and text.endswith(note["leaves"]["w"]["digest"])


@pytest.mark.parametrize("how", ["truncated", "emptied", "deleted"])
def test_every_file_in_turn(damaged, how):
    directory, bits = damaged
    fell_back = 0
    for path in files(directory):
        content = path.read_bytes()
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[:len(content) // 2] if how == "truncated" else b"")
        step, got, skipped = latest(directory)
        assert got == bits[step] and len(skipped) == (step == 1), path
        assert all("skipped step 2" in text and "step 2 in" in text for text in skipped)
        fell_back += step == 1
        path.write_bytes(content)
    assert fell_back >= 3  # the manifest, the index, the data


@pytest.mark.parametrize("where", ["state", "manifest"])
def test_a_lost_directory(damaged, where):
    directory, bits = damaged
    shutil.rmtree(directory / "2" / where)
    step, got, skipped = latest(directory)
    assert step == 1 and got == bits[1] and len(skipped) == 1


def test_every_checkpoint_bad(damaged):
    directory, _ = damaged
    for step in (1, 2):
        for path in files(directory, step):
            path.write_bytes(b"")
    with (zj.Checkpointer(directory) as checkpoints,
          pytest.warns(RuntimeWarning, match="skipped step") as seen):
        for if_none in ("raise", "none"):
            with pytest.raises(zj.CorruptCheckpointError,
                               match=r"has steps \[1, 2\], and none of them loads"):
                checkpoints.restore_latest(states.target(), if_none=if_none)
    assert len(seen) == 4 and checkpoints.steps() == [1, 2]


def test_continuing_from_before_a_bad_step(damaged):
    """When training reaches the bad step again, that one is renamed, and the new one is found."""
    directory, _ = damaged
    for path in data_files(directory):
        path.write_bytes(b"")
    with (zj.Checkpointer(directory) as checkpoints,
          pytest.warns(RuntimeWarning, match="skipped step 2")):
        state = checkpoints.restore_latest(states.target()).state
        left = sorted(p.name for p in directory.iterdir())
        assert left == [".zerojax-lock", "1", "2"]  # restoring only reads
        checkpoints.save(state.replace(step=state.step + 1), force=True)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2] and len(list(directory.glob("2.unreadable-*"))) == 1
    assert latest(directory)[0] == 2


@pytest.mark.parametrize("error", [PermissionError(13, "no"), MemoryError(), TimeoutError(),
                                   ValueError("UNAVAILABLE: x"),
                                   OSError(24, "Too many open files")], ids=repr)
def test_errors_that_are_not_damage_skip_no_step(damaged, monkeypatch, error):
    def fails(path, sources):
        raise error

    monkeypatch.setattr(reading, "_read", fails)
    with zj.Checkpointer(damaged[0]) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore_latest(states.target())


def test_a_step_that_loads_again_is_not_renamed(damaged):
    """Its files were intact, and something else failed."""
    directory, _ = damaged
    path, = [p for p in data_files(directory) if p.parent.parent.name == "state"]
    content = path.read_bytes()
    path.write_bytes(b"")
    with (zj.Checkpointer(directory) as checkpoints,
          pytest.warns(RuntimeWarning, match="skipped step 2")):
        state = checkpoints.restore_latest(states.target()).state
        path.write_bytes(content)
        step_2 = state.replace(step=state.step + 1)
        assert not checkpoints.save(step_2, force=True)  # because the directory has it
    assert latest(directory)[0] == 2 and len(list(directory.iterdir())) == 3


def test_verify(damaged):
    directory, _ = damaged
    with zj.Checkpointer(directory) as checkpoints:
        assert checkpoints.verify(2).step == 2
        for path in data_files(directory):
            path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(zj.CorruptCheckpointError,
                           match=r"step 2 in .* leaves are damaged.*\n  .*: "):
            checkpoints.verify(2)
        assert checkpoints.verify(1).step == 1


def test_the_highest_step_wins_whatever_the_clock(damaged):
    directory, bits = damaged
    for path in [*files(directory, 2), directory / "2"]:
        os.utime(path, (0, 0))  # 1970, before step 1
    assert latest(directory)[:2] == (2, bits[2])


def change(directory, edit):
    """Edits the manifest of step 2, and gives it the digest that belongs to the result."""
    path = directory / "2/manifest/metadata"
    note = json.loads(path.read_text())
    note.pop("digest")
    edit(note)
    path.write_text(json.dumps(note | {"digest": manifest.sha256(note)}))


# name: (an edit of a manifest, words of the reason why it is unusable)
HOSTILE = {
    "another format": (lambda note: note.update(format=99), "its format is not 2"),
    "no leaves": (lambda note: note.pop("leaves"), "'leaves'"),
    "leaves in a list": (lambda note: note.update(leaves=[]), "no attribute 'items'"),
    "a shape of text": (lambda note: note["leaves"]["params/w"].update(shape=["../..", 1]),
                        "a leaf of shape ['../..', 1]"),
    "a leaf with an unknown field": (
        lambda note: note["leaves"]["params/w"].update(file="/etc/passwd"), "argument 'file'"),
    "another step": (lambda note: note.update(step=3), "it belongs to step 3"),
    "bytes that are not base64": (lambda note: note.update(data_states=[{"__bytes__": "?"}]),
                                  "base64"),
    "an unknown field": (lambda note: note.update(data_state={"next": 2}), "argument 'data_state'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(damaged, name):
    directory, bits = damaged
    edit, reason = HOSTILE[name]
    change(directory, edit)
    step, got, skipped = latest(directory)
    assert step == 1 and got == bits[1]
    assert "its manifest is unusable" in skipped[0] and reason in skipped[0]


def test_a_manifest_of_200_megabytes(damaged):
    directory, _ = damaged
    with (directory / "2/manifest/metadata").open("r+b") as file:
        file.truncate(200 * 10**6)  # sparse
    assert "200,000,000 bytes, more than 104,857,600" in latest(directory)[2][0]


@pytest.mark.parametrize("leads", ["to a file", "to a folder"])
def test_links_are_refused(damaged, leads):
    directory, _ = damaged
    path = files(directory)[0] if leads == "to a file" else directory / "2/state/d"
    path.rename(directory.parent / "outside")
    path.symlink_to(directory.parent / "outside")
    assert "is a link, and no checkpoint contains links" in latest(directory)[2][0]


def test_pickles_are_not_run(damaged):
    directory, bits = damaged
    ran = directory.parent / "ran"
    poison = f"cos\nsystem\n(S'touch {ran}'\ntR.".encode()
    for path in files(directory):
        path.write_bytes(poison)
    for name in ("checkpoint", "state.pkl", "state/pickle"):
        (directory / "2" / name).write_bytes(poison)
    assert latest(directory)[:2] == (1, bits[1]) and not ran.exists()


def test_names_that_lead_outside_are_names_of_leaves_and_nothing_else(damaged):
    """No file is read or written at a path made of a leaf's name."""
    directory, _ = damaged
    before = sorted(directory.parent.rglob("*"))
    change(directory, lambda note: note["leaves"].update(
        {"../../outside": note["leaves"].pop("params/w")}))
    with zj.Checkpointer(directory) as checkpoints:
        with pytest.raises(zj.CheckpointError, match=r"\.\./\.\./outside: float32\[64, 32\] in the "
                                                     "checkpoint, not in the target"):
            checkpoints.restore(2, states.target())
        with pytest.raises(zj.CorruptCheckpointError, match=r"\.\./\.\./outside: "):
            checkpoints.verify(2)
    assert sorted(directory.parent.rglob("*")) == before
