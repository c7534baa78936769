"""The manifest as JSON: every field returns from disk, and other values are refused."""

import json

import jax
import pytest

from zerojax.checkpoint import manifest
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.manifest import Manifest
from zerojax.errors import CheckpointError

POSITION = {"at": bytes(range(256)), "inner": [b"", {"n": 3}]}
MANIFEST = Manifest(7, {"params/w": Entry((4, 2), "bfloat16", "0123abcd", "P('data')", kept=(6, 2)),
                        "rng": Entry((2,), "uint32", "01234567", key="threefry2x32")},
                    ("ScaleByAdamState",), {"data": 8}, 3, {"params": "float32"},
                    (POSITION, {"n": 4}), {"loss": 1.5, "raw": b"\xff"})


def on_disk(made):
    """Returns the JSON values of a manifest, after writing and reading them."""
    return json.loads(json.dumps(made.to_json()))


def with_digest(values):
    """Returns JSON values with the digest that belongs to them."""
    values = {key: value for key, value in values.items() if key != "digest"}
    return values | {"digest": manifest.sha256(values)}


def test_it_comes_back():
    found = Manifest.from_json(on_disk(MANIFEST))
    assert found == MANIFEST
    assert found.data_of(0, 2) == POSITION and found.data_of(1, 2) == {"n": 4}
    assert found.bytes == 4 * 2 * 2 + 2 * 4


def test_an_older_format_of_one_process():
    values = on_disk(MANIFEST)
    first, _ = values.pop("data_states")
    found = Manifest.from_json(with_digest(values | {"format": 1, "data_state": first}))
    assert found.data_states == (POSITION,) and found.data_of(3, 4) == POSITION


@pytest.mark.parametrize("field", [f for f in on_disk(MANIFEST) if f != "digest"])
def test_any_change_is_noticed(field):
    values = on_disk(MANIFEST)
    with pytest.raises(ValueError, match="the manifest's own digest does not match"):
        Manifest.from_json(values | {field: [values[field]]})


@pytest.mark.parametrize("change, error, text", [
    ({"format": 3}, ValueError, "its format is not 2"),
    ({"data_state": None}, TypeError, "unexpected keyword argument 'data_state'"),
    ({"data_states": [{"__bytes__": "AA?="}]}, ValueError, "base64"),
    ({"metrics": {"__bytes__": "A"}}, ValueError, "base64"),
    ({"leaves": {"w": {"shape": [True], "dtype": "int8"}}}, ValueError, r"leaf of shape \[True\]"),
    ({"leaves": {"w": {"shape": [-1], "dtype": "int8"}}}, ValueError, r"leaf of shape \[-1\]"),
    ({"leaves": {"w": {"shape": [1], "dtype": "int7"}}}, TypeError, "int7"),
    ({"leaves": {"w": {"shape": [1], "dtype": "int8", "kept": ["1"]}}}, ValueError, "kept as"),
], ids=str)
def test_other_values_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        Manifest.from_json(with_digest(on_disk(MANIFEST) | change))


@pytest.mark.parametrize("process, processes", [(0, 1), (2, 3)])
def test_positions_of_another_number_of_processes(process, processes):
    text = (f"step 7 was saved by 2 processes, each at its own position in the data, so it has no "
            f"position for process {process} of {processes}")
    with pytest.raises(CheckpointError, match=text):
        MANIFEST.data_of(process, processes)


def test_the_table():
    text = str(MANIFEST)
    assert text.startswith("step 7: 2 leaves, 24 bytes")
    assert "mesh data 8, stage 3, params float32" in text and "ScaleByAdamState" in text
    row, = [line for line in text.splitlines() if "params/w" in line]
    assert row.split() == ["params/w", "[4,", "2]", "bfloat16", "P('data')", "16", "0123abcd"]
    assert jax.__version__ in text
