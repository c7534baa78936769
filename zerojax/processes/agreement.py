"""Agreement between processes, before they compile, on everything that they must have in common.

Processes with different programs hang or compute wrong numbers; jax notices at the end, if at all.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from zerojax.errors import ClusterError
from zerojax.policy import Policy
from zerojax.processes import exchange, fingerprint, naming
from zerojax.processes.exchange import Group
from zerojax.processes.programs import Program, first_difference

T = TypeVar("T")
_MOST = 10  # fields in an error
_DIFFER = "the processes differ, and would not run the same program:"


def check(group: Group, where: str, fields: Mapping[str, Any]) -> str:
    """Compares fields between the processes of a group; returns their digest.

    Args:
      where: the call that compares. Processes that are at different calls differ in it.
      fields: programs, and JSON values, nested to any depth; other values are compared by their
        repr.

    Raises:
      ClusterError: on every process, with the fields that differ, and their values by process:
        those of a program are its first line that differs.
    """
    text = json.dumps({"call": where, **fields}, sort_keys=True, default=repr)
    digest = hashlib.sha256(text.encode())
    mark = np.frombuffer(digest.digest(), np.uint32)
    if len({other.tobytes() for other in group.words(mark).values()}) > 1:
        all_fields = {process: json.loads(other) for process, other in group.texts(text).items()}
        _show_lines(group, fields, all_fields)
        raise ClusterError(f"{where}: {difference(all_fields)}")
    return digest.hexdigest()


def _show_lines(group: Group, fields: Mapping[str, Any], all_fields: dict[int, dict]) -> None:
    """Puts the first line that differs in the place of each program that every process has."""
    programs = {name: field for name, field in fields.items() if isinstance(field, Program)}
    common = set.intersection(*map(set, group.shared(sorted(programs)).values()))
    for name in sorted(common):
        if len({of[name] for of in all_fields.values()}) > 1:
            line, texts = first_difference(group, programs[name])
            for process, of in all_fields.items():
                del of[name]
                of[f"{name}, line {line + 1}"] = texts[process]


def before(policy: Policy, where: str, make: Callable[[], T],
           fields: Callable[[T], Mapping[str, Any]]) -> tuple[T, str]:
    """Returns what `make` returns, after a `check` of versions, mesh, policy and its `fields`.

    Also returns their digest. To be called before the program is compiled. An error that `make` or
    `fields` raises on one process is an error on all.
    """
    group = exchange.of_mesh(policy.mesh)
    if group.size == 1:  # making the fields traces the program
        return make(), ""

    def act() -> tuple[T, Mapping[str, Any]]:
        made = make()
        return made, {**fingerprint.of_policy(policy), **fields(made)}

    made, all_fields = group.everywhere(act)
    return made, check(group, where, all_fields)


class Once:
    """An agreement before the first call of a function, which compiles it.

    Later calls are only reported, to notice processes that do not make them: see `calling`.
    """

    def __init__(self):
        self._group: Group | None = None
        self._digest = ""  # of what the processes agreed on
        self._is_later = False  # the call is a later one, which is only reported

    def __call__(self, policy: Policy, where: str, fields: Callable[[], Mapping[str, Any]],
                 *arguments: Any) -> None:
        """Agrees, unless an earlier call did.

        Args:
          arguments: those of the call. If one of them is traced, the function is not called yet.
        """
        self._is_later = False
        if self._group is not None and self._group.size == 1:
            return
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
            return
        if self._group is None:
            _, self._digest = before(policy, where, lambda: None, lambda _: fields())
            self._group = exchange.of_mesh(policy.mesh)
        else:
            self._is_later = True

    def calling(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context of the call itself, which reports it."""
        if self._group is None or not self._is_later:
            return contextlib.nullcontext()
        return self._group.calling(self._digest)


def difference(values: Mapping[int, Any]) -> str:
    """Returns the fields that differ between processes, or "" if none does.

    >>> print(difference({0: {"model": {"lr": 0.1}}, 1: {"model": {"lr": 0.2}}}))
    the processes differ, and would not run the same program:
      model.lr: 0.1 on process 0; 0.2 on process 1
    >>> difference({0: {"lr": 0.1}, 1: {"lr": 0.1}})
    ''
    """
    flat = {process: dict(_flat(fields)) for process, fields in values.items()}
    names = dict.fromkeys(name for fields in flat.values() for name in fields)
    by_name = {name: {p: str(fields.get(name, "nothing")) for p, fields in flat.items()}
               for name in names}
    lines = [f"\n  {name}: {naming.by_value(texts)}" for name, texts in by_name.items()
             if len(set(texts.values())) > 1]
    if not lines:
        return ""
    more = f"\n  and {len(lines) - _MOST} more fields" if len(lines) > _MOST else ""
    return _DIFFER + "".join(lines[:_MOST]) + more


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not name):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
