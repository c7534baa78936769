"""The benchmarks find what they import."""

import ast
import importlib
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"
FILES = sorted(FOLDER.glob("*.py"))


def imports(path):
    """Yields (module, name) for each name that a file imports from zerojax."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zerojax"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_exists(path):
    for module, name in imports(path):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.import_module(f"{module}.{name}"), (module, name)


def test_run_knows_every_table(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    run = importlib.import_module("run")
    names = {name for path in FILES for name in _makers(path)}
    used = {make.__name__ for _, make in run.TABLES.values()}
    assert used <= names and used >= {"wire_table", "converge_table", "plans_table"}
    for name in [path.stem for path in FILES]:
        sys.modules.pop(name, None)


def _makers(path):
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
