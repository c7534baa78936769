"""Which job this process is part of: read off what started it. Needs no jax."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

from zerojax.errors import ClusterError

PORT = 29431  # where nobody names one: below those that Linux gives to whoever asks for any
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Job:
    """Processes that train together, as one of them sees it.

    Attributes:
      source: who said so.
      address: "host:port" of process 0; None where jax is to find it out itself.
      processes, process: how many, and which one this is.
      local_devices: of this host, those that this process shall use; None is all that it sees.
      scheduled: a scheduler wrote the address and starts the processes, perhaps minutes apart; else a person did.
    """

    source: str
    address: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None
    scheduled: bool = False

    def __str__(self) -> str:
        if self.address is None:
            return f"what jax detects itself ({self.source})"
        devices = "" if self.local_devices is None else f", devices {list(self.local_devices)} of this host"
        return f"process {self.process} of {self.processes}, coordinator {self.address}{devices} (by {self.source})"


def given(address: str | None, processes: int | None, process: int | None) -> Job | None:
    """What the caller says.

    Raises:
      ClusterError: some of it and not all, or numbers that can't be.
    """
    said = {"address": address, "processes": processes, "process": process}
    if all(value is None for value in said.values()):
        return None
    missing = [name for name, value in said.items() if value is None]
    if missing:
        raise ClusterError(f"initialize({', '.join(f'{k}={v!r}' for k, v in said.items() if v is not None)}): "
                           f"{' and '.join(missing)} missing; give all three, or none for what started the process to say.")
    return _checked(Job("arguments", address, processes, process))


def detected(environ: Mapping[str, str] = os.environ) -> Job | None:
    """What started this process says: JAX's own variables, `zerojax launch`, SkyPilot, torchrun, SLURM; last, those that jax
    detects itself (Open MPI, Kubernetes). None if it is alone.

    >>> print(detected({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "2", "RANK": "1"}))
    process 1 of 2, coordinator 10.0.0.1:1234 (by torchrun's variables)

    Raises:
      ClusterError: variables that are no numbers, or do not fit together.
    """
    for find in (_jax, _skypilot, _torchrun, _slurm, _openmpi, _kubernetes):
        job = find(environ)
        if job is not None and job.processes != 1:  # one process for this launcher may be several for the one within
            return _checked(dataclasses.replace(job, address=environ.get("JAX_COORDINATOR_ADDRESS", job.address)))
    if environ.keys() & set(_JAX) and environ.get("JAX_NUM_PROCESSES") != "1":
        missing = [f"${name}" for name in _JAX if name not in environ]
        raise ClusterError(f"of {', '.join(f'${name}' for name in _JAX)}, {' and '.join(missing)} missing, and nothing else says "
                           "it; set all three, or none.")
    return None


def _jax(env) -> Job | None:
    if not set(_JAX) <= env.keys():
        return None
    launched = "ZEROJAX_LAUNCH" in env
    return Job("zerojax launch" if launched else "JAX_COORDINATOR_ADDRESS", env["JAX_COORDINATOR_ADDRESS"],
               _number(env, "JAX_NUM_PROCESSES"), _number(env, "JAX_PROCESS_ID"), scheduled=launched)


def _skypilot(env) -> Job | None:
    if not {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"} <= env.keys() or "TORCHELASTIC_RUN_ID" in env:  # torchrun within
        return None
    hosts = env["SKYPILOT_NODE_IPS"].split() or ["?"]
    return Job("SkyPilot's variables", f"{hosts[0]}:{env.get('JAX_COORDINATOR_PORT', PORT)}", len(hosts),
               _number(env, "SKYPILOT_NODE_RANK"), scheduled=True)


def _torchrun(env) -> Job | None:
    if not {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= env.keys():
        return None
    port = _number(env, "MASTER_PORT", PORT)
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own store listens there
    several = _number(env, "LOCAL_WORLD_SIZE", 1) > 1
    return Job("torchrun's variables", f"{env['MASTER_ADDR']}:{port}", _number(env, "WORLD_SIZE"), _number(env, "RANK"),
               (_number(env, "LOCAL_RANK"),) if several else None, scheduled="TORCHELASTIC_RUN_ID" in env)


def _slurm(env) -> Job | None:
    """Within a step of srun. The port is that which jax would take."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= env.keys():
        return None
    tasks = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")  # of an interactive step, one
    port = env.get("JAX_COORDINATOR_PORT", _number(env, "SLURM_JOB_ID") % 2**12 + 65535 - 2**12 + 1)
    return Job("SLURM's variables", f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}", tasks,
               _number(env, "SLURM_PROCID"), _slurm_devices(env), scheduled=True)


def _first_host(nodes: str) -> str:
    """Of a node list.

    >>> [_first_host(text) for text in ("node7", "a1,b2", "node[001-0015],b2", "node[007,9]")]
    ['node7', 'a1', 'node001', 'node007']
    """
    prefix, _, rest = nodes.partition("[") if "[" in nodes.split(",")[0] else (nodes.split(",")[0], "", "")
    return prefix + re.split(r"[,\-\]]", rest)[0]


def _slurm_devices(env) -> tuple[int, ...] | None:
    """One for each task of a host, unless it has one task, or SLURM gave each its own: they see another number then."""
    tasks = list(_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    here = tasks[min(_number(env, "SLURM_NODEID", 0), len(tasks) - 1)]
    bound = "CUDA_VISIBLE_DEVICES" in env and len(env["CUDA_VISIBLE_DEVICES"].split(",")) != here
    return None if here == 1 or bound else (_number(env, "SLURM_LOCALID"),)


def _per_node(text: str) -> Iterator[int]:
    """Of SLURM's way to write it.

    >>> list(_per_node("8(x2),4"))
    [8, 8, 4]
    """
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(tasks)] * int(times or 1)


def _openmpi(env) -> Job | None:
    """Version 4 says where mpirun is, which jax takes for process 0; 5 does not."""
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) < 2:
        return None
    if "JAX_COORDINATOR_ADDRESS" not in env:
        if "OMPI_MCA_orte_hnp_uri" in env:
            return Job("Open MPI", scheduled=True)
        raise ClusterError(f"this is process {env.get('OMPI_COMM_WORLD_RANK')} of {env['OMPI_COMM_WORLD_SIZE']} of Open MPI 5, "
                           f"which does not say where the first one is; set $JAX_COORDINATOR_ADDRESS to its host:{PORT}.")
    local = (_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),) if _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) > 1 else None
    return Job("Open MPI's variables", env["JAX_COORDINATOR_ADDRESS"], _number(env, "OMPI_COMM_WORLD_SIZE"),
               _number(env, "OMPI_COMM_WORLD_RANK"), local, scheduled=True)


def _kubernetes(env) -> Job | None:
    there = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys() and "JAX_COORDINATOR_ADDRESS" not in env
    return Job("Kubernetes, an indexed Job", scheduled=True) if there else None


def _number(env, name: str, default: int | None = None) -> int:
    if name not in env:
        if default is None:
            raise ClusterError(f"${name} is not set, which the other variables of its launcher call for.")
        return default
    if not env[name].strip().isdecimal():
        raise ClusterError(f"${name} is {env[name]!r}; it has to be a whole number.")
    return int(env[name])


def _checked(job: Job) -> Job:
    if job.address is None:
        return job
    host, _, port = job.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ClusterError(f"the coordinator's address {job.address!r} (by {job.source}) is not host:port; write, say, "
                           f'"10.0.0.1:{PORT}".')
    n, i = job.processes, job.process
    if type(n) is not int or type(i) is not int or not 0 <= i < n:
        raise ClusterError(f"process {job.process!r} of {job.processes!r} (by {job.source}) can't be: processes are numbered from "
                           "0, each once.")
    return job
