"""Barriers between all processes of a job, at which their background threads wait.

Needs no jax.
"""

import dataclasses

from zerojax.processes import naming
from zerojax.processes.roll_call import Members


@dataclasses.dataclass
class Barrier:
    """A barrier to which not all processes have come.

    Attributes:
      came: the values by process.
      began: when the first came, in seconds of `time.monotonic`.
      is_reported: whether `Barriers.late` has reported it.
    """

    began: float
    came: dict[int, str] = dataclasses.field(default_factory=dict)
    is_reported: bool = False


class Barriers:
    """The barriers to which not all processes have come."""

    def __init__(self, everyone: Members):
        self.everyone = everyone
        self._open: dict[str, Barrier] = {}

    def come(self, process: int, tag: str, value: str, now: float) -> dict[int, str] | None:
        """Notes a process; returns the values of all, by process, if it is the last to come."""
        barrier = self._open.setdefault(tag, Barrier(now))
        barrier.came[process] = value
        if len(barrier.came) < len(self.everyone):
            return None
        return dict(sorted(self._open.pop(tag).came.items()))

    @property
    def waiting(self) -> set[int]:
        """The processes that wait at one of them."""
        return set().union(*(barrier.came for barrier in self._open.values()))

    def never(self, gone: set[int]) -> str:
        """Returns why some barrier will never open, or ""."""
        for tag, barrier in self._open.items():
            if missing := gone - barrier.came.keys():
                return f"{naming.named(missing)} ended before {tag}, which all must make."
        return ""

    def late(self, now: float, seconds: float) -> list[str]:
        """Returns a text for each barrier that has waited for some seconds, once."""
        late = {tag: barrier for tag, barrier in self._open.items()
                if now - barrier.began > seconds and not barrier.is_reported}
        for barrier in late.values():
            barrier.is_reported = True
        return [f"{naming.named(barrier.came)} came to {tag} more than {seconds:g} s ago, and "
                f"{naming.named(set(self.everyone) - barrier.came.keys())} did not, although all "
                "must." for tag, barrier in late.items()]


def difference(tag: str, values: dict[int, str]) -> str:
    """Returns a text if processes came with different values, or ""."""
    if len(set(values.values())) == 1:
        return ""
    return f"the processes differ at {tag}: {naming.by_value(values)}."
