"""A plan's times as a profile, which XLA's scheduler reads in place of its own assumptions.

By default the scheduler knows no times: each collective counts as much as five calls of a library
for products (`GpuLatencyEstimator` in XLA's gpu_latency_hiding_scheduler.cc). A profile gives the
time of each instruction by name. jax can record one on GPUs (`jax_enable_pgle`); this one has the
times that a plan assumes, so that it needs no GPU.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from zerojax.errors import PolicyError
from zerojax.hlo.schedule import Run
from zerojax.plan import cache

OPTION = "xla_gpu_pgle_profile_file_or_directory_path"
SUFFIX = ".pbtxt"  # by which XLA recognizes a profile that is text


def text(runs: Mapping[str, Run]) -> str:
    """Returns XLA's `ProfiledInstructionsProto` as text, from the runs of a plan.

    A collective has the time of its transfer, also where other instructions hide it.
    """
    times = {span.name: span.stop - span.start for run in runs.values() for span in run.spans}
    return "".join(f'costs {{ name: "{name}" cost_us: {1e6 * times[name]:.3f} }}\n'
                   for name in sorted(times))


def write(runs: Mapping[str, Run]) -> pathlib.Path:
    """Writes a profile to a file in the cache, which is named by its content, and returns the path.
    """
    profile = text(runs).encode()
    path = cache.folder() / "profiles" / f"{hashlib.sha256(profile).hexdigest()[:16]}{SUFFIX}"
    cache.keep(path, profile)
    return path


def check_there(options: Mapping[str, Any]) -> None:
    """Raises `PolicyError` if options name a profile that is not there: XLA would ignore that."""
    path = options.get(OPTION)
    if path and not pathlib.Path(path).exists():
        raise PolicyError(f"compiler_options: there is no profile {path!r}. Copy the file that "
                          "`zerojax tune` wrote to this path on every host, or leave the option "
                          f"{OPTION} out.")
