"""What all tests share: stores, and programs that run beside a test or as somebody else."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from engine import Repository

ROOT = Path(__file__).parent.parent

PATIENCE = 800.0
"""Seconds after which a program that a test waits for hangs; the test has a limit of its own."""

# How long an example takes says how busy the machine is. The same ones each time, unless there are
# to be new ones.
settings.register_profile(
    "steady", derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile("many", settings.get_profile("steady"), derandomize=False)
settings.load_profile("many" if os.environ.get("AMALGAMFS_EXAMPLES") else "steady")

# As a shell's background jobs begin, and who is started by nohup: all that tests start would ignore
# them, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
