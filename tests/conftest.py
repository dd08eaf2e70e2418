"""What all tests share: stores, and programs that run beside a test or as somebody else."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
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


@cache
def as_somebody() -> tuple[str, ...]:
    """Returns what makes a command run as an ordinary user: nothing if this is one."""
    if os.geteuid() != 0:
        return ()
    name = os.environ.get("AMALGAMFS_TEST_USER")
    uid, gid = 65534, 65534
    if name is not None:
        uid, gid = pwd.getpwnam(name)[2:4]
    command = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups")
    probe = [*command, sys.executable, "-c", "import engine"]
    if subprocess.run(probe, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"user {name or uid} cannot run {sys.executable}: set AMALGAMFS_TEST_USER")
    return command


@pytest.fixture
def as_user() -> Run:
    """Runs Python with arguments as an ordinary user: this one, or another when it is root."""
    return run_as_user


def run_as_user(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*as_somebody(), sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
