"""Plots with matplotlib: memory by kind, a timeline of kernels, and the placement of one leaf.

Each function draws on `ax` and returns it. If `ax` is None, it draws on a new pyplot figure, which
notebooks show. Requires the extra `viz`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zerojax.errors import MissingExtraError, PolicyError
from zerojax.hlo import collectives as moves
from zerojax.plan.plan import Plan

COLORS = {"parameters": "#3b6fb6", "optimizer state": "#7fa8d9", "model state": "#b5cbe6",
          "batch": "#c9c9c9", "other arguments and results": "#8f8f8f",
          "gathered parameters": "#e07b39", "gradients": "#d9b23d",
          "activations, other temporaries": "#7ab37a", "constants": "#5a4a42",
          "compute": "#7ab37a", "memory": "#b8d8b8", "network": "#e07b39"}
_LABELS = {"compute": "compute-bound", "memory": "memory-bound", "network": "collectives"}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_NARROW = 0.06  # a collective that takes less of the computation's time has no label
_MANY = 64  # parts; with more, their devices are not written in


def memory(plans: Mapping[str, Plan] | Plan, ax: Any = None):
    """Plots bytes per device by kind: a bar for each plan, and beside it a bar for ZeRO's formula.

    The second bar has only the kinds for which ZeRO has a formula.

    Args:
      plans: a plan, or several by name.
    """
    plans = {"": plans} if isinstance(plans, Plan) else plans
    ax = _axes(ax, (1.5 + 1.6 * len(plans), 4.2))
    peak = max(plan.memory.peak for plan in plans.values())
    scale, unit = next((known for known in _UNITS if peak >= known[0]), (1, "bytes"))
    compiled = [plan.memory.kinds for plan in plans.values()]
    formula = [plan.memory.zero for plan in plans.values()]
    _stack(ax, compiled, compiled[0], scale, shift=-0.2, width=0.36, labels_above=1e-3 * peak)
    _stack(ax, formula, compiled[0], scale, shift=0.2, width=0.28, alpha=0.55)
    ax.set_xticks(np.arange(len(plans)), list(plans))
    ax.set_ylabel(f"{unit} on each device\nleft: compiled, right: ZeRO's formula")
    ax.set_ylim(0, 1.05 * peak / scale)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _stack(ax, plans: Sequence[Mapping[str, float | None]], kinds: Iterable[str], scale: float,
           *, shift: float, labels_above: float = np.inf, **style) -> None:
    """Draws a bar per plan, stacked by kind, with labels for kinds above a number of bytes."""
    tops = np.zeros(len(plans))
    for kind in kinds:
        sizes = np.array([sizes.get(kind) or 0 for sizes in plans])
        label = kind if sizes.max() > labels_above else None
        ax.bar(np.arange(len(plans)) + shift, sizes / scale, bottom=tops / scale, label=label,
               color=COLORS[kind], edgecolor="white", linewidth=0.5, **style)
        tops += sizes


def _axes(ax, size: tuple[float, float]):
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'zerojax[viz]'.") from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def timeline(plan: Plan, computation: str | None = None, ax: Any = None):
    """Plots the estimated timeline: kernels in one lane, collectives in the other.

    Args:
      computation: a computation of the program: the entry or the body of a loop (the keys of
        `plan.runs`). None means the one whose collectives send the most.

    Raises:
      PolicyError: the program has no such computation, or the plan's devices have no known speed.
    """
    runs = plan.runs
    if not runs:
        raise PolicyError(f"viz.timeline(computation={computation!r}): the plan has no simulation, "
                          "because the speed of its devices is unknown; plan for GPUs, such as "
                          'zj.make_mesh(topology="h200:8x8").')
    if (computation or plan.program.entry) not in runs:
        raise PolicyError(f"viz.timeline(computation={computation!r}): "
                          f"the simulated computations are {', '.join(runs)}.")
    found = moves.of(plan.program)
    computation = computation or max(runs, key=lambda name: _sent(found, name))
    duration = runs[computation].seconds
    ax = _axes(ax, (9, 2.4))
    _lanes(ax, runs[computation].spans, {c.name: c.kind for c in found}, _NARROW * duration)
    times = plan.program.times[computation]
    whole = computation == plan.program.entry
    where = "the whole step" if whole else f"one of {times} loop iterations"
    ax.set_yticks([0.5, 1.5], ["network", "compute"])
    ax.set_xlabel(f"estimated ms within {where}")
    ax.set_xlim(0, duration * 1e3)
    for cause, label in _LABELS.items():
        ax.bar(0, 0, color=COLORS[cause], label=label)
    ax.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _sent(found: Iterable[moves.Collective], computation: str) -> float:
    return sum(c.wire_bytes for c in found if c.computation == computation)


def _lanes(ax, spans: Iterable[Any], kinds: Mapping[str, str], labels_above: float) -> None:
    """Draws the spans, with labels for the collectives above a number of seconds."""
    for span in spans:
        on_network = span.of == "network"
        start, length = span.start * 1e3, (span.stop - span.start) * 1e3
        ax.broken_barh([(start, length)], (0.1 if on_network else 1.1, 0.8),
                       facecolor=COLORS[span.of], edgecolor="white", linewidth=0.3)
        if on_network and span.stop - span.start > labels_above:
            ax.text(start + length / 2, 0.5, kinds[span.name].replace("-", "-\n"),
                    ha="center", va="center", fontsize=7)


def leaf(shape: Sequence[int], spec: Any, mesh: Any, ax: Any = None):
    """Plots which devices hold which part of one leaf.

    The plot is a grid over the sharded dimensions, at most two, and names the devices in each part.

    Args:
      shape: the whole shape.
      spec: a `PartitionSpec`.
      mesh: the mesh of the spec, or a mapping of its axis names to sizes.
    """
    shape = tuple(shape) or (1,)  # a scalar is one part
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    axes += [()] * (len(shape) - len(axes))
    dims = _dimensions(axes)
    held = _holders(dict(getattr(mesh, "shape", mesh)), [axes[i] for i in dims])
    rows, columns, _ = held.shape
    ax = _axes(ax, (5, 2.6))
    ax.imshow(held[..., 0] % 20, cmap="tab20", aspect="auto", alpha=0.55,
              extent=(0, columns, rows, 0))
    if rows * columns <= _MANY:
        for row, column in np.ndindex(rows, columns):
            ax.text(column + 0.5, row + 0.5, _devices(held[row, column]),
                    ha="center", va="center", fontsize=7)
    ax.set_yticks([0, rows], [0, shape[dims[0]]])
    ax.set_xticks([0, columns], [0, shape[dims[1]]] if len(dims) > 1 else [])
    ax.set_ylabel(f"dimension {dims[0]}")
    ax.set_xlabel(f"dimension {dims[1]}" if len(dims) > 1 else "")
    ax.set_title(f"{tuple(shape)} by {spec}: devices that hold each part", fontsize=9, loc="left")
    return ax


def _dimensions(axes: Sequence[tuple[str, ...]]) -> list[int]:
    """Returns the dimensions to draw, in order: at most two, preferably sharded ones."""
    sharded = [i for i, names in enumerate(axes) if names] or [0]
    whole = [i for i in range(len(axes)) if i not in sharded]
    return sorted((sharded + whole)[:2])


def _holders(sizes: Mapping[str, int], drawn: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Returns the devices that hold each part, int[rows, columns, devices]."""
    used = [name for names in drawn for name in names]
    order = [list(sizes).index(name) for name in used]
    order += [i for i, name in enumerate(sizes) if name not in used]
    parts = [math.prod(sizes[name] for name in names) for names in drawn]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return ids.transpose(order).reshape(*[*parts, 1][:2], -1)


def _devices(ids: np.ndarray) -> str:
    if len(ids) <= 4:
        return ", ".join(map(str, ids))
    consecutive = ids.max() - ids.min() == len(ids) - 1
    return f"all of {ids.min()} to {ids.max()}" if consecutive else f"{len(ids)} devices"
