"""A run to be killed: it saves and reports every step, and continues from the newest one.

    python trainer.py DIRECTORY STEPS [PAUSE]
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


def batch(i):
    return np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32)


def begun(zero, batches, checkpoints):
    """Returns the state to continue from, with the batches at its position."""
    target = zero.abstract(init, states.tx, jax.random.key(0))
    found = checkpoints.restore_latest(target, if_none="none")
    if found is None:
        return zero.init(init, states.tx, jax.random.key(0))
    batches.set_state(found.data_state)
    return found.state


def main(directory, steps, pause=0.0):
    jax.config.update("jax_num_cpu_devices", 8)
    zero = states.zero()
    batches = zj.feed(zj.Indexed(batch, steps), zero)
    step = zero.train_step(loss_fn, states.tx)
    with (zj.Preemption() as preemption,
          zj.Checkpointer(directory, keep=2, zero=zero) as checkpoints):
        state = begun(zero, batches, checkpoints)
        print("from", int(state.step), flush=True)
        for number, x in enumerate(preemption.until(batches), int(state.step) + 1):
            state, _ = step(state, x)
            print("saving", number, flush=True)
            checkpoints.save(state, step=number, data_state=batches)
            time.sleep(pause)
            print("whole", *checkpoints.steps(), flush=True)
        is_slow = preemption.requested or pause
        for _ in preemption.until(range(1000 if is_slow else 1)):  # stands for an evaluation
            print("evaluating", flush=True)
            time.sleep(pause)
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
        if preemption.requested:
            preemption.exit()
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
