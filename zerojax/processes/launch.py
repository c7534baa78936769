"""`zerojax launch`: the processes of a job on this machine, which start and end together.

Needs no jax.
"""

import collections
import contextlib
import dataclasses
import glob
import math
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence

from zerojax.errors import ClusterError
from zerojax.processes import naming, output
from zerojax.processes.outcome import PREEMPTED
from zerojax.processes.output import say
from zerojax.processes.sealed import SECRET

GRACE = 4.0  # seconds between a signal and SIGKILL
_AFTER_FAILURE = 1.0  # the same after one process has failed, when the others cannot save any more
TAIL = 400  # lines of standard error that are kept of each process
_TRACEBACK = re.compile(r"\s*(\+ Exception Group )?Traceback \(most recent call last\)")
_LED_TO = ("The above exception was the direct cause", "During handling of the above exception")
_PAUSE = 0.05  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A job to run.

    Attributes:
      command: the command of each process.
      processes: the number of processes of the first attempt, and of each one after a failure; the
        last number is used for all further attempts.
      devices: the number of CPU devices of each process. None means one GPU each, or one CPU device
        on a machine without GPUs.
      restarts: how often the job restarts after a failure.
      grace: seconds in which the processes may save and end after a signal, before they are killed.
      secret: with which the processes authenticate each other; by default $ZEROJAX_SECRET, or a
        random one.
    """

    command: Sequence[str]
    processes: Sequence[int]
    devices: int | None = None
    restarts: int = 0
    grace: float = GRACE
    secret: str = dataclasses.field(
        default_factory=lambda: os.environ.get(SECRET) or secrets.token_hex(16), repr=False)

    def environment(self, process: int, processes: int, port: int) -> dict[str, str]:
        """Returns the variables that a process gets in addition to those of the launcher."""
        variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                     "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(process),
                     "ZEROJAX_LAUNCH": str(os.getpid()), SECRET: self.secret,
                     "PYTHONUNBUFFERED": "1"}
        if self.on_cpu:
            devices = str(self.devices or 1)
            return variables | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        return variables | {"JAX_LOCAL_DEVICE_IDS": str(process)}

    @property
    def on_cpu(self) -> bool:
        """Whether the processes use CPU devices."""
        platform = os.environ.get("JAX_PLATFORMS")
        return self.devices is not None or platform == "cpu" or not (platform or gpus())

    def check(self) -> None:
        """Raises `ClusterError` for invalid numbers."""
        numbers = [("-n", n, 1) for n in self.processes]
        numbers += [("--devices", self.devices, 1), ("--restarts", self.restarts, 0),
                    ("--grace", self.grace, 0)]
        for name, n, least in numbers:
            if n is not None and not n >= least:
                raise ClusterError(f"launch {name} {n}: write a number, {least} or more.")
        most = max(self.processes)
        found = len(gpus())
        if not self.on_cpu and 0 < found < most:
            raise ClusterError(f"launch -n {most}: each process takes one GPU, and this machine "
                               f"has {found}; write -n {found}, or --devices 1 for CPU devices.")


def gpus() -> list[str]:
    """Returns the NVIDIA GPUs of this machine; other GPUs are used if JAX_PLATFORMS names them."""
    return glob.glob("/dev/nvidia[0-9]*")


def launch(plan: Launch) -> int:
    """Runs the job to its end; returns its exit status, that of the first failure.

    Raises:
      ClusterError: the plan is invalid.
    """
    plan.check()
    return _attempts(plan)


def _attempts(plan: Launch) -> int:
    status = 0
    for attempt in range(plan.restarts + 1):
        job = _Job(plan, plan.processes[min(attempt, len(plan.processes) - 1)])
        status = job.run()
        if status in (0, PREEMPTED) or job.signals or attempt == plan.restarts:
            break
        say(f"starts again, {attempt + 1} of {plan.restarts}")
    return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Job:
    """One attempt to run the job."""

    def __init__(self, plan: Launch, processes: int):
        self.plan = plan
        self.processes = processes
        self.running: dict[int, subprocess.Popen] = {}
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (process, status)
        self.signals: list[signal.Signals] = []  # that the launcher has received
        self.failure: tuple[int, int] | None = None  # (process, status) of the first
        self.deadline = math.inf  # of the processes that still run after a failure or a signal
        self.was_killed = False  # after the deadline
        self.is_stuck = False  # although it was killed
        self.tails = [collections.deque(maxlen=TAIL) for _ in range(processes)]
        self.readers: list[threading.Thread] = []
        self.over = threading.Event()  # all processes have ended

    def run(self) -> int:
        before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        try:
            port = _free_port()
            for process in range(self.processes):
                self._start(process, self.plan.environment(process, self.processes, port))
            if self.signals:  # received while the processes were started
                self._signal(self.signals[0])
            return self._watch()
        finally:
            self._signal(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number, frame):
        """Passes Ctrl-C and SIGTERM to the processes, which may save; a second one ends them."""
        self._signal(signal.SIGKILL if self.signals else number)
        if not self.signals:
            self.deadline = time.monotonic() + self.plan.grace
            name = signal.Signals(number).name
            say(f"{name}: the processes have {self.plan.grace:g} s to end (--grace); a second "
                 "signal ends them")
        self.signals.append(signal.Signals(number))

    def _start(self, process: int, environment: dict[str, str]) -> None:
        child = subprocess.Popen(self.plan.command, env=os.environ | environment,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, start_new_session=True)
        self.running[process] = child
        prefix = f"[{process}] "
        self._read(child.stdout, output.OUT, prefix, None, self.over)
        self._read(child.stderr, output.ERR, prefix, self.tails[process], self.over)
        threading.Thread(target=self._await, args=(process, child), daemon=True).start()

    def _read(self, *arguments) -> None:
        reader = threading.Thread(target=output.forward, args=arguments, daemon=True)
        reader.start()
        self.readers.append(reader)

    def _await(self, process: int, child: subprocess.Popen) -> None:
        self.ended.put((process, child.wait()))

    def _watch(self) -> int:
        """Waits until all processes have ended, which is soon after a failure of one of them."""
        while self.running and not self.is_stuck:
            try:
                self._note_end(*self.ended.get(timeout=0.1))
            except queue.Empty:
                if time.monotonic() > self.deadline:
                    self._kill()
        self._read_rest()
        failure = self.failure or next(((p, -signal.SIGKILL) for p in self.running), None)
        return self._reported(*failure) if failure else 0

    def _kill(self) -> None:
        """Ends the processes that have not ended in time; gives up those that it has killed."""
        who = naming.named(self.running)
        self._signal(signal.SIGKILL)
        self.is_stuck, self.was_killed = self.was_killed, True
        self.deadline = time.monotonic() + output.MOMENT
        if self.is_stuck:
            say(f"{who} cannot be killed, which the system delays while a process waits for a "
                 "device or a disk")
        elif self.signals:
            say(f"killed {who} after {self.plan.grace:g} s; --grace sets another limit")

    def _read_rest(self) -> None:
        """Waits for the last output; after a failure or a signal, only a moment."""
        self.over.set()
        limit = time.monotonic() + output.MOMENT
        while any(reader.is_alive() for reader in self.readers):
            if (self.failure or self.signals) and time.monotonic() > limit:
                return
            time.sleep(_PAUSE)

    def _note_end(self, process: int, status: int) -> None:
        """Notes that a process has ended; after a failure, ends the others."""
        child = self.running.pop(process)
        if not status and not self.signals:
            return
        _signal_all(child, signal.SIGKILL)  # what it started is of its session, and may still run
        if not status or (self.failure is not None and self.failure[1] != PREEMPTED):
            return
        if status == PREEMPTED:  # the others are about to save too
            self.failure = self.failure or (process, status)
            return
        self.failure = (process, status)
        self.deadline = min(self.deadline, time.monotonic() + _AFTER_FAILURE)
        if not self.signals:  # else the others have received one
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for child in list(self.running.values()):
            _signal_all(child, number)

    def _reported(self, process: int, status: int) -> int:
        """Reports a failure; returns the exit status of the launcher."""
        if status == PREEMPTED:
            say(f"the processes stopped on a signal: status {status}")
            return status
        if self.signals:
            return 128 + self.signals[0]
        name = signal.Signals(-status).name if status < 0 else ""
        end = f"was ended by {name}" if name else f"ended with status {status}"
        lines = "".join(f"\n[{process}] {line}" for line in _traceback(self.tails[process]))
        say(f"process {process} of {self.processes} {end}, the first to fail; the others were "
             f"ended.{lines}")
        return 128 - status if status < 0 else status


def _signal_all(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _traceback(tail: Iterable[str]) -> list[str]:
    """Returns the last traceback with those that led to it; without any, the last ten lines."""
    lines = list(tail)
    starts = [i for i, line in enumerate(lines) if _TRACEBACK.match(line)]
    if not starts:
        return lines[-10:]
    begin = starts.pop()
    while starts and any(line.startswith(_LED_TO) for line in lines[starts[-1]:begin]):
        begin = starts.pop()
    return lines[begin:]
