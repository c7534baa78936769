"""The table of contents in `zerojax/__init__.py`, and its copy for type checkers."""

import ast
import pathlib

import pytest

import zerojax as zj


def _imports_for_type_checkers():
    tree = ast.parse(pathlib.Path(zj.__file__).read_text())
    block, = [node for node in tree.body if isinstance(node, ast.If)]
    return {(statement.module, alias.name, alias.asname)
            for statement in block.body for alias in statement.names}


def test_type_checkers_see_the_names_of_the_table():
    seen = _imports_for_type_checkers()
    table = {(f"zerojax.{module}", name, name) for name, module in zj._MODULE_OF.items()}
    assert seen == table | {("zerojax", name, name) for name in zj._SUBMODULES}
    assert dir(zj) == zj.__all__ == sorted(name for _, name, _ in seen)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'zerojax' has no attribute 'Zeros'"):
        zj.Zeros  # noqa: B018
