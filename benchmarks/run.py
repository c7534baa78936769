"""Every table, as Markdown on standard output: `make bench` writes it to benchmarks/results.md.

    python benchmarks/run.py             # some twenty-five minutes on two cores
    python benchmarks/run.py overhead    # one of them: see TABLES
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import checkpoints
import hosts
import lora
import machine
import overhead
import plans
import programs

TABLES = {
    "overhead": ("What `train_step` costs beside the same step by hand", overhead.markdown),
    "stages": ("The stages: 534 M parameters, 8 H200s, 4 microbatches of one sequence of 2048 a GPU", programs.stage_table),
    "compile": ("Compile time for 8 H200s, with the GPU compiler", programs.compile_table),
    "plans": ("What a plan costs: 7 B parameters in 24 scanned layers, stage 3, without a GPU", plans.plans_table),
    "checkpoints": ("Checkpoints beside Orbax alone", checkpoints.markdown),
    "lora": ("Fine-tuning 1 B parameters with LoRA: 8 H200s, one sequence of 1024 a GPU", lora.markdown),
    "hosts": ("Several processes", hosts.markdown),
    "collectives": ("MiB each GPU sends in a step, and keeps: H200s that are not there", programs.collectives_table),
}

if __name__ == "__main__":
    print(f"# Measured\n\nBy `make bench`. {machine.header()}.\n")
    for name in sys.argv[1:] or TABLES:
        title, make = TABLES[name]
        print(f"## {title}\n\n{make()}", flush=True)
