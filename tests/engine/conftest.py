"""A session on a small tree."""

from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from tests.engine.test_session_machine import make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with something of every kind."""
    path = tmp_path / "base"
    path.mkdir()
    make_base(path)
    return path


@pytest.fixture
def first(repository: Repository, base: Path) -> SnapshotId:
    """The snapshot of `base`."""
    return SnapshotId(repository.import_directory(str(base)).snapshot)


@pytest.fixture
def session(repository: Repository, first: SnapshotId) -> str:
    """A session on it."""
    repository.sessions.create("s", (None, None, first))
    return "s"
