"""The house: imports go one way (pyproject.toml has the layers), no private jax, nothing global, no file too long."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "zerojax"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def _imported(node):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(path):
    return (name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node))


def test_imports_go_one_way():
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
                          capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_modules(path):
    roots = ("jax", "flax", "optax", "orbax")
    private = [n for n in _imports(path) if n.split(".")[0] in roots and any(part.startswith("_") for part in n.split("."))]
    assert private == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_file_is_two_concepts(path):
    assert len(path.read_text().splitlines()) <= 400


JAX_FREE = ["zerojax", "zerojax.cli", "zerojax.hlo.liveness", "zerojax.hlo.schedule", "zerojax.plan.theory",
            "zerojax.processes.launch", "zerojax.processes.launchers", "zerojax.processes.rendezvous"]


@pytest.mark.parametrize("name", JAX_FREE)
def test_arithmetic_and_the_command_need_no_jax(name):
    code = f"import sys, {name}; assert not {{'jax', 'flax', 'optax'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
