"""`zerojax launch`: the processes of a job on this machine, which start and end together.

Needs no jax.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence

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
    """One attempt to run the job.

    Signals and the ends of processes are events: functions that the main thread calls in turn. It
    never waits for longer than a moment, and a signal handler only notes an event.
    """

    def __init__(self, plan: Launch, processes: int):
        self.plan = plan
        self.processes = processes
        self.children: list[subprocess.Popen] = []
        self.running: set[int] = set()
        self.events: collections.deque[Callable[[], None]] = collections.deque()
        self.signals: list[signal.Signals] = []  # that the launcher has received
        self.errors: list[tuple[int, int]] = []  # (process, status), in the order of the ends
        self.is_ending = False  # the processes have been asked to end
        self.deadline = math.inf  # of what the main thread waits for
        self.over = threading.Event()  # all processes have ended
        self.tails = [collections.deque(maxlen=TAIL) for _ in range(processes)]
        self.readers: list[threading.Thread] = []

    def run(self) -> int:
        """Runs the attempt to its end; returns the exit status of the launcher."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in (signal.SIGINT, signal.SIGHUP):  # a background job, or one of nohup
            if before[number] == signal.SIG_IGN:
                del before[number]
        try:
            for number in before:
                signal.signal(number, self._note_signal)
            self._start_all()
            return self._watch()
        finally:
            self._end_all()
            for child in self.children:
                child.poll()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_all(self) -> None:
        port = _free_port()
        for process in range(self.processes):
            self._start(process, self.plan.environment(process, self.processes, port))

    def _start(self, process: int, environment: dict[str, str]) -> None:
        child = subprocess.Popen(self.plan.command, env=os.environ | environment,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, start_new_session=True)
        self.children.append(child)
        self.running.add(process)
        prefix = f"[{process}] "
        self._read(child.stdout, output.OUT, prefix, None, self.over)
        self._read(child.stderr, output.ERR, prefix, self.tails[process], self.over)
        threading.Thread(target=self._await, args=(process, child), daemon=True).start()

    def _read(self, *arguments) -> None:
        reader = threading.Thread(target=output.forward, args=arguments, daemon=True)
        reader.start()
        self.readers.append(reader)

    def _await(self, process: int, child: subprocess.Popen) -> None:
        """Notes the end of a process, whose number and group remain its own until the job ends."""
        end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        self.events.append(functools.partial(self._note_end, process, status))

    def _note_signal(self, number, frame):
        self.events.append(self._hurry if self.signals else self._pass_on)
        self.signals.append(signal.Signals(number))

    def _pass_on(self) -> None:
        """Passes the first signal to the processes, which may save."""
        self._ask(self.signals[0], self.plan.grace)
        say(f"{self.signals[0].name}: the processes have {self.plan.grace:g} s to end (--grace); "
            "a second signal ends them")

    def _hurry(self) -> None:
        """Ends the processes at once, after a second signal."""
        self.deadline = time.monotonic()

    def _note_end(self, process: int, status: int) -> None:
        """Notes that a process has ended; after a failure, the others end too."""
        self.running.discard(process)
        if status:
            self.errors.append((process, status))
        if self.signals and status == -self.signals[0]:
            _send(os.killpg, self.children[process], self.signals[0])  # it did not pass it on
        elif status not in (0, PREEMPTED):  # if it is PREEMPTED, the others are about to save too
            self._ask(signal.SIGTERM, _AFTER_FAILURE)

    def _ask(self, number: int, seconds: float) -> None:
        """Asks the processes to end within some seconds, each only once.

        They pass it on to what they have started, such as a loader of data, when they need it no
        more.
        """
        for process in () if self.is_ending else self.running:
            _send(os.kill, self.children[process], number)
        self.is_ending = True
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _watch(self) -> int:
        """Waits until all processes have ended, which is soon after a failure or a signal."""
        self._wait(lambda: not self.running)
        if self.signals:  # programs that they have started may be saving
            self._wait(self._is_silent)
        if not self._is_healthy():
            self._kill()
        self.over.set()
        self._wait(self._is_silent)
        return self._reported(*self._failure()) if self.errors else 0

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Calls the events until a condition holds, or the deadline has passed.

        A wait with a timeout in C would not end in Python 3.12 if a signal handler outlasts it.
        """
        while not is_over() and time.monotonic() < self.deadline:
            if self.events:
                self.events.popleft()()
            else:
                time.sleep(_PAUSE)

    def _is_silent(self) -> bool:
        """Whether all programs that could write to the output have ended."""
        return not any(reader.is_alive() for reader in self.readers)

    def _is_healthy(self) -> bool:
        return not (self.running or self.errors or self.signals)

    def _kill(self) -> None:
        """Ends the processes that have not ended in time, and all that the job has started."""
        late = naming.named(self.running) if self.running else ""
        self._end_all()
        self.deadline = time.monotonic() + output.MOMENT
        self._wait(lambda: not self.running)
        if self.running:
            say(f"{naming.named(self.running)} cannot be killed, which the system delays while a "
                "process waits for a device or a disk")
            self.errors += [(process, -signal.SIGKILL) for process in sorted(self.running)]
        elif late and len(self.signals) == 1:
            say(f"killed {late} after {self.plan.grace:g} s; --grace sets another limit")

    def _end_all(self) -> None:
        """Kills all groups of processes, unless all went well."""
        if not self._is_healthy():
            for child in self.children:
                _send(os.killpg, child, signal.SIGKILL)

    def _failure(self) -> tuple[int, int]:
        """Returns the first failure; a process that stopped on a signal is one if no other is."""
        return next((e for e in self.errors if e[1] != PREEMPTED), self.errors[0])

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


def _send(send: Callable[[int, int], None], child: subprocess.Popen, number: int) -> None:
    """Sends a signal to a process, or to its group: it is a leader, and was not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(child.pid, number)


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
