"""GPUs that are not there: compile-only devices of the real GPU compiler.

The CUDA plugin compiles without a driver or a GPU when it is told what it compiles for (a
`stream_executor.GpuTargetConfigProto` as text). The fields named here are those that jax 0.10 as well as 0.12 read.
"""

import dataclasses
import difflib
import os
import re

from jax.experimental import topologies

from zerojax.errors import MissingExtraError, PolicyError

# Without it, one all-reduce of a lone scalar over several hosts aborts the process (jax 0.12.0).
COMPILER_OPTIONS = {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False}
NO_GPU_VARIABLE = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler has to know of a GPU. Bytes, bytes/s and GHz; `cc` is the compute capability."""

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


GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 108, 64, 1.41, 42331013120, 1555200000000, 41943040, 167936, 166912, 2048, (8, 0)),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936, 166912, 2048, (8, 0)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472, 232448, 2048, (9, 0)),
    "h200": Gpu("NVIDIA H200", 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472, 232448, 2048, (9, 0)),
    "b200": Gpu("NVIDIA B200", 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 233472, 232448, 2048, (10, 0)),
    "a6000": Gpu("NVIDIA RTX A6000", 84, 128, 1.80, 51041271808, 768096000000, 6291456, 102400, 101376, 1536, (8, 6)),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`hosts` x `per_host` GPUs of one kind.

    >>> Topology.parse("h200:8x8").devices
    64
    """

    gpu: Gpu
    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "gpu:hostsxgpus", as "h200:8x8".

        Raises:
          PolicyError: an unknown GPU (with the nearest names), or a shape that is not two whole numbers.
        """
        name, _, shape = text.partition(":")
        if name not in GPUS:
            near = difflib.get_close_matches(name, GPUS, 2, 0.3) or list(GPUS)
            raise PolicyError(f"topology {text!r}: no GPU {name!r}; did you mean {' or '.join(near)}?")
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise PolicyError(f"topology {text!r}: write hosts x GPUs per host behind the colon, as {name}:8x8.")
        return cls(GPUS[name], int(match[1]), int(match[2]))


def devices(topology: str | Topology) -> list:
    """Compile-only devices, those of one host next to each other.

    Raises:
      PolicyError: the text is not a topology, or the environment lets the plugin offer none.
      MissingExtraError: the CUDA plugin is not installed.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x{topology.hosts}x{topology.per_host}",
            target_config=topology.gpu.target()).devices
    except Exception as error:
        raise _explain(error) from error


def _explain(error: Exception) -> Exception:
    try:
        import jax_plugins.xla_cuda13  # noqa: F401  what the extra installs
    except ImportError:
        return MissingExtraError("a topology of GPUs that are not there needs the CUDA compiler: pip install 'zerojax[plan]'.")
    if NO_GPU_VARIABLE not in os.environ:
        return PolicyError(f"without a GPU the CUDA plugin offers no topology unless {NO_GPU_VARIABLE}=1 is in the "
                           "environment before jax first looks for devices; set it and start again.")
    return PolicyError(f"the CUDA plugin refused the topology: {error}")
