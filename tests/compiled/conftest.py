import jax
import pytest

# Programs for simulated devices can be written to the cache, but not read from it.
AS_A_USER = {"jax_enable_compilation_cache": False, "jax_disable_most_optimizations": False}


@pytest.fixture(autouse=True, scope="module")
def compiled_as_a_user_does():
    before = {name: getattr(jax.config, name) for name in AS_A_USER}
    for name, value in AS_A_USER.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
