"""What all tests share: stores, and programs that run beside a test or as somebody else."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository

ROOT = Path(__file__).parent.parent

if os.environ.get("AMALGAMFS_EXAMPLES"):
    from hypothesis import settings

    settings.register_profile("many", derandomize=False)
    settings.load_profile("many")


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    """An empty store in the test's directory."""
    with Repository.create(str(tmp_path / "store")) as made:
        yield made


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that every user may enter and write in."""
    path = Path(tempfile.mkdtemp(prefix="afs"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def as_user() -> Run:
    """Runs Python with arguments as an ordinary user: this one, or another when it is root."""
    return run_as_user


def run_as_user(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    if os.geteuid() == 0:
        user = os.environ.get("AMALGAMFS_TEST_USER", "65534")
        command = ["setpriv", f"--reuid={user}", "--regid=65534", "--clear-groups", *command]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
