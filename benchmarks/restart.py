"""Restarting a run of a gigabyte on eight CPU devices, from disk and from shared memory.

    python benchmarks/restart.py                    # all tables
    python benchmarks/restart.py run DIRECTORY N MEMORY    # a run, killed after N steps if N > 0
"""

import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from checkpoints import SHAPE, STATE_BYTES, TX, filled, target, zero
from machine import table

import zerojax as zj

ROUNDS = 3
STEPS = 10  # timed, after one that compiles
EVERY = (1, 5, 10)
BATCH = np.ones((64, SHAPE[0]), np.float32)


def loss_fn(params, x):
    for name in sorted(params):
        x = jax.numpy.tanh(x @ params[name] / SHAPE[0] ** 0.5)
    return jax.numpy.square(x).mean()


def wall() -> float:
    """Returns the time in seconds, comparable between processes."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def run(directory, steps, memory=True):
    """Restores or begins, and runs steps; reports times, and is killed after the last."""
    policy = zero()
    step = policy.train_step(loss_fn, TX)
    saves = zj.Checkpointer(directory, every=10**6, memory=memory, keep=1)
    start = wall()
    found = saves.restore_latest(target(policy), if_none="none")
    state = filled(policy) if found is None else jax.block_until_ready(found.state)
    print("restored", wall() - start, flush=True)
    for _ in range(max(1, steps)):
        state, _ = jax.block_until_ready(step(state, BATCH))
        print("step", wall(), flush=True)
        saves.save(state)
    if steps:
        saves.save(state, force=not memory)
        saves.wait()
        print("killed", wall(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    saves.close()


def restart(directory, memory) -> tuple[float, float]:
    """Kills a run; returns the seconds until the next step ended, and those of the restore."""
    folder = f"{directory}/{'warm' if memory else 'cold'}"
    shutil.rmtree(folder, ignore_errors=True)
    killed = _reported("run", folder, 2, memory)["killed"]
    started = wall()
    _drop(folder)
    killed += wall() - started
    again = _reported("run", folder, 0, memory)
    return again["step"] - killed, again["restored"]


def _drop(folder):
    """Drops files from the page cache, as on a host that did not write them."""
    os.sync()
    for path in filter(pathlib.Path.is_file, pathlib.Path(folder).rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reported(*arguments) -> dict[str, float]:
    """Runs this file; returns the last number that it reported under each word."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(done.stderr[-2000:])
    return {word: float(number) for word, number in map(str.split, done.stdout.splitlines())}


def restarts(directory) -> str:
    """Returns a table of the seconds from a kill to the end of the next step."""
    times = {memory: [] for memory in (False, True)}
    for _ in range(ROUNDS):
        for memory, taken in times.items():
            taken.append(restart(directory, memory))
    cold, warm = ([statistics.median(t) for t in zip(*times[m], strict=True)] for m in times)
    rows = [[name, f"{c:.2f}", f"{w:.2f}", f"{w / c:.2f}"] for name, c, w in
            zip(["from the kill to the end of the next step", "of this, the restore"], cold, warm,
                strict=True)]
    return table(["", "from disk, s", "from memory, s", "ratio"], rows)


def held_up(directory) -> str:
    """Returns a table of how long snapshots hold up the steps, for each snapshot_every.

    The rows take turns, so that other load on the machine affects all of them alike.
    """
    policy = zero()
    step = policy.train_step(loss_fn, TX)
    state, _ = jax.block_until_ready(step(filled(policy), BATCH))
    found = {every: [] for every in (None, *EVERY)}
    for _ in range(ROUNDS):
        for every in found:
            state, times = timed(f"{directory}/{every}", step, state, every)
            found[every].append(times)
    medians = {every: np.median(times, axis=0) for every, times in found.items()}
    alone = medians[None][1]
    rows = [[every or "no snapshots", f"{1e3 * blocked:.1f}", f"{blocked / alone:.1%}",
             f"{1e3 * whole:.0f}", f"{whole / alone:.2f}"]
            for every, (blocked, whole) in medians.items()]
    return table(["`snapshot_every`", "`save`, ms per step", "of the step", "step, ms", "ratio"],
                 rows)


def timed(directory, step, state, every):
    """Runs steps; returns the state, and the mean seconds in `save` and of a whole step."""
    options = {"memory": True, "snapshot_every": every} if every else {}
    with zj.Checkpointer(directory, every=10**6, **options) as saves:
        first = int(state.step)
        saves.save(state.replace(step=0 * state.step), step=0)  # allocates the memory
        saves.wait()
        blocked, start = 0.0, time.perf_counter()
        for number in range(1, STEPS + 1):
            state, metrics = step(state, BATCH)
            jax.block_until_ready(metrics)  # as a loop does that prints them
            before = time.perf_counter()
            saves.save(state, step=first + number)
            blocked += time.perf_counter() - before
        whole = time.perf_counter() - start
    return state, (blocked / STEPS, whole / STEPS)


def report():
    """Prints the tables, each when it is complete."""
    print(f"A state of {STATE_BYTES / 1e9:.2f} GB, whose step on eight CPU devices computes on the "
          "same cores that copy and check the snapshots. Files on disk are not in the page cache; "
          "programs are in jax's compilation cache.\n")
    with tempfile.TemporaryDirectory() as directory:
        print(restarts(directory), flush=True)
        print(held_up(directory))


def markdown() -> str:
    """Returns the tables, from a process of its own because they need eight devices."""
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(tempfile.gettempdir(),
                                                                    "zerojax-restarts")))
    if len(sys.argv) == 1:
        report()
    else:
        run(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True")
