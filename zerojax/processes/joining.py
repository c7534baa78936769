"""`initialize`: this process joins the others of its job, or stays alone."""

import dataclasses
import inspect
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from zerojax.errors import ClusterError
from zerojax.processes import (
    agreement,
    ending,
    fingerprint,
    launchers,
    monitor,
    rendezvous,
    sealed,
)
from zerojax.processes.launchers import Job
from zerojax.processes.sealed import Channel

_LOG = logging.getLogger("zerojax")
_CONNECT_TIMEOUT = 5.0  # seconds; short, because an address that a person wrote may be wrong
_joined: dict[str, Any] = {}
_alone = threading.Event()  # whether a caller has said that this process trains alone


def initialize(address: str | None = None, processes: int | None = None,
               process: int | None = None, *, local_devices: tuple[int, ...] | None = None,
               config: Mapping[str, Any] | None = None, bind_address: str | None = None,
               connect_timeout: float | None = None, initialization_timeout: float = 300,
               heartbeat_timeout: float = 100, shutdown_timeout: float = 30,
               watchdog: float | None = None) -> Job | None:
    """Joins this process to the others of its job with `jax.distributed`.

    Must be the first call of a program that uses jax. Does nothing if the process is alone.

    Arguments that are not given are read from the environment of the process: the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then those of SkyPilot, torchrun,
    SLURM and Open MPI; in an indexed Job of Kubernetes, its API is asked. The logger "zerojax"
    reports the decision at level INFO, and warns if process 0 does not answer within 5 s.

    The processes first meet over plain TCP, because jax.distributed aborts a process that it cannot
    start. If $ZEROJAX_SECRET is set, only processes that have the same can take part.

    The connections stay open. Each process reports its calls of zerojax over them, so that all
    processes end within 5 s, with the reason, when one of them ends, or makes another call than
    the others.

    With several processes, the call wraps `sys.excepthook` and `sys.exit`, and registers an
    `atexit` function: an uncaught exception, or `sys.exit` with an error, ends all processes, where
    jax would wait for the others.

    Args:
      address: "host:port" of process 0, which authenticates nobody: the network must be private.
      processes, process: the number of processes, and the index of this one, from 0.
        `initialize(processes=1)` says that this process trains alone, although its launcher has
        started others.
      local_devices: the devices of this host to use. None means all, or those that the launcher
        assigns.
      config: your settings. If they differ between processes, every process raises an error.
      bind_address: the IP address at which process 0 listens. None means that of `address`;
        "0.0.0.0" means every interface.
      connect_timeout: seconds within which process 0 must listen. None means
        $ZEROJAX_CONNECT_TIMEOUT; if that is not set, `initialization_timeout` for an address that a
        scheduler wrote, and 5 for any other.
      initialization_timeout: seconds within which all processes must arrive.
      heartbeat_timeout: seconds after which all processes end if one is suspended or disconnected.
        After half of it, the logger warns of a call that some processes have not made.
      shutdown_timeout: seconds that a finished process waits for the others.
      watchdog: seconds after which all processes print their stacks and end if one of them makes
        no call of zerojax, for example because a program of your own waits for ever. It must exceed
        the longest compilation, evaluation or export. None means never.

    Returns:
      The job, or None if this process is alone.

    Raises:
      ClusterError: process 0 cannot be reached or cannot listen; processes are missing, or differ
        in versions or config; this call is too late, or repeated with other arguments.

    >>> initialize()  # alone
    """
    asked = {name: value for name, value in locals().items() if value != _DEFAULTS[name]}
    if _joined:
        return _again(asked)
    job = launchers.given(address, processes, process)
    if job is not None and job.processes == 1:
        _alone.set()
        return None
    job = job or launchers.detected()
    if job is None or job.processes == 1:
        return None
    _check_early()
    _check_watchdog(watchdog)
    sealed.check_secret()
    if local_devices is not None:
        job = dataclasses.replace(job, local_devices=tuple(local_devices))
    _LOG.info("%s", job)
    connect_timeout = _connect_timeout(job, connect_timeout, initialization_timeout)
    bound = _bound(job, bind_address, connect_timeout)
    channels = _met(job, bound, {"config": config or {}, "watchdog": watchdog}, connect_timeout,
                    initialization_timeout)
    try:
        jax.distributed.initialize(
            job.address, job.processes, job.process, job.local_devices, "deactivate",
            coordinator_bind_address=bound, initialization_timeout=round(initialization_timeout),
            heartbeat_timeout_seconds=round(heartbeat_timeout),
            shutdown_timeout_seconds=round(shutdown_timeout))
    except BaseException:
        for channel in channels.values():
            channel.close()
        raise
    monitor.start(channels, job.process, heartbeat_timeout, watchdog)
    _joined.update(job=job, arguments=_DEFAULTS | _known(job) | asked)
    ending.on_errors(monitor.failed, monitor.left)
    ending.with_launcher()
    return job


_DEFAULTS = {p.name: p.default for p in inspect.signature(initialize).parameters.values()}


def _known(job: Job) -> dict[str, Any]:
    """Returns the arguments that a launcher has set, which a later call may repeat."""
    return {name: getattr(job, name)
            for name in ("address", "processes", "process", "local_devices")}


def _again(asked: Mapping[str, Any]) -> Job:
    """Returns the job of an earlier call; raises `ClusterError` if its arguments were others."""
    odd = [f"{name} was {before}, and is {now} now" for name, before, now in _compared(asked)
           if before != now]
    if odd:
        raise ClusterError(f"initialize was called before with other arguments: {'; '.join(odd)}. "
                           "A process joins once.")
    return _joined["job"]


def _compared(asked: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the value before and the value now of each argument."""
    for name, value in asked.items():
        before, now = map(fingerprint.of_settings, (_joined["arguments"][name], value))
        yield name, str(before), str(now)


def check_joined() -> None:
    """Raises `ClusterError` if this process is one of several that have not joined each other.

    Each of them would train a model of its own on the devices that it sees.
    """
    variables = launchers.several()
    if variables and not (_joined or _alone.is_set() or jax.distributed.is_initialized()):
        raise ClusterError(f"a launcher has started several processes ({variables}), but this one "
                           f"has not joined the others: jax sees {jax.device_count()} devices, "
                           "those of this process, and each process would train a model of its "
                           "own. Write zj.initialize() as the first line of the program that uses "
                           "jax; or, if each process is to train alone, "
                           "zj.initialize(processes=1).")


def _check_watchdog(seconds: float | None) -> None:
    if seconds is not None and not seconds > 0:
        raise ClusterError(f"initialize(watchdog={seconds!r}): write seconds, more than 0, or None "
                           "for no watchdog.")


def _check_early() -> None:
    """Raises `ClusterError` if it is too late for jax, before other processes wait for this one."""
    if jax.distributed.is_initialized():
        raise ClusterError("initialize: jax.distributed was initialized before; call "
                           "zj.initialize() in its place.")
    try:  # zero processes: refused in any case, but for lateness first
        jax.distributed.initialize("localhost:1", 0, 0, cluster_detection_method="deactivate")
    except (RuntimeError, ValueError) as error:
        if "before any JAX" in str(error):
            raise ClusterError("initialize came too late: jax has initialized its devices already, "
                               "which the first array, a key and jax.devices() do; call "
                               "zj.initialize() before them.") from error


def _connect_timeout(job: Job, given: float | None, initialization_timeout: float) -> float:
    if given is not None:
        return given
    if "ZEROJAX_CONNECT_TIMEOUT" in os.environ:
        return float(os.environ["ZEROJAX_CONNECT_TIMEOUT"])
    return initialization_timeout if job.scheduled else _CONNECT_TIMEOUT


def _bound(job, bind: str | None, connect_timeout: float) -> str | None:
    """Returns "ip:port" at which process 0 listens; None in every other process."""
    if job.process != 0:
        return None
    if bind is None:
        return rendezvous.bind_address(job.address, connect_timeout)
    return rendezvous.joined(bind.strip("[]"), rendezvous.split(job.address)[1])


def _met(job, bound, settings: Mapping[str, Any], connect_timeout: float,
         seconds: float) -> Mapping[int, Channel]:
    """Returns the connections, by process, after the processes have met."""
    fields = {"versions": fingerprint.versions(), **fingerprint.of_settings(settings)}
    if job.process == 0:
        return rendezvous.hold(bound, job.processes, fields, agreement.difference, seconds)
    return {0: rendezvous.join(job.address, job.process, job.processes, fields, connect_timeout,
                               seconds, _LOG.warning)}
