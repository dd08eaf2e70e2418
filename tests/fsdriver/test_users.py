"""Mounts of ordinary users: with fusermount3, and in a user namespace without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_as_user

pytestmark = [pytest.mark.fuse, pytest.mark.unprivileged]

IN_NAMESPACE = """
import os, sys
os.execvp("unshare", ["unshare", "-Urm", sys.executable, "-m", "tests.fsdriver.tour", sys.argv[1]])
"""


def namespaces() -> bool:
    done = run_as_user("-c", "import os; os.execvp('unshare', ['unshare', '-Urm', 'true'])")
    return done.returncode == 0


def test_the_whole_tour_of_an_ordinary_user(public_path):
    done = run_as_user("-m", "tests.fsdriver.tour", str(public_path))
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="the tour above is this one")
def test_the_whole_tour_of_root(tmp_path):
    command = [sys.executable, "-m", "tests.fsdriver.tour", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr


@pytest.mark.parametrize("helper", [True, False], ids=["with fusermount3", "without fusermount3"])
def test_the_tour_in_a_user_namespace(public_path, monkeypatch, helper):
    """There the user is root, and mounts by mount(2) itself."""
    if not namespaces():
        pytest.skip("this system gives users no namespaces")
    if not helper:
        tools = public_path / "bin"
        tools.mkdir(mode=0o755)
        for name in ["unshare", "setpriv"]:
            (tools / name).symlink_to(str(shutil.which(name)))
        monkeypatch.setenv("PATH", str(tools))
    home = Path(public_path, "home")
    home.mkdir()
    home.chmod(0o777)
    done = run_as_user("-c", IN_NAMESPACE, str(home))
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr
    assert done.returncode == 0
