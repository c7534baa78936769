"""What processes have to have in common, compared before they compile: each would run its own program, and be wrong or hang.

jax notices different programs at the end, if at all (it computes wrong numbers first).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from zerojax.errors import ClusterError
from zerojax.policy import Policy
from zerojax.processes import exchange, fingerprint

T = TypeVar("T")
_MOST, _LONG = 10, 100  # fields in an error, characters of a value


def check(devices: exchange.Devices, where: str, fields: Mapping[str, Any]) -> None:
    """Compares `fields` between the processes of these devices: the same error on each if one differs.

    Args:
      where: the call that compares; processes that are at another one differ in that.
      fields: to JSON values, nested as they like; what JSON does not have counts by its repr.

    Raises:
      ClusterError: naming field, processes and values.
    """
    if not devices:
        return
    text = json.dumps({"call": where, **fields}, sort_keys=True, default=repr)
    marks = exchange.words(devices, np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))
    if len({mark.tobytes() for mark in marks.values()}) > 1:
        said = {process: json.loads(other) for process, other in exchange.texts(devices, text).items()}
        raise ClusterError(f"{where}: {difference(said)}")


def before(policy: Policy, where: str, make: Callable[[], T], fields: Callable[[T], Mapping[str, Any]]) -> T:
    """What `make` returns, after a `check` of versions, mesh, policy and its `fields`; to be called before it is compiled.

    An error of one process within either is one on all.
    """
    if not (devices := exchange.devices_of(policy.mesh)):
        return make()

    def act():
        made = make()
        return made, {**fingerprint.of_policy(policy), **fields(made)}

    made, said = everywhere(devices, act)
    check(devices, where, said)
    return made


class Once:
    """`before`, at the first call of something that is compiled then."""

    def __init__(self):
        self._done = False

    def __call__(self, policy: Policy, where: str, fields: Callable[[], Mapping[str, Any]], *arguments: Any) -> None:
        """`arguments` are those of the call: while another program is traced, this one is not compiled."""
        if not self._done and not any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
            before(policy, where, lambda: None, lambda _: fields())
            self._done = True


def difference(said: Mapping[int, Any]) -> str:
    """What differs between processes, by field; "" if nothing does.

    >>> difference({0: {"config": {"lr": 0.1}}, 1: {"config": {"lr": 0.2}}, 2: {"config": {"lr": 0.1}}})
    'the processes differ, and would not run the same program:\\n  config.lr: 0.1 on process 0, 2; 0.2 on process 1'
    """
    flat = {process: dict(_flat(fields)) for process, fields in said.items()}
    names = dict.fromkeys(name for fields in flat.values() for name in fields)
    odd = [name for name in names if len({str(fields.get(name, "nothing")) for fields in flat.values()}) > 1]
    at = lambda name: {process: str(fields.get(name, "nothing")) for process, fields in flat.items()}
    lines = [f"\n  {name}: {_values(at(name))}" for name in odd]
    more = [f"\n  and {len(odd) - _MOST} fields more"] * (len(odd) > _MOST)
    return "the processes differ, and would not run the same program:" + "".join(lines[:_MOST] + more) if odd else ""


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _values(of: Mapping[int, str]) -> str:
    texts = dict.fromkeys(of.values())
    return "; ".join(f"{_brief(text)} on process {ranges([p for p in of if of[p] == text])}" for text in texts)


def _brief(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def ranges(processes: Iterable[int]) -> str:
    """
    >>> ranges([0, 2, 3, 4, 9])
    '0, 2-4, 9'
    """
    runs: list[list[int]] = []
    for p in sorted(processes):
        if runs and p == runs[-1][1] + 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def everywhere(devices: exchange.Devices, act: Callable[[], T], kinds: Sequence[type[Exception]] = ()) -> T:
    """What `act` returns, on processes each of which does it alone; if it fails on one, it is an error on all, of one kind.

    Raises:
      of `kinds`, the first that any process met (its own error, where it is that), else ClusterError.
    """
    if not devices:
        return act()
    result, own = None, None
    try:
        result = act()
    except Exception as error:
        own = error
    kind = next((i for i, kind in enumerate(kinds) if isinstance(own, kind)), len(kinds))
    said = exchange.shared(devices, None if own is None else [kind, f"{type(own).__name__}: {own}"])
    failed = {process: words for process, words in said.items() if words}
    if not failed:
        return result  # pyright: ignore[reportReturnType]
    worst = min(kind for kind, _ in failed.values())
    if own is not None and kind == worst:
        raise own
    first, text = next((process, text) for process, (kind, text) in failed.items() if kind == worst)
    raise (*kinds, ClusterError)[worst](f"process {ranges(failed)} of {len(said)} failed; process {first} says: {text}") from own
