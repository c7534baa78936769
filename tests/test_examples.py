"""The examples, and the GPU benchmark with a small model."""

import functools
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest
from quick import some

import zerojax as zj
from zerojax import cli
from zerojax.recipe import load

ROOT = pathlib.Path(__file__).parent.parent
# multihost_gpt.py trains the model of train_gpt.py, on devices that its launcher chooses
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py")
                  if path.stem != "multihost_gpt")


@functools.cache  # two tests read the output of one run
def run(name, *options, folder="examples"):
    command = [sys.executable, ROOT / folder / f"{name}.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def plans():
    """Returns the `zerojax plan` commands in the docstrings of the examples."""
    texts = [(ROOT / "examples" / f"{name}.py").read_text() for name in EXAMPLES]
    return [line for text in texts for line in re.findall("^    zerojax (plan .*)$", text, re.M)]


FIELDS = [  # the command, the most that the metric may be before training, the least after it, in %
    ("textbook_mlp", 20, 90),
    ("mnist_style_mlp", 20, 90),
    ("image_classification --model vit", 20, 85),
    ("image_classification --model resnet", 20, 90),
    ("text_classification", 20, 60),
    ("recommender", 50, 70),
    ("tabular_risk", 50, 97),
    ("speech_commands", 25, 90),
    ("segmentation", 25, 80),
    ("text_image", 10, 75),
    ("local_sgd --steps 200", 20, 90),
]


@pytest.mark.slow
@pytest.mark.parametrize("command, before, after", FIELDS)
def test_an_example_learns_the_same_at_every_stage(command, before, after):
    name, *options = command.split()
    results = [re.search(r"(\S+)% before, (\S+)% after \d+ steps; last loss (\S+)",
                         run(name, *options, "--stage", stage)).groups() for stage in "30"]
    (first, last, loss), (first_0, last_0, loss_0) = results
    assert float(first) <= before and float(last) >= after
    assert (first, last) == (first_0, last_0)
    assert float(loss) == pytest.approx(float(loss_0), rel=1e-3)


@pytest.mark.parametrize("command", some(plans(), lambda command: "textbook_mlp" in command))
def test_the_plan_in_a_docstring_finds_only_zeros_communication(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(shlex.split(command, comments=True)) == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_a_recipe_and_the_common_options(name, monkeypatch):
    recipe = load(str(ROOT / "examples" / f"{name}.py"))
    assert any(f"examples/{name}.py" in command for command in plans())
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), min_shard=2**10)
    state = zero.abstract(recipe.init_fn, recipe.tx)
    loss = jax.eval_shape(zero.gathered(recipe.loss_fn), state, recipe.rows(8))
    assert all(x.shape == () for x in jax.tree.leaves(loss))

    monkeypatch.setattr(sys, "argv", [name])
    module = sys.modules.pop(recipe.init_fn.__module__)
    assert module.arguments().stage == 3
    monkeypatch.setattr(sys, "argv", [name, "--stage", "1", "--devices", "2", "--steps", "5"])
    args = module.arguments()
    assert (args.stage, args.devices, args.steps) == (1, 2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("options, devices", [
    ([], 8),
    (["--stage", "1", "--devices", "4", "--accumulate", "2", "--compute", "bfloat16"], 4),
], ids=["stage 3", "stage 1"])
def test_train_gpt(options, devices):
    out = run("train_gpt", "--steps", "40", *options)
    assert f"bytes on each of {devices} devices" in out and "fewer than min_shard" in out
    losses = re.search(r"(\S+) bits per byte before, (\S+) after 40 steps", out)
    assert float(losses[1]) > 7 and float(losses[2]) < 5
    assert len(out.split('|')[-1].strip()) > 20  # the sampled text


@pytest.mark.slow
def test_textbook_mlp_pads_for_ten_devices_and_prints_progress_by_epochs():
    out = run("textbook_mlp", "--stage", "3")
    kept = re.search(r"([\d,]+) bytes on each of 10 devices", out)[1]
    assert int(kept.replace(",", "")) < 1.2 * 784 * 128 * 4 / 10  # most of it is the first kernel
    lines = re.findall(r"(Train Epoch: .*)\tLoss: \d+\.\d{6}$", out, re.M)
    assert len(lines) == 10 and lines[:3] == [
        "Train Epoch: 1 [800/1600 (50%)]", "Train Epoch: 1 [1600/1600 (100%)]",
        "Train Epoch: 2 [800/1600 (50%)]"]
    assert float(re.search(r"(\S+)% after \d+ steps", out)[1]) > 85


@pytest.mark.slow
def test_local_sgd_sends_less_than_synchronous_training_and_learns_as_much():
    out = run("local_sgd", "--stage", "3", "--steps", "200", "--every", "20", "--diloco")
    sent = [float(x) for x in re.findall(r"([\d.]+) MiB sent by each node", out)]
    assert sent[1] == pytest.approx(20 * sent[0], rel=0.01)
    local, together = (float(x) for x in re.findall(r"([\d.]+)% after 200 steps", out))
    assert local > together - 2


@pytest.mark.slow
def test_text_classification_does_not_see_padding():
    recipe = load(str(ROOT / "examples" / "text_classification.py"))
    module = sys.modules.pop(recipe.init_fn.__module__)
    words = module.words("Returns the first words, eight of them in all.")
    batch = {"words": jnp.asarray(words)[None], "label": jnp.zeros(1, int)}

    def total(variables):
        return module.loss_fn(variables, batch).total

    grads = jax.jit(jax.grad(total))(recipe.init_fn())["params"]
    by_word, by_position = grads["Embed_0"]["embedding"], grads["Embed_1"]["embedding"]
    assert not by_word[0].any() and by_word[words[0]].any()
    assert not by_position[9:].any() and by_position[:9].any(1).all()


@pytest.mark.slow
def test_segmentation_saves_a_picture(tmp_path):
    path = tmp_path / "masks.png"
    run("segmentation", "--steps", "2", "--picture", str(path))
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (700, 700) and picture[..., :3].std() > 0.1


@pytest.mark.slow
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
