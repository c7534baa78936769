import jax
import pytest


@pytest.fixture
def lowerings():
    """Grows by one for each program that jax lowers."""
    seen = []
    count = lambda event, duration, **_: seen.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)
