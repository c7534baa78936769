"""`initialize`: this process joins the others of its job, or is left alone."""

import atexit
import contextlib
import inspect
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from zerojax.errors import ClusterError
from zerojax.processes import agreement, fingerprint, launchers, rendezvous
from zerojax.processes.launchers import Job

_CONNECT_TIMEOUT = 5.0  # seconds: an address that a person wrote may be wrong
_GRACE = 3.0  # seconds for what still runs, as the writing of a checkpoint, after an exception that nobody caught
_joined: dict[str, Any] = {}


def initialize(address: str | None = None, processes: int | None = None, process: int | None = None, *,
               local_devices: tuple[int, ...] | None = None, config: Mapping[str, Any] | None = None,
               bind_address: str | None = None, connect_timeout: float | None = None, initialization_timeout: float = 300,
               heartbeat_timeout: float = 100, shutdown_timeout: float = 30) -> Job | None:
    """Joins this process to the others of its job by `jax.distributed`. First thing in a program; alone, it does nothing.

    What is not given is read off the variables of what started the process: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; SkyPilot's; torchrun's; SLURM's; else what jax itself detects. A line on standard error says what was decided.

    First the processes meet over plain TCP, for jax.distributed aborts what it can't start. Afterwards, an exception that
    nobody catches ends its process within 3 s of its traceback, with status 1; jax would wait there for the others.

    Args:
      address: "host:port" of process 0. Nobody is asked who they are there: the network has to be private.
      processes, process: how many there are; this one's number, from 0.
      local_devices: of this host, those to use; None is all, or as the launcher says.
      config: your settings; if they differ between processes, that is an error on each.
      bind_address: the IP address that process 0 listens at; None is that of `address` alone, "0.0.0.0" every interface.
      connect_timeout: seconds until process 0 has to be there; None is $ZEROJAX_CONNECT_TIMEOUT, else 5, and for an address that a scheduler wrote
        `initialization_timeout`.
      initialization_timeout: seconds until all processes have to be there.
      heartbeat_timeout: seconds after which a process that is dead, stopped or cut off ends all.
      shutdown_timeout: seconds that a process which is done waits for the others.

    Returns:
      What was decided; None if this process is alone.

    Raises:
      ClusterError: process 0 can't be reached or can't listen; processes are missing, or differ in versions or config; called
        again with other arguments, or too late.

    >>> initialize()  # alone
    """
    asked = {name: value for name, value in locals().items() if value != _DEFAULTS[name]}
    if _joined:
        return _again(asked)
    job = launchers.given(address, processes, process) or launchers.detected()
    if job is None or job.processes == 1:
        return None
    _check_early()
    local_devices = job.local_devices if local_devices is None else tuple(local_devices)
    print(f"zerojax: {job}", file=sys.stderr, flush=True)
    bound = None
    if job.address is not None:
        connect_timeout = _connect_timeout(job, connect_timeout, initialization_timeout)
        bound = _bound(job.address, bind_address, connect_timeout) if job.process == 0 else None
        _meet(job, bound, config, connect_timeout, initialization_timeout)
    _start(job, bound, local_devices, round(initialization_timeout), round(heartbeat_timeout), round(shutdown_timeout))
    known = {"address": job.address, "processes": job.processes, "process": job.process, "local_devices": local_devices}
    _joined.update(said=_DEFAULTS | known | asked, job=job)
    _end_on_errors()
    if os.environ.get("ZEROJAX_LAUNCH") == str(os.getppid()):
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    return job


_DEFAULTS = {p.name: p.default for p in inspect.signature(initialize).parameters.values()}


def _again(asked) -> Job:
    text = lambda value: str(fingerprint.of_settings(value))
    odd = [f"{name} was {text(_joined['said'][name])}, is {text(value)}" for name, value in asked.items()
           if text(value) != text(_joined["said"][name])]
    if odd:
        raise ClusterError(f"initialize was called before, with other arguments: {'; '.join(odd)}. A process joins once.")
    return _joined["job"]


def _check_early():
    """Raises `ClusterError` where jax can't be initialized any more, while no other process waits for this one."""
    if jax.distributed.is_initialized():
        raise ClusterError("initialize: jax.distributed was initialized before; call zj.initialize() in its place.")
    try:  # of no processes: refused in any case, but for this reason first
        jax.distributed.initialize("localhost:1", 0, 0, cluster_detection_method="deactivate")
    except (RuntimeError, ValueError) as error:
        if "before any JAX" in str(error):
            raise ClusterError("initialize came too late: jax has looked for its devices already, which it does for the first "
                               "array, jax.devices() or a key; call zj.initialize() before them.") from error


def _connect_timeout(job, connect_timeout, initialization_timeout) -> float:
    if connect_timeout is None and "ZEROJAX_CONNECT_TIMEOUT" in os.environ:
        connect_timeout = float(os.environ["ZEROJAX_CONNECT_TIMEOUT"])
    return connect_timeout if connect_timeout is not None else initialization_timeout if job.scheduled else _CONNECT_TIMEOUT


def _bound(address, bind, connect_timeout) -> str:
    if bind is None:
        return rendezvous.bind_address(address, connect_timeout)
    return rendezvous.joined(bind.strip("[]"), rendezvous.split(address)[1])


def _meet(job, bound, config, connect_timeout, seconds):
    said = {"versions": fingerprint.versions(), "config": fingerprint.of_settings(config or {})}
    if job.process == 0:
        rendezvous.hold(bound, job.processes, said, agreement.difference, seconds)
    else:
        note = lambda text: print(f"zerojax: process {job.process}: {text}", file=sys.stderr, flush=True)
        rendezvous.join(job.address, job.process, job.processes, said, connect_timeout, seconds, note)


def _start(job, bound, local_devices, initialization, heartbeat, shutdown):
    try:
        jax.distributed.initialize(job.address, job.processes, job.process, local_devices, job.address and "deactivate",
                                   initialization_timeout=initialization, heartbeat_timeout_seconds=heartbeat,
                                   shutdown_timeout_seconds=shutdown, coordinator_bind_address=bound)
    except (RuntimeError, ValueError) as error:
        if job.address is not None:
            raise
        raise ClusterError(f"{job.source}: jax does not find the other processes ({error}); set $JAX_COORDINATOR_ADDRESS, "
                           "$JAX_NUM_PROCESSES and $JAX_PROCESS_ID.") from error


def _end_on_errors():
    """An exception that nobody catches goes to sys.excepthook, which notebooks do not use."""
    before, failed = sys.excepthook, threading.Event()

    def hook(kind, error, trace):
        before(kind, error, trace)
        failed.set()
        timer = threading.Timer(_GRACE, _end)
        timer.daemon = True
        timer.start()

    sys.excepthook = hook
    atexit.register(lambda: failed.is_set() and _end())  # before jax's own, which waits for the other processes


def _end():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or none
            stream.flush()
    os._exit(1)


def _end_without(launcher: int):
    """A launcher that is killed can't end its processes."""
    while os.getppid() == launcher:
        time.sleep(1)
    _end()
