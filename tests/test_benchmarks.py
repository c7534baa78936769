"""The benchmarks find what they import."""

import ast
import importlib
import pathlib

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


def test_the_tables_of_run_exist():
    """By name only: the modules of other folders have the same names."""
    tree = ast.parse((FOLDER / "run.py").read_text())
    used = [(node.value.id, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and (FOLDER / f"{node.value.id}.py").exists()]
    assert len(used) > 10
    for module, name in used:
        assert name in _functions(FOLDER / f"{module}.py"), (module, name)


def _functions(path):
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
