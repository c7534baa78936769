"""The example with `zerojax launch`, and as one process with the same number of devices."""

import re
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT, environment, launch

from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import reading

EXAMPLE = ROOT / "examples" / "multihost_gpt.py"
LINE = (r"(\d) processes, 8 devices, step 6: held-out text (\S+) bits per byte, "
        r"norm of the parameters (\S+)")


def restored(directory):
    """Returns (parameters and optimizer state, manifest) of step 6."""
    path = folder.step_path(directory, 6)
    manifest = reading.read_manifest(path)
    wanted = [p for p in manifest.leaves if p.startswith(("params", "opt_state"))]
    return dict(reading.arrays(path, manifest, wanted)), manifest


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    options = ["--steps", 6, "--accumulate", 2, "--checkpoint"]
    done = launch("-n", 2, "--devices", 4, EXAMPLE, *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, EXAMPLE, *map(str, options), tmp_path / "one"]
    one = subprocess.run(command, capture_output=True, text=True, timeout=200,
                         env=environment(JAX_NUM_CPU_DEVICES=8))
    assert one.returncode == 0, one.stderr[-3000:]
    two, alone = (re.search(LINE, text).groups() for text in (done.stdout, one.stdout))
    assert (two[0], alone[0]) == ("2", "1")
    np.testing.assert_allclose(np.float64(two[1:]), np.float64(alone[1:]), rtol=1e-4)
    (ours, manifest), (theirs, _) = restored(tmp_path / "two"), restored(tmp_path / "one")
    assert manifest.mesh == {"data": 8} and manifest.data_states == ({"next": 6},)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        largest = max(1e-3, np.abs(x).max())
        np.testing.assert_allclose(x, theirs[path], rtol=0, atol=1e-4 * largest, err_msg=path)
    assert done.stdout.count("held-out text") == 1  # only one process prints
