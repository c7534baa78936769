"""ZeRO's own arithmetic: bytes per device at rest, elements on the wire. Needs no devices and no
jax.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5 and figure 1 for memory, section 7
for communication.
"""

import dataclasses


def paper_bytes(params: float, devices: int, stage: int, *, optimizer: float = 12) -> float:
    """Bytes per device of parameters, gradients and optimizer state, as the paper counts them for
    16-bit training.

    Args:
      params: number of parameters, Psi.
      devices: number that share a copy.
      optimizer: bytes of optimizer state per parameter (fp32 copy, momentum and variance of Adam:
        12).

    >>> [round(paper_bytes(7.5e9, 64, stage) / 1e9, 2) for stage in range(4)]
    [120.0, 31.41, 16.64, 1.88]
    """
    shares = [1 / devices if stage >= s else 1 for s in (1, 2, 3)]
    return params * (optimizer * shares[0] + 2 * shares[1] + 2 * shares[2])


def rest_bytes(params: float, devices: int, stage: int, *, param_bytes: int = 4,
               optimizer: float = 8) -> float:
    """Bytes per device of zerojax's state between steps: parameters and optimizer state, in shards
    from stage 1 on.

    The paper keeps a 16-bit copy of the parameters between steps of stages 1 and 2; zerojax makes
    it anew in each.

    >>> rest_bytes(8, 4, 3), rest_bytes(8, 4, 0)
    (24.0, 96.0)
    """
    return params * (param_bytes + optimizer) / (devices if stage else 1)


@dataclasses.dataclass(frozen=True)
class Wire:
    """Elements each device sends in a step, a parameter, but for the factor (N - 1) / N.

    Attributes:
      gathered: in the compute dtype.
      reduced: in the reduce dtype; an all-reduce counts twice, as a reduction and a gather.
    """

    gathered: int
    reduced: int

    @property
    def elements(self) -> int:
        return self.gathered + self.reduced

    def bytes(self, params: float, devices: int, *, compute: int = 2, reduce: int = 2) -> float:
        """Bytes each device sends in a step, for itemsizes `compute` and `reduce`."""
        return params * (self.gathered * compute + self.reduced * reduce) * (devices - 1) / devices


def wire(stage: int, accumulate: int = 1, *, per_device: bool = True,
         regathered: bool = True) -> Wire:
    """Returns the cost of a parameter on the wire per step.

    Args:
      stage: 0 to 3.
      accumulate: microbatches, A.
      per_device: each device differentiates its own part; with one loss, stage 1 reduces where
        stage 2 does.
      regathered: whether stage 3 gathers it again for the backward pass (a block under
        `jax.checkpoint`); a parameter that is kept, such as the head next to the loss, is gathered
        once.

    >>> [wire(stage).elements for stage in range(4)], wire(3, 4).elements, wire(2, 4).elements
    ([2, 2, 2, 3], 12, 5)
    """
    reductions = 1 if stage <= 1 and per_device else accumulate
    if stage == 0:
        return Wire(0, 2 * reductions)
    gathers = 1 if stage < 3 else accumulate * (2 if regathered else 1)
    return Wire(gathers, reductions)
