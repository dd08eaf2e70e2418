"""The same system calls, drawn at random, on a mounted session and on a directory of the disk.

Results and errnos must be equal call by call, the trees every so often; commits, forks,
remounts, kills of the daemon and the loss of the kernel's caches come in between. A failure
names its seed and the last calls; AMALGAMFS_EXAMPLES runs that many seeds.
"""

import contextlib
import errno
import mmap
import os
import random
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Repository
from engine.ids import SnapshotId
from fsdriver import messages
from tests.engine.trees import Tree, age, blurred, clone, noise, of_directory
from tests.fsdriver.conftest import Mount
from tests.fsdriver.syscalls import EXCHANGE, NOREPLACE, renameat2

pytestmark = pytest.mark.fuse

SEEDS = int(os.environ.get("AMALGAMFS_EXAMPLES") or 4)
CALLS = 1200
FOR_ALL = os.O_CREAT | os.O_NONBLOCK  # or a fifo would be waited for
NAMES = ["a", "b", "c", "d", "sub", "\udcff\n "]
OPENINGS = [
    os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_APPEND,
    os.O_RDONLY | os.O_DIRECTORY, os.O_RDWR | os.O_NOFOLLOW, os.O_RDWR | os.O_SYNC,
]  # fmt: skip
MODES = [0o744, 0o755, 0o700, 0o4755, 0o1777]  # with which of_directory can still look
if os.geteuid() == 0:
    MODES += [0o600, 0o000, 0o444]
TIMES = [0, 1, -1_500_000_001, 999_999_999_999_999_999, 1_200_000_000_000_000_001]
OLD = 1_577_836_800_000_000_000


def make_base(root: Path) -> None:
    for directory in ["a/sub/d", "b", "c", "d/d/d"]:
        (root / directory).mkdir(parents=True)
    (root / "a/b").write_bytes(b"tiny")
    (root / "a/c").write_bytes(noise(5_000, 1))
    (root / "a/sub/a").write_bytes(noise(90_000, 2) + bytes(30_000))
    (root / "b/a").symlink_to("../a/b")
    os.mkfifo(root / "b/c")
    (root / "sub").write_bytes(b"linked " * 30)
    os.link(root / "sub", root / "a/d")
    os.link(root / "sub", root / "d/d/c")
    (root / "d/a").write_bytes(noise(400_000, 3))
    os.setxattr(root / "a/b", b"user.x", b"1")
    os.setxattr(root / "d", b"user.dir", b"\x00\xff")
    age(root)


class Twins:
    """A session, a directory, and what is open in both."""

    def __init__(self, mount: Mount, disk: Path, dice: random.Random) -> None:
        self.mount, self.disk, self.dice = mount, disk, dice
        self.name = "s"
        kind = subprocess.run(["stat", "-fc", "%T", disk], capture_output=True, check=True)
        self.is_in_memory = kind.stdout == b"tmpfs\n"
        self.handles: list[tuple[int, int]] = []
        self.history: list[str] = []
        self.moments: dict[str, Tree] = {}
        self.forks = 0

    @property
    def session(self) -> Path:
        return self.mount.sessions / self.name

    # What is done to both.

    def path(self) -> str:
        deep = self.dice.choice([1, 1, 2, 2, 3])
        return "/".join(self.dice.choice(NAMES) for _ in range(deep))

    def both(self, what: str, call: Callable[[Path], Any]) -> Any:
        """Makes a call on the session and on the disk; returns what it gave."""
        self.history.append(what)
        outcomes = [outcome(call, root) for root in (self.session, self.disk)]
        ours, theirs = outcomes
        assert ours == theirs, f"{what}: the session says {ours!r:.200}, the disk {theirs!r:.200}"
        return outcomes[0]

    def write_map(self, at: Path, path: str, offset: int, data: bytes) -> bytes:
        before = write_map(at / path, offset, data)
        if before and at == self.disk and self.is_in_memory:
            os.utime(at / path)  # which gives no file a time that is written through a map
        return before

    def on_handle(self, what: str, call: Callable[[int], Any]) -> None:
        if not self.handles:
            return
        self.history.append(what)
        outcomes = [outcome(call, fd) for fd in self.dice.choice(self.handles)]
        ours, theirs = outcomes
        assert ours == theirs, f"{what}: the session says {ours!r:.200}, the disk {theirs!r:.200}"

    def open(self) -> None:
        path, flags, mode = self.path(), self.dice.choice(OPENINGS), self.dice.choice(MODES)
        flags |= os.O_NONBLOCK
        if len(self.handles) > 6:
            self.close()
        opened: list[int] = []

        def call(root: Path) -> str:
            opened.append(os.open(root / path, flags, mode))
            return "opened"

        self.both(f"open({path!r}, {flags:#o}, {mode:#o})", call)
        if len(opened) == 2:
            self.handles.append((opened[0], opened[1]))

    def close(self) -> None:
        if self.handles:
            self.history.append("close")
            for fd in self.handles.pop(self.dice.randrange(len(self.handles))):
                with contextlib.suppress(OSError):  # the mount may have ended
                    os.close(fd)

    def close_all(self) -> None:
        while self.handles:
            self.close()

    def step(self) -> None:
        dice, path, other = self.dice, self.path(), self.path()
        offset, size = (
            dice.choice([0, 1, 4095, 5000, 130_000]),
            dice.choice([0, 1, 7, 5000, 150_000]),
        )
        data = noise(size, dice.randrange(100))
        mode, ns = dice.choice(MODES), dice.choice(TIMES)
        name = dice.choice([b"user.x", b"user.y"])
        flags = dice.choice([0, 0, 0, NOREPLACE, EXCHANGE, EXCHANGE])
        calls: list[tuple[str, Callable[[Path], Any]]] = [
            (f"mkdir({path!r}, {mode:#o})", lambda at: os.mkdir(at / path, mode)),
            (f"rmdir({path!r})", lambda at: os.rmdir(at / path)),
            (f"unlink({path!r})", lambda at: os.unlink(at / path)),
            (f"rename({path!r}, {other!r}, {flags})",
             lambda at: renameat2(at / path, at / other, flags)),
            (f"link({path!r}, {other!r})",
             lambda at: os.link(at / path, at / other, follow_symlinks=False)),
            (f"symlink({other!r}, {path!r})", lambda at: os.symlink(other, at / path)),
            (f"readlink({path!r})", lambda at: os.readlink(at / path)),
            (f"mkfifo({path!r}, {mode:#o})", lambda at: os.mkfifo(at / path, mode)),
            (f"write({path!r}, {size})", lambda at: write(at / path, 0, data, os.O_CREAT)),
            (f"write({path!r}, {size}, {offset})", lambda at: write(at / path, offset, data, 0)),
            (f"truncate({path!r}, {offset})", lambda at: os.truncate(at / path, offset)),
            (f"read({path!r})", lambda at: read(at / path)),
            (f"map({path!r}, {offset})", lambda at: self.write_map(at, path, offset, data)),
            (f"chmod({path!r}, {mode:#o})", lambda at: os.chmod(at / path, mode)),
            (f"utime({path!r}, {ns})", lambda at: os.utime(at / path, ns=(ns, ns))),
            (f"setxattr({path!r}, {name!r})", lambda at: os.setxattr(at / path, name, data[:200])),
            (f"removexattr({path!r}, {name!r})", lambda at: os.removexattr(at / path, name)),
            (f"listxattr({path!r})", lambda at: sorted(os.listxattr(at / path))),
            (f"listdir({path!r})", lambda at: sorted(os.listdir(at / path))),
            (f"lstat({path!r})", lambda at: seen(os.lstat(at / path))),
            (f"stat({path!r})", lambda at: seen(os.stat(at / path))),
        ]  # fmt: skip
        on_handles: list[tuple[str, Callable[[int], Any]]] = [
            ("fstat", lambda fd: seen(os.fstat(fd))),
            (f"pread({offset})", lambda fd: os.pread(fd, 200_000, offset)),
            (f"pwrite({offset}, {size})", lambda fd: os.pwrite(fd, data, offset)),
            (f"ftruncate({offset})", lambda fd: os.ftruncate(fd, offset)),
            (f"fchmod({mode:#o})", lambda fd: os.fchmod(fd, mode)),
            (f"fsetxattr({name!r})", lambda fd: set_xattr(fd, name, data[:200])),
            ("fsync", os.fsync),
            ("listdir", lambda fd: sorted(os.listdir(fd))),
            (f"openat({other!r})", lambda fd: os.close(os.open(other, FOR_ALL, dir_fd=fd))),
        ]
        kind = dice.randrange(20)
        if kind < 2:
            self.open()
        elif kind == 2:
            self.close()
        elif kind < 8:
            self.on_handle(*dice.choice(on_handles))
        else:
            self.both(*dice.choice(calls))

    # What is done in between.

    def compare(self) -> Tree:
        session = blurred(of_directory(self.session))
        assert session == blurred(of_directory(self.disk)), "the trees differ"
        return session

    def commit(self) -> None:
        self.history.append("commit")
        found = self.mount.commit(self.name).hex()
        moment = blurred(of_directory(self.disk))
        assert blurred(of_directory(self.mount.snapshots / found)) == moment
        self.moments[found] = moment

    def fork(self) -> None:
        self.close_all()
        self.forks += 1
        name = f"fork{self.forks}"
        self.history.append(f"fork {name}")
        self.mount.ask(messages.Fork(self.name, name))
        self.name = name

    def remount(self) -> None:
        self.close_all()
        self.history.append("remount")
        self.mount.stop()
        self.mount.start()

    def kill(self) -> None:
        self.history.append("kill")
        self.mount.kill()
        self.close_all()
        self.mount.start()

    def drop_caches(self) -> None:
        if os.geteuid() == 0:
            self.history.append("drop caches")
            Path("/proc/sys/vm/drop_caches").write_text("2")


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def seen(status: os.stat_result) -> tuple[int, ...]:
    """Returns what must be equal: of a directory not its size and links, of a time not now."""
    time = min(status.st_mtime_ns, OLD)
    if stat.S_ISDIR(status.st_mode):
        return (status.st_mode, time, status.st_uid, status.st_gid)
    return (status.st_mode, time, status.st_uid, status.st_gid, status.st_size, status.st_nlink)


def write(path: Path, offset: int, data: bytes, flags: int) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags, 0o644)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def set_xattr(fd: int, name: bytes, value: bytes) -> None:
    """Sets an attribute, but of a removed directory, which a session refuses."""
    status = os.fstat(fd)
    if status.st_nlink or not stat.S_ISDIR(status.st_mode):
        os.setxattr(fd, name, value)


def write_map(path: Path, offset: int, data: bytes) -> bytes:
    """Writes through a shared map as far as the file goes; returns what was there."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        size = os.fstat(fd).st_size
        if not stat.S_ISREG(os.fstat(fd).st_mode) or size <= offset:
            return b""
        with mmap.mmap(fd, size) as shared:
            part = data[: size - offset]
            before = shared[offset : offset + len(part)]
            shared[offset : offset + len(part)] = part
            shared.flush()
            return before
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "base"
    root.mkdir()
    make_base(root)
    return root


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_session_and_its_twin(base, tmp_path, seed):
    before = os.umask(0o022)
    clone(base, tmp_path / "disk")
    mount = Mount(tmp_path)
    with Repository.create(str(mount.store)) as repository:
        found = repository.import_directory(str(base)).snapshot
        repository.sessions.create("s", (None, None, SnapshotId(found)))
    dice = random.Random(seed)
    twins = Twins(mount, tmp_path / "disk", dice)
    try:
        mount.start()
        for number in range(CALLS):
            twins.step()
            if number % 50 == 49:
                twins.compare()
                dice.choice([
                    twins.commit, twins.commit, twins.commit, twins.drop_caches, twins.fork,
                    twins.remount, twins.kill, twins.compare, twins.compare,
                ])()  # fmt: skip
        twins.close_all()
        twins.commit()
        twins.compare()
        for identifier, moment in twins.moments.items():
            assert blurred(of_directory(mount.snapshots / identifier)) == moment
        assert mount.statistics()["vfs"]["orphans"] == 0
        mount.stop()
        with Repository.open(str(mount.store)) as repository:
            assert not repository.verify().damage
        assert "level=error" not in mount.log()
    except BaseException as error:
        error.add_note("the last calls were\n    " + "\n    ".join(twins.history[-40:]))
        raise
    finally:
        os.umask(before)
        twins.close_all()
        mount.clear()
