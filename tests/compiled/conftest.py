import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def no_compilation_cache():
    """Programs for devices that are not there can be written to the cache, but not be read back."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
