"""A mounted session and a directory of the disk: the same system calls, one world.

What calls return, with what they fail and what can be seen afterwards must be equal, with
descriptors, maps and listings kept open in between, and with commits, forks, resets,
collections, kills and remounts, also plain ones, after any step. Every snapshot stays what
was seen when it was made. test_twins draws longer runs of fewer calls.
"""

import contextlib
import errno
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from engine import Repository
from engine.errors import InUseError
from engine.ids import SnapshotId
from fsdriver import messages
from fsdriver.client import DaemonError
from tests.engine.machines import EXAMPLES, run_machine
from tests.engine.trees import Tree, age, blurred, clone, noise, of_directory, paths
from tests.fsdriver.conftest import PLAIN, Mount, left_behind, until
from tests.fsdriver.syscalls import (
    EXCHANGE,
    KEEP_SIZE,
    NOREPLACE,
    PUNCH_HOLE,
    Name,
    fallocate,
    getdents,
    refused,
    renameat2,
)

pytestmark = pytest.mark.fuse

ROOT = os.geteuid() == 0
OLD = 1_577_836_800_000_000_000
"""2020: a time after it is one that the system has set."""

LONG = [b"x" * 255, b"x" * 256]
NAMES = [*[b"a", b"b", b"c", b"d", b"sub", b"new", b"\xff\n "] * 3, *LONG]
MODES = [0o744, 0o755, 0o700, 0o4755, 0o1777]  # with which of_directory can still look
if ROOT:
    MODES += [0o600, 0o000, 0o444, 0o2070]
TIMES = [0, 1, -1_500_000_001, 999_999_999_999_999_999, 1_200_000_000_000_000_001]
OFFSETS = [0, 1, 4095, 4096, 5000, 130_000]
SIZES = [0, 1, 7, 4096, 5000, 150_000]
MAKE = os.O_CREAT
OPENINGS = [
    os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY, os.O_RDWR | MAKE, os.O_RDWR | MAKE | os.O_EXCL,
    os.O_RDONLY | MAKE, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | MAKE | os.O_TRUNC,
    os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR | MAKE | os.O_APPEND,
    os.O_RDONLY | os.O_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY, os.O_RDONLY | os.O_NOFOLLOW,
    os.O_RDWR | MAKE | os.O_NOFOLLOW, os.O_RDWR | os.O_SYNC, os.O_PATH, os.O_PATH | os.O_NOFOLLOW,
]  # fmt: skip

number = st.integers(0, 1 << 16)
names = st.sampled_from(NAMES)
modes = st.sampled_from(MODES)
times = st.sampled_from(TIMES)
offsets = st.sampled_from(OFFSETS)
sizes = st.sampled_from(SIZES)
old = st.tuples(number, st.none())
"""Something that is there."""
new = st.tuples(number, names)
"""A name in a directory, or below something that is none."""
places = st.one_of(old, old, new)
Place = tuple[int, bytes | None]


class Call(NamedTuple):
    """One call as it is drawn."""

    name: str
    arguments: dict[str, Any]


Calls = list[st.SearchStrategy[Call]]
BY_PATH: Calls = []
WHEN_OPEN: Calls = []
BETWEEN: Calls = []
Method = TypeVar("Method", bound=Callable[..., None])


def drawn(
    table: Calls, weight: int = 1, **arguments: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Puts a method and what its arguments are drawn from into a table.

    Rules of their own would be too many: what is open would hardly ever be used.
    """

    def register(method: Method) -> Method:
        made = partial(Call, method.__name__)
        table.extend([st.fixed_dictionaries(arguments).map(made)] * weight)
        return method

    return register


def make_base(root: Path) -> None:
    for directory in ["a/sub/d", "b", "c", "d/d/d"]:
        (root / directory).mkdir(parents=True)
    (root / "a/b").write_bytes(b"tiny")
    (root / "a/c").write_bytes(noise(5_000, 1))
    (root / "a/sub/a").write_bytes(noise(90_000, 2) + bytes(30_000))
    (root / "b/a").symlink_to("../a/b")
    (root / "b/d").symlink_to("../a/sub")
    os.mkfifo(root / "b/c")
    (root / "sub").write_bytes(b"linked " * 30)
    os.link(root / "sub", root / "a/d")
    os.link(root / "sub", root / "d/d/c")
    (root / "d/a").write_bytes(noise(400_000, 3))
    os.setxattr(root / "a/b", b"user.x", b"1")
    os.setxattr(root / "d", b"user.dir", b"\x00\xff")
    for at in range(30):
        (root / "c" / f"{at:02}").write_bytes(b"%d" % at)
    age(root)


class Pair:
    """The same file opened in the session and on the disk."""

    def __init__(self, ours: int, theirs: int) -> None:
        self.both = (ours, theirs)
        self.kind = stat.S_IFMT(os.fstat(theirs).st_mode)

    def close(self) -> None:
        for fd in self.both:
            with contextlib.suppress(OSError):  # the mount may have ended
                os.close(fd)


class Map:
    """The same file mapped, and its descriptors, which tell how far a map may be touched."""

    def __init__(self, pair: Pair, ours: mmap.mmap, theirs: mmap.mmap) -> None:
        self.pair, self.both = pair, (ours, theirs)

    def reach(self) -> int:
        """Returns how many bytes can be touched, beyond which is SIGBUS."""
        ends = [os.fstat(fd).st_size for fd in self.pair.both]
        return min(*ends, *map(len, self.both))

    def close(self) -> None:
        for shared in self.both:
            shared.close()
        self.pair.close()


class Listing:
    """The same directory being listed while it changes."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.begin()

    def begin(self) -> None:
        self.found: tuple[list[Name], list[Name]] = ([], [])
        self.steady = self.now()
        self.ever = {name for name, _, _ in self.steady}

    def now(self) -> set[tuple[bytes, int, int]]:
        found = set()
        with os.scandir(self.pair.both[1]) as entries:
            for entry in entries:
                kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
                found.add((os.fsencode(entry.name), entry.inode(), kind >> 12))
        return found

    def note(self) -> None:
        now = self.now()
        self.steady &= now
        self.ever |= {name for name, _, _ in now}

    def check(self) -> None:
        """What was there all the time was listed once, and nothing that never was."""
        for fd, found in zip(self.pair.both, self.found, strict=True):
            listed = [name.name for name in found if name.name not in {b".", b".."}]
            assert set(listed) <= self.ever
            kinds = {name.name: (name.kind, name.ino) for name in found}
            for name, _, kind in self.steady:
                assert listed.count(name) == 1, (name, listed, found is self.found[0])
                ino = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
                assert kinds[name] == (kind, ino)


class MountMachine(RuleBasedStateMachine):
    """A session in a mount of its own, and its twin."""

    plain = PLAIN

    def __init__(self) -> None:
        super().__init__()
        self.umask = os.umask(0)
        self.home = Path(tempfile.mkdtemp(prefix="afs"))
        self.disk, self.base = self.home / "twin/disk", self.home / "base"
        self.disk.parent.mkdir()
        self.disk.mkdir()
        make_base(self.disk)
        clone(self.disk, self.base)
        self.mount, self.name = Mount(self.home), "s"
        with Repository.create(str(self.mount.store)) as repository:
            found = SnapshotId(repository.import_directory(str(self.disk)).snapshot)
            repository.sessions.create("s", (None, None, found))
        self.pairs: list[Pair] = []
        self.maps: list[Map] = []
        self.listings: list[Listing] = []
        self.moments: dict[str, Tree] = {}
        self.others: dict[str, Tree] = {}
        self.counter = 0
        self.mount.start(plain=self.plain)

    def teardown(self) -> None:
        try:
            if hasattr(self, "mount"):
                self.end()
        finally:
            self.close_all()
            self.mount.clear()
            os.umask(self.umask)
            shutil.rmtree(self.home)

    def end(self) -> None:
        """All is as it was seen, and when all is closed, nothing is left."""
        self.compare()
        self.close_all()
        self.commit()
        for name, tree in self.others.items():
            assert of_directory(self.mount.sessions / name) == tree
        for identifier, tree in self.moments.items():
            assert of_directory(self.mount.snapshots / identifier) == tree
        until(lambda: self.mount.statistics()["vfs"]["orphans"] == 0)
        self.stop()
        assert left_behind(self.mount) == []
        with self.mount.repository() as repository:
            assert not repository.verify().damage
        assert "level=error" not in self.mount.log()

    # Helpers.

    def stop(self) -> None:
        """Unmounts; somebody who looks at all mounts, as df does, is waited for."""

        def unmounted() -> bool:
            try:
                self.mount.ask(messages.Shutdown())
            except DaemonError as error:
                if "busy" not in str(error):
                    raise
                return False
            return True

        until(unmounted)
        self.mount.wait_for_end()

    @property
    def session(self) -> Path:
        return self.mount.sessions / self.name

    @property
    def roots(self) -> tuple[bytes, bytes]:
        return os.fsencode(self.session), os.fsencode(self.disk)

    def path(self, place: Place, kind: int = 0) -> bytes:
        """Returns what a place is by now: a path below the roots, with a slash before it."""
        which, name = place
        inside = which % 8 != 7 and name is not None  # what can have names in it
        found = [
            b"/" + path if path else path
            for path, _, status in paths(self.roots[1])
            if stat.S_ISDIR(status.st_mode) or not inside
            if not kind or stat.S_IFMT(status.st_mode) == kind
        ] or [b""]
        path = found[which // 8 % len(found)]
        return path if name is None else path + b"/" + name

    def alike(self, call: Callable[[Any], Any], sides: tuple[Any, Any]) -> Any:
        """Makes a call on both sides, which give the same; returns what."""
        ours, theirs = (outcome(call, side) for side in sides)
        assert ours == theirs, f"the session: {ours!r:.300}, the disk: {theirs!r:.300}"
        return ours

    def both(self, call: Callable[[bytes], Any]) -> Any:
        self.sync_maps()
        return self.alike(call, self.roots)

    def on_pair(self, which: int, call: Callable[[int], Any]) -> Any:
        return self.alike(call, self.pair(which).both)

    def on_directory(self, which: int, call: Callable[[int], Any]) -> Any:
        return self.alike(call, self.pair(which, stat.S_IFDIR).both)

    def pair(self, which: int, kind: int = stat.S_IFREG) -> Pair:
        """Returns something open, mostly of this kind; opens it if nothing is."""
        found = [pair for pair in self.pairs if pair.kind == kind]
        if self.pairs and which % 16 == 15:
            found = self.pairs
        if not found:
            at = self.path((which, None), kind)
            flags = os.O_RDONLY if kind == stat.S_IFDIR or not at else os.O_RDWR
            self.keep_open(at, flags, 0)
            return self.pairs[-1]
        return found[which // 16 % len(found)]

    def keep_open(self, path: bytes, flags: int, mode: int) -> None:
        if len(self.pairs) > 6:
            self.pairs.pop(0).close()
        fds: list[int] = []
        try:
            self.both(lambda r: fds.append(os.open(r + path, flags | os.O_NONBLOCK, mode)))
        except AssertionError:
            for fd in fds:
                os.close(fd)
            raise
        if fds:
            self.pairs.append(Pair(fds[0], fds[1]))

    def sync_maps(self) -> None:
        """The time of a written map is the session's only once it is synced."""
        for shared in self.maps:
            self.alike(lambda side: side.flush(), shared.both)

    def close_all(self) -> None:
        for shared in self.maps:
            shared.close()
        for pair in [*(listing.pair for listing in self.listings), *self.pairs]:
            pair.close()
        self.maps, self.listings, self.pairs = [], [], []

    def fresh_name(self) -> str:
        self.counter += 1
        return f"n{self.counter}"

    # Names.

    @drawn(BY_PATH, at=new, mode=modes)
    def mkdir(self, at: Place, mode: int) -> None:
        path = self.path(at)
        self.both(lambda root: os.mkdir(root + path, mode))

    @drawn(BY_PATH, at=places)
    def rmdir(self, at: Place) -> None:
        path = self.path(at)
        if path:
            self.both(lambda root: os.rmdir(root + path))

    @drawn(BY_PATH, at=places)
    def unlink(self, at: Place) -> None:
        path = self.path(at)
        self.both(lambda root: os.unlink(root + path))

    @drawn(BY_PATH, at=old)
    def remove_tree(self, at: Place) -> None:
        path = self.path(at, stat.S_IFDIR)
        if path:
            self.both(lambda root: shutil.rmtree(root + path))

    @drawn(
        BY_PATH,
        at=places,
        to=places,
        flags=st.sampled_from([0, 0, 0, NOREPLACE, EXCHANGE, EXCHANGE, 3]),
    )
    def rename(self, at: Place, to: Place, flags: int) -> None:
        one, other = self.path(at), self.path(to)
        if one and other:  # the roots themselves are no part of the twins
            self.both(lambda root: renameat2(root + one, root + other, flags))

    @drawn(BY_PATH, at=old, to=new)
    def move(self, at: Place, to: Place) -> None:
        self.rename(at, to, 0)

    @drawn(BY_PATH, at=old, to=new, follow=st.booleans())
    def link(self, at: Place, to: Place, follow: bool) -> None:
        one, other = self.path(at), self.path(to)
        self.both(lambda root: os.link(root + one, root + other, follow_symlinks=follow))

    @drawn(BY_PATH, at=new, to=st.sampled_from([b"a", b"sub/..", b".", b"../a/b", b"../nothing/d"]))
    def symlink(self, at: Place, to: bytes) -> None:
        path = self.path(at)
        self.both(lambda root: os.symlink(to, root + path))

    @drawn(BY_PATH, at=new, mode=modes)
    def mkfifo(self, at: Place, mode: int) -> None:
        path = self.path(at)
        self.both(lambda root: os.mkfifo(root + path, mode))

    @drawn(BY_PATH, at=new, size=sizes, mode=modes)
    def create(self, at: Place, size: int, mode: int) -> None:
        path, data = self.path(at), noise(size, at[0])
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK

        def call(root: bytes) -> int:
            fd = os.open(root + path, flags, mode)
            try:
                return os.write(fd, data)
            finally:
                os.close(fd)

        self.both(call)

    @drawn(BY_PATH, at=old)
    def no_unnamed_files(self, at: Place) -> None:
        with refused(errno.EOPNOTSUPP, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.EACCES):
            os.open(self.roots[0] + self.path(at), os.O_TMPFILE | os.O_RDWR)

    # Attributes and contents, by path.

    @drawn(BY_PATH, at=places, offset=offsets)
    def truncate(self, at: Place, offset: int) -> None:
        path = self.path(at)
        self.both(lambda root: os.truncate(root + path, offset))

    @drawn(BY_PATH, at=old, mode=modes)
    def chmod(self, at: Place, mode: int) -> None:
        path = self.path(at)
        self.both(lambda root: os.chmod(root + path, mode))

    @drawn(BY_PATH, at=places, ns=st.one_of(st.none(), times), follow=st.booleans())
    def utime(self, at: Place, ns: int | None, follow: bool) -> None:
        path, moment = self.path(at), None if ns is None else (ns, ns)
        if moment is None:
            self.both(lambda root: os.utime(root + path, follow_symlinks=follow))
        else:
            self.both(lambda root: os.utime(root + path, ns=moment, follow_symlinks=follow))

    @drawn(
        BY_PATH,
        at=old,
        name=st.sampled_from([b"user.x", b"user.y", b"user." + b"n" * 250, b"user." + b"n" * 251]),
        value=st.sampled_from([b"", b"\x00value", b"v" * 200, None]),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
        follow=st.booleans(),
    )
    def xattr(self, at: Place, name: bytes, value: bytes | None, flags: int, follow: bool) -> None:
        path = self.path(at)
        if value is None:
            self.both(lambda root: os.removexattr(root + path, name, follow_symlinks=follow))
        else:
            self.both(lambda r: os.setxattr(r + path, name, value, flags, follow_symlinks=follow))
        self.both(lambda root: os.getxattr(root + path, name, follow_symlinks=follow))
        self.both(lambda root: sorted(os.listxattr(root + path, follow_symlinks=follow)))

    @drawn(BY_PATH, at=places)
    def look(self, at: Place) -> None:
        path = self.path(at)
        self.both(lambda root: seen(os.lstat(root + path)))
        self.both(lambda root: seen(os.stat(root + path)))
        self.both(lambda root: os.readlink(root + path))
        self.both(lambda root: sorted(os.listdir(root + path)))
        self.both(lambda root: os.access(root + path, os.W_OK))

    @drawn(BY_PATH, at=places, offset=offsets, size=sizes)
    def read(self, at: Place, offset: int, size: int) -> None:
        path = self.path(at)
        self.both(
            lambda root: opened(root + path, os.O_RDONLY, lambda f: os.pread(f, size, offset))
        )

    @drawn(
        BY_PATH, at=places, offset=offsets, size=sizes, flags=st.sampled_from([0, 0, os.O_APPEND])
    )
    def write(self, at: Place, offset: int, size: int, flags: int) -> None:
        path, data = self.path(at), noise(size, offset)
        flags |= os.O_WRONLY
        self.both(lambda root: opened(root + path, flags, lambda f: os.pwrite(f, data, offset)))

    @drawn(BY_PATH, at=old, offset=offsets)
    def read_past_the_cache(self, at: Place, offset: int) -> None:
        """O_DIRECT asks the daemon; the disk would want everything aligned."""
        path = self.path(at)
        if stat.S_ISREG(os.lstat(self.roots[1] + path).st_mode):
            self.sync_maps()
            direct, plain = (
                outcome(opened, root + path, flags, partial(read_at, offset))
                for root, flags in zip(self.roots, (os.O_RDONLY | os.O_DIRECT, 0), strict=True)
            )
            assert direct == plain

    @drawn(BY_PATH, at=old, data=st.binary(min_size=1, max_size=9), offset=offsets)
    def map_privately(self, at: Place, data: bytes, offset: int) -> None:
        path = self.path(at)

        def call(fd: int) -> bytes | None:
            size = os.fstat(fd).st_size
            if not stat.S_ISREG(os.fstat(fd).st_mode) or offset >= size:
                return None
            with mmap.mmap(fd, size, access=mmap.ACCESS_COPY) as private:
                private[offset : offset + len(data)] = data[: size - offset]
                return bytes(private[offset - 1 :]) + os.pread(fd, 20, offset)

        self.both(lambda root: opened(root + path, os.O_RDONLY, call))

    # What is kept open.

    @drawn(WHEN_OPEN, at=places, flags=st.sampled_from(OPENINGS), mode=modes)
    def open(self, at: Place, flags: int, mode: int) -> None:
        self.keep_open(self.path(at), flags, mode)

    @drawn(WHEN_OPEN, which=number)
    def close(self, which: int) -> None:
        if self.pairs:
            self.pairs.pop(which % len(self.pairs)).close()

    @drawn(WHEN_OPEN, which=number)
    def fstat(self, which: int) -> None:
        self.sync_maps()
        self.on_pair(which, lambda fd: seen(os.fstat(fd)))
        numbers = [os.fstat(fd).st_ino for fd in self.pair(which).both]
        ours, theirs = self.roots
        for path, _, status in paths(theirs):
            number = os.lstat(ours + b"/" + path).st_ino
            assert (number == numbers[0]) == (status.st_ino == numbers[1]), path

    @drawn(WHEN_OPEN, which=number, offset=offsets, size=sizes)
    def pread(self, which: int, offset: int, size: int) -> None:
        self.on_pair(which, lambda fd: os.pread(fd, size, offset))

    @drawn(WHEN_OPEN, which=number, offset=offsets, size=sizes)
    def pwrite(self, which: int, offset: int, size: int) -> None:
        data = noise(size, which % 100)
        self.on_pair(which, lambda fd: os.pwrite(fd, data, offset))

    @drawn(
        WHEN_OPEN, which=number, to=st.sampled_from([0, -5, 3]), whence=st.sampled_from([0, 1, 2])
    )
    def seek(self, which: int, to: int, whence: int) -> None:
        if stat.S_ISREG(os.fstat(self.pair(which).both[1]).st_mode):  # others have no places
            self.on_pair(which, lambda fd: os.lseek(fd, to, whence))

    @drawn(
        WHEN_OPEN,
        which=number,
        size=sizes,
        flags=st.sampled_from([0, 0, os.RWF_SYNC, os.RWF_APPEND]),
    )
    def write_on(self, which: int, size: int, flags: int) -> None:
        parts = [noise(size // 2, which % 100), b"and", noise(size // 2, which % 99)]
        self.on_pair(which, lambda fd: os.pwritev(fd, parts, -1, flags))
        self.on_pair(which, lambda fd: os.lseek(fd, 0, os.SEEK_CUR))

    @drawn(WHEN_OPEN, which=number, size=sizes)
    def read_on(self, which: int, size: int) -> None:
        self.on_pair(which, lambda fd: os.read(fd, size))

    @drawn(WHEN_OPEN, which=number, offset=offsets)
    def ftruncate(self, which: int, offset: int) -> None:
        self.on_pair(which, lambda fd: os.ftruncate(fd, offset))

    @drawn(WHEN_OPEN, which=number, mode=modes, ns=times)
    def change(self, which: int, mode: int, ns: int) -> None:
        self.sync_maps()
        self.on_pair(which, lambda fd: os.fchmod(fd, mode))
        self.on_pair(which, lambda fd: os.utime(fd, ns=(ns, ns)))
        status = os.fstat(self.pair(which).both[1])
        if status.st_nlink or not stat.S_ISDIR(status.st_mode):  # a session refuses that
            self.on_pair(which, lambda fd: os.setxattr(fd, b"user.open", b"%d" % mode))
            self.on_pair(which, lambda fd: os.getxattr(fd, b"user.open"))

    @drawn(WHEN_OPEN, which=number, data=st.booleans())
    def sync(self, which: int, data: bool) -> None:
        self.on_pair(which, os.fdatasync if data else os.fsync)

    @drawn(
        WHEN_OPEN,
        which=number,
        mode=st.sampled_from([0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE]),
        at=offsets,
    )
    def allocate(self, which: int, mode: int, at: int) -> None:
        """fallocate(2), where a session has it."""
        pair = self.pair(which)
        if outcome(lambda fd: fallocate(fd, mode, at, 5000), pair.both[0]) == "ENOTSUP":
            return
        self.alike(lambda fd: fallocate(fd, mode, at, 5000), pair.both)

    @drawn(WHEN_OPEN, which=number, offset=offsets)
    def find_holes(self, which: int, offset: int) -> None:
        """A session may say that everything is data; it finds no hole where there is data."""
        for fd in self.pair(which).both:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            data = outcome(lambda fd: os.lseek(fd, offset, os.SEEK_DATA), fd)
            hole = outcome(lambda fd: os.lseek(fd, offset, os.SEEK_HOLE), fd)
            os_error = outcome(lambda fd: os.lseek(fd, 0, os.SEEK_SET), fd)
            if isinstance(os_error, str):  # O_PATH
                assert data == hole == os_error
            elif offset >= status.st_size:
                assert data == hole == "ENXIO"
            else:
                assert offset <= hole <= status.st_size
                assert data == "ENXIO" or offset <= data < status.st_size
        self.alike(lambda fd: os.pread(fd, 200_000, offset), self.pair(which).both)

    @drawn(WHEN_OPEN, which=number, to=number, offset=offsets, at=offsets)
    def copy_range(self, which: int, to: int, offset: int, at: int) -> None:
        sources, targets = self.pair(which).both, self.pair(to).both
        if any(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in (sources[1], targets[1])):
            return

        def call(side: int) -> int:
            return os.copy_file_range(sources[side], targets[side], 3000, offset, at)

        self.alike(call, (0, 1))

    @drawn(
        WHEN_OPEN,
        which=number,
        name=names,
        flags=st.sampled_from([os.O_RDONLY, os.O_RDWR | os.O_CREAT]),
    )
    def open_in(self, which: int, name: bytes, flags: int) -> None:
        flags |= os.O_NONBLOCK
        self.on_directory(which, lambda fd: os.close(os.open(name, flags, 0o700, dir_fd=fd)))

    @drawn(WHEN_OPEN, which=number, name=names, other=names)
    def change_in(self, which: int, name: bytes, other: bytes) -> None:
        """Names in a directory that is open, perhaps removed."""
        self.on_directory(which, lambda fd: os.mkdir(name, 0o755, dir_fd=fd))
        self.on_directory(which, lambda fd: os.rename(name, other, src_dir_fd=fd, dst_dir_fd=fd))
        self.on_directory(which, lambda fd: sorted(os.listdir(fd)))
        self.on_directory(which, lambda fd: os.unlink(name, dir_fd=fd))

    # What is mapped.

    def map(self, which: int) -> Map | None:
        """Returns a map; makes one of something that is open if there is none, or few."""
        if self.maps and (len(self.maps) > 2 or which % 3):
            return self.maps[which // 3 % len(self.maps)]
        pair, maps = self.pair(which), []
        status = [os.fstat(fd) for fd in pair.both]
        if not all(stat.S_ISREG(s.st_mode) and s.st_size for s in status):
            return None
        size = status[1].st_size
        try:
            self.alike(lambda fd: maps.append(mmap.mmap(fd, size)), pair.both)
        except AssertionError:
            for shared in maps:
                shared.close()
            raise
        if not maps:
            return None
        self.maps.append(Map(Pair(*(os.dup(fd) for fd in pair.both)), *maps))
        return self.maps[-1]

    @drawn(WHEN_OPEN, which=number, offset=offsets, size=sizes, synced=st.booleans())
    def write_map(self, which: int, offset: int, size: int, synced: bool) -> None:
        shared, data = self.map(which), noise(size, which % 98)
        size = min(size, shared.reach() - offset) if shared else 0
        if shared and size > 0:
            for side in shared.both:
                side[offset : offset + size] = data[:size]
            if synced:
                self.alike(lambda side: side.flush(), shared.both)

    @drawn(WHEN_OPEN, which=number, offset=offsets, size=sizes)
    def read_map(self, which: int, offset: int, size: int) -> None:
        shared = self.map(which)
        size = min(size, shared.reach() - offset) if shared else 0
        if shared and size > 0:
            self.alike(lambda side: side[offset : offset + size], shared.both)

    @drawn(WHEN_OPEN, which=number)
    def unmap(self, which: int) -> None:
        if self.maps:
            self.maps.pop(which % len(self.maps)).close()

    # What is being listed.

    def listing(self, which: int) -> Listing:
        """Returns a listing that is under way; begins one if there is none, or one."""
        if not self.listings or (len(self.listings) < 2 and which % 2):
            path, fds = self.path((which, None), stat.S_IFDIR), []
            flags = os.O_RDONLY | os.O_DIRECTORY
            self.both(lambda root: fds.append(os.open(root + path, flags)))
            self.listings.append(Listing(Pair(fds[0], fds[1])))
        return self.listings[which // 2 % len(self.listings)]

    @drawn(WHEN_OPEN, which=number, size=st.sampled_from([280, 300, 600]))
    def list_on(self, which: int, size: int) -> None:
        listing = self.listing(which)
        for fd, found in zip(listing.pair.both, listing.found, strict=True):
            with contextlib.suppress(FileNotFoundError):  # removed
                found += getdents(fd, size)

    @drawn(WHEN_OPEN, which=number, again=st.booleans())
    def end_of_listing(self, which: int, again: bool) -> None:
        listing = self.listing(which)
        for fd, found in zip(listing.pair.both, listing.found, strict=True):
            with contextlib.suppress(FileNotFoundError):
                while part := getdents(fd, 500):
                    found += part
        listing.check()
        if again:
            for fd in listing.pair.both:
                os.lseek(fd, 0, os.SEEK_SET)
            listing.begin()
        else:
            self.listings.remove(listing)
            listing.pair.close()

    def note_changes(self) -> None:
        for listing in self.listings:
            listing.note()

    # What happens in between.

    @drawn(BETWEEN, 3)
    def compare(self) -> None:
        self.sync_maps()
        assert blurred(of_directory(self.session)) == blurred(of_directory(self.disk))

    @drawn(BETWEEN, 4)
    def commit(self) -> None:
        self.sync_maps()
        found = self.mount.commit(self.name, "latest").hex()
        moment = of_directory(self.mount.snapshots / found)
        assert blurred(moment) == blurred(of_directory(self.disk))
        assert of_directory(self.session) == moment
        assert os.readlink(self.mount.snapshots / "latest") == found
        self.moments[found] = moment
        shutil.rmtree(self.base)
        clone(self.disk, self.base)

    @drawn(BETWEEN, which=number)
    def look_back(self, which: int) -> None:
        """An earlier snapshot is what it was, and can be written by nobody."""
        if not self.moments:
            return
        found = sorted(self.moments)[which % len(self.moments)]
        root = self.mount.snapshots / found
        assert of_directory(root) == self.moments[found]
        path = sorted(self.moments[found])[which % len(self.moments[found])]
        for call in (os.unlink, os.rmdir, lambda at: os.truncate(at, 0)):
            assert isinstance(outcome(call, os.fsencode(root) + b"/" + path), str)
        with refused(errno.EROFS):
            os.mkdir(root / "not here")

    @drawn(BETWEEN, 2, go_on=st.booleans())
    def fork(self, go_on: bool) -> None:
        self.sync_maps()
        name = self.fresh_name()
        self.mount.ask(messages.Fork(self.name, name))
        moment = of_directory(self.mount.sessions / name)
        assert blurred(moment) == blurred(of_directory(self.disk))
        if go_on:
            self.close_all()
            name, self.name = self.name, name
        self.others[name] = of_directory(self.mount.sessions / name)
        assert self.others[name] == moment

    @drawn(BETWEEN, which=number)
    def change_other(self, which: int) -> None:
        """What is done in one session is not seen in another."""
        if not self.others:
            return
        name = sorted(self.others)[which % len(self.others)]
        root = self.mount.sessions / name
        assert of_directory(root) == self.others[name]
        for path in os.listdir(root):
            if (root / path).is_file():
                with (root / path).open("ab") as file:
                    file.write(b"other")
        os.mkdir(root / self.fresh_name())
        self.others[name] = of_directory(root)

    @drawn(BETWEEN, which=number)
    def remove_other(self, which: int) -> None:
        if not self.others:
            return
        name = sorted(self.others)[which % len(self.others)]
        self.mount.ask(messages.Remove(name, force=True))
        del self.others[name]
        assert name not in os.listdir(self.mount.sessions)

    @drawn(BETWEEN)
    def reset(self) -> None:
        self.close_all()
        self.mount.ask(messages.Reset(self.name, force=True))
        shutil.rmtree(self.disk)
        clone(self.base, self.disk)

    @drawn(BETWEEN)
    def rename_session(self) -> None:
        """Whatever is open goes on."""
        name = self.fresh_name()
        self.mount.ask(messages.Rename(self.name, name))
        self.name = name

    @drawn(BETWEEN)
    def collect(self) -> None:
        with self.mount.repository() as repository:
            repository.collect()
            assert not repository.verify().damage

    @drawn(BETWEEN, which=number)
    def remove_snapshot(self, which: int) -> None:
        if len(self.moments) < 2:
            return
        found = sorted(self.moments)[which % len(self.moments)]
        with self.mount.repository() as repository, contextlib.suppress(InUseError):
            repository.remove_snapshot(SnapshotId(bytes.fromhex(found)))
            del self.moments[found]
        self.mount.ask(messages.Refresh())
        assert (found in os.listdir(self.mount.snapshots)) == (found in self.moments)
        assert (self.mount.snapshots / found).exists() == (found in self.moments)

    @drawn(BETWEEN, plain=st.booleans())
    def remount(self, plain: bool) -> None:
        self.close_all()
        self.stop()
        self.mount.start(plain=plain or PLAIN)

    @drawn(BETWEEN, plain=st.booleans())
    def kill(self, plain: bool) -> None:
        self.sync_maps()
        self.mount.kill()
        self.close_all()
        self.mount.start(plain=plain or PLAIN)

    @drawn(BETWEEN)
    def numbers_stay(self) -> None:
        """The kernel forgets what it can, asks again, and finds the same numbers."""
        if not ROOT:
            return
        before = numbers(self.session)
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert numbers(self.session) == before

    # What the machine draws.

    def make(self, call: Call) -> None:
        getattr(self, call.name)(**call.arguments)
        self.note_changes()

    @rule(calls=st.lists(st.one_of(BY_PATH), min_size=1, max_size=12))
    def by_path(self, calls: list[Call]) -> None:
        for call in calls:
            self.make(call)

    @rule(calls=st.lists(st.one_of(WHEN_OPEN), min_size=1, max_size=12))
    def when_open(self, calls: list[Call]) -> None:
        for call in calls:
            self.make(call)

    @rule(calls=st.lists(st.one_of(BY_PATH + WHEN_OPEN), min_size=1, max_size=12))
    def mixed(self, calls: list[Call]) -> None:
        for call in calls:
            self.make(call)

    @rule(call=st.one_of(BETWEEN))
    def between(self, call: Call) -> None:
        self.make(call)


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a call gives, or the name of its error."""
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


def opened(path: bytes, flags: int, call: Callable[[int], Any]) -> Any:
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        return call(fd)
    finally:
        os.close(fd)


def read_at(offset: int, fd: int) -> bytes:
    return os.pread(fd, 200_000, offset)


def numbers(root: Path) -> dict[str, int]:
    found = {"": root.stat().st_ino}
    for directory, below, files in os.walk(root):
        for name in [*below, *files]:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = os.lstat(path).st_ino
    return found


@pytest.mark.timeout(300 + 4 * EXAMPLES)
def test_a_mounted_session_is_like_a_directory() -> None:
    run_machine(MountMachine, 25, 20)
