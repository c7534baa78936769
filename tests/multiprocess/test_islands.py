"""Islands in processes of their own train as they do in one, and one that fails ends all."""

import re

import each_an_island
import jax
import numpy as np
import pytest
from processes import HERE, Job


@pytest.mark.slow
def test_each_process_is_an_island(tmp_path, capsys):
    with Job(tmp_path, [HERE / "each_an_island.py", tmp_path], 2, 2) as job:
        statuses = job.wait(120)
    assert 0 not in statuses, [p.out for p in job]
    assert "NonFiniteError: 1 consecutive steps were skipped" in job[1].err
    _, islands, _, state = each_an_island.train(tmp_path / "alone", jax.devices()[:4])
    w = np.asarray(islands.average(state).params["w"])
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), w, rtol=0, atol=1e-5)
    outputs = (capsys.readouterr().out, *(p.out for p in job))
    losses = [float(re.search(r"^mean loss (\S+)", out, re.MULTILINE)[1]) for out in outputs]
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)
