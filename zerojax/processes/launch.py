"""`zerojax launch`: the processes of a job on this machine, started, watched and ended together. Needs no jax."""

import collections
import contextlib
import dataclasses
import glob
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from zerojax.errors import ClusterError

GRACE = 3.0  # seconds between SIGTERM and SIGKILL, where one process failed
TAIL = 400  # lines of standard error that are kept of each process
_TRACEBACK = re.compile(r"\s*(\+ Exception Group )?Traceback \(most recent call last\)")
_LED_TO = ("The above exception was the direct cause", "During handling of the above exception")
_LINE = re.compile(rb"([^\r\n]*)(\r?\n|\r)")
PREEMPTED = 75  # the status of a run that was told to stop, and saved


@dataclasses.dataclass(frozen=True)
class Launch:
    """What to run.

    Attributes:
      command: of one process.
      processes: how many at first, then after each failure; the last number stays.
      devices: CPU devices of each process; None is one GPU each, or one CPU device where there is no GPU.
      restarts: how often to start again.
    """

    command: Sequence[str]
    processes: Sequence[int]
    devices: int | None = None
    restarts: int = 0

    def environment(self, process: int, processes: int, port: int) -> dict[str, str]:
        """What a process is told beside what this one was."""
        told = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process), "ZEROJAX_LAUNCH": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self.on_cpu:
            return told | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices or 1)}
        return told | {"JAX_LOCAL_DEVICE_IDS": str(process)}

    @property
    def on_cpu(self) -> bool:
        platform = os.environ.get("JAX_PLATFORMS")
        return self.devices is not None or platform == "cpu" or not (platform or gpus())

    def check(self) -> None:
        """Raises `ClusterError` for numbers that can't be."""
        for name, n, least in (*(("-n", n, 1) for n in self.processes), ("--devices", self.devices, 1),
                               ("--restarts", self.restarts, 0)):
            if n is not None and n < least:
                raise ClusterError(f"launch {name} {n}: write a whole number, {least} or more.")
        there = len(gpus())
        if not self.on_cpu and there and max(self.processes) > there:
            raise ClusterError(f"launch -n {max(self.processes)}: each process takes one GPU, and this machine has {there}; write "
                               f"-n {there}, or --devices 1 for CPU devices.")


def gpus() -> list[str]:
    """NVIDIA's. Of another maker's, JAX_PLATFORMS has to tell."""
    return glob.glob("/dev/nvidia[0-9]*")


def launch(plan: Launch) -> int:
    """Runs the job to its end; returns its exit status, that of the first failure.

    Raises:
      ClusterError: a plan that can't be.
    """
    plan.check()
    status = 0
    for attempt in range(plan.restarts + 1):
        job = _Job(plan, plan.processes[min(attempt, len(plan.processes) - 1)])
        status = job.run()
        if status in (0, PREEMPTED) or job.asked or attempt == plan.restarts:
            break
        _say(f"starts again, {attempt + 1} of {plan.restarts}")
    return status


def _say(text: str) -> None:
    print(f"zerojax launch: {text}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Job:
    """One attempt."""

    def __init__(self, plan: Launch, processes: int):
        self.plan, self.n = plan, processes
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (process, status)
        self.asked: list[signal.Signals] = []
        self.tails = [collections.deque(maxlen=TAIL) for _ in range(processes)]
        self.readers: list[threading.Thread] = []
        self.running: dict[int, subprocess.Popen] = {}

    def run(self) -> int:
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            port = _free_port()
            for process in range(self.n):
                self._start(process, self.plan.environment(process, self.n, port))
            if self.asked:  # while they were started
                self._signal(self.asked[0])
            return self._watch()
        finally:
            self._signal(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number, frame):
        """Ctrl-C and SIGTERM are for the processes: they may save. A second one ends them."""
        self._signal(signal.SIGKILL if self.asked else number)
        if not self.asked:  # print may not be called while it is at work already
            os.write(2, f"\nzerojax launch: {signal.Signals(number).name}, waits for the processes; once more ends them\n".encode())
        self.asked.append(signal.Signals(number))

    def _start(self, process, environment):
        child = subprocess.Popen(self.plan.command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, start_new_session=True)
        self.running[process] = child
        for source, sink, keep in ((child.stdout, sys.stdout, None), (child.stderr, sys.stderr, self.tails[process])):
            reader = threading.Thread(target=_forward, args=(source, sink, f"[{process}] ", keep), daemon=True)
            reader.start()
            self.readers.append(reader)
        threading.Thread(target=lambda: self.ended.put((process, child.wait())), daemon=True).start()

    def _watch(self) -> int:
        """Until all have ended; after a failure, that is soon."""
        first, deadline = None, None
        while self.running:
            try:
                process, status = self.ended.get(timeout=0.1 if deadline is None else max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    self._signal(signal.SIGKILL)
                continue
            self._reap(process, status)
            if status and (first is None or (first[1] == PREEMPTED and status != PREEMPTED)):
                first = (process, status)
                if status != PREEMPTED:  # else the others are about to save
                    if not self.asked:  # they have been told
                        self._signal(signal.SIGTERM)
                    deadline = time.monotonic() + GRACE
        for reader in self.readers:
            reader.join(timeout=1)
        return self._told(first) if first else 0

    def _reap(self, process, status):
        """Of one that failed, also what it has left behind: all that it started is of its session."""
        child = self.running.pop(process)
        if status:
            _signal_all(child, signal.SIGKILL)

    def _signal(self, number):
        for child in list(self.running.values()):
            _signal_all(child, number)

    def _told(self, first) -> int:
        process, status = first
        if status == PREEMPTED:
            _say(f"the processes were told to stop: status {PREEMPTED}")
            return status
        if self.asked:
            return 128 + self.asked[0]
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        _say(f"process {process} of {self.n} {how}, the first to fail; the others were ended."
             + "".join(f"\n[{process}] {line}" for line in _traceback(self.tails[process])))
        return 128 - status if status < 0 else status


def _signal_all(child, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _traceback(lines: Sequence[str]) -> list[str]:
    """The last one, with those that led to it; or the last lines."""
    lines = list(lines)
    starts = [i for i, line in enumerate(lines) if _TRACEBACK.match(line)]
    if not starts:
        return lines[-10:]
    begin = starts.pop()
    while starts and any(line.startswith(_LED_TO) for line in lines[starts[-1]:begin]):
        begin = starts.pop()
    return lines[begin:]


def _forward(source: IO[bytes], sink: IO[str], prefix: str, keep: collections.deque | None):
    """Line by line; a line is what ends in a newline, or is written over (progress bars). What can't be written is dropped: a
    process whose output nobody reads would wait."""
    rest = b""
    while got := source.read1(2**16):  # pyright: ignore[reportAttributeAccessIssue]
        rest += got
        found = list(_LINE.finditer(rest))
        rest = rest[found[-1].end():] if found else rest
        _write([m[1] for m in found if m[1] or m[2] != b"\r"], sink, prefix, keep)
    _write([rest] * bool(rest), sink, prefix, keep)


def _write(lines, sink, prefix, keep):
    texts = [line.decode(errors="replace") for line in lines]
    if keep is not None:
        keep.extend(texts)
    with contextlib.suppress(OSError, ValueError):
        encoding = sink.encoding or "utf-8"
        sink.buffer.write("".join(f"{prefix}{text}\n" for text in texts).encode(encoding, errors="backslashreplace"))
        sink.flush()
