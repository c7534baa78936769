"""The house: imports go one way, no private jax, nothing global, no file too long."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "zerojax"
STAIRS = ["errors", "tables", "trees", "padded", "cluster", "rendezvous", "launch",  # the command, and processes that meet
          "policy", "specs", "layout", "theory", "hlo", "collectives", "cost", "schedule", "liveness",  # vocabulary, arithmetic
          "topology", "mesh", "exchange", "fingerprint", "agreement", "distributed",  # placement
          "provenance", "identity", "compiler", "audit", "memory", "notes", "plan",  # foresight
          "gather", "rewrite", "means", "models", "scanned", "trained",  # mechanism
          "loss", "scale", "data", "parts", "reader", "source", "study", "gradients", "optimizer", "donation", "state",  # training
          "frame", "transforms", "step", "jitted",  # what a training loop calls
          "digest", "manifest", "store", "target", "checkpoint", "weights", "preemption",  # what is kept
          "policies", "zero", "recipe", "advice", "viz", "cli", "__main__", "__init__"]  # edges
FILES = sorted(PACKAGE.glob("*.py"))


def _imported(node):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(path):
    return (name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node))


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


def _needs(name, seen):
    """What importing a file of the package imports, but for what its functions do."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    for full in (x for node in top for x in _imported(node)):
        root, *rest = full.split(".")
        if root == "zerojax" and rest and (PACKAGE / f"{rest[0]}.py").exists() and rest[0] not in seen:
            _needs(rest[0], seen)
        seen.add(rest[0] if root == "zerojax" and rest else root)
    return seen


@pytest.mark.parametrize("name", ["theory", "hlo", "collectives", "cost", "schedule", "liveness", "cluster", "rendezvous", "launch",
                                  "cli", "__init__"])
def test_arithmetic_and_the_command_need_no_jax(name):
    assert not {"jax", "flax", "optax"} & _needs(name, set())


def test_importing_changes_nothing_global():
    code = ("import os, jax; before = dict(os.environ), dict(jax.config.values)\n"
            "import flax, optax; middle = dict(jax.config.values)\n"
            "import zerojax; [getattr(zerojax, n) for n in zerojax.__all__]\n"
            "assert (dict(os.environ), dict(jax.config.values)) == (before[0], middle)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    import zerojax

    assert [n for n in zerojax.__all__ if not (getattr(zerojax, n).__doc__ or "").strip()] == []
