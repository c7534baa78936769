"""Draws docs/memory_by_stage.svg, the picture of the README: the model and GPUs of its table.

    python benchmarks/picture.py    # half a minute on two cores
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import matplotlib
import programs

import zerojax as zj

FILE = pathlib.Path(__file__).parent.parent / "docs" / "memory_by_stage.svg"
ACCUMULATE = 4


def plan(stage):
    """Returns the plan of a stage for 8 H200s, with 4 microbatches of one sequence per GPU."""
    method = programs.Method("", stage, "per_device", None, ACCUMULATE)
    zero, state, batch = programs.setting(8, method)
    step = zero.train_step(programs.CASE.loss, programs.TX, accumulate=ACCUMULATE)
    return step.plan(state, batch, cache=False).check()


def main():
    matplotlib.rcParams |= {"svg.hashsalt": "zerojax", "svg.fonttype": "none"}  # the same each time
    ax = zj.viz.memory({f"stage {stage}": plan(stage) for stage in range(4)})
    ax.set_title("534 M parameters, bfloat16 and Adam, 8 H200s", fontsize=10)
    ax.figure.savefig(FILE, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
