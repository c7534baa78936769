"""Settings of every test: ten CPU devices, strict rank promotion, and compilation caches.

Most tests use eight of the devices; ten are for dimensions that are not divisible.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a GPU compiler without GPU

import jax
import pytest

CACHE = os.path.join(tempfile.gettempdir(), f"zerojax-tests-{os.getuid()}")
if "PYTEST_XDIST_WORKER" not in os.environ:  # one cache of plans for this run and all its workers
    os.environ["ZEROJAX_CACHE"] = tempfile.mkdtemp(prefix="zerojax-plans-")
    atexit.register(shutil.rmtree, os.environ["ZEROJAX_CACHE"], ignore_errors=True)
jax.config.update("jax_num_cpu_devices", 10)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(CACHE, jax.__version__))
# compiling takes most of the time: many programs are compiled twice, and run for milliseconds
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_disable_most_optimizations", True)

LONG_NOTEBOOKS = ("zero_stages.ipynb", "plan_a_cluster.ipynb")  # each compiles for 1 to 2 minutes


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG_NOTEBOOKS:
            item.add_marker(pytest.mark.slow)
