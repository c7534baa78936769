"""The frozen settings of the formats in which arrays travel between devices. Needs no devices."""

import dataclasses
import re
from collections.abc import Sequence

from zerojax.errors import PolicyError
from zerojax.settings import as_text, check_pattern

GATHERS = ("int8", "float8_e4m3fn")
REDUCTIONS = ("bfloat16", "int8")
IN_BLOCKS = GATHERS  # bfloat16 is a cast
LEAST_BLOCK = 32  # elements; the scales of smaller blocks take more than an eighth of the codes
EXCEPT = (r"(?i).*(emb|wte|wpe|vocab|logits|classifier|router|norm).*"
          r"|(.*/)?((\w+_)?head(_\d+)?|bias|scale)(/.*)?")  # not MultiHeadDotProductAttention_0


@dataclasses.dataclass(frozen=True)
class Wire:
    """The formats in which parameters and gradients travel between devices, where fewer bytes
    matter more than the last digits.

    Args:
      gather: "int8" or "float8_e4m3fn": parameters are gathered in blocks with a float32 scale
        each, rounded to the nearest code; None: in the compute dtype. The parameters at rest keep
        all their digits.
      reduce: "bfloat16" or "int8": each device rounds its part of a gradient up or down at random,
        so that the mean is right (stochastic rounding), sends it to the device that keeps the
        shard (an all-to-all), and sums what it received in float32. "int8" is in blocks. On a mesh
        of hosts, the sums within a host are then rounded and exchanged between hosts. Copies of
        the state (replicas) are summed in the reduce dtype. None: gradients are reduced in the
        reduce dtype. It requires that each device differentiates its own part of the batch (return
        `zj.Loss`).
      block: the largest number of elements that share a scale.
      exclude: a regex for the paths of parameters to which formats in blocks do not apply: by
        default embeddings, heads, routers, norms and biases, by their usual names. They do not
        apply to parameters of fewer than two dimensions either, not counting the one that a scan
        slices, nor to those of `Precision(keep=...)`.

    Raises:
      PolicyError: an unknown format, a block of fewer than 32 elements, or an invalid regex.

    Sources: ZeRO++ (arXiv 2306.10209), sections 3.1 and 3.3; QSDP (arXiv 2302.02390) for the
    unbiased rounding.

    >>> Wire(gather="int8", reduce="bfloat16").gather
    'int8'
    """

    gather: str | None = None
    reduce: str | None = None
    _: dataclasses.KW_ONLY
    block: int = 256
    exclude: str = EXCEPT

    def __post_init__(self):
        for field, known in (("gather", GATHERS), ("reduce", REDUCTIONS)):
            if (given := getattr(self, field)) not in (None, *known):
                raise PolicyError(f"Wire({field}={given!r}): not a format for it; write one of "
                                  f"{', '.join(map(repr, known))}, or None.")
        if not isinstance(self.block, int) or self.block < LEAST_BLOCK:
            raise PolicyError(f"Wire(block={self.block!r}): write at least {LEAST_BLOCK} elements; "
                              "the scales of smaller blocks take more than an eighth of the codes.")
        check_pattern("Wire(exclude=...)", self.exclude)

    def __repr__(self) -> str:
        return f"Wire({as_text(self).removeprefix(', ')})"

    def excludes(self, path: str) -> bool:
        """Whether formats in blocks do not apply to the parameter with this path.

        >>> Wire().excludes("lm_head/kernel"), Wire().excludes("attention/query/kernel")
        (True, False)
        """
        return re.fullmatch(self.exclude, path) is not None


def blocks_of(dims: Sequence[int], most: int) -> tuple[int, int]:
    """Returns the dimension that is divided into blocks, and their size; size 0 if too small.

    The dimension with the largest blocks is chosen, and the last of several.

    Args:
      dims: those of the shard on one device.
      most: the largest block.

    >>> blocks_of((768, 28), 512), blocks_of((10, 10), 512)
    ((0, 384), (1, 0))
    """
    block, dim = max(((_largest_divisor(d, most), i) for i, d in enumerate(dims)), default=(0, 0))
    return dim, block if block >= LEAST_BLOCK else 0


def _largest_divisor(d: int, most: int) -> int:
    return next((b for b in range(min(d, most), 0, -1) if d % b == 0), 0)
