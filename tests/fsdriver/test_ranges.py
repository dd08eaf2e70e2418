"""Ranges of files, as programs ask for them: room, holes, copies, and past the page cache."""

import errno
import itertools
import mmap
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from tests.conftest import run_as_user
from tests.engine.trees import noise
from tests.fsdriver.aio import Writer
from tests.fsdriver.conftest import PLAIN, Mount, until
from tests.fsdriver.syscalls import KEEP_SIZE, PUNCH_HOLE, fallocate, refused

pytestmark = pytest.mark.skipif(PLAIN, reason="pyfuse3 alone has no handlers for these")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root lets others in")

ZERO_RANGE, COLLAPSE_RANGE, UNSHARE_RANGE = 16, 8, 64
HOLE = 1 << 20
IN_THE_BACKGROUND = 12
"""So many requests that nobody waits for does the kernel send before one is answered."""


def holes_of(fd: int) -> list[tuple[int, int]]:
    """Returns the ranges of a file that are data, as its filesystem says."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


@pytest.mark.parametrize("how", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
@pytest.mark.parametrize("name", ["README", "src/lib/big", "new"])
def test_room_can_be_had_however_a_file_is_open(at: Path, name: str, how: int):
    before = (at / name).read_bytes() if name != "new" else b""
    fd = os.open(at / name, how | os.O_CREAT, 0o644)
    os.posix_fallocate(fd, 0, 4_000_000)
    os.posix_fallocate(fd, 0, 10)
    status = os.fstat(fd)
    os.close(fd)
    assert status.st_size == 4_000_000
    assert status.st_blocks * 512 >= 4_000_000
    assert (at / name).read_bytes() == before.ljust(4_000_000, b"\0")


def test_each_way_to_change_a_range(at: Path):
    path = at / "src/lib/big"
    expected = bytearray(path.read_bytes())
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, len(expected)) as mapped:
        mapped[5 * 4096] = expected[5 * 4096] = 7  # only in the page cache
        fallocate(fd, KEEP_SIZE, len(expected), 100_000)
        assert os.fstat(fd).st_size == len(expected)
        for mode, start, length in [
            (KEEP_SIZE | PUNCH_HOLE, 3 * 4096, 2 * 4096),
            (KEEP_SIZE | PUNCH_HOLE, 100_001, 50_000),
            (ZERO_RANGE | KEEP_SIZE, 200_003, 30_000),
            (ZERO_RANGE, len(expected) - 10, 100),
        ]:
            fallocate(fd, mode, start, length)
            expected[start : start + length] = bytes(length)
        assert mapped[:] == expected[: len(mapped)]
    assert os.pread(fd, len(expected) + 9, 0) == expected
    assert (3 * 4096, 5 * 4096) not in holes_of(fd)
    assert holes_of(fd)[0] == (0, 3 * 4096)
    for mode in (COLLAPSE_RANGE, UNSHARE_RANGE | 0x80):
        with refused(errno.EOPNOTSUPP, errno.EINVAL):
            fallocate(fd, mode, 1, 4096)
    os.close(fd)
    assert path.read_bytes() == expected


def test_a_snapshot_gives_no_room(mount: Mount, snapshot: SnapshotId):
    path = mount.snapshots / snapshot.hex() / "README"
    with refused(errno.EROFS):
        os.close(os.open(path, os.O_RDWR))
    fd = os.open(path, os.O_RDONLY)
    with refused(errno.EBADF):
        fallocate(fd, 0, 0, 10)
    os.close(fd)


@pytest.mark.parametrize("place", ["snapshot", "session", "changed"])
def test_holes_are_found_and_copied_as_holes(
    mount: Mount, snapshot: SnapshotId, session: Path, tmp_path: Path, place: str
):
    root = mount.snapshots / snapshot.hex() if place == "snapshot" else session
    path = root / "src/lib/sparse"
    if place == "changed":
        os.utime(path, ns=(1, 1))
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    ((start, end),) = holes_of(fd)
    assert 0 < start <= 5_000_000
    assert end == size
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert os.lseek(fd, size - 1, os.SEEK_HOLE) == size
    with refused(errno.ENXIO):
        os.lseek(fd, size, os.SEEK_DATA)
    assert os.fstat(fd).st_blocks * 512 < 100_000
    os.close(fd)
    subprocess.run(["cp", "--sparse=auto", path, tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 100_000


def test_what_a_mapping_has_written_is_no_hole(session: Path, tmp_path: Path):
    path = session / "holes"
    with path.open("wb") as file:
        file.truncate(4 * HOLE)
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 4 * HOLE) as mapped:
        mapped[HOLE + 5] = 1
        mapped[2 * HOLE] = 2
        assert os.lseek(fd, 0, os.SEEK_DATA) == HOLE
        assert os.lseek(fd, HOLE, os.SEEK_HOLE) == HOLE + 4096
        mapped[3 * HOLE + 9] = 3
        subprocess.run(["cp", "--sparse=auto", path, tmp_path / "copy"], check=True)
    os.close(fd)
    copy = (tmp_path / "copy").read_bytes()
    assert (copy[HOLE + 5], copy[2 * HOLE], copy[3 * HOLE + 9]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *itertools.product(["pristine", "changed", "snapshot", "new"], ["new", "pristine"]),
        ("itself", "itself"),
    ],
)
def test_ranges_are_copied(
    mount: Mount, snapshot: SnapshotId, session: Path, source: str, target: str
):
    root = mount.snapshots / snapshot.hex() if source == "snapshot" else session
    data = noise(3_000_000, 1)
    path = root / "src/lib/big"
    if source == "new":
        path = session / "source"
        path.write_bytes(data)
    elif source == "changed":
        path.chmod(0o600)
    to = {"new": "target", "pristine": "README", "itself": "src/lib/big"}[target]
    with path.open("rb") as one, (session / to).open("r+b" if target != "new" else "w+b") as two:
        before = two.read()
        at, done = 100, 4_000_000 if target == "itself" else 7
        first = done
        while count := os.copy_file_range(one.fileno(), two.fileno(), 2_000_000, at, done):
            at, done = at + count, done + count
            if at >= 2_000_100:
                break
        assert at >= 2_000_100
        expected = before[:first].ljust(first, b"\0") + data[100:at]
        assert os.pread(two.fileno(), 9_000_000, 0)[: len(expected)] == expected
    assert (session / to).read_bytes()[: len(expected)] == expected


CHANGE = """
import os, sys
from tests.fsdriver.syscalls import fallocate
at = sys.argv[1] + "/"
fd = os.open(at + "room", os.O_RDWR)
fallocate(fd, 0, 0, 100)
fd = os.open(at + "hole", os.O_RDWR)
fallocate(fd, 3, 0, 1)
fd = os.open(at + "copy", os.O_RDWR)
os.copy_file_range(os.open(at + "source", os.O_RDONLY), fd, 100)
"""


@as_root
def test_who_is_not_root_takes_set_id_bits(public_path: Path, tree: Path):
    mount = Mount(public_path)
    with Repository.create(str(mount.store)) as repository:
        found = SnapshotId(repository.import_directory(str(tree)).snapshot)
        repository.sessions.create("s", (None, None, found))
    at = mount.sessions / "s"
    try:
        mount.start(allow_other=True)
        for name in ["room", "hole", "copy", "source", "root"]:
            (at / name).write_bytes(b"some words")
            (at / name).chmod(0o6777)
        done = run_as_user("-c", CHANGE, str(at))
        assert done.returncode == 0, done.stderr
        with (at / "root").open("r+b") as file:
            fallocate(file.fileno(), 0, 0, 100)
        modes = {name: stat.S_IMODE((at / name).stat().st_mode) for name in os.listdir(at)}
        assert [modes[n] for n in ["room", "hole", "copy"]] == [0o777] * 3
        assert modes["root"] == modes["source"] == 0o6777
        mount.stop()
    finally:
        mount.clear()


def test_reading_with_o_noatime_leaves_the_access_time(session: Path):
    path = session / "read"
    path.write_bytes(b"text")
    os.utime(path, ns=(1_000_000_000, 2_000_000_000))
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.read(fd, 9) == b"text"
    assert os.fstat(fd).st_atime_ns == 1_000_000_000
    os.close(fd)
    assert path.stat().st_atime_ns == 1_000_000_000


def test_no_old_page_stays_after_asynchronous_direct_writes(mount: Mount, session: Path):
    """The page that a write waits to be sent for is read meanwhile: after it was dropped once."""
    pages = 40
    path = session / "direct"
    path.write_bytes(b"o" * 4096 * pages)
    fd, plain = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDONLY)
    reader, into = os.pipe()
    writer = Writer()
    writes = [(4096 * at, b"n" * 4096) for at in range(pages)]
    with mmap.mmap(plain, 4096 * pages, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)  # a fault asks for its page alone, before what waits
        writer.submit(fd, [(0, b"o" * 4096)])  # asks for what comes before a first write
        assert writer.wait() == [4096]
        waiting = memoryview(mapped)[4096 * IN_THE_BACKGROUND :][:4096]
        submit = threading.Thread(target=writer.submit, args=(fd, writes), daemon=True)
        fault = threading.Thread(target=os.write, args=(into, waiting), daemon=True)
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            submit.start()
            until(lambda: not submit.is_alive() or asleep(submit))
            fault.start()
            until(lambda: not fault.is_alive() or asleep(fault))
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        submit.join()
        fault.join()
        waiting.release()
        assert writer.wait() == [4096] * pages
        writer.close()
        assert mapped[:] == b"n" * 4096 * pages
    for open_one in (fd, plain, reader, into):
        os.close(open_one)


def asleep(thread: threading.Thread) -> bool:
    """Tells whether a thread waits inside the kernel for an answer."""
    where = Path(f"/proc/self/task/{thread.native_id}")
    try:
        waits = where.joinpath("wchan").read_text()
        state = where.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    if waits not in {"", "0"}:
        return "fuse" in waits or "request_wait" in waits
    return state in "SD"
