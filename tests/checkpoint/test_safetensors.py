"""Safetensors: exports equal the saved arrays, and each device reads its part of an import."""

import functools
import json
import os
import struct
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import states
from flax import nnx
from flax.training import train_state
from safetensors.numpy import load_file, save_file

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


def test_what_is_not_a_live_state(checkpoint, tmp_path):
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


# name: (the tensors of a file, a target that they do not fit, words of the error)
IMPORTS = {
    "a shape": ({"w": np.ones((3, 4), np.float32)}, {"w": jnp.ones((4, 3))},
                r"w: float32\[3, 4\] in .* float32\[4, 3\]"),
    "a dtype": ({"w": np.ones(3, np.int32)}, {"w": jnp.ones(3)},
                r"w: int32\[3\] in the checkpoint, float32\[3\] in the target"),
    "a name": ({"weight": np.ones(3, np.float32)}, {"w": jnp.ones(3)},
               r"The closest names in the files: \{'w': \['weight'\]\}; see rename"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_targets_that_do_not_fit(tmp_path, name):
    given, target, text = IMPORTS[name]
    save_file(given, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match=text):
        zj.load_safetensors(tmp_path, target)


def save_as_pytorch(folder, **tensors):
    save_file({name: np.asarray(x, np.float32) for name, x in tensors.items()},
              folder / "m.safetensors", {"format": "pt"})


SQUARE = np.arange(16).reshape(4, 4)


def test_transforms_turn_cut_and_stack(tmp_path):
    names = {f"h.{i}.qkv": np.arange(24).reshape(6, 4) + 100 * i for i in range(3)}
    save_as_pytorch(tmp_path, **names, table=SQUARE)
    kernel = {"kernel": jnp.ones((3, 4, 3))}
    target = {"h": {"key": kernel, "query": kernel}, "table": jnp.ones(4)}
    found = zj.load_safetensors(
        tmp_path, target, rename={r"^h\.\w+\.kernel": "h.*.qkv"},
        transform={"query": "(0/2 out) in -> in out", "key": "(1/2 out) in -> in out",
                   "table": lambda x: x.sum(0)})
    stacked = np.stack(list(names.values())).transpose(0, 2, 1)
    np.testing.assert_array_equal(found["h"]["query"]["kernel"], stacked[..., :3])
    np.testing.assert_array_equal(found["h"]["key"]["kernel"], stacked[..., 3:])
    np.testing.assert_array_equal(found["table"], SQUARE.sum(0))


KERNEL = {"kernel": jnp.ones((4, 4))}
# name: (options of a load of a square kernel, words of the error)
TRANSFORMS = {
    "a square kernel as it is": ({}, "stores the kernels of linear layers transposed. Write"),
    "another one transformed": ({"transform": {"other": "a b -> b a"}}, "kernel would be read"),
    "a number": ({"transform": {"kernel": 3}}, r"transform=\{'kernel': 3\}: write a pattern"),
    "an invalid regex": ({"transform": {"(": "a b -> a b"}}, "invalid regular expression '\\('"),
    "a pattern that does not fit": ({"transform": {"kernel": "a b -> a"}},
                                    "^kernel, from kernel: the pattern 'a b -> a' does not turn"),
    "a function of another shape": ({"transform": {"kernel": lambda x: x[:2]}},
                                    r"made float32\[2, 4\] of a tensor float32\[4, 4\], but the"),
    "too many stars": ({"rename": {"^": "*.*.*."}}, "has no indices for each *"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_that_are_wrong(tmp_path, name):
    options, text = TRANSFORMS[name]
    save_as_pytorch(tmp_path, kernel=SQUARE)
    with pytest.raises(zj.CheckpointError, match=text):
        zj.load_safetensors(tmp_path, KERNEL, **options)


@pytest.mark.parametrize("pattern", ["out in -> in out", "in out -> in out"])
def test_a_square_kernel_with_a_pattern(tmp_path, pattern):
    save_as_pytorch(tmp_path, kernel=SQUARE)
    found = zj.load_safetensors(tmp_path, KERNEL, transform={"kernel$": pattern})
    np.testing.assert_array_equal(found["kernel"], SQUARE.T if pattern[0] == "o" else SQUARE)


def test_advice_on_dtypes_and_transposed_kernels(tmp_path):
    save_as_pytorch(tmp_path, w=np.ones((3, 4)))
    with pytest.raises(zj.CheckpointError, match=r"write transform=\{'kernel\$': 'out in -> in ou"):
        zj.load_safetensors(tmp_path, {"w": jnp.ones((4, 3))})
    with pytest.raises(zj.CheckpointError, match="For another floating dtype, write cast=True"):
        zj.load_safetensors(tmp_path, {"w": jnp.ones((3, 4), jnp.bfloat16)})


@pytest.mark.parametrize("n", [6, 9, 33])
def test_devices_that_hold_only_padding(tmp_path, n):
    kernel = np.arange(13.0 * n).reshape(13, n)
    save_as_pytorch(tmp_path, kernel=kernel, **{f"h.{i}.b": np.full(3, i) for i in range(n)})
    policy = states.zero(uneven="pad")
    state = policy.init(lambda: {"kernel": jnp.zeros((n, 13)), "h": jnp.zeros((n, 3))}, states.tx)
    found = zj.load_safetensors(tmp_path, state, rename={"^h$": "h.*.b"},
                                transform={"kernel": "o i -> i o"}).params
    np.testing.assert_array_equal(np.asarray(found["kernel"]), kernel.T)
    np.testing.assert_array_equal(np.asarray(found["h"])[:, 0], np.arange(n))


def test_transforms_see_names_between_renamings(tmp_path):
    save_as_pytorch(tmp_path, **{"model.q_proj.weight": SQUARE})
    rename = {r"\bwq\.": "q_proj."} | zj.hugging_face.LLAMA["rename"]
    found = zj.load_safetensors(tmp_path, {"wq": {"kernel": jnp.ones((4, 2, 2))}}, rename=rename,
                                transform=zj.hugging_face.LLAMA["transform"])
    np.testing.assert_array_equal(found["wq"]["kernel"], SQUARE.T.reshape(4, 2, 2))


def test_functions_are_computed_one_by_one(tmp_path):
    save_as_pytorch(tmp_path, **{f"w{i}": np.full(8, i) for i in range(4)})
    made, most = [], []

    class Result(np.ndarray):
        pass

    def doubled(x):
        result = (2 * x).view(Result)
        made.append(weakref.ref(result))
        most.append(sum(ref() is not None for ref in made))
        return result

    found = zj.load_safetensors(tmp_path, {f"w{i}": jnp.zeros(8) for i in range(4)},
                                transform={"w": doubled})
    assert found["w3"].tolist() == [6.0] * 8 and len(most) == 4 and max(most) <= 2


def test_values_that_a_dtype_cannot_represent(tmp_path):
    save_as_pytorch(tmp_path, w=np.array([1.0, 1e6]))
    with pytest.raises(zj.CheckpointError, match="w has values that float16 cannot represent"):
        zj.load_safetensors(tmp_path, {"w": jnp.zeros(2, jnp.float16)}, cast=True)
    with pytest.raises(zj.CheckpointError, match="that float8_e4m3fn cannot represent"):
        zj.export_safetensors({"w": jnp.array([1.0, 1e6])}, tmp_path / "n.safetensors",
                              dtype="float8_e4m3fn")


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_an_nnx_model_with_dropout(tmp_path):
    state = states.zero().init(lambda: Dropping(nnx.Rngs(0)), states.tx)
    save_as_pytorch(tmp_path, **{"dense.kernel": SQUARE, "dense.bias": np.ones(4)})
    found = zj.load_safetensors(tmp_path, state, transform={"kernel": "o i -> i o"})
    np.testing.assert_array_equal(found.params["dense"]["kernel"], SQUARE.T)
    check_equal(found.model_state, state.model_state)
    with pytest.raises(zj.CheckpointError, match="kernel/value would be read from"):
        zj.load_safetensors(tmp_path, nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
                            rename={r"^(\w+)\.value": r"dense.\1", r"^(\w+)$": r"dense.\1"})
    only = zj.load_safetensors(tmp_path, state, only="params/.*bias")
    check_equal(only.params["dense"]["kernel"], state.params["dense"]["kernel"])


def test_an_export_keeps_no_copy_of_the_state(tmp_path, monkeypatch):
    state, taken = states.state(), []
    asarray = np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *a, **k: (taken.append(x), asarray(x, *a, **k))[1])
    zj.export_safetensors(state, tmp_path / "m.safetensors")
    leaves = jax.tree.leaves(state)
    assert taken and not any(x is leaf for x in taken for leaf in leaves)


def test_one_tensor_for_two_leaves(tmp_path):
    save_as_pytorch(tmp_path, w=np.ones((3, 4)))
    target = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4))}
    with pytest.raises(zj.CheckpointError, match="a, b would all be read from 'w' without"):
        zj.load_safetensors(tmp_path, target, rename={".+": "w"})
    same = {"": "x y -> x y"}
    with pytest.raises(zj.CheckpointError, match=r"by the transform 'x y -> x y'; .*'\(0/2 ...\) "):
        zj.load_safetensors(tmp_path, target, rename={".+": "w"}, transform=same)
    found = zj.load_safetensors(tmp_path, {"a": target["a"], "b": jnp.zeros((4, 3))},
                                rename={".+": "w"}, transform={"b": "x y -> y x"})
    assert found["a"].shape == (3, 4) and found["b"].shape == (4, 3)


def test_a_missing_star_is_named(tmp_path):
    save_as_pytorch(tmp_path, **{f"encoder.layer.{i}.norm": np.ones(4) for i in range(2)})
    with pytest.raises(zj.CheckpointError, match=r"rename it to 'encoder\.layer\.\*\.norm'"):
        zj.load_safetensors(tmp_path, {"layers": {"norm": jnp.ones((2, 4))}},
                            rename={"^layers": "encoder.layer"})


def test_targets_that_cannot_be_loaded(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match="would stay shapes; give a live state"):
        zj.load_safetensors(tmp_path, states.target())
    with pytest.raises(zj.CheckpointError, match="names no devices"):
        zj.load_safetensors(tmp_path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_a_flax_state_keeps_its_optimizer_state(tmp_path):
    save_file({"w": np.full(3, 2, np.float32)}, tmp_path / "m.safetensors")
    params = {"w": jnp.ones(3)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=states.tx)
    found = zj.load_safetensors(tmp_path, state)
    assert found.params["w"].tolist() == [2, 2, 2] and found.step == 0
    check_equal(found.opt_state, state.opt_state)


def test_unused_tensors_are_named(tmp_path):
    save_file({"w": np.ones(3, np.float32), "left": np.ones(2)}, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="no leaf for 1 of the 2 tensors in .*, such as left") as w:
        zj.load_safetensors(tmp_path, {"w": jnp.ones(3)})
    assert w[0].filename == __file__


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    states.saved(tmp_path / "c", [1])
    for path in (tmp_path / "c/1/state/d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(zj.CorruptCheckpointError, match="step 1 in"):
        zj.export_safetensors(tmp_path / "c", tmp_path / "m.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def raw(header, body=b"\0" * 64):
    """Returns the bytes of a safetensors file with a header, a dict or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "a header of 200 MB": struct.pack("<Q", 200 * 10**6) + b" " * 1000,
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "overlapping offsets": raw({"w": TENSOR, "v": TENSOR}),
    "offsets past the end": raw({"w": {**TENSOR, "shape": [400], "data_offsets": [0, 1600]}}),
    "offsets backwards": raw({"w": {**TENSOR, "data_offsets": [16, 0]}}),
    "a shape of another size": raw({"w": {**TENSOR, "shape": [2**40]}}),
    "a header that is not JSON": raw(b"{" * 100),
    "a pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "m.safetensors"
    file.write_bytes(HOSTILE[name])
    if name == "a header of 200 MB":
        os.truncate(file, 300 * 10**6)  # sparse
    with pytest.raises(zj.CorruptCheckpointError, match=r"m\.safetensors is unreadable: "):
        zj.load_safetensors(file, {"w": jnp.ones(4)})
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


NOT_BESIDE = "which is not the name of a .safetensors file in its own directory"
# name: (the weight map of an index, words of the error)
INDEXES = {
    "a path upwards": ({"w": "../outside.safetensors"}, NOT_BESIDE),
    "an absolute path": ({"w": "/etc/outside.safetensors"}, NOT_BESIDE),
    "another kind of file": ({"w": "model.pkl"}, NOT_BESIDE),
    "a number": ({"w": 3}, NOT_BESIDE),
    "a zero byte": ({"w": "m\0.safetensors"}, NOT_BESIDE),
    "a list": (["m.safetensors"], "no attribute 'items'"),
    "a deep list": (functools.reduce(lambda x, _: [x], range(900), []), "is not a usable index"),
    "a tensor that its file does not have": (
        {"w": "m.safetensors", "other": "m.safetensors"}, r"m\.safetensors is unreadable: .*other"),
    "a missing file": ({"w": "n.safetensors"}, "which is not a file in its directory"),
    "a pipe": ({"w": "pipe.safetensors"}, "which is not a file in its directory"),
    "a link": ({"w": "link.safetensors"}, "is a link to .*; to allow links, write follow_links"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_hostile_indexes(tmp_path, name):
    (tmp_path / "in").mkdir()
    for file in (tmp_path / "outside.safetensors", tmp_path / "in/m.safetensors"):
        save_file({"w": np.ones(4, np.float32)}, file)
    (tmp_path / "in/link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    os.mkfifo(tmp_path / "in/pipe.safetensors")  # opening it would wait for ever
    index = tmp_path / "in/model.safetensors.index.json"
    weight_map, text = INDEXES[name]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(zj.CorruptCheckpointError, match=text):
        zj.load_safetensors(index, {"w": jnp.ones(4)})
    if name == "a link":
        found = zj.load_safetensors(index, {"w": jnp.zeros(4)}, follow_links=True)
        assert found["w"].tolist() == [1, 1, 1, 1]


def test_an_index_of_200_megabytes(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.touch()
    os.truncate(index, 200 * 10**6)  # sparse
    with pytest.raises(zj.CorruptCheckpointError, match="200,000,000 bytes, more than"):
        zj.load_safetensors(index, {"w": jnp.ones(4)})


def test_a_link_is_not_written_through(checkpoint, tmp_path):
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(zj.CheckpointError, match="already exists"):
        zj.export_safetensors(checkpoint, tmp_path / "m.safetensors")
    assert not (tmp_path / "elsewhere").exists()
