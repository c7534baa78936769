"""Texts that name processes. Needs no jax."""

from collections.abc import Hashable, Iterable, Mapping

_LONG = 200  # characters of a value in a text


def named(processes: Iterable[int]) -> str:
    """Returns a text that names processes.

    >>> named([3]), named([0, 2, 3, 4, 9])
    ('process 3', 'processes 0, 2-4, 9')
    """
    runs: list[list[int]] = []
    for process in sorted(processes):
        if runs and process == runs[-1][1] + 1:
            runs[-1][1] = process
        else:
            runs.append([process, process])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"process{'' if one else 'es'} {', '.join(texts)}"


def by_value(texts: Mapping[int, Hashable]) -> str:
    """Returns each text once, with the processes that have it.

    >>> by_value({0: "save", 1: "step", 2: "step"})
    'save on process 0; step on processes 1-2'
    """
    processes: dict[Hashable, list[int]] = {}
    for process, text in texts.items():
        processes.setdefault(text, []).append(process)
    return "; ".join(f"{_brief(str(text))} on {named(where)}" for text, where in processes.items())


def _brief(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
