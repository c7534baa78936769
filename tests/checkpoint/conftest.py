import pytest

from zerojax.checkpoint import slots


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The directory in place of /dev/shm."""
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(slots, "BASE", path)
    return path
