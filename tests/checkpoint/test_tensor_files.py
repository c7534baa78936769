"""Hostile safetensors files and indexes: an error by name, and no other file is read."""

import functools
import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import zerojax as zj


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
