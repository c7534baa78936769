"""The wheel and the sdist: complete, and a program that imports the installed wheel trains."""

import pathlib
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import sys, jax.numpy as jnp, optax, zerojax as zj
zero = zj.Zero(zj.make_mesh(), min_shard=1)
state = zero.init(lambda: {"w": jnp.ones((4, 2))}, optax.sgd(0.1))
step = zero.train_step(lambda params, x: (x @ params["w"]).mean(), optax.sgd(0.1))
print(zj.__file__, float(step(state, jnp.ones((8, 4)))[1]["loss"]))
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=120, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns a folder with both packages; the wheel is built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    archive, = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder / "source", filter="data")
    source, = (folder / "source").iterdir()
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


def modules(folder):
    return {str(path.relative_to(folder)) for path in (folder / "zerojax").rglob("*.py")}


def test_the_sdist_has_all_that_its_tests_need(built):
    source, = (built / "source").iterdir()
    for name in ("LICENSE", "Makefile", "conftest.py", "docs/plan.md", "examples/train_gpt.py",
                 "notebooks/quickstart.ipynb", "tests/oracle.py", "zerojax/py.typed"):
        assert (source / name).exists(), name
    assert modules(source) == modules(ROOT)
    assert not [path for path in source.rglob("*") if ".venv" in path.parts or ".git" in path.parts]


def test_the_wheel_is_installed_and_trains(built, tmp_path):
    wheel, = built.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site",
        wheel)
    assert modules(tmp_path / "site") == modules(ROOT)
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{PROGRAM}"
    file, loss = run("-c", program, cwd=tmp_path).split()
    assert pathlib.Path(file).is_relative_to(tmp_path / "site") and float(loss) == 4
    help_text = run(tmp_path / "site/bin/zerojax", "--help",
                    env={"PYTHONPATH": str(tmp_path / "site")})
    assert "zerojax plan" in help_text
