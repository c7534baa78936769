"""The calls that processes must make together, compared in the order in which each makes them.

The n-th call of each group of processes is a round: it is complete when every member has made its
own, and all must be the same. Needs no jax.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zerojax.processes import naming

Members = tuple[int, ...]
_SAME_ORDER = ("All of them must make the same calls in the same order; move calls out of branches "
               "that depend on jax.process_index().")


class Call(NamedTuple):
    """A call that several processes must make.

    Attributes:
      members: the processes; () for all.
      name: the function of zerojax that the user's program called, such as "Checkpointer.save".
      place: the line of the user's program, such as "train.py:40".
      key: what must be equal: where zerojax exchanges data, or the function that is called.
    """

    members: Members
    name: str
    place: str
    key: str

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


@dataclasses.dataclass(eq=False)
class Group:
    """The calls of some members that others have not made yet.

    Attributes:
      open: the calls by process, oldest first.
      behind: the processes that have none.
      is_reported: whether `RollCall.late` has reported the oldest round.
    """

    open: dict[int, collections.deque[Made]]
    behind: set[int]
    is_reported: bool = False

    def add(self, process: int, made: Made) -> dict[int, Made] | None:
        """Notes a call; returns the calls of all members, by process, if it is the last of them."""
        self.open[process].append(made)
        self.behind.discard(process)
        if self.behind:
            return None
        self.is_reported = False
        complete = {p: calls.popleft() for p, calls in self.open.items()}
        self.behind = {p for p, calls in self.open.items() if not calls}
        return complete

    def withdraw(self, process: int, number: int) -> bool:
        """Forgets a call; returns whether it was still open."""
        made = next((made for made in self.open[process] if made.number == number), None)
        if made is None:
            return False
        self.open[process].remove(made)
        if not self.open[process]:
            self.behind.add(process)
        self.is_reported &= bool(self.oldest())
        return True

    def oldest(self) -> dict[int, Made]:
        """Returns the calls of the oldest round that is not complete, by process."""
        return {p: calls[0] for p, calls in self.open.items() if calls}


class RollCall:
    """The calls of all processes of a job.

    Attributes:
      everyone: all processes.
      last: the last call of each process that has made one.
      waiting: the calls that processes wait for, by process and number.
      begun: the calls that processes have begun some time ago, by process. They may still fail, and
        so do not take part in a round.
      left: the processes that have reported their end, and when. They may call again, because a
        function of `atexit` may.
    """

    def __init__(self, everyone: Members):
        self.everyone = everyone
        self.last: dict[int, Made] = {}
        self.waiting: dict[tuple[int, int], Made] = {}
        self.begun: dict[int, Made] = {}
        self.left: dict[int, float] = {}
        self._began: float | None = None  # the time of the first call
        self._groups: dict[Members, Group] = {}

    def group(self, members: Members) -> Group:
        """Returns the group of some processes; () means all."""
        if members not in self._groups:
            all_of = members or self.everyone
            empty = {p: collections.deque() for p in all_of}
            self._groups[members] = Group(empty, set(all_of))
        return self._groups[members]

    def add(self, process: int, group: Group, made: Made) -> dict[int, Made] | None:
        """Notes a call; see `Group.add`. A process that has left is back."""
        self.left.pop(process, None)
        self.begun.pop(process, None)
        self.last[process] = made
        self._began = made.at if self._began is None else self._began
        if made.waits:
            self.waiting[process, made.number] = made
        return group.add(process, made)

    def never(self, gone: set[int]) -> str:
        """Returns why a call can never be complete without some processes, or ""."""
        for group in self._groups.values():
            missing = group.behind & gone
            made = self._begun_of(group) | group.oldest()
            if missing and (made := {p: m for p, m in made.items() if p not in missing}):
                return (f"{naming.named(missing)} ended, but {_calls(made)}, a call that "
                        f"{naming.named(group.open)} must make together. "
                        f"{self.last_calls(missing)}")
        return ""

    def _begun_of(self, group: Group) -> dict[int, Made]:
        """Returns the calls that processes without an open call have begun in a group."""
        return {p: made for p, made in self.begun.items()
                if p in group.behind and self.group(made.call.members) is group}

    def differ(self, now: float, seconds: float) -> str:
        """Returns a text if a call that began some seconds ago is not that of the others, or ""."""
        for group in self._groups.values():
            begun = {p: m for p, m in self._begun_of(group).items() if now - m.at > seconds}
            if begun and (trouble := difference(begun | group.oldest())):
                return trouble
        return ""

    def late(self, now: float, seconds: float) -> dict[Members, str]:
        """Returns a text for each round that began more than `seconds` ago, once, by members."""
        texts = {}
        for group in self._groups.values():
            begun = self._begun_of(group)
            made, missing = begun | group.oldest(), group.behind - begun.keys()
            if not made or not missing or group.is_reported:
                continue
            if now - min(m.at for m in made.values()) > seconds:
                group.is_reported = True
                texts[tuple(group.open)] = (
                    f"{_calls(made)}, more than {seconds:g} s ago, and {naming.named(missing)} did "
                    f"not, although all must. {self.last_calls(missing)}")
        return texts

    def stuck(self, gone: set[int], now: float, seconds: float) -> str:
        """Returns a text if all processes have waited for each other for some seconds, or ""."""
        waiting = {process: made for (process, _), made in self.waiting.items()}
        if not waiting or not gone.union(waiting).issuperset(self.everyone):
            return ""
        if now - max(made.at for made in waiting.values()) <= seconds:
            return ""
        return (f"the processes wait for each other: {_calls(waiting)}, more than {seconds:g} s "
                f"ago. {_SAME_ORDER}")

    def silent(self, at_barriers: set[int], now: float, seconds: float) -> str:
        """Returns a text if a process has made no call for some seconds, or "".

        Those that wait for others, or have left, are not to blame. The time begins with the first
        call of any process.
        """
        if self._began is None:
            return ""
        blameless = at_barriers.union(self.left, (process for process, _ in self.waiting))
        since = {p: self.last[p].at if p in self.last else self._began for p in self.everyone
                 if p not in blameless}
        quiet = [p for p, at in since.items() if now - at > seconds]
        if not quiet:
            return ""
        return (f"{naming.named(quiet)} made no call of zerojax for more than {seconds:g} s. "
                f"{self.last_calls(self.everyone)}")

    def last_calls(self, processes: Iterable[int]) -> str:
        """Returns a sentence with the last call of each process."""
        texts = {p: str(self.last[p].call) if p in self.last else "none" for p in processes}
        return f"Last calls: {naming.by_value(texts)}."


def difference(complete: Mapping[int, Made]) -> str:
    """Returns a text if the calls of a round differ, or "".

    A call that waits is one before the first compilation, and differs from a later one.
    """
    if len({(made.call.key, made.waits) for made in complete.values()}) == 1:
        return ""
    several = len({made.waits for made in complete.values()}) > 1
    texts = {p: f"{made.call}{' (the first)' * (several and made.waits)}"
             for p, made in sorted(complete.items())}
    return f"the processes are at different calls: {naming.by_value(texts)}. {_SAME_ORDER}"


def _calls(made: Mapping[int, Made]) -> str:
    """Returns the calls as the beginning of a sentence."""
    by_call: dict[str, list[int]] = {}
    for process, m in sorted(made.items()):
        by_call.setdefault(str(m.call), []).append(process)
    return "; ".join(f"{naming.named(where)} called {call}" for call, where in by_call.items())
