"""The calls that processes must make together, compared in the order in which each makes them.

The n-th call of each group of processes is a round: it is complete when every member has made its
own, which must have the same name. Needs no jax.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zerojax.processes import naming

Members = tuple[int, ...]


class Call(NamedTuple):
    """A call that several processes must make.

    Attributes:
      members: the processes.
      name: the function of zerojax, such as "Checkpointer.save".
      place: the line of the user's program, such as "train.py:40".
    """

    members: Members
    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name} at {self.place}"


class Made(NamedTuple):
    """A call that a process has made.

    Attributes:
      call: the call.
      number: its number among the calls of this process.
      waits: whether the process waits until all members have made theirs.
      at: when it was made, in seconds of `time.monotonic`.
    """

    call: Call
    number: int
    waits: bool
    at: float


@dataclasses.dataclass
class _Group:
    """The calls of some members that others have not made yet.

    Attributes:
      open: the calls by process, oldest first.
      behind: the processes that have none.
      reported: whether `late` has reported the oldest round.
    """

    open: dict[int, collections.deque[Made]]
    behind: set[int]
    reported: bool = False

    def add(self, process: int, made: Made) -> dict[int, Made] | None:
        """Returns the round that a call completes, if it completes one."""
        self.open[process].append(made)
        self.behind.discard(process)
        if self.behind:
            return None
        self.reported = False
        complete = {p: calls.popleft() for p, calls in self.open.items()}
        self.behind = {p for p, calls in self.open.items() if not calls}
        return complete

    def oldest(self) -> dict[int, Made]:
        """Returns the calls of the oldest round that is not complete, by process."""
        return {p: calls[0] for p, calls in self.open.items() if calls}


class RollCall:
    """The calls of all processes of a job.

    Attributes:
      last: the last call of each process that has made one.
      left: the processes that have ended, and make no more calls.
    """

    def __init__(self):
        self.last: dict[int, Made] = {}
        self.left: set[int] = set()
        self._groups: dict[Members, _Group] = {}

    def add(self, process: int, made: Made) -> dict[int, Made] | None:
        """Notes a call; returns the calls of all members, by process, if it is the last of them."""
        self.last[process] = made
        members = made.call.members
        if members not in self._groups:
            empty = {p: collections.deque() for p in members}
            self._groups[members] = _Group(empty, set(members))
        return self._groups[members].add(process, made)

    def never(self) -> str:
        """Returns why a call can never be complete, or ""."""
        for group in self._groups.values():
            gone = group.behind & self.left
            if gone and (made := group.oldest()):
                return (f"{naming.named(gone)} ended, but {_calls(made)}, a call that "
                        f"{naming.named(group.open)} must make together. {self._last(gone)}")
        return ""

    def late(self, now: float, seconds: float) -> dict[Members, str]:
        """Returns a text for each round that began more than `seconds` ago, once, by members."""
        texts = {}
        for members, group in self._groups.items():
            made = group.oldest()
            if made and not group.reported and now - min(m.at for m in made.values()) > seconds:
                group.reported = True
                texts[members] = (f"{_calls(made)}, more than {seconds:g} s ago, and "
                                  f"{naming.named(group.behind)} did not, although all must. "
                                  f"{self._last(group.behind)}")
        return texts

    def silent(self, now: float, seconds: float) -> str:
        """Returns a text if a process has made no call for some seconds, or ""."""
        quiet = [p for p, made in self.last.items()
                 if p not in self.left and now - made.at > seconds]
        if not quiet:
            return ""
        return (f"{naming.named(quiet)} made no call of zerojax for more than {seconds:g} s. "
                f"{self._last(self.last)}")

    def _last(self, processes: Iterable[int]) -> str:
        texts = {p: str(self.last[p].call) if p in self.last else "none" for p in processes}
        return f"Last calls: {naming.by_value(texts)}."


def difference(complete: Mapping[int, Made]) -> str:
    """Returns a text if the calls of a round have different names, or ""."""
    if len({made.call.name for made in complete.values()}) == 1:
        return ""
    texts = {p: str(made.call) for p, made in complete.items()}
    return (f"the processes are at different calls: {naming.by_value(texts)}. All of them must "
            "make the same calls in the same order; move calls out of branches that depend on "
            "jax.process_index().")


def _calls(made: Mapping[int, Made]) -> str:
    """Returns the calls as the beginning of a sentence."""
    by_call: dict[Call, list[int]] = {}
    for process, m in made.items():
        by_call.setdefault(m.call, []).append(process)
    return "; ".join(f"{naming.named(where)} called {call}" for call, where in by_call.items())
