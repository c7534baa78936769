"""The house: imports go one way, no private jax, nothing global, no file too long."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "zerojax"
STAIRS = ["errors", "policy", "specs", "layout", "theory", "hlo",  # vocabulary, arithmetic
          "topology", "mesh",  # placement
          "gather", "box", "census", "linen", "nnx", "tree",  # mechanism
          "loss", "scale", "data", "gradients", "state", "step", "loop",  # training
          "policies", "zero", "__init__"]  # edges
FILES = sorted(PACKAGE.glob("*.py"))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_stair():
    assert {f.stem for f in FILES} == set(STAIRS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_only_from_above(path):
    above = STAIRS[:STAIRS.index(path.stem)]
    ours = [name.split(".")[1] for name in _imports(path) if name.startswith("zerojax.")]
    assert [name for name in ours if name not in above] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_private_modules(path):
    roots = ("jax", "flax", "optax", "orbax")
    private = [n for n in _imports(path) if n.split(".")[0] in roots and any(part.startswith("_") for part in n.split("."))]
    assert private == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_file_is_two_concepts(path):
    assert len(path.read_text().splitlines()) <= 400


def test_theory_and_hlo_need_no_jax():
    for name in ("theory", "hlo"):
        assert [n for n in _imports(PACKAGE / f"{name}.py") if n.split(".")[0] in ("jax", "flax", "zerojax")] == []


def test_importing_changes_nothing_global():
    code = ("import os, jax; before = dict(os.environ), dict(jax.config.values)\n"
            "import flax, optax; middle = dict(jax.config.values)\n"
            "import zerojax; assert (dict(os.environ), dict(jax.config.values)) == (before[0], middle)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    import zerojax

    assert [n for n in zerojax.__all__ if not (getattr(zerojax, n).__doc__ or "").strip()] == []
