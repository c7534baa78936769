"""ZeRO's own arithmetic: bytes per device at rest, elements on the wire. Needs no devices and no
jax.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5 and figure 1 for memory, section 7
for communication.
"""

import dataclasses

from zerojax.tables import Sheet, quantity

_COLUMNS = ("stage", "paper, within a step (2+2+12 bytes)", "zerojax, between steps (4+8 bytes)",
            "elements sent per parameter", "sent per step, 16 bit")


def paper_bytes(params: float, devices: int, stage: int, *, optimizer: float = 12) -> float:
    """Returns the paper's bytes per device: parameters, gradients and optimizer state of 16-bit
    training.

    Args:
      params: the number of parameters, Psi.
      devices: the number of devices that share a copy.
      optimizer: bytes of optimizer state per parameter (fp32 copy, momentum and variance of Adam:
        12).

    >>> [round(paper_bytes(7.5e9, 64, stage) / 1e9, 2) for stage in range(4)]
    [120.0, 31.41, 16.64, 1.88]
    """
    shares = [1 / devices if stage >= s else 1 for s in (1, 2, 3)]
    return params * (optimizer * shares[0] + 2 * shares[1] + 2 * shares[2])


def rest_bytes(params: float, devices: int, stage: int, *, param_bytes: int = 4,
               optimizer: float = 8) -> float:
    """Returns the bytes per device of zerojax's parameters and optimizer state between steps.

    They are sharded from stage 1 on. At stages 1 and 2, the paper keeps a 16-bit copy of the
    parameters between steps; zerojax makes this copy anew in each step.

    >>> rest_bytes(8, 4, 3), rest_bytes(8, 4, 0)
    (24.0, 96.0)
    """
    return params * (param_bytes + optimizer) / (devices if stage else 1)


@dataclasses.dataclass(frozen=True)
class Wire:
    """The elements that each device sends per step and parameter, without the factor (N - 1) / N.

    Attributes:
      gathered: those in the compute dtype.
      reduced: those in the reduce dtype; an all-reduce counts twice, as a reduction and a gather.
    """

    gathered: int
    reduced: int

    @property
    def elements(self) -> int:
        return self.gathered + self.reduced

    def bytes(self, params: float, devices: int, *, compute: int = 2, reduce: int = 2) -> float:
        """Returns the bytes that each device sends per step, for these itemsizes."""
        return params * (self.gathered * compute + self.reduced * reduce) * (devices - 1) / devices


def wire(stage: int, accumulate: int = 1, *, per_device: bool = True,
         regathered: bool = True) -> Wire:
    """Returns the cost of a parameter on the wire per step.

    Args:
      stage: the ZeRO stage, 0 to 3.
      accumulate: the number of microbatches, A.
      per_device: whether each device differentiates its own part; with one loss, stage 1 reduces
        where stage 2 does.
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


def figures(params: float, devices: int, accumulate: int = 1) -> dict[int, dict[str, float]]:
    """Returns the figures of each stage by name: bytes per device at rest and sent per step, and
    elements sent per parameter."""
    wires = {stage: wire(stage, accumulate) for stage in range(4)}
    return {stage: {"paper_bytes": paper_bytes(params, devices, stage),
                    "rest_bytes": rest_bytes(params, devices, stage),
                    "elements_per_param": moved.elements,
                    "sent_bytes": moved.bytes(params, devices)}
            for stage, moved in wires.items()}


def sheet(params: float, devices: int, accumulate: int = 1) -> Sheet:
    """Returns the paper's table."""
    title = (f"{params:,.0f} parameters, {quantity(devices, 'device')}, "
             f"{quantity(accumulate, 'microbatch')}: per device")
    rows = (_row(stage, x) for stage, x in figures(params, devices, accumulate).items())
    return Sheet(title, _COLUMNS, tuple(rows))


def _row(stage: int, x: dict[str, float]) -> tuple[str, ...]:
    paper, rest, sent = (f"{x[name] / 1e9:,.2f} GB"
                         for name in ("paper_bytes", "rest_bytes", "sent_bytes"))
    return str(stage), paper, rest, str(x["elements_per_param"]), sent
