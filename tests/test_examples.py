"""The examples, and the benchmark of a real GPU in small, as a person runs them: in processes of their own."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *options, folder="examples"):
    done = subprocess.run([sys.executable, ROOT / folder / f"{name}.py", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("options, devices", [
    ([], 8),
    (["--stage", "1", "--devices", "4", "--accumulate", "2", "--compute", "bfloat16"], 4),
], ids=["stage 3", "stage 1"])
def test_train_gpt(options, devices):
    out = run("train_gpt", "--steps", "40", *options)
    assert f"bytes on each of {devices} devices" in out and "elements < min_shard" in out
    before, after = map(float, re.search(r"(\S+) bits per byte before, (\S+) after 40 steps", out).groups())
    assert before > 7 and after < 5
    assert len(out.split('|')[-1].strip()) > 20  # what was sampled


def test_mnist_style_mlp_is_the_same_at_every_stage():
    lines = [re.findall(r"Train Epoch: .*|Test set: .*", run("mnist_style_mlp", "--stage", stage)) for stage in "03"]
    assert len(lines[0]) == 6 and "Train Epoch: 3 [1600/1600 (100%)]\tLoss: " in lines[0][2]
    losses = [[float(line.split("Loss: ")[1]) for line in part[:-1]] for part in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert int(re.search(r"(\d+)/197", lines[1][-1])[1]) > 0.85 * 197


def test_nnx_transformer():
    out = run("nnx_transformer", "--stage", "2", "--accumulate", "2")
    word, backwards = re.search(r"(\w+) backwards is (\w+)", out).groups()
    assert backwards == word[::-1]


def test_gpu_benchmark_in_small():
    sizes = {"width": 64, "layers": 2, "vocab": 256, "seq": 32, "batch": 2, "steps": 1, "rounds": 1}
    out = run("gpu", *(word for name, n in sizes.items() for word in (f"--{name}", str(n))), folder="benchmarks")
    assert re.search(r"\| zerojax, stage 3 \| [\d,]+ \|", out) and re.search(r"\| jax by hand \| [\d,]+ \|", out)
