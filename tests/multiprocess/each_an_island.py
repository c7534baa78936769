"""Trains two islands, alone or each in a process of its own; writes the average and prints losses.

    python each_an_island.py FOLDER
"""

import pathlib
import sys

import jax
import numpy as np
import optax

import zerojax as zj

TX, DILOCO = optax.adam(0.05), optax.sgd(0.7, momentum=0.9, nesterov=True)


def batch(number):
    return np.random.default_rng(number).normal(size=(16, 8)).astype(np.float32)


def loss(params, x):
    return zj.Loss(((x @ params["w"] - 1) ** 2).sum(), x.shape[0])


def init():
    return {"w": jax.random.normal(jax.random.key(1), (8, 16))}


def train(folder, devices):
    """Returns the average after five steps; saves and restores after the third."""
    zero = zj.Zero(zj.make_mesh(islands=2, devices=devices), min_shard=1)
    islands = zero.islands(2, every=2, outer=DILOCO)

    def share(number):
        index, of = islands.share()
        return np.split(batch(number), of)[index]

    state, step = islands.init(init, TX), islands.train_step(loss, TX, max_skipped=1)
    with zj.Checkpointer(folder) as checkpoints:
        for number, x in enumerate(zj.feed(zj.Indexed(share, 5), islands), 1):
            state, metrics = step(state, x)
            if number == 3:
                checkpoints.save(state)
                state = checkpoints.restore_latest(islands.abstract(init, TX)).state
    print("mean loss", float(metrics["loss"].mean()), flush=True)
    return zero, islands, step, state


def main(folder):
    zj.initialize()
    zero, islands, step, state = train(folder / "checkpoints", jax.devices())
    whole = zero.jit(zero.gathered(lambda params: params["w"]), donate=False, batch_argnums=())
    w = np.asarray(whole(islands.average(state).params).addressable_data(0))
    if jax.process_index() == 0:
        np.save(folder / "w.npy", w)
    print("saved", flush=True)
    bad = np.full((8, 8), np.nan if jax.process_index() == 1 else 1, np.float32)
    for x in zj.feed([bad] * 4, islands):
        state, _ = step(state, x)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
