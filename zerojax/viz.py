"""Pictures, with matplotlib: bytes per device by kind, collectives on a time line, one leaf over the mesh.

Each function draws on `ax` (if there is none, on a new pyplot figure's, which notebooks show) and returns it. Needs the extra
`viz`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zerojax.errors import MissingExtraError, PolicyError
from zerojax.hlo import collectives as moves
from zerojax.plan.plan import Plan

COLORS = {"parameters": "#3b6fb6", "optimizer state": "#7fa8d9", "model state": "#b5cbe6", "batch": "#c9c9c9",
          "other arguments and results": "#8f8f8f", "gathered parameters": "#e07b39", "gradients": "#d9b23d",
          "activations, other temporaries": "#7ab37a", "constants": "#5a4a42", "compute": "#7ab37a",
          "memory": "#b8d8b8", "network": "#e07b39"}


def _axes(ax, size: tuple[float, float]):
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("pictures need matplotlib: pip install 'zerojax[viz]'.") from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def memory(plans: Mapping[str, Plan] | Plan, ax: Any = None):
    """Bytes per device by kind: a bar for each plan, and beside it ZeRO's formula for what it says something of.

    Args:
      plans: one, or several by name.
    """
    plans = {"": plans} if isinstance(plans, Plan) else plans
    ax = _axes(ax, (1.5 + 1.6 * len(plans), 4.2))
    scale, unit = _unit(max(p.memory.peak for p in plans.values()))
    highest = max(p.memory.peak for p in plans.values()) / scale
    for kind in next(iter(plans.values())).memory.kinds:
        for shift, width, of in ((-0.2, 0.36, lambda m: m.kinds), (0.2, 0.28, lambda m: m.zero)):
            sizes = [(of(p.memory).get(kind) or 0) / scale for p in plans.values()]
            below = [sum((of(p.memory).get(k) or 0) / scale for k in _before(p, kind)) for p in plans.values()]
            ax.bar(np.arange(len(plans)) + shift, sizes, width, bottom=below, color=COLORS[kind], alpha=1 if shift < 0 else 0.55,
                   label=kind if shift < 0 and max(sizes) > 1e-3 * highest else None, edgecolor="white", linewidth=0.5)
    ax.set_xticks(np.arange(len(plans)), list(plans))
    ax.set_ylabel(f"{unit} on each device\nleft: compiled, right: ZeRO's formula")
    ax.set_ylim(0, 1.05 * highest)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _before(plan: Plan, kind: str) -> list[str]:
    kinds = list(plan.memory.kinds)
    return kinds[:kinds.index(kind)]


def _unit(most: float) -> tuple[float, str]:
    return next(((2**p, name) for p, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if most >= 2**p), (1, "bytes"))


def timeline(plan: Plan, computation: str | None = None, ax: Any = None):
    """What runs when, by the plan's estimate: products and memory-bound work in one lane, collectives in the other.

    Args:
      computation: of the program: the entry, or a loop's body (`plan.runs` has them); None is the one whose collectives send
        the most.

    Raises:
      PolicyError: the program has no such computation, or the plan is for devices whose speed is not known.
    """
    found, runs = moves.of(plan.program), plan.runs
    if not runs or (computation or plan.program.entry) not in runs:
        raise PolicyError(f"viz.timeline(computation={computation!r}): what was simulated is {', '.join(runs) or 'nothing'}.")
    sent = lambda name: sum(c.wire_bytes for c in found if c.computation == name)
    computation = computation or max(runs, key=sent)
    ax = _axes(ax, (9, 2.4))
    kinds = {c.name: c.kind for c in found}
    for span in runs[computation].spans:
        lane = 0 if span.of == "network" else 1
        ax.broken_barh([(span.start * 1e3, (span.stop - span.start) * 1e3)], (lane + 0.1, 0.8), facecolor=COLORS[span.of],
                       edgecolor="white", linewidth=0.3)
        if lane == 0 and span.stop - span.start > 0.06 * runs[computation].seconds:
            middle = (span.start + span.stop) / 2 * 1e3
            ax.text(middle, 0.5, kinds[span.name].replace("-", "-\n"), ha="center", va="center", fontsize=7)
    times = plan.program.times[computation]
    where = "the whole step" if computation == plan.program.entry else f"one of {times} turns of a loop"
    ax.set_yticks([0.5, 1.5], ["network", "compute"])
    ax.set_xlabel(f"ms, estimated, of {where}")
    ax.set_xlim(0, runs[computation].seconds * 1e3)
    for of, what in (("compute", "bound by products"), ("memory", "bound by memory"), ("network", "collectives")):
        ax.bar(0, 0, color=COLORS[of], label=what)
    ax.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def leaf(shape: Sequence[int], spec: Any, mesh: Any, ax: Any = None):
    """Who holds which part of one leaf: a field of its dimensions that are sharded (at most two), with devices written in.

    Args:
      shape: whole.
      spec: a `PartitionSpec`; mesh: the mesh (or mapping of axis names to sizes) it is over.
    """
    sizes = dict(getattr(mesh, "shape", mesh))
    ids = np.arange(int(np.prod(list(sizes.values())))).reshape(list(sizes.values()))
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in [*spec, *[None] * (len(shape) - len(spec))]]
    split = [i for i, e in enumerate(entries) if e] or [0]
    dims = sorted((split + [i for i in range(len(shape)) if i not in split])[:2])
    ax = _axes(ax, (5, 2.6))
    rows, columns = (int(np.prod([sizes[a] for a in entries[i]])) if i < len(shape) else 1 for i in [*dims, len(shape)][:2])
    used = [a for i in dims for a in entries[i]]
    order = [list(sizes).index(a) for a in used] + [i for i, a in enumerate(sizes) if a not in used]
    held = ids.transpose(order).reshape(rows, columns, -1)
    ax.imshow(held[..., 0] % 20, cmap="tab20", aspect="auto", alpha=0.55, extent=(0, columns, rows, 0))
    for r in range(rows):
        for c in range(columns):
            if rows * columns <= 64:
                ax.text(c + 0.5, r + 0.5, _devices(held[r, c]), ha="center", va="center", fontsize=7)
    ax.set_yticks([0, rows], [0, shape[dims[0]]])
    ax.set_xticks([0, columns], [0, shape[dims[1]]] if len(dims) > 1 else [])
    ax.set_ylabel(f"dimension {dims[0]}")
    ax.set_xlabel(f"dimension {dims[1]}" if len(dims) > 1 else "")
    ax.set_title(f"{tuple(shape)} by {spec}: the devices that hold each part", fontsize=9, loc="left")
    return ax


def _devices(ids: np.ndarray) -> str:
    if len(ids) <= 4:
        return ", ".join(map(str, ids))
    return f"all of {ids.min()} to {ids.max()}" if ids.max() - ids.min() == len(ids) - 1 else f"{len(ids)} devices"
