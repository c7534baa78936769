"""Restores the newest state of a directory that this process sees in a state of its own.

    python views.py DIRECTORY_OF_PROCESS_0 DIRECTORY_OF_PROCESS_1 [LISTED...]    # LISTED: the steps that the second one lists
"""

import sys

import jax
import states

import zerojax as zj
from zerojax import store

if __name__ == "__main__":
    zj.initialize()
    directory, listed = sys.argv[1 + jax.process_index()], list(map(int, sys.argv[3:]))
    if jax.process_index() and listed:
        store.steps = lambda _: listed
    zero = zj.Zero(zj.make_mesh(), min_shard=1)
    with zj.Checkpointer(directory) as checkpoints:
        try:
            found = checkpoints.restore_latest(states.target(zero))
            print("restored", found.step, found.data_state, flush=True)
        except zj.ZeroError as error:
            print(type(error).__name__, str(error).splitlines()[0], flush=True)
