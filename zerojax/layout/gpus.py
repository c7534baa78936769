"""The GPUs that can be simulated: what the compiler and the time estimates need to know of each."""

import dataclasses
import difflib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from zerojax.errors import PolicyError
from zerojax.tables import Sheet, size

MIB = 2**20
OLDEST = (7, 5)  # the oldest compute capability that the compiler supports
OWN = ("For any other NVIDIA GPU, write `zerojax gpus h200 --json > mine.json`, edit the file, and "
       "give it in place of a name: --topology mine.json:8x8.")
_TOO_OLD = f"the CUDA compiler needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
_UNSUPPORTED = {  # reasons by a regex for names in lower case
    r"\b[vp]100|\bk80": _TOO_OLD,
    r"\bmi\d": "AMD's GPUs need XLA's ROCm compiler, and zerojax simulates with its CUDA compiler",
}
_COLUMNS = ("name", "driver's name", "memory", "bf16 TFLOP/s", "memory GB/s", "link GB/s",
            "network GB/s")


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

    Raises:
      PolicyError: a figure is not a positive number of its type, or the compute capability is older
        than the CUDA compiler supports.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type in (int, float):
                _check_figure(field.name, getattr(self, field.name), field.type)
        pair = isinstance(self.cc, tuple) and len(self.cc) == 2
        if not pair or not all(_is_number(n, int) for n in self.cc):
            raise PolicyError(f"Gpu(cc={self.cc!r}): write two integers, such as (9, 0).")
        if self.cc < OLDEST:
            raise PolicyError(f"Gpu(cc={self.cc!r}): {_TOO_OLD}.")
        if not isinstance(self.name, str) or '"' in self.name:
            raise PolicyError(f"Gpu(name={self.name!r}): write a text without quotation marks.")

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


def _check_figure(name: str, value: Any, kind: type) -> None:
    if not _is_number(value, kind) or value <= 0:
        raise PolicyError(f"Gpu({name}={value!r}): write a positive "
                          f"{'integer' if kind is int else 'number'}.")


def _is_number(value: object, kind: type) -> bool:
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


# Sources: CUDA device attributes as nvidia-smi, XLA and PyTorch report them; tensor_flops and link:
# data sheets. network: what each GPU has in the usual system of its kind: DGX (200 Gb/s HDR,
# 400 Gb/s NDR), GB200 NVL72 (400 Gb/s), g4dn, g5, g6 and g6e in AWS (100 or 400 Gb/s for eight
# GPUs), and a share of 100 Gb/s for the A6000 and GeForce. link without NVLink: three quarters of
# PCIe's rate within a host. The T4 has no bfloat16: its tensor_flops are for float16.
GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 108, 64, 1.41, 42331013120, 1555200000000, 41943040,
                    167936, 166912, 2048, (8, 0), 312e12, 300e9, 25e9),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 85100068864, 2039040000000, 41943040,
                    167936, 166912, 2048, (8, 0), 312e12, 300e9, 25e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 84942979072, 3352320000000, 52428800,
                233472, 232448, 2048, (9, 0), 989e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 132, 128, 1.98, 151397597184, 4800000000000, 52428800,
                233472, 232448, 2048, (9, 0), 989e12, 450e9, 50e9),
    "gh200": Gpu("NVIDIA GH200 480GB", 132, 128, 1.98, 96768 * MIB, 4000000000000, 62914560,
                 233472, 232448, 2048, (9, 0), 989e12, 450e9, 50e9),
    "h20": Gpu("NVIDIA H20", 78, 128, 1.98, 97285 * MIB, 4000000000000, 62914560,
               233472, 232448, 2048, (9, 0), 148e12, 450e9, 50e9),
    "b200": Gpu("NVIDIA B200", 148, 128, 1.965, 191514411008, 7672320000000, 132644864,
                233472, 232448, 2048, (10, 0), 2250e12, 900e9, 50e9),
    "gb200": Gpu("NVIDIA GB200", 152, 128, 2.062, 197897748480, 7928064000000, 135528448,
                 233472, 232448, 2048, (10, 0), 2500e12, 900e9, 50e9),
    "l40s": Gpu("NVIDIA L40S", 142, 128, 2.52, 45589 * MIB, 864000000000, 100663296,
                102400, 101376, 1536, (8, 9), 362e12, 25e9, 6e9),
    "a10g": Gpu("NVIDIA A10G", 80, 128, 1.71, 22587 * MIB, 600000000000, 6291456,
                102400, 101376, 1536, (8, 6), 70e12, 25e9, 1.5e9),
    "l4": Gpu("NVIDIA L4", 58, 128, 2.04, 22478 * MIB, 300000000000, 50331648,
              102400, 101376, 1536, (8, 9), 121e12, 25e9, 1.5e9),
    "t4": Gpu("Tesla T4", 40, 64, 1.59, 15095 * MIB, 320000000000, 4194304,
              65536, 65536, 1024, (7, 5), 65e12, 12e9, 1.5e9),
    "a6000": Gpu("NVIDIA RTX A6000", 84, 128, 1.80, 51041271808, 768096000000, 6291456,
                 102400, 101376, 1536, (8, 6), 155e12, 25e9, 3e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 128, 128, 2.52, 24217 * MIB, 1008000000000, 75497472,
                   102400, 101376, 1536, (8, 9), 165e12, 25e9, 3e9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 82, 128, 1.695, 24259 * MIB, 936000000000, 6291456,
                   102400, 101376, 1536, (8, 6), 71e12, 25e9, 3e9),
}


def find(name: str) -> Gpu:
    """Returns a GPU by its name in `GPUS` or its driver's, by a JSON file, or by JSON text.

    Case, spaces and hyphens of names do not matter.

    Raises:
      PolicyError: there is no such GPU (the text suggests similar names), it cannot be simulated,
        or the JSON does not describe a GPU.

    >>> find("H200").name, find("RTX 4090") == find("rtx4090")
    ('NVIDIA H200', True)
    """
    for ours, gpu in GPUS.items():
        if _key(name) in (_key(ours), _key(gpu.name)):
            return gpu
    if name.startswith("{"):
        return _from_json(name, f"the GPU {name}")
    if name.lower().endswith(".json"):
        return _from_json(_contents(name), f"the GPU {name}")
    for pattern, why in _UNSUPPORTED.items():
        if re.search(pattern, name.lower()):
            raise PolicyError(f"GPU {name!r} cannot be simulated: {why}.")
    near = difflib.get_close_matches(name.lower(), GPUS, 2, 0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    raise PolicyError(f"unknown GPU {name!r}{guess} `zerojax gpus` lists all names. {OWN}")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _contents(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"GPU {path!r}: {error}. {OWN}") from None


def _from_json(text: str, where: str) -> Gpu:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise PolicyError(f"{where} is not JSON: {error}. {OWN}") from None
    types = {field.name: field.type for field in dataclasses.fields(Gpu)}
    fields = given if isinstance(given, dict) else {}
    if fields.keys() != types.keys():
        missing, unknown = types.keys() - fields.keys(), fields.keys() - types.keys()
        raise PolicyError(f"{where}: missing fields {sorted(missing)}, unknown fields "
                          f"{sorted(unknown)}. {OWN}")
    values = {name: _as(types[name], value) for name, value in fields.items()}
    try:
        return Gpu(**values)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _as(kind: Any, value: Any) -> Any:
    """Returns a JSON value as the type of its field: 4.8e12 is an integer, a list a tuple."""
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def sheet(chosen: Mapping[str, Gpu]) -> Sheet:
    """Returns a table of GPUs by name."""
    return Sheet("GPUs that can be simulated", _COLUMNS,
                 tuple(_row(name, gpu) for name, gpu in chosen.items()))


def _row(name: str, gpu: Gpu) -> tuple[str, ...]:
    rates = (gpu.bandwidth / 1e9, gpu.link / 1e9, gpu.network / 1e9)
    return (name, gpu.name, size(gpu.memory), f"{gpu.tensor_flops / 1e12:,.0f}",
            *(f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}" for rate in rates))


def to_json(gpu: Gpu) -> dict:
    """Returns the fields of a GPU as JSON values, which `find` reads."""
    return dataclasses.asdict(gpu)
