"""The frozen settings of the formats in which arrays travel between devices. Needs no devices."""

import dataclasses
import re

from zerojax.errors import PolicyError, check_pattern

GATHERS = ("int8", "float8_e4m3fn")
REDUCTIONS = ("bfloat16", "int8")
IN_BLOCKS = ("int8", "float8_e4m3fn")  # the others are a cast
LEAST_BLOCK = 32  # elements; the scales of smaller blocks take more than an eighth of the codes
EXCEPT = r"(?i).*(embed|wte|wpe|vocab|token|logits|head|classifier|router|gate/).*"


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
        shard (an all-to-all), and sums what it received in float32. "int8" is in blocks. None:
        gradients are reduced in the reduce dtype. It requires that each device differentiates its
        own part of the batch (return `zj.Loss`).
      block: the largest number of elements that share a scale.
      exclude: a regex for the paths of parameters to which formats in blocks do not apply: by
        default embeddings, heads and routers, by their usual names. They do not apply to
        parameters of fewer than two dimensions either, not counting the one that a scan slices.

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

    def excludes(self, path: str) -> bool:
        """Whether the formats do not apply to the parameter with this path."""
        return re.fullmatch(self.exclude, path) is not None


def block_of(size: int, most: int) -> int:
    """Returns the size of the largest possible blocks; 0 if those are too small.

    Args:
      size: the size of the last dimension on one device.
      most: the largest block.

    >>> block_of(768, 512), block_of(10, 512)
    (384, 0)
    """
    block = max((b for b in range(1, min(size, most) + 1) if size % b == 0), default=0)
    return block if block >= LEAST_BLOCK else 0
