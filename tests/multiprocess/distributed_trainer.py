"""A run of several processes for faults: saves at every step, and continues from a checkpoint.

    python distributed_trainer.py DIRECTORY STEPS [PAUSE]

PAUSE is in seconds, after each step. $FAULT is "kind process step": the fault of that process
before that step. It occurs once; DIRECTORY/done marks it. "lose" is a host that is replaced: its
memory is gone too. With $HOSTS, a directory, the run takes snapshots in memory, and saves every
fifth step to disk; each process has a shared memory of its own there, as on a host of its own. With
$SWAP, the hosts have another order after the fault.
$REPLICA is the number of replicas.
"""

import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import states

import zerojax as zj
from zerojax.checkpoint import slots

HEARTBEAT = 8
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def init(key):
    return states.init(key) | {"large": jax.random.normal(key, (512, 512))}


def loss_fn(params, x):
    time.sleep(float(os.environ.get("SLOW_TO_TRACE", 0)))
    return states.loss_fn(params, x) + jnp.square(params["large"]).mean()


def own_part(number):
    whole = np.random.default_rng(number).standard_normal((8, 64)).astype(np.float32)
    return np.split(whole, jax.process_count())[jax.process_index()]


def fault(directory, number):
    kind, process, step = os.environ.get("FAULT", "none 0 0").split()
    done = pathlib.Path(directory, "done")
    if (int(process), int(step)) != (jax.process_index(), number) or done.exists():
        return
    done.touch()
    if kind == "lose":
        shutil.rmtree(slots.BASE)
        kind = "kill"
    if kind == "raise":
        raise ValueError(f"process {process} fails")
    os.kill(os.getpid(), SIGNALS[kind])


def restored(zero, checkpoints, batches):
    """Returns the state of the last checkpoint, or a new one."""
    key = jax.random.key(0)
    target = zero.abstract(init, states.tx, key)
    found = checkpoints.restore_latest(target, if_none="none")
    if found is None:
        return zero.init(init, states.tx, key)
    batches.set_state(found.data_state)
    return found.state


def options(directory):
    """Returns the options of the checkpointer."""
    if "HOSTS" not in os.environ:
        return {}
    host = jax.process_index()
    if "SWAP" in os.environ and pathlib.Path(directory, "done").exists():
        host = jax.process_count() - 1 - host
    slots.BASE = pathlib.Path(os.environ["HOSTS"], str(host))
    slots.BASE.mkdir(parents=True, exist_ok=True)
    return {"memory": True, "every": 5, "asynchronous": False}


def main(directory, steps, pause=0.0):
    zj.initialize(heartbeat_timeout=HEARTBEAT, shutdown_timeout=25)
    mesh = zj.make_mesh(replica=int(os.environ.get("REPLICA", 1)))
    zero = zj.Zero(mesh, min_shard=1)
    batches = zj.feed(zj.Indexed(own_part, steps), zero)
    step = zero.train_step(loss_fn, states.tx)
    with (zj.Preemption() as preemption,
          zj.Checkpointer(directory, keep=2, zero=zero, **options(directory)) as saves):
        state = restored(zero, saves, batches)
        print("from", int(state.step), flush=True)
        for number, x in enumerate(preemption.until(batches), int(state.step) + 1):
            print("step", number, flush=True)
            fault(directory, number)
            state, _ = step(state, x)
            saves.save(state, step=number, data_state=batches)
            time.sleep(pause)
        for _ in preemption.until(range(1000 if pause else 1)):  # an evaluation
            print("evaluating", flush=True)
            time.sleep(pause)
        saves.save(state, data_state=batches, force=True)
        saves.wait()
        if preemption.requested:
            print("stopped at", int(state.step), flush=True)
            preemption.exit()
    print("done", int(state.step), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
