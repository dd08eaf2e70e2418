"""What the daemon holds in memory, and in descriptors, goes back to what it was."""

import os
import shutil
from pathlib import Path

import pytest

from engine.mounted.overlay import OPEN_FILES
from fsdriver import messages
from tests.fsdriver.conftest import descriptors, drop_caches, resident, until

pytestmark = pytest.mark.fuse

can_drop = pytest.mark.skipif(
    not os.access("/proc/sys/vm/drop_caches", os.W_OK), reason="only root can empty the caches"
)


def churn(session: Path, number: int) -> None:
    home = session / f"churn{number}"
    shutil.copytree(session / "src/lib/deep", home / "deep")
    for name in range(150):
        (home / f"{name}").write_bytes(b"x" * 100)
    for name in range(150):
        (home / f"{name}").rename(home / f"moved-{name}")
    assert len(os.listdir(home)) == 151
    for name in range(150):
        with (home / f"moved-{name}").open("r+b") as file:
            (home / f"moved-{name}").unlink()
            file.write(b"late")
    with (session / "README").open("ab") as file:
        file.write(b"more")
    (session / "src/lib").rename(session / "lib")
    (session / "lib").rename(session / "src/lib")
    shutil.rmtree(home)


def look(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            os.lstat(os.path.join(directory, name))


@can_drop
def test_what_the_kernel_forgets_is_forgotten(own):
    own.start()
    session = own.sessions / "s"
    churn(session, 0)
    own.commit("s")
    drop_caches()
    before = own.statistics()["vfs"]
    open_before = descriptors(own)
    for number in range(3):
        churn(session, number)
        look(session)
        look(own.snapshots / "main")
        own.commit("s")
    assert own.statistics()["vfs"]["inodes"] > before["inodes"]
    assert own.statistics()["vfs"]["orphans"] == 0

    def settled() -> bool:
        drop_caches()
        return bool(own.statistics()["vfs"]["inodes"] <= before["inodes"] + 2)

    until(settled)
    after = own.statistics()["vfs"]
    assert after["orphans"] == 0
    assert after["open_files"] <= before["open_files"] + 2
    assert descriptors(own) <= open_before + 4
    own.stop()


def test_removed_files_are_orphans_as_long_as_they_are_open(own):
    own.start()
    session = own.sessions / "s"
    files = []
    for number in range(50):
        files.append(os.open(session / f"{number}", os.O_CREAT | os.O_RDWR))
        (session / f"{number}").unlink()
    assert own.statistics()["vfs"]["orphans"] == 50
    for fd in files[:20]:
        os.close(fd)
    until(lambda: own.statistics()["vfs"]["orphans"] == 30)
    own.commit("s")
    assert own.statistics()["vfs"]["orphans"] == 30
    for number, fd in enumerate(files[20:]):
        os.write(fd, b"%d" % number)
        assert os.pread(fd, 10, 0) == b"%d" % number
        os.close(fd)
    until(lambda: own.statistics()["vfs"]["orphans"] == 0)
    own.stop()


def test_descriptors_are_bounded(own):
    own.start()
    session = own.sessions / "s"
    start = descriptors(own)
    files = []
    for number in range(2 * OPEN_FILES):
        files.append(os.open(session / f"{number}", os.O_CREAT | os.O_RDWR))
        os.write(files[-1], b"%d" % number)
    assert own.statistics()["vfs"]["open_files"] <= OPEN_FILES
    assert descriptors(own) <= start + OPEN_FILES + 20
    for number, fd in enumerate(files):
        assert os.pread(fd, 10, 0) == b"%d" % number
        os.close(fd)
    own.ask(messages.Reset("s", force=True))
    assert descriptors(own) <= start + 20
    own.stop()


def test_sessions_that_come_and_go_leave_nothing(own):
    own.start()
    with own.repository() as repository:
        main = repository.resolve("main")
    (own.sessions / "s" / "README").read_bytes()
    start, files = own.statistics()["vfs"], descriptors(own)
    for number in range(15):
        at = own.create(f"n{number}", main)
        (at / "README").write_text("x")
        own.commit(f"n{number}")
        own.ask(messages.Rename(f"n{number}", f"m{number}"))
        own.ask(messages.Remove(f"m{number}", force=True))
    assert own.statistics()["vfs"]["sessions"] == start["sessions"]
    assert descriptors(own) <= files + 4
    sessions = [path.name for path in (own.store / "locks").glob("session-*")]
    shared = ["control", "gc", "mount", "objects", "store"]
    assert sorted(os.listdir(own.store / "locks")) == sorted(shared + sessions)
    assert len(list((own.store / "locks").glob("session-*"))) == 1
    assert len(list((own.store / "sessions").iterdir())) == 1
    own.stop()


@can_drop
def test_memory_does_not_grow_with_work(own):
    own.start()
    session = own.sessions / "s"
    sizes = []
    for number in range(6):
        churn(session, number)
        own.commit("s")
        drop_caches()
        sizes.append(resident(own))
    assert sizes[-1] - sizes[2] < 4 << 20, sizes
    own.stop()
