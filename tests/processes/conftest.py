import concurrent.futures
import threading

import pytest

from zerojax.processes import ending


@pytest.fixture
def ends(monkeypatch):
    """The arguments with which processes were ended."""
    seen = []
    monkeypatch.setattr(ending, "soon", lambda *arguments: seen.append(arguments))
    return seen


class _Daemons:
    """Calls functions in daemon threads, for which a test that has failed does not wait."""

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


@pytest.fixture
def threads():
    return _Daemons()
