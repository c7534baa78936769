"""Right: processes that each bring a part of every batch come to what one device would, at every stage."""

import json

import jax
import numpy as np
import oracle
import pytest
import zoo
from contract import STEPS, batch
from processes import HERE, Job


def case(stage, accumulate=1, clip=None, **more):
    return {"stage": stage, "accumulate": accumulate, "clip": clip, "replica": 1, "model": "mlp", "tx": "adamw", "way": None,
            "parts": 8} | more


CASES = {
    "2 x 4": (2, [case(0, 2, 0.3), case(1, 2, 0.3), case(2, 2, 0.3), case(3, 2, 0.3), case(3, way="global")]),
    "4 x 2": (4, [case(1, 2, 0.3), case(3, 2, 0.3), case(2, replica=2, tx="adafactor", model="matrices")]),
    "2 x 4, a transformer": (2, [case(stage, 2, 0.3, model="scanned") for stage in range(4)]),
    "4 x 2, all": (4, [case(0, 2, 0.3), case(2, 2, 0.3), case(3, way="global"), case(1, replica=2)]),
}
SLOW = list(CASES)[2:]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_equals_one_device(tmp_path, name):
    processes, cases = CASES[name]
    with Job(tmp_path, [HERE / "contract.py", tmp_path / "found.npz", *map(json.dumps, cases)], processes, 8 // processes) as job:
        assert job.wait(240) == [0] * processes, [p.err[-2000:] for p in job]
    found = np.load(tmp_path / "found.npz")
    for i, one in enumerate(cases):
        model, batches = zoo.MODELS[one["model"]](), [batch(one, seed) for seed in range(STEPS)]
        tx = zoo.OPTIMIZERS[one["tx"]]()
        theirs, _, losses = oracle.train(model, tx, batches, accumulate=one["accumulate"], clip_norm=one["clip"])
        np.testing.assert_allclose(found[f"{i}/losses"], losses, rtol=1e-5, err_msg=str(one))
        born, _ = model.split(model.init())
        ours = jax.tree.map_with_path(lambda path, _, i=i: found[f"{i}/{jax.tree_util.keystr(path)}"], theirs)
        oracle.assert_close(ours, theirs, born, "float32")
