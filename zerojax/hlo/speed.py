"""The speed of a GPU and of its links, and the part of it that programs reach.

Needs no devices and no jax.
"""

import dataclasses
from collections.abc import Callable

PRODUCTS = 0.6  # of the dense peak
ATTENTION = 0.5  # of the dense peak
MEMORY = 0.85  # of the memory's bandwidth
LINKS = 0.8  # of the bandwidth of links
BESIDE = 0.85  # of a kernel's speed, while a collective runs
LAUNCH = 2e-6  # s per kernel


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one GPU.

    Attributes:
      flops: the operations/s of a dtype.
      bandwidth: bytes/s of its memory.
      link, network: bytes/s that it sends within a host, and between hosts.
      per_host: the number of GPUs in a host.
      products, attention: the part of `flops` that products and attention kernels reach.
      memory, links: the part of the bandwidths that kernels and collectives reach.
      beside: the part of a kernel's speed that is left while a collective runs, which occupies
        multiprocessors and memory.
      launch: seconds per kernel.
    """

    flops: Callable[[str], float]
    bandwidth: float
    link: float
    network: float
    per_host: int
    products: float = PRODUCTS
    attention: float = ATTENTION
    memory: float = MEMORY
    links: float = LINKS
    beside: float = BESIDE
    launch: float = LAUNCH
