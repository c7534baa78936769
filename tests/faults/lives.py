"""Many lives of one training run, each ended by SIGKILL at a random moment.

    python lives.py DIRECTORY KILLS SEED

Every life is forked from this process, which has imported all modules and initialized no device, so
that it starts in a fraction of a second. It restores, trains, saves to disk and takes snapshots in
memory; the pipe to this process tells where it is. Prints a line of JSON at the end.
"""

import collections
import json
import os
import pathlib
import random
import select
import signal
import sys
import threading
import time
import traceback

import jax
import states
import trainer

import zerojax as zj
from zerojax.checkpoint import directory as folder
from zerojax.checkpoint import reading, slots

PHASES = ("start", "restore", "compile", "step", "save", "wait")


def live(directory, tell, last=None):
    """Trains up to a step, or until this process is killed."""
    tell("start")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", str(directory.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    slots.BASE = directory.parent / f"memory of {directory.name}"
    slots.BASE.mkdir(exist_ok=True)
    zero = states.zero(2)
    batches = zj.feed(zj.Indexed(trainer.batch, last), zero)
    step = zero.train_step(trainer.loss_fn, states.tx)
    with zj.Checkpointer(directory, keep=2, every=3, memory=True, zero=zero) as checkpoints:
        tell("restore")
        for _, is_on_disk, _ in checkpoints._candidates()[:1]:
            tell(f"source {'disk' if is_on_disk else 'memory'}")
        state = trainer.begun(zero, batches, checkpoints)
        tell(f"from {int(state.step)}")
        tell("compile")
        for number, x in enumerate(batches, int(state.step) + 1):
            state, _ = step(state, x)
            tell(f"step {number}")
            tell("save")
            checkpoints.save(state, step=number, data_state=batches)
            tell("wait")
            jax.block_until_ready(state)
            for whole in checkpoints.steps():
                tell(f"whole {whole}")
        checkpoints.save(state, data_state=batches, force=True)


def forked(act):
    """Calls a function in a forked process with a function that tells lines.

    Returns (its id, a file to read the lines from).
    """
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        act(lambda line: os.write(into, f"{line}\n".encode()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def read(out, seconds):
    """Returns the lines that arrive within some seconds, or until the end."""
    end, text = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
        more = os.read(out, 2**16)
        if not more:
            break
        text += more
    return text.decode().splitlines()


def killed(directory, seconds):
    """Returns the lines that a life has told before it was killed after some seconds."""
    pid, out = forked(lambda tell: live(directory, tell))
    lines = read(out, seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by itself: {status}, {lines[-3:]}"
    lines += read(out, 1)
    os.close(out)
    return lines


def whole(act):
    """Returns the lines that a function tells in a forked process, which must succeed."""
    pid, out = forked(act)
    lines = read(out, 600)
    assert os.waitpid(pid, 0)[1] == 0, lines[-3:]
    os.close(out)
    return lines


def digests(directory, last):
    """Trains to a step; returns the digests of its state on disk."""
    whole(lambda tell: live(directory, tell, last))
    return whole(lambda tell: tell({path: entry.digest for path, entry in reading.verify(
        folder.step_path(directory, last)).leaves.items()}))


def length_of_a_life(directory):
    """Returns the seconds from the start of a life to its end after two steps."""
    started = time.monotonic()
    whole(lambda tell: live(directory, tell, 2))
    return time.monotonic() - started


def numbers(lines, word):
    return [int(line.split()[1]) for line in lines if line.startswith(f"{word} ")]


def main(directory, kills, seed):
    assert threading.active_count() == 1, "a forked process has only one of the threads"
    directory = pathlib.Path(directory).absolute()
    rng, committed, newest = random.Random(seed), 0, 0
    length = min(length_of_a_life(directory / f"length {i}") for i in range(2))
    phases, sources = collections.Counter(), collections.Counter()
    for _ in range(kills):
        lines = killed(directory / "killed", rng.uniform(0, 1.2 * length))
        for start in numbers(lines, "from"):
            assert start >= committed, f"started from {start}, although {committed} was on disk"
        committed = max([committed, *numbers(lines, "whole")])
        newest = max([newest, *numbers(lines, "step")])
        sources.update(line.split()[1] for line in lines if line.startswith("source"))
        known = [line.split()[0] for line in lines if line.split()[0] in PHASES]
        phases[known[-1] if known else "start"] += 1
    last = newest + 2
    equal = digests(directory / "killed", last) == digests(directory / "whole", last)
    print(json.dumps({"phases": phases, "sources": sources, "last": last, "equal": equal}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
