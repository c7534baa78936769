"""The examples, and the GPU benchmark with a small model, each in a process of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *options, folder="examples"):
    command = [sys.executable, ROOT / folder / f"{name}.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("options, devices", [
    ([], 8),
    pytest.param(["--stage", "1", "--devices", "4", "--accumulate", "2", "--compute", "bfloat16"],
                 4, marks=pytest.mark.slow),
], ids=["stage 3", "stage 1"])
def test_train_gpt(options, devices):
    out = run("train_gpt", "--steps", "40", *options)
    assert f"bytes on each of {devices} devices" in out and "fewer than min_shard" in out
    losses = re.search(r"(\S+) bits per byte before, (\S+) after 40 steps", out)
    assert float(losses[1]) > 7 and float(losses[2]) < 5
    assert len(out.split('|')[-1].strip()) > 20  # the sampled text


def test_mnist_style_mlp_is_the_same_at_every_stage():
    outputs = [run("mnist_style_mlp", "--stage", stage) for stage in "03"]
    lines = [re.findall(r"Train Epoch: .*|Test set: .*", out) for out in outputs]
    assert len(lines[0]) == 6 and "Train Epoch: 3 [1600/1600 (100%)]\tLoss: " in lines[0][2]
    losses = [[float(line.split("Loss: ")[1]) for line in part[:-1]] for part in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert int(re.search(r"(\d+)/197", lines[1][-1])[1]) > 0.85 * 197


def test_nnx_transformer():
    out = run("nnx_transformer", "--stage", "2", "--accumulate", "2")
    word, backwards = re.search(r"(\w+) backwards is (\w+)", out).groups()
    assert backwards == word[::-1]


@pytest.mark.slow
def test_gpu_benchmark_with_a_small_model():
    sizes = {"width": 64, "layers": 2, "vocab": 256, "seq": 32, "batch": 2, "steps": 1, "rounds": 1}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    out = run("gpu", *options, folder="benchmarks")
    assert re.search(r"\| zerojax, stage 3 \| [\d,]+ \|", out)
    assert re.search(r"\| jax by hand \| [\d,]+ \|", out)
