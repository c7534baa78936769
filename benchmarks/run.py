"""Prints every table as Markdown; `make bench` writes them to benchmarks/results.md.

    python benchmarks/run.py             # about forty minutes on two cores
    python benchmarks/run.py overhead    # one table: a name from TABLES
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import checkpoints
import estimates
import hosts
import lora
import machine
import matrices
import overhead
import plans
import programs
import restart
import tuning
import wire

TABLES = {
    "overhead": ("The cost of `train_step` relative to a hand-written step", overhead.markdown),
    "stages": ("The stages: 534 M parameters, 8 H200s, 4 microbatches of one sequence of 2048 per "
               "GPU", programs.stage_table),
    "compile": ("Compile time for 8 H200s with the GPU compiler", programs.compile_table),
    "plans": ("The cost of a plan: 7 B parameters in 24 scanned layers, stage 3, without a GPU",
              plans.plans_table),
    "tuning": ("Compiler options that hide the network: 64 H100s in 8 hosts, stage 3, 2 sequences "
               "of 2048 per GPU", tuning.tuning_table),
    "estimates": ("Estimates beside measurements: published training runs on H100s",
                  estimates.markdown),
    "checkpoints": ("Checkpoints compared with Orbax alone", checkpoints.markdown),
    "restart": ("Restarting from disk and from shared memory", restart.markdown),
    "lora": ("Fine-tuning 1 B parameters with LoRA: 8 H200s, one sequence of 1024 per GPU",
             lora.markdown),
    "matrices": ("Muon on whole matrices: 24 scanned layers, one sequence of 2048 per H200",
                 matrices.matrices_table),
    "hosts": ("Several processes", hosts.markdown),
    "collectives": ("MiB sent per step and stored by each GPU: simulated H200s",
                    programs.collectives_table),
    "wire": ("Fewer bytes between hosts", wire.wire_table),
    "converge": ("Training with fewer digits on the wire: `examples/train_gpt.py`",
                 wire.converge_table),
}

if __name__ == "__main__":
    print(f"# Results\n\nMeasured by `make bench`. {machine.header()}.\n")
    for name in sys.argv[1:] or TABLES:
        title, make = TABLES[name]
        print(f"## {title}\n\n{make()}", flush=True)
