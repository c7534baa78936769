import signal

import jax
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # `make test &` in a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def lowerings():
    """A list that grows by one for each program that jax lowers."""
    seen = []

    def count(event, duration, **_):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)
