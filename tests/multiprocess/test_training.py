"""Several processes, each with its own part of every batch, train like one device at all stages."""

import json
import re

import jax
import numpy as np
import oracle
import pytest
import quick
import zoo
from contract import STEPS, batch
from processes import HERE, Job
from safetensors.numpy import load_file


def case(stage, accumulate=1, clip=None, **more):
    defaults = {"replica": 1, "model": "mlp", "tx": "adamw", "way": None, "parts": 8}
    return defaults | {"stage": stage, "accumulate": accumulate, "clip": clip} | more


def stages(*wanted, **more):
    return [case(stage, 2, 0.3, **more) for stage in wanted]


GLOBAL = case(3, way="global")
MATRICES = case(2, replica=2, tx="adafactor", model="matrices")
JOBS = {  # the number of processes, with 8 devices in all, and their cases
    "2 x 4": (2, [*stages(0, 1, 2, 3), GLOBAL, MATRICES]),
    "4 x 2": (4, [*stages(1, 3), MATRICES]),
    "2 x 4, a transformer": (2, stages(0, 1, 2, 3, model="scanned")),
    "4 x 2, all": (4, [*stages(0, 2), GLOBAL, case(1, replica=2)]),
}


def expected(one):
    """Returns (initial parameters, final parameters, losses) of one device."""
    model, tx = zoo.MODELS[one["model"]](), zoo.OPTIMIZERS[one["tx"]]()
    batches = [batch(one, seed) for seed in range(STEPS)]
    params, _, losses = oracle.train(model, tx, batches, accumulate=one["accumulate"],
                                     clip_norm=one["clip"])
    born, _ = model.split(model.init())
    return born, params, losses


@pytest.mark.parametrize("name", quick.some(JOBS, "2 x 4".__eq__))
def test_equals_one_device(tmp_path, name):
    processes, cases = JOBS[name]
    command = [HERE / "contract.py", tmp_path / "found.npz", *map(json.dumps, cases)]
    with Job(tmp_path, command, processes, 8 // processes) as job:
        assert job.wait(240) == [0] * processes, [p.err[-2000:] for p in job]
    found = np.load(tmp_path / "found.npz")
    for i, one in enumerate(cases):
        born, theirs, losses = expected(one)
        np.testing.assert_allclose(found[f"{i}/losses"], losses, rtol=1e-5, err_msg=str(one))
        ours = jax.tree.map_with_path(
            lambda path, _, i=i: found[f"{i}/{jax.tree_util.keystr(path)}"], theirs)
        oracle.assert_close(ours, theirs, born, "float32")
    check_export(load_file(tmp_path / "found.npz.safetensors"), found)


def check_export(tensors, found):
    """Checks that the exported parameters are those of the first case, bit for bit."""
    params = {key: x for key, x in found.items() if key.startswith("0/[")}
    assert len(tensors) == len(params)
    for key, x in params.items():
        name = ".".join(re.findall(r"\['(.*?)'\]", key))
        np.testing.assert_array_equal(tensors[name], x)
