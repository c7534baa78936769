"""GPUs that are not there: compile-only devices of the real GPU compiler.

The CUDA plugin compiles without a driver or a GPU when it is told what it compiles for (a
`stream_executor.GpuTargetConfigProto` as text). The fields named here are those that jax 0.10 as well as 0.12 read.
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

# Without it, one all-reduce of a lone scalar over several hosts aborts the process (jax 0.12.0).
COMPILER_OPTIONS = {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False}
PLATFORM = "cuda"
NO_GPU_VARIABLE = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler has to know of a GPU, and what an estimate of its time has to.

    Attributes:
      name: as the driver says it.
      cores, fpus_per_core, clock_ghz, l2, shared_memory, shared_memory_optin, threads_per_core: streaming
        multiprocessors; bytes of memory where it is memory.
      memory, bandwidth: bytes, and bytes/s, of device memory.
      cc: the compute capability.
      tensor_flops: dense multiply-adds of bfloat16 or float16 a second, counted as two operations each, by the vendor.
        Those of float32 (as TensorFloat-32, jax's default for products) are half of it.
      link: bytes/s each GPU sends to the others of its host, in one direction.
      network: bytes/s each GPU sends to other hosts.
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
        """Operations a second of products of a dtype, in HLO's spelling.

        >>> GPUS["h200"].flops("f32") / GPUS["h200"].flops("bf16")
        0.5
        """
        return self.tensor_flops * {"f32": 0.5, "f64": 0.03}.get(dtype, 1.0)

    def target(self) -> str:
        """The `GpuTargetConfigProto`, as text."""
        minor = f" minor: {self.cc[1]}" if self.cc[1] else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory} threads_per_core_limit: {self.threads_per_core}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_memory_optin}
              cuda_compute_capability {{ major: {self.cc[0]}{minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"
            """


# Compiler: nvidia-smi and CUDA device attributes. tensor_flops, link: data sheets. network: what DGX systems of the kind
# have a GPU (200 Gb/s HDR, 400 Gb/s NDR); for the A6000, PCIe 4.0 within a host and a share of 100 Gb/s between hosts.
GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 108, 64, 1.41, 42331013120, 1555200000000, 41943040, 167936, 166912, 2048, (8, 0),
                    312e12, 300e9, 25e9),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936, 166912, 2048, (8, 0),
                    312e12, 300e9, 25e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472, 232448, 2048, (9, 0),
                989e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472, 232448, 2048, (9, 0),
                989e12, 450e9, 50e9),
    "b200": Gpu("NVIDIA B200", 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 233472, 232448, 2048, (10, 0),
                2250e12, 900e9, 50e9),
    "a6000": Gpu("NVIDIA RTX A6000", 84, 128, 1.80, 51041271808, 768096000000, 6291456, 102400, 101376, 1536, (8, 6),
                 155e12, 25e9, 3e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`hosts` x `per_host` GPUs of one kind.

    For interconnects of your own: `Topology(dataclasses.replace(GPUS["h200"], network=25e9), 8, 8)`.

    Raises:
      PolicyError: a number of hosts or GPUs that is no positive integer.

    >>> Topology.parse("h200:8x8").devices
    64
    """

    gpu: Gpu
    hosts: int
    per_host: int

    def __post_init__(self):
        if not isinstance(self.gpu, Gpu):
            raise PolicyError(f"Topology(gpu={self.gpu!r}): write one of zerojax.layout.topology.GPUS, or Topology.parse(\"h200:8x8\").")
        for name in ("hosts", "per_host"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1:
                raise PolicyError(f"Topology({name}={n!r}): write a positive integer.")

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def text(self) -> str:
        """What `parse` makes it from: "h200:8x8", or JSON for a GPU of one's own."""
        name = next((name for name, gpu in GPUS.items() if gpu == self.gpu), json.dumps(dataclasses.asdict(self.gpu)))
        return f"{name}:{self.hosts}x{self.per_host}"

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "gpu:hostsxgpus", as "h200:8x8".

        Raises:
          PolicyError: an unknown GPU (with the nearest names), or a shape that is not two whole numbers.
        """
        name, _, shape = text.rpartition(":") if ":" in text else (text, "", "")
        if name not in GPUS and not name.startswith("{"):
            near = difflib.get_close_matches(name, GPUS, 2, 0.3) or list(GPUS)
            raise PolicyError(f"topology {text!r}: no GPU {name!r}; did you mean {' or '.join(near)}?")
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise PolicyError(f"topology {text!r}: write hosts x GPUs per host behind the colon, as {name}:8x8.")
        return cls(GPUS[name] if name in GPUS else _gpu(name), int(match[1]), int(match[2]))

    @classmethod
    def of(cls, mesh) -> "Topology | None":
        """What a mesh is made of: absent GPUs of `make_mesh(topology=...)`, or GPUs that are there; None for other devices."""
        if isinstance(mesh, AbstractMesh):
            absent = mesh.abstract_device
            return cls.parse(absent.device_kind) if absent is not None and absent.platform == PLATFORM else None
        kinds = {d.device_kind for d in mesh.devices.flat}
        gpu = next((gpu for gpu in GPUS.values() if kinds == {gpu.name}), None)
        hosts = len({(d.process_index, getattr(d, "slice_index", 0)) for d in mesh.devices.flat})
        return gpu and cls(gpu, hosts, mesh.devices.size // hosts)

    def device(self) -> AbstractDevice:
        """What stands for one of its GPUs in an `AbstractMesh`."""
        return AbstractDevice(device_kind=self.text, num_cores=None, platform=PLATFORM)


def _gpu(text: str) -> Gpu:
    try:
        fields = json.loads(text)
        return Gpu(**{**fields, "cc": tuple(fields["cc"])})
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"topology: {text!r} is no GPU in JSON ({error}); write one of {', '.join(GPUS)}.") from None


def check_installed() -> None:
    """Raises `MissingExtraError` if the CUDA compiler is not installed, `PolicyError` if it is of another jax."""
    found = {name: version(name) for n in (13, 12) for name in (f"jax-cuda{n}-plugin", f"jax-cuda{n}-pjrt") if _installed(name)}
    if len(found) < 2 or not _installed("flatbuffers"):
        raise MissingExtraError("GPUs that are not there need the CUDA compiler: pip install 'zerojax[plan]' (131 MB; no driver, "
                                "no CUDA libraries and no GPU).")
    odd = {name: v for name, v in found.items() if v.split(".")[:3] != jax.__version__.split(".")[:3]}
    if odd:
        raise PolicyError(f"jax is {jax.__version__}, but {', '.join(f'{n} is {v}' for n, v in odd.items())}; install one version: "
                          f"pip install 'jax[cuda13-local]=={jax.__version__}'.")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def devices(topology: str | Topology) -> list:
    """Compile-only devices, those of one host next to each other.

    The plugin offers them only if `NO_GPU_VARIABLE` is in the environment before jax first looks for devices.

    Raises:
      PolicyError: the text is not a topology, or the environment lets the plugin offer none.
      MissingExtraError: the CUDA plugin is not installed.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    check_installed()
    try:
        return topologies.get_topology_desc(
            platform=PLATFORM, topology_name="", topology=f"1x{topology.hosts}x{topology.per_host}",
            target_config=topology.gpu.target()).devices
    except Exception as error:
        unset = "" if os.environ.get(NO_GPU_VARIABLE) else f"; {NO_GPU_VARIABLE}=1 has to be in the environment before jax starts"
        raise PolicyError(f"the CUDA plugin offers no {topology.text}: {error}{unset}.") from error
