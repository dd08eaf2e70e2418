"""What the kernel asks the daemon, and what it need not ask."""

import errno
import mmap
import os
import stat
import subprocess
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from fsdriver import messages
from fsdriver.mountpoint import PART, mounts
from tests.conftest import run_as_user
from tests.fsdriver.conftest import PLAIN, Mount, until, with_luck
from tests.fsdriver.syscalls import refused

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(PLAIN, reason="pyfuse3 has the device and nobody counts"),
]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts inside of its mount")


def asked(mount: Mount) -> dict[str, int]:
    """Returns the requests so far; nobody is to wait for those that the kernel sends late."""
    counts = mount.statistics()["messages"]
    return {name: n for name, n in counts.items() if not name.endswith("FORGET")}


def read_all(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                fd = os.open(path, os.O_RDONLY)
                while os.read(fd, 1 << 20):
                    pass
                os.close(fd)
            elif stat.S_ISLNK(status.st_mode):
                os.readlink(path)


def asked_when_warm(mount: Mount, root: Path) -> set[str]:
    """Returns the kinds of requests of three passes over a tree that was passed over twice."""
    here = os.open(root, os.O_PATH)
    try:
        for _ in range(2):
            read_all(Path(f"/proc/self/fd/{here}/"))
        before = asked(mount)
        for _ in range(3):
            read_all(Path(f"/proc/self/fd/{here}/"))
        after = asked(mount)
    finally:
        os.close(here)
    return {name for name in after if after[name] != before.get(name)}


@as_root
@with_luck
def test_a_warm_snapshot_asks_nothing(mount, snapshot):
    assert asked_when_warm(mount, mount.snapshots / snapshot.hex()) == set()


@as_root
@with_luck
def test_a_warm_session_asks_nothing(mount, session):
    # A file that the upper has is asked for its times once it was read.
    assert asked_when_warm(mount, session) <= {"GETATTR"}


@with_luck
def test_what_was_written_is_not_asked_back(mount, session):
    data = os.urandom(75 * mmap.PAGESIZE)  # a page that was written in part is asked for
    (session / "big").write_bytes(data)
    before = asked(mount).get("READ", 0)
    assert (session / "big").read_bytes() == data
    with (session / "big").open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * 5000)
        file.flush()
        file.seek(0)
        assert file.read() == data[:4096] + b"x" * 5000 + data[9096:]
    assert asked(mount).get("READ", 0) == before


@with_luck
def test_a_write_after_the_first_asks_nothing_else(mount, session):
    with (session / "log").open("wb", buffering=0) as file:
        file.write(b"first")
        before = asked(mount)
        for _ in range(10):
            file.write(b"more")
        after = asked(mount)
    assert {name: after[name] - before.get(name, 0) for name in after
            if after[name] != before.get(name, 0)} == {"WRITE": 10}  # fmt: skip


@as_root
def test_snapshots_are_a_mount_of_their_own(mount, snapshot):
    inside = [m for m in mounts() if m.path == str(mount.snapshots)]
    assert [m.kind for m in inside] == [PART]
    path = mount.snapshots / snapshot.hex() / "README"
    assert os.statvfs(path).f_flag & os.ST_RDONLY
    with path.open("rb") as file, pytest.raises(PermissionError):
        mmap.mmap(file.fileno(), 0)
    for flags in [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC]:
        with refused(errno.EROFS):
            os.open(path, flags)


def test_a_file_of_the_mount_itself_stays_as_it_was_looked_at(mount):
    path = mount.path / ".amalgam/status"
    with path.open() as file:
        mount.ask(messages.GetStatistics())
        first = file.read()
        file.seek(0)
        assert file.read() == first
    with refused(errno.EROFS, errno.EACCES), path.open("r+b", buffering=0) as raw:
        raw.write(b"x")


WRITE = """
import os, sys
for name in sys.argv[2:]:
    fd = os.open(f"{sys.argv[1]}/{name}", os.O_WRONLY)
    if name.startswith("cut"):
        os.ftruncate(fd, 3)
    else:
        os.write(fd, b"by somebody else")
    os.close(fd)
"""


@as_root
def test_a_write_by_another_user_takes_set_id_bits(public_path, tree):
    mount = Mount(public_path)
    with Repository.create(str(mount.store)) as repository:
        found = SnapshotId(repository.import_directory(str(tree)).snapshot)
        repository.sessions.create("s", (None, None, found))
    modes = {"user": 0o4777, "group": 0o2777, "lock": 0o2767, "both": 0o6777}
    at = mount.sessions / "s"
    try:
        mount.start(allow_other=True)
        for kind in ["write", "cut"]:
            for name, mode in modes.items():
                (at / f"{kind}-{name}").write_bytes(b"some words")
                (at / f"{kind}-{name}").chmod(mode)
        # Root keeps them.
        with (at / "write-both").open("r+b") as file:
            file.write(b"x")
        os.truncate(at / "cut-both", 5)
        assert stat.S_IMODE((at / "write-both").stat().st_mode) == 0o6777
        assert stat.S_IMODE((at / "cut-both").stat().st_mode) == 0o6777
        names = [f"{kind}-{name}" for kind in ["write", "cut"] for name in modes]
        done = run_as_user("-c", WRITE, str(at), *names)
        assert done.returncode == 0, done.stderr
        for name in names:
            kept = 0o2767 if name.endswith("lock") else 0o777
            assert (name, oct(stat.S_IMODE((at / name).stat().st_mode))) == (name, oct(kept))
        mount.stop()
    finally:
        mount.clear()


def test_a_program_that_lost_its_bits_stays_so(mount, session):
    """Whatever the mount's mode: chown takes the bits as it does on a disk."""
    path = session / "tool"
    path.write_bytes(b"#!/bin/sh\n")
    path.chmod(0o6755)
    subprocess.run(["chgrp", str(os.getgid()), path], check=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_is_forgotten_is_forgotten_when_nobody_asks(own):
    """FORGETs are gathered, but not for longer than there is something to do.

    In a mount of its own: in the shared one, what earlier tests had may be forgotten meanwhile.
    """
    own.start()
    session = own.sessions / "s"
    (session / "first").write_bytes(b"x")
    before = own.statistics()["vfs"]
    for number in range(150):
        (session / f"file{number}").write_bytes(b"x")
    assert own.statistics()["vfs"]["inodes"] == before["inodes"] + 150
    for number in range(150):
        (session / f"file{number}").unlink()
    until(lambda: own.statistics()["vfs"]["inodes"] == before["inodes"])
    assert own.statistics()["vfs"]["orphans"] == 0
    own.stop()


def test_what_pyfuse3_does_not_know_is_answered(mount, session):
    """libfuse answers by itself: no handler begins."""
    with (session / "file").open("wb") as file:
        file.write(b"words")
        for _ in range(3):
            with refused(errno.EOPNOTSUPP):
                os.close(os.open(session, os.O_TMPFILE | os.O_RDWR))
            file.write(b"more")
            file.flush()
    assert (session / "file").read_bytes() == b"words" + b"more" * 3
