"""The commands inspect, verify and export, as users run them."""

import json
import os
import subprocess
import sys

import pytest
import states
from safetensors.numpy import load_file

from zerojax import cli


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    states.saved(made, [1, 2, 10], zero=states.zero(stage=2))
    return made


def test_inspect(directory, capsys):
    assert cli.main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 10: 16 leaves, 24.5 KiB")
    assert "mesh data 8, stage 2, params float32" in out
    assert "ScaleByAdamState" in out and '{"next": 10}' in out and "orbax-checkpoint" in out
    assert cli.main(["inspect", str(directory / "2"), "--json"]) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["step"] == 2
    line = next(line for line in out.split("\n") if line.strip().startswith("params/w"))
    assert line.split()[1:6] == ["[64,", "32]", "float32", "P('data')", "8,192"]


def test_verify(directory, tmp_path, capsys):
    assert cli.main(["verify", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2", "step 10"]
    assert cli.main(["verify", str(directory / "2")]) == 0
    assert cli.main(["verify", str(directory), "--step", "2"]) == 0
    assert capsys.readouterr().out == "step 2: 16 leaves, 24.5 KiB, intact\n" * 2
    states.saved(tmp_path, [1, 2])
    for path in (tmp_path / "1/state/d").iterdir():
        path.write_bytes(b"")
    assert cli.main(["verify", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "step 2: 16 leaves, 24.5 KiB, intact\n"
    assert "zerojax verify: step 1 in" in shown.err


def test_export(directory, tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    command = ["export", str(directory), "--to", str(file), "--dtype", "float16", "--step", "1"]
    assert cli.main([*command, "--rename", "^w$=h.weight", "--rename", "odd=even"]) == 0
    assert capsys.readouterr().out == f"{file}  4.4 KiB\n"
    loaded = load_file(file)
    assert set(loaded) == {"h.weight", "even", "half", "none"}
    assert {x.dtype.name for x in loaded.values()} == {"float16"}
    command = ["export", str(directory), "--to", str(tmp_path / "n.safetensors")]
    assert cli.main([*command, "--shard-gb", "1e-6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("arguments, text", [
    (["inspect", "{}/none"], "none has no step; it has none"),
    (["verify", "{}/none"], "none has no step; it has none"),
    (["verify", "{}", "--step", "3"], r"has no step 3; it has [1, 2, 10]"),
    (["export", "{}", "--to", "{}/m.bin"], "name a file that ends in .safetensors"),
    (["export", "{}", "--to", "{}/m.safetensors", "--rename", "x"],
     "--rename 'x' has no '='; write REGEX=TEXT"),
])
def test_bad_input_is_an_error(directory, capsys, arguments, text):
    assert cli.main([word.format(directory) for word in arguments]) == 2
    assert text in capsys.readouterr().err


def test_on_a_machine_without_a_gpu_it_prints_nothing_else(directory):
    bare = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "-m", "zerojax", "verify", directory]
    done = subprocess.run(command, capture_output=True, text=True, env=bare, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3
