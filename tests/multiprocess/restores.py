"""Restores the newest state of a trainer; prints the digests of its leaves, computed here."""

import json
import sys

import distributed_trainer
import jax
import states

import zerojax as zj
from zerojax.checkpoint import digest, entries

if __name__ == "__main__":
    zj.initialize()
    zero = zj.Zero(zj.make_mesh(), stage=1, min_shard=1)
    with zj.Checkpointer(sys.argv[1]) as checkpoints:
        target = zero.abstract(distributed_trainer.init, states.tx, jax.random.key(0))
        leaves = entries.by_path(checkpoints.restore_latest(target).state)
    print(json.dumps(dict(zip(leaves, digest.of(list(leaves.values())), strict=True))))
