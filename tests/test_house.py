"""The rules of the house: imports in layers, no private jax, nothing global, short files."""

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
    nodes = ast.walk(ast.parse(path.read_text()))
    return (name for node in nodes for name in _imported(node))


def _python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          **options)


def test_imports_go_one_way():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = _python(code, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_modules(path):
    roots = ("jax", "flax", "optax", "orbax")
    parts = (name.split(".") for name in _imports(path))
    private = [names for names in parts
               if names[0] in roots and any(name.startswith("_") for name in names)]
    assert private == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_file_is_two_concepts(path):
    assert len(path.read_text().splitlines()) <= 400


JAX_FREE = ["zerojax", "zerojax.cli", "zerojax.hlo.liveness", "zerojax.hlo.schedule",
            "zerojax.plan.theory", "zerojax.processes.launch", "zerojax.processes.launchers",
            "zerojax.processes.rendezvous"]


@pytest.mark.parametrize("name", JAX_FREE)
def test_arithmetic_and_the_command_need_no_jax(name):
    done = _python(f"import sys, {name}; assert not {{'jax', 'flax', 'optax'}} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_global():
    done = _python("import os, jax; before = dict(os.environ), dict(jax.config.values)\n"
                   "import flax, optax; middle = dict(jax.config.values)\n"
                   "import zerojax; [getattr(zerojax, n) for n in zerojax.__all__]\n"
                   "assert (dict(os.environ), dict(jax.config.values)) == (before[0], middle)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    import zerojax

    undocumented = [name for name in zerojax.__all__
                    if not (getattr(zerojax, name).__doc__ or "").strip()]
    assert undocumented == []
