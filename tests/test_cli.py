"""The `zerojax` command: its output and its exit status, which serves as a gate."""

import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
from types import SimpleNamespace

import jax
import optax
import pytest

import zerojax as zj
from zerojax import advice, cli, recipe, tables
from zerojax.layout import gpus

EXAMPLE = str(pathlib.Path(__file__).parent.parent / "examples" / "train_gpt.py")
RECIPE = """
import jax, jax.numpy as jnp, optax, zerojax as zj
def init():
    return {"a": jnp.ones((512, 512)), "b": jnp.ones((512, 512))}
def loss(p, x):
    y = ((x @ p["a"]) @ p["b"]) ** 2
    return zj.Loss(y.sum(), y.size)
def textbook(p, x):
    return (p["a"] @ (x.T @ x)).mean()
def rows(parts):
    return jax.ShapeDtypeStruct((parts * 8, 512), "float32")
recipe = zj.Recipe(init, loss, optax.adam(1e-3), rows)
contracting = zj.Recipe(init, textbook, optax.adam(1e-3), rows)
two = zj.Recipe(init, {"plain": loss, "remat": jax.checkpoint(loss, static_argnums=())},
                optax.adam(1e-3), rows)
fixed = zj.Recipe(init, loss, optax.adam(1e-3), jax.ShapeDtypeStruct((24, 512), "float32"))
def wide(parts):
    return jax.ShapeDtypeStruct((parts * 8, 2**17), "float32")
huge = zj.Recipe(lambda: {"a": jnp.ones((2**17, 2**17)), "b": jnp.ones((2**17, 512))}, loss,
                 optax.adam(1e-3), wide)
number = 7
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "training.py"
    path.write_text(RECIPE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(path)


def test_theory_needs_no_jax():
    code = ("import sys; from zerojax import cli\n"
            "status = cli.main(['theory', '--params', '7.5e9', '--devices', '64'])\n"
            "sys.exit(status or (3 if 'jax' in sys.modules else 0))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for figure in ("120.00 GB", "31.41 GB", "16.64 GB", "1.88 GB"):
        assert figure in done.stdout


def test_theory_as_json(capsys):
    command = ["theory", "--params", "7.5e9", "--devices", "64", "--accumulate", "4", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["3"]["elements_per_param"] == 12
    assert cli.main(["theory", "--params", "1B", "--devices", "0"]) == 2


@pytest.mark.parametrize("text", ["7.5B", "7500m", "7.5e9"])
def test_a_number_of_parameters_has_a_unit(capsys, text):
    assert cli.main(["theory", "--params", text, "--devices", "64"]) == 0
    assert "31.41 GB" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["7.5X", "B", "-1", "nan", "inf", ""])
def test_a_number_of_parameters_that_is_none(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["theory", f"--params={text}", "--devices", "64"])
    assert "write a positive number, such as 7.5B" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"zerojax {zj.__version__}\n"


def test_gpus_are_listed_without_jax(capsys):
    code = ("import sys; from zerojax import cli\n"
            "status = cli.main(['gpus'])\n"
            "sys.exit(status or (3 if 'jax' in sys.modules else 0))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0
    for words in ("rtx4090", "NVIDIA GeForce RTX 4090", "141.0 GiB", "mine.json:8x8"):
        assert words in " ".join(done.stdout.split())


def test_a_gpu_of_ones_own(file, capsys, tmp_path, monkeypatch):
    assert cli.main(["gpus", "H200", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out) | {"name": "half an H200", "memory": 70 * 2**30}
    (tmp_path / "mine.json").write_text(json.dumps(gpu))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "./training.py", "--topology", "mine.json:1x2"]) == 0
    out = capsys.readouterr().out
    assert "2 x half an H200 (1 host of 2)" in out and "70.0 GiB" in out


@pytest.mark.parametrize("change, words", [
    ({"memory": "70 GiB"}, ["Gpu(memory='70 GiB')", "positive integer"]),
    ({"network": 0}, ["Gpu(network=0)", "positive number"]),
    ({"cc": [9]}, ["two integers"]), ({"cc": 9}, ["two integers"]),
    ({"cc": [7, 0]}, ["the GPU mine.json", "capability 7.5"]),
    ({"bandwith": 1}, ["unknown fields ['bandwith']"])])
def test_a_gpu_file_with_a_mistake(capsys, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(gpus.to_json(gpus.GPUS["h200"]) | change))
    assert cli.main(["gpus", "mine.json"]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_figures_of_a_gpu_file_may_be_floats(tmp_path):
    fields = gpus.to_json(gpus.GPUS["h200"]) | {"bandwidth": 4.8e12}
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    assert gpus.find(str(tmp_path / "mine.json")) == gpus.GPUS["h200"]


@pytest.mark.slow
def test_the_readmes_command(tmp_path):
    """In a process of its own: the plan of a file for a topology."""
    command = [sys.executable, "-m", "zerojax", "plan", EXAMPLE, "--topology", "h200:8x8",
               "--min-shard", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("stage 3 on 64 x NVIDIA H200 (8 hosts of 8)", "gathered parameters",
                  "fits 126.9 GiB", "reduce-scatter", "MFU"):
        assert words in done.stdout
    assert done.stderr == ""


def test_plan_as_json_and_its_program(file, capsys, tmp_path):
    hlo = tmp_path / "hlo"
    assert cli.main(["plan", file, "--topology", "h200:1x8", "--json", "--hlo", str(hlo)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ok"] and plan["fits"]
    assert plan["memory"]["kinds"]["parameters"] == 2 * 512 * 512 * 4 / 8
    assert "ENTRY" in hlo.read_text()


def test_a_plan_that_is_not_zero_fails_the_gate(file, capsys):
    assert cli.main(["plan", f"{file}:contracting", "--topology", "h200:1x8"]) == 1
    error = capsys.readouterr().err
    assert "that ZeRO does not explain" in error and "training.py:9" in error


def test_a_plan_that_does_not_fit_fails_the_gate(file, capsys):
    assert cli.main(["plan", f"{file}:huge", "--topology", "a100-40g:1x2"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_show_prints_the_layout(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["show", file, "--topology", "h200:1x8"]) == 0
    assert "P(None, 'data')" in capsys.readouterr().out


@pytest.mark.slow
def test_advise_refuses_with_reasons_and_takes_the_fastest(file, capsys):
    two = recipe.load(f"{file}:two")
    found = advice.advise(two, "h200:1x2", stages=(0, 3), accumulate=(1,))
    tried = {(trial.choice.stage, trial.choice.remat) for trial in found.tried}
    assert tried == {(0, "plain"), (0, "remat"), (3, "plain"), (3, "remat")}
    assert found.best.rate == max(t.rate for t in found.tried) > 0
    assert found.plan.check() and str(found.best.choice) in str(found)


def test_advise_says_why_nothing_fits(file, capsys):
    assert cli.main(["advise", f"{file}:huge", "--topology", "a100-40g:1x1"]) == 1
    out = capsys.readouterr().out
    assert "nothing fits" in out and "of 35.5 GiB" in out
    assert "needs the least memory. Try more GPUs" in out


def _trial(stage, peak, fits, refused):
    plan = SimpleNamespace(memory=SimpleNamespace(peak=peak, fits=fits), sent=0, compute=None)
    return advice.Trial(advice.Choice(stage, 1, "", 1), 8, plan, refused)


def test_more_memory_is_advised_only_where_nothing_fits():
    large, small = _trial(0, 90, False, "too large"), _trial(2, 50, False, "too large")
    other = _trial(3, 10, True, "not ZeRO")
    text = str(advice.Advice(None, (large, small)))
    assert "nothing fits" in text and "stage=2, accumulate=1, replica=1 needs the least" in text
    text = str(advice.Advice(None, (large, small, other)))
    assert "no layout was accepted" in text and "Try more GPUs" not in text


def test_advise_counts_layouts(file, capsys, monkeypatch):
    """Layouts that need not be tried count as done."""
    monkeypatch.setattr(tables, "is_watched", lambda: True)
    monkeypatch.setattr(advice, "tqdm", functools.partial(advice.tqdm, mininterval=0))
    monkeypatch.setattr(advice, "attempt", lambda recipe, topology, choice, *options: advice.Trial(
        choice, 24, None, "" if choice.stage == 3 else "refused"))
    advice.advise(recipe.load(f"{file}:fixed"), "h200:1x2", stages=(0, 3), accumulate=(1, 2, 3))
    bar = capsys.readouterr().err
    assert [n for n in range(7) if f" {n}/6" in bar] == [0, 1, 2, 3, 4, 6]


WRONG = {
    "no file": (["show", "nowhere.py", "--topology", "h200:1x8"], ["no file 'nowhere.py'"]),
    "no module": (["show", "no_such_module", "--topology", "h200:1x8"],
                  ["neither a file nor a module 'no_such_module'"]),
    "no such name": (["show", "{file}:recipes", "--topology", "h200:1x8"],
                     ["no recipes in it", "did you mean", ":recipe?"]),
    "not a recipe": (["show", "{file}:number", "--topology", "h200:1x8"], ["number is a int"]),
    "a gpu too old": (["gpus", "Tesla V100-SXM2"], ["cannot be simulated", "capability 7.5"]),
    "a file without .json": (["gpus", "mine"], ["unknown GPU 'mine'"]),
    "another vendor": (["plan", "{file}", "--topology", "MI300X:1x8"], ["ROCm"]),
    "no gpu file": (["plan", "{file}", "--topology", "mine.json:1x8"],
                    ["No such file", "zerojax gpus h200 --json"]),
    "unknown gpu": (["plan", "{file}", "--topology", "h2000:1x8"],
                    ["unknown GPU 'h2000'", "h200", "zerojax gpus"]),
    "impossible topology": (["plan", "{file}", "--topology", "h200:8"], ["hosts x GPUs"]),
    "batch": (["plan", "{file}:fixed", "--topology", "h200:1x5"], ["24 examples", "5"]),
    "no name": (["show", ":recipe", "--topology", "h200:1x2"], ["names no file or module"]),
    "half a gpu": (["show", "{file}", "--topology", "{{bad:1x2"], ["the GPU {bad is not JSON"]),
    "no such loss": (["plan", "{file}:two", "--topology", "h200:1x2", "--remat", "all"],
                     ["no loss 'all'", "'plain', 'remat'"]),
    "no batch divides": (["advise", "{file}:fixed", "--topology", "h200:1x5"],
                         ["24 examples", "5 devices", "tried: [1, 2, 4, 8]"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_an_error_with_the_fix(file, capsys, name):
    argv, words = WRONG[name]
    assert cli.main([a.format(file=file) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zerojax ") and "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("raised, status, words", [
    ("ValueError('of the user')", 2, "of the user"), ("KeyboardInterrupt", 130, "interrupted")])
def test_an_error_in_the_users_file_is_no_failed_plan(tmp_path, capsys, raised, status, words):
    (tmp_path / "broken.py").write_text(f"raise {raised}")
    assert cli.main(["plan", str(tmp_path / "broken.py"), "--topology", "h200:1x2"]) == status
    assert words in capsys.readouterr().err
    assert not [name for name in sys.modules if name.startswith("recipe_broken")]


def test_a_module_in_the_working_directory(file, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(file).parent)
    assert cli.main(["show", "training:two", "--topology", "h200:1x8"]) == 0
    sys.modules.pop("training")


@pytest.mark.parametrize("where", ["training.py", "training"])
def test_loading_restores_the_search_path(file, monkeypatch, where):
    """The entry is on the path during the import; the file's own changes of the path stay."""
    folder = pathlib.Path(file).parent
    (folder / "sizes.py").write_text("width = 512")
    pathlib.Path(file).write_text(f"import sys, sizes\nsys.path.append('/models')\n{RECIPE}")
    monkeypatch.chdir(folder)
    before = list(sys.path)
    found = recipe.load(where)
    assert sys.path == [*before, "/models"]
    assert sys.modules[found.init_fn.__module__].recipe is found
    for name in ("sizes", found.init_fn.__module__):
        sys.modules.pop(name)


def test_recipes_of_two_files_with_one_name(file):
    """Each keeps its own module, in which pickle and dataclasses look up its classes."""
    other = pathlib.Path(file).parent / "other" / "training.py"
    other.parent.mkdir()
    other.write_text(RECIPE)
    both = [recipe.load(str(path)) for path in (file, other)]
    for found in both:
        assert pickle.loads(pickle.dumps(found.init_fn)) is found.init_fn
        sys.modules.pop(found.init_fn.__module__)


def test_the_search_path_of_the_command_keeps_the_files_folder(file, capsys):
    """As for `python training.py`: a function of the recipe may import from it when called."""
    (pathlib.Path(file).parent / "late.py").write_text("from training_sizes import WIDTH")
    (pathlib.Path(file).parent / "training_sizes.py").write_text("WIDTH = 512")
    pathlib.Path(file).write_text(RECIPE.replace("def init():", "def init():\n    import late"))
    assert cli.main(["show", file, "--topology", "h200:1x8"]) == 0
    for name in ("late", "training_sizes"):
        sys.modules.pop(name)


@pytest.mark.parametrize("options", [{"accumulate": (0,)}, {"replica": 2}, {"stages": ()}])
def test_advise_with_nothing_to_try(file, options):
    with pytest.raises(zj.PolicyError, match=f"advise\\({next(iter(options))}="):
        advice.advise(recipe.load(file), "h200:1x2", **options)


def test_advise_refuses_a_plan_that_is_not_zero(file):
    found = advice.advise(recipe.load(f"{file}:contracting"), "h200:1x8", stages=(3,))
    assert found.best is None and "not ZeRO" in str(found)


@pytest.mark.parametrize("change, words", [
    ({"init_fn": 3}, "no arguments that returns the model"),
    ({"init_fn": lambda key: key}, "takes .'key'."),
    ({"loss_fn": {}}, "dict of names to functions"), ({"tx": optax.adam}, "optax transform")])
def test_an_invalid_recipe(change, words):
    valid = {"init_fn": dict, "loss_fn": lambda p, b: 0.0, "tx": optax.sgd(0.1),
             "batch": jax.ShapeDtypeStruct((8,), "float32")}
    with pytest.raises(zj.RecipeError, match=words):
        zj.Recipe(**valid | change)
