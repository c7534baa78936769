"""Real processes that train together over gloo: started, watched with a limit, and ended by their ids."""

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
HEARTBEAT = 10  # seconds
QUIET = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "faults"), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SKYPILOT_", "MASTER_", "RANK", "WORLD_SIZE"))}
    return kept | QUIET | {"PYTHONPATH": path} | {k: str(v) for k, v in more.items()}


class Process:
    """One of them; its output goes to files, so that nothing waits for a reader."""

    def __init__(self, command, env, out, err):
        self.started, self.seconds, self._files = time.monotonic(), None, (out, err)
        with out.open("w") as a, err.open("w") as b:
            self.popen = subprocess.Popen([*map(str, command)], env=env, stdout=a, stderr=b, stdin=subprocess.DEVNULL)

    @property
    def out(self):
        return self._files[0].read_text(errors="replace")

    @property
    def err(self):
        return self._files[1].read_text(errors="replace")

    @property
    def status(self):
        return self.popen.returncode

    def poll(self):
        """Whether it has ended; notes when."""
        if self.popen.poll() is not None and self.seconds is None:
            self.seconds = time.monotonic() - self.started
        return self.popen.returncode is not None

    def signal(self, number):
        os.kill(self.popen.pid, number)

    def wait_for(self, text, limit=90):
        """Until it has printed a line that starts so; returns the line."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ended = self.poll()
            for line in self.out.splitlines():
                if line.startswith(text):
                    return line
            assert not ended, f"ended with {self.status} before {text!r}: {self.err[-2000:]}"
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} within {limit} s: {self.out[-500:]} {self.err[-2000:]}")


class Job(contextlib.AbstractContextManager):
    """`processes` copies of a command, told of each other by JAX's variables; what still runs is ended at the end."""

    def __init__(self, tmp_path, command, processes, devices=4, *, env=lambda process: {}, prefix=lambda process: [], name="job",
                 host="127.0.0.1"):
        port = free_port()
        told = {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": processes, "JAX_NUM_CPU_DEVICES": devices,
                "ZEROJAX_CONNECT_TIMEOUT": 60}
        self.port, self.all = port, []
        for i in range(processes):
            files = (tmp_path / f"{name}-{i}.out", tmp_path / f"{name}-{i}.err")
            own = environment(**told | {"JAX_PROCESS_ID": i} | env(i))
            self.all.append(Process([*prefix(i), sys.executable, *command], own, *files))

    def __getitem__(self, i):
        return self.all[i]

    def wait(self, limit, but=()):
        """Until all (but some) have ended; returns their statuses. One that runs longer is an error, and ended."""
        end = time.monotonic() + limit
        waited = [p for i, p in enumerate(self.all) if i not in but]
        while sum(p.poll() for p in waited) < len(waited):  # all are polled: each notes when it ended
            assert time.monotonic() < end, f"still running after {limit} s: " + "".join(
                f"\n--- {i}\n{p.out[-500:]}\n{p.err[-1500:]}" for i, p in enumerate(self.all) if not p.poll())
            time.sleep(0.02)
        return [p.status for p in waited]

    def __exit__(self, kind, error, trace):
        for p in self.all:
            if not p.poll():
                with contextlib.suppress(ProcessLookupError):
                    p.signal(signal.SIGKILL)
                p.popen.wait(10)


def launch(*arguments, limit=200, env=None, **options):
    """`zerojax launch ...` to its end."""
    command = [sys.executable, "-m", "zerojax", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment(**env or {}), **options)
