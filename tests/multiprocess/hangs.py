"""A training run of two processes in which one of them does something else before step 3.

    python hangs.py CASE DIRECTORY
"""

import contextlib
import logging
import os
import sys
import time

import distributed_trainer as trainer
import jax
import optax
import states

import zerojax as zj

LATE = 4  # seconds
WATCHDOG = 6  # seconds


def first(act):
    """Calls a function in process 0 only."""
    if jax.process_index() == 0:
        act()


def second(act):
    if jax.process_index() == 1:
        act()


def double(state, x):
    return 2 * x


def triple(state, x):
    return 3 * x


def fails(jitted, state, x):
    with contextlib.suppress(TypeError):
        jitted(state, x, "one argument too many")


def cases(jits, state, evaluate, checkpoints, x):
    norm = jax.jit(optax.global_norm)
    return {
        "save": lambda: first(lambda: checkpoints.save(state, force=True)),
        "another function": lambda: jits[jax.process_index()](state, x),
        "evaluate": lambda: first(lambda: evaluate(state, x)),
        "own program": lambda: first(lambda: print(float(norm(state.params)))),
        "late": lambda: second(lambda: time.sleep(LATE)) or checkpoints.save(state),
        "exit": lambda: second(lambda: sys.exit(3)) or time.sleep(60),  # no call needs it
        "exit of the first": lambda: first(lambda: sys.exit(3)) or time.sleep(60),
        "caught": lambda: second(lambda: fails(jits[0], state, x)),
        "end": lambda: second(sys.exit),
        "kill": lambda: second(lambda: os.kill(os.getpid(), 9)),
        "error": lambda: second(lambda: [][0]),
        "another save": lambda: checkpoints.save(state.replace(step=state.step + jax.process_index()
                                                               ), force=True),
    }


def main(case, directory):
    logging.basicConfig(level=logging.WARNING)
    zj.initialize(heartbeat_timeout=2 if case == "late" else 100,
                  watchdog=WATCHDOG if case == "own program" else None)
    zero = zj.Zero(zj.make_mesh(), min_shard=1)
    batches = zj.feed(zj.Indexed(trainer.own_part, 6), zero)
    step = zero.train_step(trainer.loss_fn, states.tx)
    evaluate = zero.eval_step(trainer.loss_fn)
    jits = [zero.jit(f) for f in (double, triple)]
    checkpoints = zj.Checkpointer(directory, zero=zero)
    state = zero.init(trainer.init, states.tx, jax.random.key(0))
    for number, x in enumerate(batches, 1):
        print("step", number, flush=True)
        if number == 1:
            evaluate(state, x)
            jits[0](state, x), jits[1](state, x)
        if number == 3:
            cases(jits, state, evaluate, checkpoints, x)[case]()
        state, _ = step(state, x)
    checkpoints.close()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
