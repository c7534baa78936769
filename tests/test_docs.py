"""The Python blocks of a page run in order, as one program."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import zerojax.recipe

ROOT = pathlib.Path(__file__).parent.parent
# pytest-xdist sets the width of terminals, which tables would keep to
ENVIRON = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
PAGES = ["README.md", "docs/coming_from.md", "docs/on_gpus.md", "docs/plan.md", "docs/start.md"]


def blocks(page: str) -> list[re.Match]:
    text = (ROOT / page).read_text()
    return list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def program(page: str) -> str:
    """Returns the blocks of a page as one program, in which lines have the numbers of the page."""
    lines = [""] * (ROOT / page).read_text().count("\n")
    for block in blocks(page):
        start = block.string[:block.start(1)].count("\n")
        code = block[1].splitlines()
        lines[start:start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_all_blocks_are_found(page):
    assert len(blocks(page)) == (ROOT / page).read_text().count("```python") > 0


def run(page, devices, tmp_path):
    code = f"exec(compile({program(page)!r}, {page!r}, 'exec'), globals())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300,
                          env=ENVIRON | {"JAX_NUM_CPU_DEVICES": str(devices)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_block_of_the_page_on_plans_runs(tmp_path):
    run("docs/plan.md", 1, tmp_path)


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_readmes_blocks_run(devices, tmp_path):
    done = run("README.md", devices, tmp_path)
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert losses[-1] < 0.5 * losses[0]
    text = " ".join(done.stdout.split())
    assert f"on each of {devices} device" in text and "MFU about" in text


@pytest.mark.slow
def test_the_program_of_coming_from_runs(tmp_path):
    run("docs/coming_from.md", 8, tmp_path)


@pytest.mark.slow
def test_the_start_page_runs_and_shows_its_output(tmp_path):
    done = run("docs/start.md", 8, tmp_path)
    shown = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs/start.md").read_text(),
                       re.DOTALL | re.MULTILINE)
    losses, layout, stages, plan = ([line.rstrip() for line in text.splitlines()] for text in shown)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert [line for line in layout + stages + plan[:1] if line not in lines] == []
    assert [line.split(":")[0] for line in losses] == [line.split(":")[0] for line in lines[:4]]


def test_the_page_on_gpus_has_a_recipe(tmp_path):
    run("docs/on_gpus.md", 1, tmp_path)
    code, = (block[1] for block in blocks("docs/on_gpus.md"))
    (tmp_path / "gpt.py").write_text(code)
    recipe = zerojax.recipe.load(str(tmp_path / "gpt.py"))
    assert recipe.rows(8).shape == (16, 2049) and len(recipe.losses) == 5


def test_the_tests_of_the_fault_matrix_exist():
    """Its rows are numbered, and each names a test."""
    rows = re.findall(r"^\| (\d+) \|.*\| `(\S+)::(\S+)` \|$",
                      (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 50
    assert not missing([(file, test) for _, file, test in rows])


def test_the_tests_of_the_mutations_exist():
    """Each row names a file, or a test in it."""
    named = re.findall(r"`(\S+\.py)(?:::(\w+))?", (ROOT / "docs/mutations.md").read_text())
    assert len(named) >= 150 and not missing(named)


def missing(named):
    return [f"{file}::{test}" for file, test in named
            if (f"def {test}(" if test else "") not in (ROOT / "tests" / file).read_text()]
