"""A mount that works while something under it does not: rot, a full disk, no descriptors.

Programs are told, what they were told before stays true, everything else goes on, and once the
fault is gone so do they. Damage that was there before the mount, and the commit on a full
disk, are in test_daemon.
"""

import contextlib
import errno
import itertools
import mmap
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from engine.storage.content import chunk_ids
from engine.storage.nodes import Entry
from engine.storage.store import Db
from engine.trees.directory import directory_id, find
from fsdriver import messages
from fsdriver.client import DaemonError
from tests.engine.trees import noise, of_directory
from tests.fsdriver.conftest import Mount, drop_caches, until, until_forgotten
from tests.fsdriver.syscalls import refused

pytestmark = pytest.mark.fuse

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount what fails")


@contextlib.contextmanager
def working(*workers: Callable[[], object]) -> Iterator[list[int]]:
    """Lets functions run over and over beside the block, at least once more after it.

    Gives how often each has run; what one raises, it raises.
    """
    done, counts, errors = threading.Event(), [0] * len(workers), []

    def repeat(at: int) -> None:
        try:
            while not done.is_set():
                workers[at]()
                counts[at] += 1
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(len(workers))]
    for thread in threads:
        thread.start()
    try:
        yield counts
        before = list(counts)
        until(lambda: errors or all(now > then for now, then in zip(counts, before, strict=True)))
    finally:
        done.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a program hangs"
    if errors:
        raise errors[0]


def build(session: Path, number: int) -> Callable[[], None]:
    """Returns what compiles, so to speak: reads the base's files, writes, renames, removes."""
    out = session / f"out{number}"

    def once() -> None:
        out.mkdir()
        for name in ["README", "src/main.c", "src/lib/deep/text"]:
            data = (session / name).read_bytes()
            temporary = out / "temporary"
            temporary.write_bytes(data)
            temporary.rename(out / name.rpartition("/")[2])
            assert (out / name.rpartition("/")[2]).read_bytes() == data
        assert sorted(os.listdir(out)) == ["README", "main.c", "text"]
        for name in os.listdir(out):
            (out / name).unlink()
        out.rmdir()

    return once


def read_snapshot(root: Path, tree: Path) -> Callable[[], None]:
    def once() -> None:
        for name in ["README", "src/main.c", "docs/linked", "src/lib/deep/text"]:
            assert (root / name).read_bytes() == (tree / name).read_bytes()

    return once


# Rot.


class Rot:
    """Bytes of the store that change under a running mount, and change back."""

    def __init__(self, mount: Mount, path: bytes) -> None:
        self.mount = mount
        with mount.repository() as repository:
            root = repository.snapshot(repository.resolve("main")).root
            entry = find(repository.objects, root, path)
            assert isinstance(entry, Entry)
            if entry.totals is not None:
                self.db, self.key = Db.NODES, bytes(directory_id(entry))
            else:
                self.db = Db.CHUNKS
                self.key = bytes(list(chunk_ids(repository.objects, entry, set()))[-1])
            with repository.store.read() as reader:
                raw = reader.get(self.db, self.key)
                assert raw is not None
                self.good = bytes(raw)

    def put(self, value: bytes) -> None:
        with self.mount.repository() as repository:
            repository.store.write(lambda writer: writer.put(self.db, self.key, value))

    def begin(self) -> None:
        """One bit, in the middle."""
        at = len(self.good) // 2
        self.put(self.good[:at] + bytes([self.good[at] ^ 4]) + self.good[at + 1 :])


def test_a_chunk_that_rots_under_a_build_hurts_its_file_alone(own, tree):
    own.start()
    session, main = own.sessions / "s", own.snapshots / "main"
    data = (tree / "src/lib/big").read_bytes()
    rot = Rot(own, b"src/lib/big")
    with working(build(session, 1), build(session, 2), read_snapshot(main, tree)):
        rot.begin()
        for root in [main, session]:
            for _ in range(3):
                with refused(errno.EIO):
                    (root / "src/lib/big").read_bytes()
                with (root / "src/lib/big").open("rb", buffering=0) as file:
                    assert file.read(5000) == data[:5000]
            with (
                (root / "src/lib/big").open("rb") as file,
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as shared,
            ):
                assert shared[:5000] == data[:5000]
        with refused(errno.EIO), (session / "src/lib/big").open("ab", buffering=0) as file:
            file.write(b"x")  # cannot be copied up
        with refused(errno.EIO):
            (session / "src/lib/big").rename(session / "src/large")
        own.commit("s")  # keeps by id what it need not read
        with refused(errno.EIO):
            (session / "src/lib/big").read_bytes()
        with own.repository() as repository:
            damage = repository.verify().damage
        assert {one.path for one in damage} == {b"src/lib/big"}
        assert {one.where for one in damage} >= {"@s"}
        assert rot.key.hex() in own.log()
        rot.put(rot.good)
        assert (main / "src/lib/big").read_bytes() == data
        (session / "src/lib/big").rename(session / "src/large")
        assert (session / "src/large").read_bytes() == data
    with own.repository() as repository:
        assert not repository.verify().damage
    assert own.statistics()["vfs"]["orphans"] == 0
    own.stop()


def test_a_directory_that_rots_under_a_build_hurts_itself_alone(own, tree):
    own.start()
    session, main = own.sessions / "s", own.snapshots / "main"
    rot = Rot(own, b"docs")

    def touch() -> None:
        (session / "src/main.c").write_bytes(b"int x;")
        (session / "src/main.c").rename(session / "src/main.d")
        (session / "src/main.d").rename(session / "src/main.c")

    with working(touch):
        rot.begin()
        for root in [main, session]:
            with refused(errno.EIO):
                os.listdir(root / "docs")
            with refused(errno.EIO):
                (root / "docs/linked").read_bytes()
        with refused(errno.EIO):
            (session / "docs/new").write_bytes(b"")
        found = own.commit("s")
        for root in [own.snapshots / found.hex(), session]:
            with refused(errno.EIO):
                os.listdir(root / "docs")
        with own.repository() as repository:
            assert b"docs" in {one.path for one in repository.verify().damage}
        (session / "docs").rename(session / "papers")
        with pytest.raises(DaemonError, match=rot.key.hex()):
            own.commit("s")  # which directory that is, it would have to read
        with refused(errno.EIO):
            os.listdir(session / "papers")
        assert rot.key.hex() in own.log()
        rot.put(rot.good)
        assert sorted(os.listdir(session / "papers")) == sorted(os.listdir(tree / "docs"))
    assert of_directory(main / "docs") == of_directory(tree / "docs")
    own.stop()


# No room.


@pytest.fixture
def narrow(tmp_path: Path, tree: Path) -> Iterator[Mount]:
    """A store with `tree` as main and a session s, on a disk of 40 MB and few inodes."""
    home = tmp_path / "disk"
    home.mkdir()
    options = "size=40m,nr_inodes=400"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "amalgamfs-test", home], check=True)
    mount = Mount(home)
    try:
        with Repository.create(str(mount.store)) as repository:
            main = SnapshotId(repository.import_directory(str(tree), ref="main").snapshot)
            repository.sessions.create("s", (None, None, main))
        mount.start()
        yield mount
        mount.stop()
    finally:
        mount.clear()
        subprocess.run(["umount", "-l", home], check=True)


def fill(mount: Mount) -> Path:
    """Fills the disk beside the store to the last page."""
    filler = mount.path.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    return filler


@as_root
def test_writers_on_a_full_disk_lose_nothing_that_was_acknowledged(narrow, tree):
    session = narrow.sessions / "s"
    acknowledged: list[list[int]] = [[] for _ in range(4)]

    def write(number: int) -> None:
        """Appends lines until it is told that there is no room."""
        name = session / f"log{number}"
        with refused(errno.ENOSPC), name.open("ab", buffering=0) as file:
            for line in itertools.count():
                acknowledged[number].append(file.write(b"%07d\n" % line * 4096))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    before = [(session / f"log{number}").read_bytes() for number in range(4)]
    for data, done in zip(before, acknowledged, strict=True):
        assert len(data) >= sum(done)
        assert data.startswith(b"".join(b"%07d\n" % n * 4096 for n in range(len(done) - 1)))
    with pytest.raises(DaemonError, match=r"full|space"):
        narrow.commit("s")
    with pytest.raises(DaemonError):
        narrow.ask(messages.Fork("s", "other"))
    assert [(session / f"log{number}").read_bytes() for number in range(4)] == before
    assert (narrow.snapshots / "main/src/lib/big").read_bytes() == (
        tree / "src/lib/big"
    ).read_bytes()
    for number in range(4):
        os.truncate(session / f"log{number}", 100)
    (session / "new").write_bytes(b"room")
    found = narrow.commit("s")
    assert of_directory(narrow.snapshots / found.hex()) == of_directory(session)
    assert (session / "log1").read_bytes() == before[1][:100]
    with narrow.repository() as repository:
        assert not repository.verify().damage


@as_root
def test_a_full_disk_can_be_mounted_and_made_room_on(narrow, tree):
    session = narrow.sessions / "s"
    (session / "kept").write_bytes(noise(100_000, 1))
    (session / "large").write_bytes(noise(5_000_000, 2))
    filler = fill(narrow)
    before = of_directory(session)
    narrow.kill()
    narrow.start()
    assert of_directory(session) == before
    with refused(errno.ENOSPC), (session / "src/lib/big").open("ab", buffering=0) as file:
        file.write(b"x")
    assert of_directory(session) == before
    (session / "kept").rename(session / "src/kept")  # takes no room, or little
    (session / "src/kept").rename(session / "kept")
    (session / "large").unlink()
    until_forgotten(narrow)
    with (session / "src/lib/big").open("ab", buffering=0) as file:
        assert file.write(b"x") == 1
    filler.unlink()
    found = narrow.commit("s")
    assert (narrow.snapshots / found.hex() / "kept").read_bytes() == noise(100_000, 1)
    assert (session / "src/lib/big").read_bytes() == (tree / "src/lib/big").read_bytes() + b"x"


@as_root
def test_a_full_disk_under_a_map(narrow):
    """msync(2) tells; without it a map has no way to."""
    session = narrow.sessions / "s"
    with (session / "hole").open("w+b", buffering=0) as file:
        file.truncate(3 << 20)
        with mmap.mmap(file.fileno(), 0) as shared:
            filler = fill(narrow)
            shared[:] = b"m" * (3 << 20)
            with refused(errno.ENOSPC, errno.EIO):
                shared.flush()
            filler.unlink()
            shared[:] = b"n" * (3 << 20)
            shared.flush()
    narrow.kill()
    narrow.start()
    assert (session / "hole").read_bytes() == b"n" * (3 << 20)


@as_root
def test_no_inode_is_left(narrow):
    session, dice = narrow.sessions / "s", range(1000)
    with refused(errno.ENOSPC):
        for number in dice:
            (session / f"{number}").touch()
    made = {name for name in os.listdir(session) if name.isdigit()}
    before = of_directory(session)
    refusals = 0
    for call in [
        (session / "more").mkdir,
        lambda: (session / "more").symlink_to("x"),
        (session / "src/more").touch,
        lambda: (session / "src/lib/zero").write_bytes(b"copied up"),
        lambda: (session / "src").rename(session / "moved"),
        (session / "src/main.c").unlink,
    ]:
        with contextlib.suppress(OSError):
            call()
            continue
        refusals += 1
        assert of_directory(session) == before
    assert refusals
    with pytest.raises(DaemonError):
        narrow.commit("s")
    narrow.kill()
    narrow.start()
    assert made <= set(os.listdir(session))
    for name in sorted(made):
        (session / name).unlink()
    (session / "more").mkdir()
    found = narrow.commit("s")
    assert of_directory(narrow.snapshots / found.hex()) == of_directory(session)


@as_root
def test_a_read_only_upper_is_told_and_read_on(own, tree):
    where = own.store / "sessions"
    own.start()
    session = own.sessions / "s"
    (session / "new").write_bytes(b"new")
    before = of_directory(session)
    own.stop()
    subprocess.run(["mount", "--bind", where, where], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", where], check=True)
        own.start()
        assert of_directory(session) == before
        for call in [
            lambda: (session / "new").write_bytes(b"x"),
            lambda: (session / "README").write_bytes(b"x"),
            (session / "more").mkdir,
            lambda: (session / "src").rename(session / "moved"),
            (session / "src/main.c").unlink,
            lambda: (session / "new").chmod(0o600),
            lambda: os.utime(session / "new", ns=(1, 1)),
            lambda: os.setxattr(session / "README", b"user.x", b"y"),
        ]:
            with refused(errno.EROFS):
                call()
        assert of_directory(session) == before
        assert of_directory((own.snapshots / "main").resolve()) == of_directory(tree)
        with pytest.raises(DaemonError):
            own.commit("s")
        subprocess.run(["mount", "-o", "remount,bind,rw", where], check=True)
        (session / "README").write_bytes(b"x")
        found = own.commit("s")
        assert (own.snapshots / found.hex() / "README").read_bytes() == b"x"
        own.stop()
    finally:
        own.clear()
        subprocess.run(["umount", "-l", where], check=True)


# Few descriptors.


@pytest.mark.parametrize("sessions", [1, 6])
def test_few_descriptors_are_made_do_with(own, tree, sessions):
    """A limit on the daemon that is less than what it would like to keep open."""
    own.start()
    with own.repository() as repository:
        main = repository.resolve("main")
    roots = [own.sessions / "s", *(own.create(f"n{n}", main) for n in range(sessions - 1))]
    for root in roots:
        os.listdir(root)
    used = len(os.listdir(f"/proc/{own.pid}/fd"))
    resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (used + 60, used + 60))
    for root in roots:
        for number in range(120):
            (root / f"{number}").write_bytes(b"%d" % number)
    for root in roots:
        for number in range(120):
            assert (root / f"{number}").read_bytes() == b"%d" % number
        assert (root / "src/lib/big").read_bytes() == (tree / "src/lib/big").read_bytes()
    for root in roots:
        found = own.commit(root.name)
        assert (own.snapshots / found.hex() / "119").read_bytes() == b"119"
    own.stop()


def test_descriptors_that_ran_out_come_back(own):
    """Removed files that programs have open need one each; the others are told, and go on."""
    own.start()
    session = own.sessions / "s"
    (session / "kept").write_bytes(b"kept")
    used = len(os.listdir(f"/proc/{own.pid}/fd"))
    resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (used + 40, used + 40))
    opened = []
    with refused(errno.EMFILE, errno.ENFILE, errno.EIO):
        for number in range(200):
            opened.append(os.open(session / f"{number}", os.O_RDWR | os.O_CREAT))
            os.write(opened[-1], b"%d" % number)
            os.unlink(session / f"{number}")
    assert len(opened) > 10
    for number, fd in enumerate(opened[:-1]):
        assert os.pread(fd, 9, 0) == b"%d" % number
    assert (own.snapshots / "main/README").read_bytes() == b"read me\n"
    for fd in opened:
        os.close(fd)
    until(lambda: own.statistics()["vfs"]["orphans"] == 0)
    assert (session / "kept").read_bytes() == b"kept"
    (session / "more").write_bytes(b"more")
    own.commit("s")
    own.stop()


# A daemon that stands still.


def test_a_daemon_that_stands_still_fails_nobody(own, tree):
    own.start()
    session, main = own.sessions / "s", own.snapshots / "main"

    def stand_still(seconds: float) -> None:
        os.kill(own.pid, signal.SIGSTOP)
        time.sleep(seconds)  # what is tested is that nothing happens
        os.kill(own.pid, signal.SIGCONT)

    committed: list[SnapshotId] = []
    with working(
        build(session, 1), build(session, 2), read_snapshot(main, tree),
        lambda: committed.append(own.commit("s")),
    ):  # fmt: skip
        for seconds in [0.01, 0.1, 1.0]:
            stand_still(seconds)
            if os.geteuid() == 0:
                drop_caches()
    assert committed
    assert "level=error" not in own.log()
    with own.repository() as repository:
        assert not repository.verify().damage
    own.stop()
