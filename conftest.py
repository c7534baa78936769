"""Settings of every test: ten CPU devices, strict rank promotion, and compilation caches.

Most tests use eight of the devices; ten are for dimensions that are not divisible. Most of the time
goes into compiling programs that then run for milliseconds. LLVM's optimizations are therefore off,
and all processes share one compilation cache. XLA's cache of GPU kernels has no lock, so each
worker has its own.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ.update({  # child processes inherit them
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # a GPU compiler without GPU
    "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"zerojax-{os.getuid()}",
                                              importlib.metadata.version("jax")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # the GPU compiler's cache of kernels
    "XLA_FLAGS": "--xla_gpu_kernel_cache_file=TEST_UNDECLARED_OUTPUTS_DIR/kernels"
                 # halves the time to compile; jax 0.12 has no such flag
                 + (" --xla_cpu_use_fusion_emitters=false"
                    if importlib.metadata.version("jax").startswith("0.10.") else ""),
} | os.environ)

import jax
import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:  # one cache of plans for this run and all its workers
    os.environ["ZEROJAX_CACHE"] = tempfile.mkdtemp(prefix="zerojax-plans-")
    atexit.register(shutil.rmtree, os.environ["ZEROJAX_CACHE"], ignore_errors=True)
# XLA replaces the name of this variable in the flag above. A path in the flag would differ between
# workers, and jax's shared cache hashes the flags.
os.environ["TEST_UNDECLARED_OUTPUTS_DIR"] = os.path.join(
    os.environ["ZEROJAX_CACHE"], "kernels", os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.makedirs(os.environ["TEST_UNDECLARED_OUTPUTS_DIR"], exist_ok=True)
jax.config.update("jax_num_cpu_devices", 10)
jax.config.update("jax_numpy_rank_promotion", "raise")

LONG_NOTEBOOKS = ("zero_stages.ipynb", "plan_a_cluster.ipynb", "multihost.ipynb",
                  "reading_hlo.ipynb", "quickstart.ipynb")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG_NOTEBOOKS:
            item.add_marker(pytest.mark.slow)
