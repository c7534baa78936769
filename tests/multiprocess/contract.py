"""The cases of test_training, which each process trains with its own part of every batch.

    python contract.py OUTPUT.npz CASE_AS_JSON...

Process 0 writes losses and parameters into OUTPUT.npz. The parameters of the first case are also
exported, to OUTPUT.npz.safetensors.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import oracle
import zoo

import zerojax as zj

STEPS = 3


def batch(case, seed):
    """Returns the whole batch, whose halves have different weights.

    A token that is a multiple of 5 has weight 0, and an example of an MLP 1 + label % 3.
    """
    n = 2 * case["parts"] * case["accumulate"]
    made = zoo.MODELS[case["model"]]().batch(n, seed)
    if case["model"] == "scanned":
        made[n // 2:, 2:] = 5
    if case["model"] == "mlp":
        made["y"][n // 2:] = made["y"][n // 2:] // 3 * 3
    return made


def own_part(whole):
    n = jax.process_count()
    return jax.tree.map(lambda x: np.split(x, n)[jax.process_index()], whole)


def trained(case, export=None):
    """Returns (losses, final parameters, whole on this process); also exports them to a file."""
    model, tx = zoo.MODELS[case["model"]](), zoo.OPTIMIZERS[case["tx"]]()
    mesh = zj.make_mesh(replica=case["replica"])
    zero = zj.Zero(mesh, case["stage"], min_shard=1, gradients=case["way"])
    state = zero.init(model.init, tx)
    step = zero.train_step(model.loss, tx, accumulate=case["accumulate"], clip_norm=case["clip"],
                           compiler_options=oracle.QUICK)
    losses = []
    for x in zj.feed((own_part(batch(case, seed)) for seed in range(STEPS)), zero):
        assert len(jax.tree.leaves(x)[0]) == 2 * case["parts"] * case["accumulate"]
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    if zero.stage:
        assert not all(x.is_fully_replicated for x in jax.tree.leaves(state.params))
    if export:
        exported(state, export)
    whole = jax.NamedSharding(zero.mesh, jax.P())
    params = jax.jit(lambda x: x, out_shardings=whole)(state.params)
    return losses, jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), params)


def exported(state, file):
    """Exports a live state, and checks that another export to the file fails on all processes."""
    assert zj.export_safetensors(state, file) == [pathlib.Path(file)]
    try:
        zj.export_safetensors(state, file)
    except zj.CheckpointError as error:
        assert "already exists" in str(error)
    else:
        raise AssertionError(f"process {jax.process_index()} raised no error")


def main(output, *cases):
    zj.initialize(heartbeat_timeout=30)
    found = {}
    for i, case in enumerate(map(json.loads, cases)):
        losses, params = trained(case, None if i else f"{output}.safetensors")
        found[f"{i}/losses"] = losses
        for path, x in jax.tree.leaves_with_path(params):
            found[f"{i}/{jax.tree_util.keystr(path)}"] = x
        print("done", i, flush=True)
    if jax.process_index() == 0:
        np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
