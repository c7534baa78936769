"""Two processes that keep snapshots for two directories, as on two hosts.

    python positions.py DIRECTORY

Their positions in the data are equal at first, then differ, then are equal again.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.checkpoint import slots


def header(step):
    headers = [json.loads(path.read_text()) for path in slots.BASE.glob("*/*-[01].json")]
    return next(h for h in headers if h["step"] == step and h["on_disk"] >= step - 1)


def main(directory):
    zj.initialize()
    slots.BASE = directory / str(jax.process_index())
    slots.BASE.mkdir()
    everywhere = NamedSharding(zj.make_mesh(), P())
    state = {"w": jax.jit(lambda: jnp.ones(4), out_shardings=everywhere)()}
    with (zj.Checkpointer(directory / "a", memory=True, asynchronous=False) as one,
          zj.Checkpointer(directory / "b", memory=True, every=100) as two):
        for step, position in enumerate([1, jax.process_index(), 1], 1):
            for checkpoints in (one, two):
                checkpoints.save(state, step=step, data_state=position)
            if step == 1:
                continue
            one.wait()
            two.wait()
            print(step, header(step)["is_alike"], flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
