"""Safetensors: what is exported is what was saved, and each device reads its part of what is imported."""

import json
import os
import pathlib
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import states
from safetensors.numpy import load_file, save_file

import zerojax as zj


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    states.saved(directory, [1, 2])
    return directory


def equal(tree, want):
    assert states.bits(tree) == states.bits(want)


def test_what_is_exported_loads_in_plain_safetensors(checkpoint, tmp_path):
    files = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    assert files == [tmp_path / "m.safetensors"] == list(tmp_path.iterdir())
    loaded, state = load_file(files[0]), states.state(seed=2)
    assert set(loaded) == {"w", "odd", "half", "none"}
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, np.asarray(state.params[name]), strict=True)
    with safetensors.safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "flax", "step": "2"}


def test_dtype_names_and_step(checkpoint, tmp_path):
    rename = {"^w$": "layers.0.weight", r"^(o.*)": r"x.\1"}
    file, = zj.export_safetensors(checkpoint / "1", tmp_path / "m.safetensors", dtype="bfloat16", rename=rename)
    state = states.state(seed=1)
    assert json.loads(file.read_bytes()[8:8 + struct.unpack("<Q", file.read_bytes()[:8])[0]])["x.odd"]["dtype"] == "BF16"
    found = zj.load_safetensors(file, states.target().params, rename=rename, cast=True)
    equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.params))


def test_files_of_a_size_and_their_index(checkpoint, tmp_path):
    *files, index = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors", shard_bytes=160)
    assert [f.name for f in files] == [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    note = json.loads(index.read_text())
    assert note["metadata"]["total_size"] == sum(x.nbytes for f in files for x in load_file(f).values()) == 8192 + 60 + 96
    assert all(name in load_file(tmp_path / file) for name, file in note["weight_map"].items())
    equal(zj.load_safetensors(tmp_path, states.target().params), states.state(seed=2).params)


@pytest.mark.parametrize("options", [{}, {"stage": 0}, {"devices": 2}, {"replica": 2}], ids=str)
def test_import_onto_any_mesh(checkpoint, tmp_path, options):
    file, = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    policy = states.zero(**options)
    live = states.state(policy, seed=9)
    found = zj.load_safetensors(file, live)
    equal(found.params, states.state(seed=2).params)
    equal(found.opt_state, live.opt_state)
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, found, live))


def test_each_device_reads_its_part_once(checkpoint, tmp_path, monkeypatch):
    from zerojax.checkpoint import safetensors

    file, = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    read, slice_ = [], safetensors._slice
    monkeypatch.setattr(safetensors, "_slice", lambda tensor, index, x: read.append(slice_(tensor, index, x)) or read[-1])
    zj.load_safetensors(file, {"w": states.target(states.zero(replica=2)).params["w"]}, rename={})
    assert [x.shape for x in read] == [(16, 32)] * 4


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


def test_model_state_goes_along(tmp_path):
    policy = states.zero()
    state = policy.init(Net().init, states.tx, jax.random.key(0), jnp.ones((2, 4)))
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    file, = zj.export_safetensors(tmp_path / "c", tmp_path / "m.safetensors")
    assert set(load_file(file)) == {"Dense_0.kernel", "Dense_0.bias", "BatchNorm_0.scale", "BatchNorm_0.bias",
                                    "batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"}
    other = policy.init(Net().init, states.tx, jax.random.key(1), jnp.ones((2, 4)))
    found = zj.load_safetensors(file, other)
    equal((found.params, found.model_state), (state.params, state.model_state))


def _large(directory):
    with zj.Checkpointer(directory / "large") as checkpoints:
        checkpoints.save({"step": 0, "params": {"w": jnp.full(3, 1e5)}})
    return directory / "large"


EXPORTS = {
    "a file that is there": (lambda c, d: [zj.export_safetensors(c, d / "m.safetensors") for _ in range(2)], "is there already"),
    "another suffix": (lambda c, d: zj.export_safetensors(c, d / "m.bin"), "name a file that ends in .safetensors"),
    "a directory that is not there": (lambda c, d: zj.export_safetensors(c, d / "x/m.safetensors"), "in a directory that is there"),
    "a dtype that is none": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", dtype="f8"), "'f8' is no floating dtype"),
    "two of one name": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", rename={".*": "x"}), "would both be named"),
    "no regex": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", rename={"(": "x"}), "no regular expression"),
    "integers": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", dtype="int8"), "'int8' is no floating dtype"),
    "what float16 can't hold": (lambda c, d: zj.export_safetensors(_large(c.parent), d / "m.safetensors", dtype="float16"),
                                "params/w has values that float16 can't hold, as 100000"),
    "the header's own": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", rename={"w": "__metadata__"}), "no tensor"),
    "no regex for leaves": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", only="("), "no regular expression"),
    "no leaf": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", only="x"), "only='x' matches none of the 16 leaves"),
    "no step": (lambda c, d: zj.export_safetensors(c, d / "m.safetensors", step=5), r"has no step 5; it has \[1, 2\]"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_an_export_refuses(checkpoint, tmp_path, name):
    act, text = EXPORTS[name]
    with pytest.raises(zj.CheckpointError, match=text):
        act(checkpoint, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} <= {"m.safetensors"}


IMPORTS = {
    "a shape": ({"w": np.ones((3, 4), np.float32)}, {"w": jnp.ones((4, 3))}, r"w: float32\[3, 4\] in .* float32\[4, 3\]"),
    "a dtype": ({"w": np.ones(3, np.int32)}, {"w": jnp.ones(3)}, r"w: int32\[3\] in the checkpoint, float32\[3\] in the target"),
    "a name": ({"weight": np.ones(3, np.float32)}, {"w": jnp.ones(3)}, r"Nearest names there: \{'w': \['weight'\]\}; see rename"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_does_not_fit(tmp_path, name):
    given, target, text = IMPORTS[name]
    save_file(given, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match=text):
        zj.load_safetensors(tmp_path, target)


def test_targets_that_nothing_can_be_read_into(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match="would stay shapes; give a live state"):
        zj.load_safetensors(tmp_path, states.target())
    with pytest.raises(zj.CheckpointError, match="names no devices"):
        zj.load_safetensors(tmp_path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_a_flax_state_keeps_its_optimizer(tmp_path):
    from flax.training import train_state

    save_file({"w": np.full(3, 2, np.float32)}, tmp_path / "m.safetensors")
    state = train_state.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=states.tx)
    found = zj.load_safetensors(tmp_path, state)
    assert float(found.params["w"].sum()) == 6 and found.step == 0
    equal(found.opt_state, state.opt_state)


def test_tensors_that_are_not_wanted_are_named(tmp_path):
    save_file({"w": np.ones(3, np.float32), "left": np.ones(2)}, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="has 1 tensors that the target has no leaf for, as left"):
        zj.load_safetensors(tmp_path, {"w": jnp.ones(3)})


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    states.saved(tmp_path / "c", [1])
    for path in (tmp_path / "c/1/state/d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(zj.CorruptCheckpointError, match="step 1 in"):
        zj.export_safetensors(tmp_path / "c", tmp_path / "m.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def raw(header: dict | bytes, body: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "a header of 200 MB": struct.pack("<Q", 200 * 10**6) + b" " * 1000,
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "overlapping offsets": raw({"w": TENSOR, "v": TENSOR}),
    "offsets past the end": raw({"w": {**TENSOR, "shape": [400], "data_offsets": [0, 1600]}}),
    "offsets backwards": raw({"w": {**TENSOR, "data_offsets": [16, 0]}}),
    "a shape that its bytes are not": raw({"w": {**TENSOR, "shape": [2**40]}}),
    "a header that is no JSON": raw(b"{" * 100),
    "a pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "m.safetensors"
    file.write_bytes(HOSTILE[name])
    if "200" in name:
        with file.open("r+b") as out:
            out.truncate(300 * 10**6)
    with pytest.raises(zj.CorruptCheckpointError, match=r"m\.safetensors can't be read: "):
        zj.load_safetensors(file, {"w": jnp.ones(4)})
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


INDEXES = {
    "a path upwards": {"w": "../outside.safetensors"},
    "an absolute path": {"w": "/etc/outside.safetensors"},
    "another kind of file": {"w": "model.pkl"},
    "a number": {"w": 3},
    "a zero byte": {"w": "m\0.safetensors"},
    "a list": ["m.safetensors"],
    "a tensor that is not in its file": {"w": "m.safetensors", "other": "m.safetensors"},
    "a file that is not there": {"w": "n.safetensors"},
    "a pipe": {"w": "pipe.safetensors"},
    "a link": {"w": "link.safetensors"},
}


@pytest.mark.parametrize("name", INDEXES)
def test_hostile_indexes(tmp_path, name):
    (tmp_path / "in").mkdir()
    for file in (tmp_path / "outside.safetensors", tmp_path / "in/m.safetensors"):
        save_file({"w": np.ones(4, np.float32)}, file)
    (tmp_path / "in/link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    os.mkfifo(tmp_path / "in/pipe.safetensors")  # to open it would wait for ever
    index = tmp_path / "in/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": INDEXES[name]}))
    with pytest.raises(zj.CorruptCheckpointError):
        zj.load_safetensors(index, {"w": jnp.ones(4)})
    if name == "a link":
        found = zj.load_safetensors(index, {"w": jnp.zeros(4)}, follow_links=True)
        assert float(found["w"].sum()) == 4


def test_an_index_of_200_megabytes(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    with index.open("wb") as out:
        out.truncate(200 * 10**6)
    with pytest.raises(zj.CorruptCheckpointError, match="200,000,000 bytes, more than"):
        zj.load_safetensors(index, {"w": jnp.ones(4)})


def test_a_link_is_not_written_through(checkpoint, tmp_path):
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(zj.CheckpointError, match="is there already"):
        zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    assert not pathlib.Path(tmp_path / "elsewhere").exists()
