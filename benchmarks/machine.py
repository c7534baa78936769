"""The header of every table, and how times are measured."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import jax


def header() -> str:
    """Returns versions and machine in one line."""
    names = ("jax", "flax", "optax", "zerojax")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {packages}; {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def steps(step: Callable, state, batch, n: int) -> Callable[[], None]:
    """Returns a function that runs `n` training steps and waits for the last; compiles the step."""
    held = [state]

    def run():
        for _ in range(n):
            held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    run()
    return run


def seconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Returns the median time of each run.

    The runs take turns, so that other load on the machine affects all of them alike.
    """
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
