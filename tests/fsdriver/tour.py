"""What an ordinary user does from import to unmount: run as a program by test_users.

`python -m tests.fsdriver.tour HOME`, with HOME an empty directory of the user. Exits 0 if all
is as it should be. In a user namespace of its own the user is root, and permission bits stop
nothing.
"""

import contextlib
import errno
import os
import shutil
import stat
import sys
from pathlib import Path

from engine import Repository
from engine.ids import SnapshotId
from fsdriver import launch
from tests.engine.trees import of_directory
from tests.fsdriver.conftest import Mount, make_tree
from tests.fsdriver.syscalls import EXCHANGE, refused, renameat2

ROOT = os.geteuid() == 0


def denied() -> contextlib.AbstractContextManager[None]:
    """Expects a refusal, where permission bits count."""
    return contextlib.suppress(OSError) if ROOT else refused(errno.EACCES)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def permissions(at: Path) -> None:
    """Files that are locked even for who owns them, until they are unlocked."""
    fixed, locked = at / "fixed", at / "locked"
    assert (mode(fixed), mode(locked), mode(locked / "inside")) == (0o444, 0o555, 0o400)
    with denied():
        fixed.open("ab").close()
    with denied():
        (locked / "new").touch()
    fixed.chmod(0o644)
    fixed.write_text("changed")
    fixed.chmod(0o000)
    with denied():
        fixed.read_text()
    locked.chmod(0o755)
    (locked / "new").write_text("new")
    (locked / "inside").chmod(0o000)
    locked.chmod(0o000)
    with denied():
        os.listdir(locked)
    with denied():
        (locked / "new").stat()
    fd = os.open(at / "made", os.O_CREAT | os.O_RDWR, 0o000)
    os.write(fd, b"by who made it")
    os.close(fd)
    (at / "closed").mkdir(mode=0o000)
    with denied():
        (at / "closed/new").touch()


def check_permissions(at: Path) -> None:
    assert [mode(at / name) for name in ["fixed", "locked", "made", "closed"]] == [0] * 4
    with denied():
        (at / "made").read_bytes()


def unlock(at: Path) -> None:
    for name in ["fixed", "made", "locked", "closed"]:
        (at / name).chmod(0o700)
    assert (at / "fixed").read_text() == "changed"
    assert (at / "made").read_bytes() == b"by who made it"
    assert sorted(os.listdir(at / "locked")) == ["inside", "new"]
    assert mode(at / "locked/inside") == 0
    (at / "locked/inside").chmod(0o600)
    assert (at / "locked/inside").read_text() == "inside"


def edit(at: Path) -> None:
    (at / "src/lib").rename(at / "lib")
    renameat2(at / "src/main.c", at / "README", EXCHANGE)
    shutil.rmtree(at / "docs")
    (at / "docs").mkdir()
    (at / "docs/new").write_text("new")
    os.mkfifo(at / "docs/fifo")
    (at / "docs/link").symlink_to("new")
    os.link(at / "docs/new", at / "docs/hard")
    os.setxattr(at / "docs", b"user.x", b"y")
    with (at / "lib/big").open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    (at / "src/tool.sh").chmod(0o4755)
    if not ROOT:
        with refused(errno.EPERM):
            os.chown(at / "README", 0, 0)
        with refused(errno.EPERM):
            os.mknod(at / "device", stat.S_IFBLK | 0o600, os.makedev(1, 1))


def main(home: Path) -> None:
    source = home / "source"
    source.mkdir()
    make_tree(source)
    (source / "locked").chmod(0o755)
    shutil.rmtree(source / "locked")
    (source / "fixed").write_text("fixed")
    (source / "fixed").chmod(0o444)
    (source / "locked").mkdir()
    (source / "locked/inside").write_text("inside")
    (source / "locked/inside").chmod(0o400)
    (source / "locked").chmod(0o555)
    mount = Mount(home)
    with Repository.create(str(mount.store)) as repository:
        main = SnapshotId(repository.import_directory(str(source), ref="main").snapshot)
        repository.sessions.create("s", (None, None, main))
    try:
        mount.start()
        at = mount.sessions / "s"
        assert of_directory(mount.snapshots / main.hex()) == of_directory(source)
        edit(at)
        permissions(at)
        check_permissions(at)
        found = mount.commit("s")
        check_permissions(at)
        check_permissions(mount.snapshots / found.hex())
        mount.kill()
        mount.start()
        check_permissions(at)
        unlock(at)
        second = mount.commit("s")
        assert of_directory(mount.snapshots / second.hex()) == of_directory(at)
        mount.stop()
        try:
            launch.launch(str(mount.store), str(mount.path), allow_other=True)
        except launch.LaunchError as error:
            print("allow_other:", error)
        else:
            mount.stop()
    finally:
        mount.clear()
        (source / "locked").chmod(0o755)  # or nobody could remove it
    with Repository.open(str(mount.store)) as repository:
        repository.sessions.remove(repository.sessions.hold("s", "the end"))
        repository.collect()
        assert not repository.verify().damage
    assert not os.listdir(mount.store / "sessions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("all is well")
