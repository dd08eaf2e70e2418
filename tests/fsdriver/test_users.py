"""Mounts of ordinary users: with fusermount3, and in a user namespace without it."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from tests.conftest import ROOT, run_as_user
from tests.fsdriver.conftest import Mount

pytestmark = [pytest.mark.fuse, pytest.mark.unprivileged]

IN_NAMESPACE = """
import os, sys
os.execvp("unshare", ["unshare", "-Urm", sys.executable, "-m", "tests.fsdriver.tour", sys.argv[1]])
"""


def user_number() -> int:
    """Returns the uid of the ordinary user that AMALGAMFS_TEST_USER names."""
    name = os.environ.get("AMALGAMFS_TEST_USER", "65534")
    return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid


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


OTHER = """
import errno, os, sys
os.umask(0o022)
def new(path):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
for call, name in [(os.stat, ""), (open, "/private"), (os.mkdir, "/src/x"), (new, "/README"),
                   (os.unlink, "/sticky/ours"), (os.mkdir, "/sticky/theirs"),
                   (new, "/sticky/file")]:
    try:
        call(sys.argv[1] + name)
        print("done")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may let others in")
def test_others_are_let_in_only_on_demand_and_as_the_bits_allow(public_path, tree):
    mount = Mount(public_path)
    with Repository.create(str(mount.store)) as repository:
        found = SnapshotId(repository.import_directory(str(tree)).snapshot)
        repository.sessions.create("s", (None, None, found))
    at = mount.sessions / "s"
    try:
        for allowed in [False, True]:
            mount.start(allow_other=allowed)
            (at / "private").touch(mode=0o600)
            (at / "sticky").mkdir(exist_ok=True)
            (at / "sticky").chmod(0o1777)
            (at / "sticky/ours").touch()
            words = run_as_user("-c", OTHER, str(at)).stdout.split()
            if allowed:
                assert words == ["done", "EACCES", "EACCES", "EEXIST", "EPERM", "done", "done"]
                for name, bits in {"theirs": 0o755, "file": 0o644}.items():
                    status = (at / "sticky" / name).stat()
                    assert stat.S_IMODE(status.st_mode) == bits
                    assert status.st_uid == user_number()
            else:
                assert words == ["EACCES"] * 7
            mount.stop()
    finally:
        mount.clear()


@pytest.mark.timeout(900)  # 20 s where nothing else runs
@pytest.mark.skipif(os.geteuid() != 0, reason="test_running itself is this one")
def test_commands_of_an_ordinary_user_under_overlayfs(public_path):
    if not namespaces():
        pytest.skip("this system gives users no namespaces")
    done = run_as_user(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={public_path}/t",
        str(ROOT / "tests/fsdriver/test_running.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr


WITHOUT_NAMESPACES = """
echo 0 > /proc/sys/user/max_user_namespaces
exec setpriv --bounding-set -all --inh-caps -all --no-new-privs "$@"
"""


def test_without_namespaces_a_command_runs_in_the_mount_or_a_checkout(public_path):
    if not namespaces():
        pytest.skip("this system gives users no namespaces")
    (public_path / "mnt").mkdir()
    (public_path / "mnt").chmod(0o777)
    store, program = f"{public_path}/store", [sys.executable, "-m", "mountctl"]

    def mountctl(*words: str) -> "subprocess.CompletedProcess[str]":
        return run_as_user("-m", "mountctl", "--store", store, *words)

    mountctl("init")
    mountctl("import", str(ROOT / "docs"), "--ref", "main")
    mountctl("session", "create", "work", "main")
    mountctl("mount", str(public_path / "mnt"))
    try:

        def run(mode: str) -> "subprocess.CompletedProcess[str]":
            script = f"pwd; touch by-{mode}"
            command = [*program, "--store", store, "run", "work", "--mode", mode, "--", "sh", "-c"]
            words = ["unshare", "-Ur", "sh", "-c", WITHOUT_NAMESPACES, "sh", *command, script]
            return run_as_user("-c", f"import os; os.execvp('unshare', {words!r})")

        refused = run("overlay")
        assert refused.returncode == 4
        assert "a user namespace: No space left on device" in refused.stderr
        in_mount, in_checkout, either = run("lazy"), run("full"), run("auto")
        assert in_mount.stdout == f"{public_path}/mnt/sessions/work\n"
        assert in_checkout.stdout.startswith(f"{store}/sessions/")
        assert either.stdout in {in_mount.stdout, in_checkout.stdout}
        assert [done.returncode for done in (in_mount, in_checkout, either)] == [0, 0, 0]
        made = mountctl("diff", "main", "@work").stdout
        assert made == "A by-auto\nA by-full\nA by-lazy\n"
    finally:
        assert mountctl("umount").returncode == 0


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
