"""Restores the newest state of a directory, several times; each process sees it in another state.

    python views.py POSITIONS CASES_AS_JSON

A case is [directory of each process, steps that the second one lists, or null, seconds]. During
these seconds after it has first looked for a file, the second process does not find it, as on NFS.
Then saves a state into POSITIONS, with a position in its data for each process, and restores it.
The clock of the second process is a day behind.
"""

import contextlib
import json
import os
import sys
import time

import jax
import states

import zerojax as zj
from zerojax.checkpoint import directory as folder


def report(*words):
    print("view:", *words, flush=True)


@contextlib.contextmanager
def late(directory, seconds):
    """Hides each file in a directory for some seconds after the first look for it."""
    stat, looked = os.stat, {}

    def late_stat(path, **options):
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if os.path.dirname(name) == directory:
            first = looked.setdefault(name, time.monotonic())
            if time.monotonic() < first + seconds:
                raise FileNotFoundError(2, "hidden", name)
        return stat(path, **options)

    os.stat = late_stat
    try:
        yield
    finally:
        os.stat = stat


def view(zero, directories, listed, seconds):
    """Restores from directories that should be the same one."""
    with late(directories[1], seconds if jax.process_index() else 0):
        _view(zero, directories, listed)


def _view(zero, directories, listed):
    steps = folder.steps
    if listed is not None and jax.process_index() == 1:
        folder.steps = lambda _: listed
    with zj.Checkpointer(directories[0]) as checkpoints:
        checkpoints.directory = folder.located(directories[jax.process_index()])
        try:
            found = checkpoints.restore_latest(states.target(zero))
            report("restored", found.step, found.data_state)
        except zj.ZeroError as error:
            report(type(error).__name__, str(error).splitlines()[0])
    folder.steps = steps


def not_shared(directory):
    try:
        zj.Checkpointer(f"{directory}-{jax.process_index()}")
    except zj.CheckpointError as error:
        report(error)


def positions(zero, directory):
    own = {"next": 10 + jax.process_index(), "bytes": b"\x00"}
    with zj.Checkpointer(directory) as checkpoints:
        checkpoints.save(states.state(zero), data_state=own)
        report(checkpoints.restore_latest(states.target(zero)).data_state)


def main(directory, cases):
    zj.initialize()
    zero = zj.Zero(zj.make_mesh(), min_shard=1)
    if jax.process_index() == 1:
        now = time.time
        time.time = lambda: now() - 86400
    for case in json.loads(cases):
        view(zero, *case)
    not_shared(directory)
    positions(zero, directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
