import concurrent.futures

import pytest

from zerojax.processes import ending


@pytest.fixture
def ends(monkeypatch):
    """The arguments with which processes were ended."""
    seen = []
    monkeypatch.setattr(ending, "soon", lambda *arguments: seen.append(arguments))
    return seen


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool
