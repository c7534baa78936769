"""The Python blocks of the README run in order, as one program."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md"]


def program(page: str) -> str:
    """Returns the blocks of a page as one program, in which lines have the numbers of the page."""
    text = (ROOT / page).read_text()
    lines = [""] * text.count("\n")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        start = text[:block.start(1)].count("\n")
        code = block[1].splitlines()
        lines[start:start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", PAGES)
def test_its_blocks_run_in_order(page, devices, tmp_path):
    code = f"import jax\njax.config.update('jax_num_cpu_devices', {devices})\n"
    code += f"exec(compile({program(page)!r}, {page!r}, 'exec'), globals())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert losses[-1] < 0.5 * losses[0]
    text = " ".join(done.stdout.split())
    assert f"on each of {devices} device" in text and "MFU about" in text
