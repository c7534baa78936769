"""Simulated clusters of GPUs: compile-only devices of the real GPU compiler.

The CUDA plugin compiles without a driver or a GPU if it is given a description of the target (a
`stream_executor.GpuTargetConfigProto` as text). jax 0.10 and 0.12 both read the fields used here.
"""

import dataclasses
import difflib
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from zerojax.errors import MissingExtraError, PolicyError

COMPILER_OPTIONS = {
    # an all-reduce of a scalar over several hosts aborts the process with this kernel (jax 0.12.0)
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
    # cannot measure without a GPU: it compiles each fusion once more and changes none (jax 0.12.0)
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
PLATFORM = "cuda"
NO_GPU_VARIABLE = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that the compiler needs, and those that time estimates need.

    Attributes:
      name: the name that the driver reports.
      cores: number of streaming multiprocessors.
      fpus_per_core: number of float32 units in each multiprocessor.
      clock_ghz: clock rate in GHz.
      memory: bytes of device memory.
      bandwidth: bytes/s of device memory.
      l2: bytes of the L2 cache.
      shared_memory, shared_memory_optin: bytes of shared memory per core, and the most that one
        block can request.
      threads_per_core: the most threads resident on a core.
      cc: compute capability.
      tensor_flops: dense bfloat16 or float16 operations per second, according to the vendor, with
        each multiply-add counted as two. The rate for float32 (as TensorFloat-32, jax's default for
        matrix products) is half of it.
      link: bytes/s that each GPU can send to the other GPUs of its host.
      network: bytes/s that each GPU can send to other hosts.
    """

    name: str
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared_memory: int
    shared_memory_optin: int
    threads_per_core: int
    cc: tuple[int, int]
    tensor_flops: float
    link: float
    network: float

    def flops(self, dtype: str) -> float:
        """Returns the operations per second of matrix products in a dtype, given by its HLO name.

        >>> GPUS["h200"].flops("f32") / GPUS["h200"].flops("bf16")
        0.5
        """
        return self.tensor_flops * {"f32": 0.5, "f64": 0.03}.get(dtype, 1.0)

    def target(self) -> str:
        """Returns the `GpuTargetConfigProto` as text."""
        minor = f" minor: {self.cc[1]}" if self.cc[1] else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory}
              threads_per_core_limit: {self.threads_per_core}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
              clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory}
              shared_memory_per_block_optin: {self.shared_memory_optin}
              cuda_compute_capability {{ major: {self.cc[0]}{minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
            """


# Sources: nvidia-smi and CUDA device attributes. tensor_flops and link: data sheets. network: what
# each GPU has in a DGX system of that kind (200 Gb/s HDR, 400 Gb/s NDR). For the A6000, link is
# PCIe 4.0 within a host, and network a share of 100 Gb/s between hosts.
GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 108, 64, 1.41, 42331013120, 1555200000000, 41943040,
                    167936, 166912, 2048, (8, 0), 312e12, 300e9, 25e9),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 85100068864, 2039040000000, 41943040,
                    167936, 166912, 2048, (8, 0), 312e12, 300e9, 25e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 84942979072, 3352320000000, 52428800,
                233472, 232448, 2048, (9, 0), 989e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 132, 128, 1.98, 151397597184, 4800000000000, 52428800,
                233472, 232448, 2048, (9, 0), 989e12, 450e9, 50e9),
    "b200": Gpu("NVIDIA B200", 148, 128, 1.965, 191514411008, 7672320000000, 132644864,
                233472, 232448, 2048, (10, 0), 2250e12, 900e9, 50e9),
    "a6000": Gpu("NVIDIA RTX A6000", 84, 128, 1.80, 51041271808, 768096000000, 6291456,
                 102400, 101376, 1536, (8, 6), 155e12, 25e9, 3e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A cluster of `hosts` x `per_host` GPUs of one kind.

    To use your own interconnect, write
    `Topology(dataclasses.replace(GPUS["h200"], network=25e9), 8, 8)`.

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
                              'zerojax.layout.topology.GPUS, or Topology.parse("h200:8x8").')
        for name in ("hosts", "per_host"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1:
                raise PolicyError(f"Topology({name}={n!r}): write a positive integer.")

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def text(self) -> str:
        """The text that `parse` reads: "h200:8x8", with JSON in place of the name of other GPUs."""
        name = next((name for name, gpu in GPUS.items() if gpu == self.gpu), None)
        name = name or json.dumps(dataclasses.asdict(self.gpu))
        return f"{name}:{self.hosts}x{self.per_host}"

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Returns the topology that "gpu:hostsxgpus" describes, such as "h200:8x8".

        Raises:
          PolicyError: the GPU is unknown (the text has the nearest names), or the shape is not two
            positive integers.
        """
        name, _, shape = text.rpartition(":") if ":" in text else (text, "", "")
        if name not in GPUS and not name.startswith("{"):
            near = difflib.get_close_matches(name, GPUS, 2, 0.3) or list(GPUS)
            raise PolicyError(f"topology {text!r}: unknown GPU {name!r}; "
                              f"did you mean {' or '.join(near)}?")
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise PolicyError(f"topology {text!r}: write hosts x GPUs per host after the colon, "
                              f"such as {name}:8x8.")
        gpu = GPUS[name] if name in GPUS else _gpu(name)
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


def _gpu(text: str) -> Gpu:
    try:
        fields = json.loads(text)
        return Gpu(**{**fields, "cc": tuple(fields["cc"])})
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"topology: {text!r} is not a GPU in JSON ({error}); "
                          f"write one of {', '.join(GPUS)}.") from None


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
