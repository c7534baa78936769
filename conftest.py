"""Eight CPU devices (ten for the test of dimensions that do not divide), strict promotion, one compilation cache a run."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the GPU compiler without a GPU

import jax

jax.config.update("jax_num_cpu_devices", 10)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = os.path.join(tempfile.gettempdir(), f"zerojax-tests-{jax.__version__}-{os.getuid()}")
jax.config.update("jax_compilation_cache_dir", CACHE)
