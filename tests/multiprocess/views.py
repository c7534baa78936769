"""Restores the newest state of a directory, several times; each process sees it in a state of its own.

    python views.py POSITIONS CASES_AS_JSON    # [[directory of each process], [steps that the second one lists] or null], ...

Then saves a state into POSITIONS, where each process is at a place of its own in its data, and restores that.
"""

import json
import sys

import jax
import states

import zerojax as zj
from zerojax.checkpoint import reading

if __name__ == "__main__":
    zj.initialize()
    zero, listed = zj.Zero(zj.make_mesh(), min_shard=1), reading.steps
    for directories, seen in json.loads(sys.argv[2]):
        reading.steps = listed if seen is None or jax.process_index() == 0 else lambda _, seen=seen: seen
        with zj.Checkpointer(directories[0]) as checkpoints:
            checkpoints.directory = reading.located(directories[jax.process_index()])  # as this host sees it
            try:
                found = checkpoints.restore_latest(states.target(zero))
                print("view: restored", found.step, found.data_state, flush=True)
            except zj.ZeroError as error:
                print("view:", type(error).__name__, str(error).splitlines()[0], flush=True)
    reading.steps = listed
    try:
        zj.Checkpointer(f"{sys.argv[1]}-{jax.process_index()}")
    except zj.CheckpointError as error:
        print("view:", error, flush=True)
    with zj.Checkpointer(sys.argv[1]) as checkpoints:
        checkpoints.save(states.state(zero), data_state={"next": 10 + jax.process_index(), "bytes": b"\x00"})
        print("view:", checkpoints.restore_latest(states.target(zero)).data_state, flush=True)
