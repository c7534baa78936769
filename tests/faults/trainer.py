"""A run to be killed: saves at every step, says so, and goes on from what is there.

    python trainer.py DIRECTORY STEPS [slow]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import states

import zerojax as zj


def init(key):
    return states.init(key) | {"large": jax.random.normal(key, (512, 512))}


def loss_fn(params, x):
    return states.loss_fn(params, x) + jnp.square(params["large"]).mean()


def main(directory, steps, pause=0.0):
    jax.config.update("jax_num_cpu_devices", 8)
    zero = states.zero()
    batches = zj.feed(zj.Indexed(lambda i: np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32), steps), zero)
    step = zero.train_step(loss_fn, states.tx)
    with zj.Preemption() as preemption, zj.Checkpointer(directory, keep=2, zero=zero) as checkpoints:
        target = zero.abstract(init, states.tx, jax.random.key(0))
        found = checkpoints.restore_latest(target, if_none="none")
        if found:
            batches.set_state(found.data_state)
        state = found.state if found else zero.init(init, states.tx, jax.random.key(0))
        print("from", int(state.step), flush=True)
        for number, x in enumerate(preemption.until(batches), int(state.step) + 1):
            state, _ = step(state, x)
            print("saving", number, flush=True)
            checkpoints.save(state, step=number, data_state=batches)
            time.sleep(pause)
            print("whole", *checkpoints.steps(), flush=True)
        for _ in preemption.until(range(1000 if preemption.requested or pause else 1)):  # an evaluation
            print("evaluating", flush=True)
            time.sleep(pause)
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
        if preemption.requested:
            preemption.exit()
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
