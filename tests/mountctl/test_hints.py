"""Hints that once led nowhere: each is followed here as it is written."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT, Run, as_somebody
from tests.mountctl.conftest import Program


def commands_of(stderr: str) -> list[str]:
    """Returns what the hint says between backticks."""
    hint = stderr.splitlines()[-1]
    assert hint.startswith("hint: "), stderr
    return re.findall("`([^`]+)`", hint)


def follow(command: str, **environment: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to another user")
def test_a_repository_of_another_user(mountctl: Program, tmp_path: Path):
    made = tmp_path / "some's"
    follow(f'git init -q "{made}" && git -C "{made}" -c user.name=a -c user.email=a@b commit '
           "-q --allow-empty -m first", HOME=str(tmp_path))  # fmt: skip
    for path in [made, *made.rglob("*")]:
        os.chown(path, 12_345, 12_345, follow_symlinks=False)
    done = mountctl.run("git", "import", made, code=4)
    assert "is not owned by current user" in done.stderr  # libgit2's own words
    (command,) = commands_of(done.stderr)
    assert command.startswith("git config --global --add safe.directory ")
    follow(command, HOME=str(mountctl.home))
    mountctl.run("git", "import", made)


def make_wheel(folder: Path) -> None:
    """Makes a package that stands for pygit2."""
    info = "pygit2-9.9.dist-info"
    with zipfile.ZipFile(folder / "pygit2-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pygit2/__init__.py", "followed = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pygit2\nVersion: 9.9\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\n"
                                        "Root-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        wheel.writestr(f"{info}/RECORD", "")


def test_the_library_for_git_is_missing(mountctl: Program, tmp_path: Path):
    hide = "import sys; sys.modules['pygit2'] = None; from mountctl.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "git", "import", str(tmp_path)],
        env=mountctl.environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 11, done.stderr
    (command,) = commands_of(done.stderr)
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    make_wheel(tmp_path)
    target = tmp_path / "installed"
    follow(command, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PIP_TARGET=str(target),
           PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_CONFIG_FILE=os.devnull)  # fmt: skip
    program = [sys.executable, "-c", "import pygit2; assert pygit2.followed"]
    subprocess.run(program, env={**os.environ, "PYTHONPATH": str(target)}, check=True)


HOMELESS = """
import os, sys
os.environ["HOME"] = sys.argv.pop(1)
for name in ("XDG_DATA_HOME", "AMALGAMFS_STORE"):
    os.environ.pop(name, None)
from mountctl.__main__ import main
main()
"""


@pytest.mark.unprivileged
def test_a_home_that_cannot_be_written(public_path: Path, as_user: Run):
    home = public_path / "home"
    home.mkdir(mode=0o555)
    done = as_user("-c", HOMELESS, str(home), "init")
    assert done.returncode == 7, done.stderr
    assert f"you may not write in '{home}'" in done.stderr
    assert "--store DIR" in done.stderr.splitlines()[-1]
    done = as_user("-c", HOMELESS, str(home), "init", "--store", str(public_path / "store"))
    assert done.returncode == 0, done.stderr


UNMOUNT = """
set -e
cd "$1"
mkdir etc
cp /etc/passwd /etc/group etc
for file in nsswitch.conf ld.so.cache fuse.conf; do
    if [ -f "/etc/$file" ]; then cp "/etc/$file" etc; fi
done
mount --bind etc /etc
user() { "$AS" "$BY" "$TO" "$CLEAR" "$PYTHON" -m mountctl --store store "$@"; }
user init -q
user mount mnt -q
trap 'umount -l mnt || true' EXIT
if user umount 2>said; then exit 3; fi
cat said >&2
sed -n '$s/.*root run `\\([^`]*\\)`.*/\\1/p' said | sh
trap - EXIT
until user umount 2>&1 | grep -q "is not mounted"; do :; done
"""


@pytest.mark.fuse
@pytest.mark.unprivileged
def test_a_machine_without_a_list_of_mounts(public_path: Path):
    """As in a container, where fusermount3 cannot look whose the mount is."""
    if os.geteuid() != 0 or "AMALGAMFS_TEST_USER" not in os.environ:
        pytest.skip("needs root, and AMALGAMFS_TEST_USER to name an ordinary user")
    user = dict(zip(("AS", "BY", "TO", "CLEAR"), as_somebody(), strict=True))
    (public_path / "mnt").mkdir()
    (public_path / "mnt").chmod(0o777)
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", UNMOUNT, "-", str(public_path)],
        env={**os.environ, **user, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
             "HOME": str(public_path)},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert "failed to open /etc/mtab" in done.stderr  # fusermount3's own words
    assert done.returncode == 0, done.stderr
