"""Eight CPU devices (ten for the test of dimensions that do not divide), strict promotion, one compilation cache a run."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import jax
import pytest

CACHE = os.path.join(tempfile.gettempdir(), f"zerojax-tests-{os.getuid()}")
if "PYTEST_XDIST_WORKER" not in os.environ:  # one for this run and all its workers
    os.environ["ZEROJAX_CACHE"] = tempfile.mkdtemp(prefix="zerojax-plans-")
    atexit.register(shutil.rmtree, os.environ["ZEROJAX_CACHE"], ignore_errors=True)
jax.config.update("jax_num_cpu_devices", 10)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(CACHE, jax.__version__))

LONG_NOTEBOOKS = ("zero_stages.ipynb", "plan_a_cluster.ipynb")  # one or two minutes of compiling each


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG_NOTEBOOKS:
            item.add_marker(pytest.mark.slow)
