import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """Programs for simulated devices can be written to the cache, but not read from it."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
