"""The site: it builds without a warning, its links lead somewhere, its reference is complete."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import zlib

import pytest

import zerojax as zj
from zerojax import cli

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# classes of which public functions return instances
RETURNED = ["advice.Advice", "advice.Choice", "advice.Trial", "data.feeding.Feed",
            "layout.report.Row", "plan.finding.Finding", "plan.memory.Memory", "plan.plan.Compute",
            "plan.island_plan.IslandsPlan", "plan.traffic.Traffic", "processes.launchers.Job",
            "tables.Sheet", "train.island_step.IslandsStep", "train.islands.Islands",
            "train.jitted.Jitted", "train.stacked.IslandsState", "train.stacked.Outer",
            "train.step.EvalStep", "train.step.TrainStep", "tuning.Attempt", "tuning.Tuning"]


def test_the_site_builds_without_a_warning_and_has_every_page_and_name(tmp_path):
    site = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", "docs",
               "-d", tmp_path / "trees", ".", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "docs/index.html" in (site / "index.html").read_text()
    assert [name for name in NAMES if not (site / name).with_suffix(".html").is_file()] == []
    assert not_in_the_reference(site) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    dead = [link for link in links(page.read_text()) if not leads_somewhere(page, link)]
    assert dead == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n[1](page.md#a-b-c) [2](#a-b) [3](none.md) `[4](none)`\n"
                    "```\n# D\n[5](none)\n```\n[6](https://example.org) [7](#d)")
    found = links(page.read_text())
    assert found == ["page.md#a-b-c", "#a-b", "none.md", "#d"]
    assert [leads_somewhere(page, link) for link in found] == [True, False, False, False]


def links(text):
    """Returns the targets of links that are not addresses of the web."""
    text = re.sub(r"`[^`\n]+`", "", BLOCK.sub("", text))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"\w+:", link)]


def leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page):
    """Returns the anchors of the headings of a page, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_public_name_has_a_docstring():
    without = [name for name, value in public() if not inspect.getdoc(value)]
    without += [f"{name}.{member}" for name, value in public()
                for member, doc in members(value) if not doc]
    assert without == []


def not_in_the_reference(site):
    """Returns the public names that the API reference lacks."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]  # after four lines of text
    known = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    missing = [name for name, _ in public() if name not in known]
    missing += [f"{name}.{member}" for name, value in public() for member, _ in members(value)
                if f"{name}.{member}" not in known and not entry(value, member)]
    return missing


def test_the_reference_shows_every_subcommand():
    shown = re.findall(r"{zerojax-help} (\w+)", (ROOT / "docs/api.md").read_text())
    commands = [name.removeprefix("run_") for name in vars(cli) if name.startswith("run_")]
    assert sorted(shown) == sorted(commands)


def public():
    """Yields the names of public objects, and the objects."""
    for name in zj.__all__:
        yield f"zerojax.{name}", getattr(zj, name)
    for name in RETURNED:
        module, _, attribute = name.rpartition(".")
        yield f"zerojax.{name}", getattr(importlib.import_module(f"zerojax.{module}"), attribute)


def members(value):
    """Yields the names and the docstrings of the public members of a class or a module."""
    if inspect.ismodule(value):
        for name, found in vars(value).items():
            is_own = getattr(found, "__module__", "") == value.__name__ or name.isupper()
            if is_own and name[0] != "_":
                yield name, inspect.getdoc(found)
    elif inspect.isclass(value) and not issubclass(value, Exception):
        for name in sorted(set().union(*map(defined, value.__mro__))):
            found = inspect.getattr_static(value, name, None)
            is_code = inspect.isroutine(found) or hasattr(found, "__get__")
            yield name, inspect.getdoc(found) if is_code else entry(value, name)


def defined(cls):
    """Returns the public names that a class of zerojax defines, also on its instances."""
    if not cls.__module__.startswith("zerojax"):
        return set()
    names = {*vars(cls), *vars(cls).get("__annotations__", {})}
    if inspect.isfunction(vars(cls).get("__init__")) and not hasattr(cls, "__dataclass_fields__"):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                  and isinstance(node.ctx, ast.Store)}
    return {name for name in names if name[0] != "_"}


def entry(value, name):
    """Returns whether a docstring describes an argument or an attribute of this name."""
    return re.search(rf"^\s+(\w+, )*{name}(, \w+)*: ", inspect.getdoc(value) or "", re.MULTILINE)


def test_quoted_errors_are_those_of_the_source():
    quoted = re.findall(r"`(\w+(?:Error|Warning)): ([^`]*)`",
                        (ROOT / "docs/troubleshooting.md").read_text())
    ours = [text for kind, text in quoted if kind != "RuntimeError"]  # those are jax's
    known = "\n".join(messages())
    assert len(ours) > 20
    assert [text for text in ours for part in text.split("...") if part not in known] == []


def messages():
    """Yields the texts in the source; those of f-strings without the values in them."""
    for path in ROOT.glob("zerojax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "...".join(part.value for part in node.values
                                 if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
