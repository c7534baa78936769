"""The job that a process is part of, read from the variables of the program that started it.

Needs no jax.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

from zerojax.errors import ClusterError
from zerojax.processes import kubernetes_job

PORT = 29431  # the default: below the ports that Linux assigns on request
_MOST = 40  # characters of a variable in an error
_URI = re.compile(r"(?P<job>\d+)\..*?(tcp://(?P<ipv4>[^,:]+)[,:]|tcp6://\[(?P<ipv6>[^,\]]+)[,\]])")
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Job:
    """Processes that train together, as one of them sees them.

    Attributes:
      source: where the other fields come from.
      address: "host:port" of process 0.
      processes: the number of processes.
      process: the index of this process.
      local_devices: the devices of this host that this process uses. None means all that it sees.
      scheduled: whether a scheduler wrote the address and starts the processes, perhaps minutes
        apart; otherwise a person did.
    """

    source: str
    address: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None
    scheduled: bool = False

    def __str__(self) -> str:
        devices = ""
        if self.local_devices is not None:
            devices = f", devices {list(self.local_devices)} of this host"
        return (f"process {self.process} of {self.processes}, coordinator {self.address}{devices} "
                f"(by {self.source})")


def given(address: str | None, processes: int | None, process: int | None) -> Job | None:
    """Returns the job that a caller's arguments describe, or None without arguments.

    Raises:
      ClusterError: some arguments are missing, or do not fit together.
    """
    arguments = {"address": address, "processes": processes, "process": process}
    missing = [name for name, value in arguments.items() if value is None]
    if len(missing) == len(arguments):
        return None
    if processes == 1 and len(missing) == 2:
        return Job("arguments", f"localhost:{PORT}", 1, 0)
    if missing:
        call = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if v is not None)
        raise ClusterError(f"initialize({call}): {' and '.join(missing)} missing; give all three, "
                           "or none to use the variables of the program that started the process.")
    return _checked(Job("arguments", address, processes, process))  # pyright: ignore


def detected(environ: Mapping[str, str] = os.environ) -> Job | None:
    """Returns the job that the environment describes, or None if this process is alone.

    Looks for JAX's own variables, which `zerojax launch` sets too, then for those of SkyPilot,
    torchrun, SLURM and Open MPI, and last for an indexed Job of Kubernetes, whose API it asks.

    >>> print(detected({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "2",
    ...                 "RANK": "1"}))
    process 1 of 2, coordinator 10.0.0.1:1234 (by torchrun's variables)

    Raises:
      ClusterError: variables are missing, are not numbers, or do not fit together; the API of
        Kubernetes does not answer.
    """
    for find in (_jax, _skypilot, _torchrun, _slurm, _openmpi, _kubernetes):
        job = find(environ)
        if job is not None and job.processes != 1:  # its one process may start several
            address = environ.get("JAX_COORDINATOR_ADDRESS", job.address)
            return _checked(dataclasses.replace(job, address=address))
    _check_jax(environ)
    return None


def several(environ: Mapping[str, str] = os.environ) -> str:
    """Returns the variables by which a launcher says that it started other processes too, or "".

    The variables of an indexed Job of Kubernetes do not say so, because its pods are often
    independent; nor do those in a shell of `srun --pty`, where a person starts one process.

    >>> several({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})
    '$OMPI_COMM_WORLD_RANK is 1, $OMPI_COMM_WORLD_SIZE is 2'
    >>> several({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})  # in a batch script, without srun
    ''
    """
    counted = {_jax: ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
               _skypilot: ("SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"),
               _torchrun: ("RANK", "WORLD_SIZE"),
               _slurm: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
               _openmpi_of_any_version: ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")}
    for find, names in counted.items():
        with contextlib.suppress(ClusterError):  # incomplete variables, which nobody has asked for
            job = find(environ)
            if job is not None and job.processes > 1 and "SLURM_PTY_PORT" not in environ:
                return ", ".join(f"${name} is {' '.join(environ[name].split())[:_MOST]}"
                                 for name in names if name in environ)
    return ""


def _check_jax(env: Mapping[str, str]) -> None:
    """Raises `ClusterError` for an incomplete set of JAX's variables."""
    missing = [f"${name}" for name in _JAX if name not in env]
    if 0 < len(missing) < len(_JAX) and env.get("JAX_NUM_PROCESSES") != "1":
        names = ", ".join(f"${name}" for name in _JAX)
        raise ClusterError(f"of {names}, {' and '.join(missing)} missing, and no other launcher "
                           "sets them; set all three, or none.")


def _jax(env: Mapping[str, str]) -> Job | None:
    if not set(_JAX) <= env.keys():
        return None
    launched = "ZEROJAX_LAUNCH" in env
    return Job("zerojax launch" if launched else "JAX_COORDINATOR_ADDRESS",
               env["JAX_COORDINATOR_ADDRESS"], _number(env, "JAX_NUM_PROCESSES"),
               _number(env, "JAX_PROCESS_ID"), scheduled=launched)


def _skypilot(env: Mapping[str, str]) -> Job | None:
    names = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"}
    if not names <= env.keys() or "TORCHELASTIC_RUN_ID" in env:  # torchrun, started by SkyPilot
        return None
    hosts = env["SKYPILOT_NODE_IPS"].split() or ["?"]
    return Job("SkyPilot's variables", f"{hosts[0]}:{env.get('JAX_COORDINATOR_PORT', PORT)}",
               len(hosts), _number(env, "SKYPILOT_NODE_RANK"), scheduled=True)


def _torchrun(env: Mapping[str, str]) -> Job | None:
    if not {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= env.keys():
        return None
    port = _number(env, "MASTER_PORT", PORT)
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own store has this port
    several = _number(env, "LOCAL_WORLD_SIZE", 1) > 1
    return Job("torchrun's variables", f"{env['MASTER_ADDR']}:{port}", _number(env, "WORLD_SIZE"),
               _number(env, "RANK"), (_number(env, "LOCAL_RANK"),) if several else None,
               scheduled="TORCHELASTIC_RUN_ID" in env)


def _slurm(env: Mapping[str, str]) -> Job | None:
    """Returns the job of a step of srun, with the port that jax would use."""
    names = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
             "SLURM_LOCALID"}
    if not names <= env.keys():
        return None
    step_has_tasks = "SLURM_STEP_NUM_TASKS" in env  # an interactive step has one task
    tasks = _number(env, "SLURM_STEP_NUM_TASKS" if step_has_tasks else "SLURM_NTASKS")
    port = _number(env, "SLURM_JOB_ID") % 2**12 + 65535 - 2**12 + 1
    host = _first_host(env["SLURM_STEP_NODELIST"])
    return Job("SLURM's variables", f"{host}:{env.get('JAX_COORDINATOR_PORT', port)}", tasks,
               _number(env, "SLURM_PROCID"), _slurm_devices(env), scheduled=True)


def _first_host(nodes: str) -> str:
    """Returns the first host of a node list.

    >>> [_first_host(text) for text in ("node7", "a1,b2", "node[001-0015],b2", "node[007,9]")]
    ['node7', 'a1', 'node001', 'node007']
    """
    first = nodes.split(",")[0]
    if "[" not in first:
        return first
    prefix, _, numbers = nodes.partition("[")
    return prefix + re.split(r"[,\-\]]", numbers)[0]


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns one device per task of a host; None if a task should use all that it sees.

    That is right for one task per host, and if SLURM gave each task devices of its own: a task then
    sees another number of devices than the host has tasks.
    """
    tasks = list(_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    here = tasks[min(_number(env, "SLURM_NODEID", 0), len(tasks) - 1)]
    visible = env.get("CUDA_VISIBLE_DEVICES")
    own = visible is not None and len(visible.split(",")) != here
    return None if here == 1 or own else (_number(env, "SLURM_LOCALID"),)


def _per_node(text: str) -> Iterator[int]:
    """Yields the number of tasks of each node, from SLURM's notation.

    >>> list(_per_node("8(x2),4"))
    [8, 8, 4]
    """
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(tasks)] * int(times or 1)


def _openmpi_of_any_version(env: Mapping[str, str]) -> Job | None:
    return _openmpi({"JAX_COORDINATOR_ADDRESS": "unknown"} | dict(env))


def _openmpi(env: Mapping[str, str]) -> Job | None:
    """Returns the job of mpirun."""
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) < 2:
        return None
    address = env.get("JAX_COORDINATOR_ADDRESS") or _address_of_mpirun(env)
    several = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) > 1
    return Job("Open MPI's variables", address,
               _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK"),
               (_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),) if several else None, scheduled=True)


def _address_of_mpirun(env: Mapping[str, str]) -> str:
    """Returns the host of mpirun, which process 0 shares by default, with the port that jax would
    use. Only Open MPI before version 5 names this host.

    >>> _address_of_mpirun({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.1.0.1:34911"})
    '10.96.0.1:62624'
    """
    instead = f"set $JAX_COORDINATOR_ADDRESS to the host of process 0 and a port, host:{PORT}."
    if "OMPI_MCA_orte_hnp_uri" not in env:
        raise ClusterError(
            f"this is process {env.get('OMPI_COMM_WORLD_RANK')} of {env['OMPI_COMM_WORLD_SIZE']} "
            f"of Open MPI 5, which does not say where the first one is; {instead}")
    uri = env["OMPI_MCA_orte_hnp_uri"]
    found = _URI.match(uri)
    if not found:
        raise ClusterError(f"$OMPI_MCA_orte_hnp_uri is {uri[:_MOST]!r}, which has no job number "
                           f"and address, such as 1531576320.0;tcp://10.96.0.1:34911; {instead}")
    host = found["ipv4"] or f"[{found['ipv6']}]"
    port = int(found["job"]) // 2**12 % 2**12 + 65535 - 2**12 + 1  # jobs are multiples of 2**12
    return f"{host}:{env.get('JAX_COORDINATOR_PORT', port)}"


def _kubernetes(env: Mapping[str, str]) -> Job | None:
    """Returns the indexed Job of a pod; without a given address, waits until pod 0 has one."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys():
        return None
    job = kubernetes_job.job_of(env)
    processes = kubernetes_job.processes(job)
    known = processes == 1 or "JAX_COORDINATOR_ADDRESS" in env
    host = "unknown" if known else kubernetes_job.host_of_first(env, job)
    host = f"[{host}]" if ":" in host else host
    return Job("the API of Kubernetes", f"{host}:{env.get('JAX_COORDINATOR_PORT', PORT)}",
               processes, _number(env, "JOB_COMPLETION_INDEX"), scheduled=True)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env:
        if default is None:
            raise ClusterError(f"${name} is not set, which the other variables of its launcher "
                               "require.")
        return default
    if not env[name].strip().isdecimal():
        raise ClusterError(f"${name} is {env[name]!r}; it must be a whole number.")
    return int(env[name])


def _checked(job: Job) -> Job:
    host, _, port = job.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ClusterError(f"the coordinator's address {job.address!r} (by {job.source}) is not "
                           f'host:port; write, for example, "10.0.0.1:{PORT}".')
    n, i = job.processes, job.process
    if type(n) is not int or type(i) is not int or not 0 <= i < n:
        raise ClusterError(f"process {job.process!r} of {job.processes!r} (by {job.source}) is not "
                           "possible: processes are numbered from 0, each once.")
    return job
