"""The example as a person runs it: by the launcher, and as one process of as many devices."""

import re
import subprocess
import sys

import numpy as np
from processes import ROOT, environment, launch

from zerojax.checkpoint import reading

EXAMPLE = ROOT / "examples" / "multihost_gpt.py"
LINE = r"(\d) processes, 8 devices, step 6: held-out text (\S+) bits per byte, norm of the parameters (\S+)"


def arrays(directory):
    path = reading.step_path(directory, 6)
    note = reading.read_manifest(path)
    return dict(reading.arrays(path, note, [p for p in note.leaves if p.startswith(("params", "opt_state"))])), note


def test_two_processes_come_to_what_one_does(tmp_path):
    options = ["--steps", 6, "--accumulate", 2, "--checkpoint"]
    done = launch("-n", 2, "--devices", 4, EXAMPLE, *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, EXAMPLE, *map(str, options), tmp_path / "one"]
    one = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(JAX_NUM_CPU_DEVICES=8))
    assert one.returncode == 0, one.stderr[-3000:]
    two, alone = (re.search(LINE, text).groups() for text in (done.stdout, one.stdout))
    assert (two[0], alone[0]) == ("2", "1")
    np.testing.assert_allclose(np.float64(two[1:]), np.float64(alone[1:]), rtol=1e-4)
    (ours, note), (theirs, _) = arrays(tmp_path / "two"), arrays(tmp_path / "one")
    assert ours.keys() == theirs.keys() and note.mesh == {"data": 8} and note.data_states == ({"next": 6},)
    for path, x in ours.items():
        np.testing.assert_allclose(x, theirs[path], rtol=0, atol=1e-4 * max(1e-3, np.abs(x).max()), err_msg=path)
    assert done.stdout.count("held-out text") == 1  # one of them prints
