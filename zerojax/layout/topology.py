"""Simulated clusters of GPUs: compile-only devices of the real GPU compiler.

The CUDA plugin compiles without a driver or a GPU if it is given a description of the target (a
`stream_executor.GpuTargetConfigProto` as text). jax 0.10 and 0.12 both read the fields used here.
"""

import dataclasses
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from zerojax.errors import MissingExtraError, PolicyError
from zerojax.layout import gpus
from zerojax.layout.gpus import GPUS, Gpu

COMPILER_OPTIONS = {
    # an all-reduce of a scalar over several hosts aborts the process with this kernel (jax 0.12.0)
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
    # without a GPU, it compiles candidates, measures nothing and changes no instruction
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
PLATFORM = "cuda"
NO_GPU_VARIABLE = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A cluster of `hosts` x `per_host` GPUs of one kind.

    Attributes:
      gpu: the kind of GPU.
      hosts: the number of hosts.
      per_host: the number of GPUs in each host.

    To use your own interconnect, write
    `Topology(dataclasses.replace(gpus.GPUS["h200"], network=25e9), 8, 8)`.

    Raises:
      PolicyError: the number of hosts or GPUs is not a positive integer.

    >>> Topology.parse("h200:8x8").devices
    64
    """

    gpu: Gpu
    hosts: int
    per_host: int

    def __post_init__(self):
        if not isinstance(self.gpu, Gpu):
            raise PolicyError(f"Topology(gpu={self.gpu!r}): not a Gpu; write one of "
                              'zerojax.layout.gpus.GPUS, or Topology.parse("h200:8x8").')
        for name in ("hosts", "per_host"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1:
                raise PolicyError(f"Topology({name}={n!r}): write a positive integer.")

    @property
    def devices(self) -> int:
        """The number of GPUs."""
        return self.hosts * self.per_host

    @property
    def text(self) -> str:
        """The text that `parse` reads: "h200:8x8", with JSON in place of the name of other GPUs."""
        name = next((name for name, gpu in GPUS.items() if gpu == self.gpu), None)
        name = name or json.dumps(gpus.to_json(self.gpu))
        return f"{name}:{self.hosts}x{self.per_host}"

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Returns the topology that "gpu:hostsxgpus" describes, such as "h200:8x8".

        The GPU is a name of `zerojax.layout.gpus.GPUS`, in any case, or a JSON file with its
        fields: "mine.json:8x8".

        Raises:
          PolicyError: the GPU is unknown (the text has the nearest names), or the shape is not two
            positive integers.
        """
        name, _, shape = text.rpartition(":") if ":" in text else (text, "", "")
        try:
            gpu = gpus.find(name)
        except PolicyError as error:
            raise PolicyError(f"topology {text!r}: {error}") from None
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise PolicyError(f"topology {text!r}: write hosts x GPUs per host after the colon, "
                              f"such as {name}:8x8.")
        return cls(gpu, int(match[1]), int(match[2]))

    @classmethod
    def of(cls, mesh) -> "Topology | None":
        """Returns the topology of a mesh of GPUs, simulated or real; None for other devices."""
        if isinstance(mesh, AbstractMesh):
            simulated = mesh.abstract_device
            if simulated is None or simulated.platform != PLATFORM:
                return None
            return cls.parse(simulated.device_kind)
        kinds = {d.device_kind for d in mesh.devices.flat}
        gpu = next((gpu for gpu in GPUS.values() if kinds == {gpu.name}), None)
        hosts = len({(d.process_index, getattr(d, "slice_index", 0)) for d in mesh.devices.flat})
        return gpu and cls(gpu, hosts, mesh.devices.size // hosts)

    def device(self) -> AbstractDevice:
        """Returns the device that represents each of its GPUs in an `AbstractMesh`."""
        return AbstractDevice(device_kind=self.text, num_cores=None, platform=PLATFORM)


def devices(topology: str | Topology) -> list:
    """Returns compile-only devices, with those of one host next to each other.

    The plugin offers them only if `NO_GPU_VARIABLE` is in the environment before jax first looks
    for devices.

    Raises:
      PolicyError: the text is not a topology, or the plugin offers no such devices.
      MissingExtraError: the CUDA plugin is not installed.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    check_installed()
    try:
        return topologies.get_topology_desc(
            platform=PLATFORM, topology_name="", topology=f"1x{topology.hosts}x{topology.per_host}",
            target_config=topology.gpu.target()).devices
    except Exception as error:
        advice = ("" if os.environ.get(NO_GPU_VARIABLE) else
                  f"; set {NO_GPU_VARIABLE}=1 in the environment before jax starts")
        raise PolicyError(f"the CUDA plugin offers no devices for {topology.text}: "
                          f"{error}{advice}.") from error


def check_installed() -> None:
    """Raises an error if the CUDA compiler cannot be used.

    Raises:
      MissingExtraError: the CUDA compiler is not installed.
      PolicyError: its version is not jax's.
    """
    plugins = [f"jax-cuda{n}-{part}" for n in (13, 12) for part in ("plugin", "pjrt")]
    found = {name: version(name) for name in plugins if _installed(name)}
    if len(found) < 2 or not _installed("flatbuffers"):
        raise MissingExtraError("simulated GPUs need the CUDA compiler: "
                                "pip install 'zerojax[plan]' (131 MB; needs no driver, no CUDA "
                                "libraries and no GPU).")
    ours = _release(jax.__version__)
    other = [f"{name} is {v}" for name, v in found.items() if _release(v) != ours]
    if other:
        raise PolicyError(f"jax is {jax.__version__}, but {', '.join(other)}; install one version: "
                          f"pip install 'jax[cuda13-local]=={jax.__version__}'.")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _release(text: str) -> list[str]:
    """Returns the first three numbers of a version."""
    return text.split(".")[:3]
