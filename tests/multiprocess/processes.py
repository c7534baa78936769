"""Real processes that train together over gloo: started, watched with a limit, ended by their ids.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
QUIET = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONUNBUFFERED": "1"}
LAUNCHERS = ("SLURM_", "SKYPILOT_", "MASTER_", "RANK", "WORLD_SIZE")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    folders = [HERE, HERE.parent, HERE.parent / "faults", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return kept | QUIET | {"PYTHONPATH": path} | {k: str(v) for k, v in more.items()}


class Process:
    """A process whose output goes to files, so that it waits for no reader."""

    def __init__(self, command, env, out, err):
        self._out, self._err = out, err
        with out.open("w") as stdout, err.open("w") as stderr:
            self.popen = subprocess.Popen([*map(str, command)], env=env, stdout=stdout,
                                          stderr=stderr, stdin=subprocess.DEVNULL)

    @property
    def out(self):
        return self._out.read_text(errors="replace")

    @property
    def err(self):
        return self._err.read_text(errors="replace")

    @property
    def status(self):
        return self.popen.returncode

    def has_ended(self):
        return self.popen.poll() is not None

    def signal(self, number):
        os.kill(self.popen.pid, number)

    def wait_for(self, text, limit=90):
        """Waits for a line that starts with this text; returns the line."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ended = self.has_ended()
            for line in self.out.splitlines():
                if line.startswith(text):
                    return line
            assert not ended, f"ended with {self.status} before {text!r}: {self.err[-2000:]}"
            time.sleep(0.02)
        output = f"{self.out[-500:]} {self.err[-2000:]}"
        raise AssertionError(f"no {text!r} within {limit} s: {output}")


class Job(contextlib.AbstractContextManager):
    """Copies of a command that find each other by JAX's variables; leaving it ends all of them."""

    def __init__(self, tmp_path, command, processes, devices=4, *, env=lambda process: {},
                 prefix=lambda process: [], name="job", host="127.0.0.1"):
        self.port = free_port()
        shared = {"JAX_COORDINATOR_ADDRESS": f"{host}:{self.port}",
                  "JAX_NUM_PROCESSES": processes, "JAX_NUM_CPU_DEVICES": devices,
                  "ZEROJAX_CONNECT_TIMEOUT": 60}
        self.all = []
        for i in range(processes):
            files = (tmp_path / f"{name}-{i}.out", tmp_path / f"{name}-{i}.err")
            own = environment(**shared | {"JAX_PROCESS_ID": i} | env(i))
            self.all.append(Process([*prefix(i), sys.executable, *command], own, *files))

    def __getitem__(self, i):
        return self.all[i]

    def wait(self, limit, but=()):
        """Waits until all processes but some have ended; returns their statuses.

        A process that runs longer is an error.
        """
        end = time.monotonic() + limit
        waited = [p for i, p in enumerate(self.all) if i not in but]
        while not all(p.has_ended() for p in waited):
            assert time.monotonic() < end, f"still running after {limit} s: {self._running()}"
            time.sleep(0.02)
        return [p.status for p in waited]

    def _running(self):
        return "".join(f"\n--- {i}\n{p.out[-500:]}\n{p.err[-1500:]}"
                       for i, p in enumerate(self.all) if not p.has_ended())

    def __exit__(self, kind, error, trace):
        for p in self.all:
            if not p.has_ended():
                with contextlib.suppress(ProcessLookupError):
                    p.signal(signal.SIGKILL)
                p.popen.wait(10)


def launch(*arguments, limit=200, env=None, **options):
    """Runs `zerojax launch ...` to its end."""
    command = [sys.executable, "-m", "zerojax", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit,
                          env=environment(**env or {}), **options)
