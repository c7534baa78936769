"""What every table is headed with, and how every time is taken."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import jax


def header() -> str:
    """Versions and machine, one line."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "zerojax")]
    return f"Python {platform.python_version()}, {', '.join(packages)}; {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def steps(step: Callable, state, batch, n: int) -> Callable[[], None]:
    """A call that makes `n` training steps and waits for the last."""
    held = [state]

    def run():
        for _ in range(n):
            held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    run()  # compiles
    return run


def seconds(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """The median time of each of `runs`, taken in turn so that what the machine does meanwhile falls on all alike."""
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
