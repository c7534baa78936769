"""Exports to safetensors equal the saved or live arrays, and load onto any mesh."""

import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import states
from safetensors.numpy import load_file

import zerojax as zj
from zerojax.checkpoint import loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    states.saved(directory, [1, 2])
    return directory


def check_equal(tree, want):
    assert states.bits(tree) == states.bits(want)


def header_of(file):
    content = file.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length])


def test_exports_load_in_plain_safetensors(checkpoint, tmp_path):
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
    file, = zj.export_safetensors(checkpoint / "1", tmp_path / "m.safetensors", dtype="bfloat16",
                                  rename=rename)
    assert header_of(file)["x.odd"]["dtype"] == "BF16"
    found = zj.load_safetensors(file, states.target().params, rename=rename, cast=True)
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
                        states.state(seed=1).params)
    check_equal(found, want)


def test_files_of_a_size_and_their_index(checkpoint, tmp_path):
    *files, index = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors", shard_bytes=160)
    assert [f.name for f in files] == [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    note = json.loads(index.read_text())
    total = sum(x.nbytes for f in files for x in load_file(f).values())
    assert note["metadata"]["total_size"] == total == 8192 + 60 + 96
    assert all(name in load_file(tmp_path / file) for name, file in note["weight_map"].items())
    check_equal(zj.load_safetensors(tmp_path, states.target().params), states.state(seed=2).params)


@pytest.mark.parametrize("options", [{}, {"stage": 0}, {"devices": 2}, {"replica": 2}], ids=str)
def test_import_onto_any_mesh(checkpoint, tmp_path, options):
    file, = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    live = states.state(states.zero(**options), seed=9)
    found = zj.load_safetensors(file, live)
    check_equal(found.params, states.state(seed=2).params)
    check_equal(found.opt_state, live.opt_state)
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, found, live))


def test_each_part_is_read_once(checkpoint, tmp_path, monkeypatch):
    file, = zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    shapes, part_of = [], loading._part

    def spy(*args):
        part = part_of(*args)
        shapes.append(part.shape)
        return part

    monkeypatch.setattr(loading, "_part", spy)
    target = states.target(states.zero(replica=2))
    zj.load_safetensors(file, {"w": target.params["w"]})
    assert shapes == [(16, 32)] * 4


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


def net_state(seed):
    return states.zero().init(Net().init, states.tx, jax.random.key(seed), jnp.ones((2, 4)))


def test_model_state_is_exported_and_loaded(tmp_path):
    state = net_state(seed=0)
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    file, = zj.export_safetensors(tmp_path / "c", tmp_path / "m.safetensors")
    assert set(load_file(file)) == {"Dense_0.kernel", "Dense_0.bias", "BatchNorm_0.scale",
                                    "BatchNorm_0.bias", "batch_stats.BatchNorm_0.mean",
                                    "batch_stats.BatchNorm_0.var"}
    found = zj.load_safetensors(file, net_state(seed=1))
    check_equal((found.params, found.model_state), (state.params, state.model_state))


@pytest.mark.parametrize("policy", [{}, {"stage": 0}, {"devices": 6, "uneven": "pad"}], ids=str)
def test_a_live_state_is_exported(tmp_path, policy):
    state = states.state(states.zero(**policy), seed=2, step=7)
    file, = zj.export_safetensors(state, tmp_path / "m.safetensors")
    want = states.state(seed=2).params
    assert {name: x.tobytes() for name, x in load_file(file).items()} == {
        name: np.asarray(x).tobytes() for name, x in want.items()}
    assert header_of(file)["__metadata__"] == {"format": "flax", "step": "7"}
    alone, = zj.export_safetensors(state.params, tmp_path / "params.safetensors")
    assert set(load_file(alone)) == set(want)


def test_states_that_cannot_be_exported(checkpoint, tmp_path):
    to = tmp_path / "m.safetensors"
    taken = states.state()
    jax.tree.leaves(taken.params)[0].delete()
    with pytest.raises(zj.StateError, match="export_safetensors was given a state whose memory"):
        zj.export_safetensors(taken, to)
    with pytest.raises(zj.CheckpointError, match="are shapes without values"):
        zj.export_safetensors(states.target(), to)
    with pytest.raises(zj.CheckpointError, match="step=3 is the step of a checkpoint, but"):
        zj.export_safetensors(states.state(), to, step=3)
    assert not to.exists()


def export(**options):
    """Returns a function of a checkpoint and a directory, which exports into the directory."""
    return lambda c, d: zj.export_safetensors(c, d / "m.safetensors", **options)


def export_twice(c, d):
    for _ in range(2):
        zj.export_safetensors(c, d / "m.safetensors")


def export_large_numbers(c, d):
    large = c.parent / "large"
    with zj.Checkpointer(large) as checkpoints:
        checkpoints.save({"step": 0, "params": {"w": jnp.full(3, 1e5)}})
    zj.export_safetensors(large, d / "m.safetensors", dtype="float16")


# name: (an export that fails, words of its error)
EXPORTS = {
    "an existing file": (export_twice, "m.safetensors already exists; remove it"),
    "another suffix": (lambda c, d: zj.export_safetensors(c, d / "m.bin"),
                       "name a file that ends in .safetensors"),
    "a missing directory": (lambda c, d: zj.export_safetensors(c, d / "x/m.safetensors"),
                            "in an existing directory"),
    "an unknown dtype": (export(dtype="f8"), "'f8' is not a floating dtype"),
    "an integer dtype": (export(dtype="int8"), "'int8' is not a floating dtype"),
    "numbers beyond float16": (export_large_numbers,
                               "params/w has values that float16 cannot represent, such as 100000"),
    "two leaves of one name": (export(rename={".*": "x"}), "would both be named"),
    "an invalid regex": (export(rename={"(": "x"}), "has an invalid regular expression"),
    "a reserved name": (export(rename={"^w": "__metadata__"}),
                        "names params/w '__metadata__', which is reserved"),
    "an invalid regex for leaves": (export(only="("), "is not a regular expression"),
    "no leaf": (export(only="x"), "only='x' matches none of the 16 leaves"),
    "no such step": (export(step=5), r"has no step 5; it has \[1, 2\]"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_refuses(checkpoint, tmp_path, name):
    act, text = EXPORTS[name]
    with pytest.raises(zj.CheckpointError, match=text):
        act(checkpoint, tmp_path)
    left = ["m.safetensors"] if name == "an existing file" else []
    assert [f.name for f in tmp_path.iterdir()] == left


def test_an_export_keeps_no_copy_of_the_state(tmp_path, monkeypatch):
    state, taken = states.state(), []
    asarray = np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *a, **k: (taken.append(x), asarray(x, *a, **k))[1])
    zj.export_safetensors(state, tmp_path / "m.safetensors")
    leaves = jax.tree.leaves(state)
    assert taken and not any(x is leaf for x in taken for leaf in leaves)


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    states.saved(tmp_path / "c", [1])
    for path in (tmp_path / "c/1/state/d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(zj.CorruptCheckpointError, match="step 1 in"):
        zj.export_safetensors(tmp_path / "c", tmp_path / "m.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_a_link_is_not_written_through(checkpoint, tmp_path):
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(zj.CheckpointError, match="already exists"):
        zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    assert not (tmp_path / "elsewhere").exists()


def test_values_that_a_dtype_cannot_represent(tmp_path):
    """A float8 without infinities overflows to NaN."""
    with pytest.raises(zj.CheckpointError, match="w has values that float8_e4m3fn cannot repres"):
        zj.export_safetensors({"w": jnp.array([1.0, 1e6])}, tmp_path / "m.safetensors",
                              dtype="float8_e4m3fn")
    assert list(tmp_path.iterdir()) == []
