"""Runs that keep snapshots in the shared memory of a host, and are killed."""

import contextlib
import json
import subprocess
import sys

import pytest
import states

import zerojax as zj


def opened(tmp_path, **options):
    return zj.Checkpointer(tmp_path / "c", **{"memory": True, "every": 100} | options)


class Killed(Exception):
    """Leaves a context as a process that is killed would: the snapshots stay."""


def killed_after(tmp_path, *made, **options):
    """Takes snapshots of states, and is killed."""
    with pytest.raises(Killed), opened(tmp_path, **options) as checkpoints:
        for state in made:
            checkpoints.save(state, data_state={"next": int(state.step)}, metrics={"loss": 1.5})
        checkpoints.wait()
        raise Killed


def restored(tmp_path, target=None, **options):
    with opened(tmp_path) as checkpoints:
        return checkpoints.restore_latest(target or states.target(), **options)


def files(base, pattern):
    return sorted(base.glob(f"zerojax-*/{pattern}"))


def newest(base):
    """Returns the header and the data file of the newest snapshot."""
    path = max(files(base, "*.json"), key=lambda p: json.loads(p.read_text()).get("step", -1))
    return path, path.with_suffix(".data")


def steps(base, pattern="*.json"):
    """Returns the steps of the snapshots of a host."""
    headers = [json.loads(p.read_text()) for p in files(base, pattern)]
    return sorted(header["step"] for header in headers if "step" in header)


@contextlib.contextmanager
def holder(base, directory, process):
    """Starts another process that has slots open, and kills it."""
    code = ("import sys, pathlib\nfrom zerojax.checkpoint import slots\n"
            f"slots.BASE = pathlib.Path({str(base)!r})\n"
            f"held = slots.Slots({str(directory)!r}, {process})\nheld.open()\n"
            "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()
