"""Runs that keep snapshots in the shared memory of a host, and are killed."""

import json

import pytest
import states

import zerojax as zj


def opened(tmp_path, **options):
    return zj.Checkpointer(tmp_path / "c", memory=True, every=100, **options)


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
