"""Sessions against a real directory: the same calls on both, in any order, and the same trees.

Steps of a commit, forks, restarts, collections and the kernel's forgetting come in between.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import engine.mounted.overlay
import engine.sessions.sessions
import engine.trees.directory
from engine import Repository, SnapshotId
from engine.mounted.inodes import Changes
from engine.mounted.vfs import Vfs
from engine.sessions.freezing import Freeze
from engine.sessions.upper import Upper, rename
from engine.storage.nodes import Owner
from tests.engine.kernel import EXCHANGE, NOREPLACE, Kernel
from tests.engine.machines import run_machine
from tests.engine.trees import Tree, age, blurred, noise, of_entry, paths
from tests.engine.twin import Twin

REG, DIR, LNK, FIFO = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO
NAMES = [b"a", b"b", b"c", b"d", b"sub", b"deep", b"new", b"new2", b"\xff\n ", b"x" * 255]
TIMES = [0, 1, -1_500_000_001, 999_999_999_999_999_999, 1_500_000_000_000_000_001]
MODES = [0o644, 0o755, 0o400, 0o000, 0o111, 0o1777]
SIZES = [0, 1, 127, 129, 4096, 17_000, 300_000]

number = st.integers(0, 1 << 16)
names = st.sampled_from(NAMES)


def make_base(root: Path) -> None:
    """A small tree with everything in it that a tree can hold."""
    for directory in ["a", "a/sub", "a/sub/deep", "b", "empty", "d/deep/deep/deep"]:
        (root / directory).mkdir(parents=True)
    (root / "a/b").write_bytes(b"tiny")
    (root / "a/c").write_bytes(noise(5_000, 1))
    (root / "a/sub/d").write_bytes(noise(90_000, 2) + bytes(20_000))
    (root / "a/sub/deep/a").write_bytes(b"")
    (root / "b/a").symlink_to("../a/b")
    os.mkfifo(root / "b/c")
    (root / "c").write_bytes(b"linked " * 30)
    os.link(root / "c", root / "a/new")
    os.link(root / "c", root / "d/deep/deep/c")
    (root / "d/a").write_bytes(b"linked " * 30)
    os.link(root / "d/a", root / "d/b")
    (root / "d/deep/a").symlink_to("nowhere")
    os.link(root / "d/deep/a", root / "d/deep/b", follow_symlinks=False)
    with (root / "d/sub").open("wb") as file:
        file.seek(100_000)
        file.write(b"end")
    os.setxattr(root / "a/b", b"user.x", b"1")
    os.setxattr(root / "a/sub", b"user.dir", b"\x00\xff")
    (root / "a/c").chmod(0o400)
    (root / "a/sub/deep").chmod(0o1777)
    age(root)


class WithoutDevices(Upper):
    """An upper on a filesystem that has no whiteout devices."""

    def make_whiteout(self, absolute: bytes) -> None:
        self._make_whiteout_file(absolute)

    def move(self, old: bytes, new: bytes, *, leave_whiteout: bool = False) -> None:
        if leave_whiteout:
            self._move_and_whiteout(old, new)
        else:
            rename(self.at(old), self.at(new))


def scratch() -> str:
    """A directory in memory, where this may be, for what syncs often."""
    return tempfile.mkdtemp(prefix="afs-machine", dir="/dev/shm" if usable("/dev/shm") else None)


def usable(path: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=path) as probe:
            os.setxattr(probe, b"user.probe", b"")
    except OSError:
        return False
    return True


class World:
    """A store with the base imported, shared by the runs of one machine."""

    def __init__(self) -> None:
        self.home = os.fsencode(scratch())
        self.base = self.home + b"/base"
        os.mkdir(self.base)
        make_base(Path(os.fsdecode(self.base)))
        self.repository = Repository.create(os.fsdecode(self.home + b"/store"))
        result = self.repository.import_directory(os.fsdecode(self.base))
        self.snapshot = SnapshotId(result.snapshot)
        self.runs = 0

    def close(self) -> None:
        self.repository.close()
        shutil.rmtree(self.home)


class Handle:
    """Something that a program has open, in the session and in the twin."""

    def __init__(self, ino: int, fd: int) -> None:
        self.ino, self.fd = ino, fd


class SessionMachine(RuleBasedStateMachine):
    """A session and its twin."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        world = self.world
        world.runs += 1
        self.repository = world.repository
        self.twins = 0
        self.run_home = world.home + b"/run%d" % world.runs
        os.mkdir(self.run_home)
        self.base = Twin(world.base, self.run_home + b"/base")
        self.twin = self.copy_of(self.base)
        self.sessions = 1
        self.name = f"s{world.runs}-1"
        self.repository.sessions.create(self.name, (None, None, world.snapshot))
        self.others: dict[str, Tree] = {}
        self.snapshots: dict[SnapshotId, Tree] = {}
        self.handles: list[Handle] = []
        self.freeze: Freeze | None = None
        self.storing: Any = None
        self.vfs = Vfs(self.repository, Owner(os.getuid(), os.getgid()), {})
        self.kernel = Kernel(self.vfs, self.name)

    def teardown(self) -> None:
        if hasattr(self, "kernel"):
            if self.freeze is not None:
                self.finish_commit()
            self.compare(3)
            self.drop_handles()
            self.vfs.close()
            for name, tree in self.others.items():
                with self.repository.tree("@" + name) as root:
                    assert blurred(of_entry(self.repository.objects, root)) == tree
            for identifier, tree in self.snapshots.items():
                root = self.repository.snapshot(identifier).root
                assert of_entry(self.repository.objects, root) == tree
            for name in [self.name, *self.others]:
                held = self.repository.sessions.hold(name, "a test")
                self.repository.sessions.remove(held)
                assert held.session.uid not in os.listdir(self.repository.path + "/sessions")
            for identifier in self.snapshots:
                self.repository.remove_snapshot(identifier)
        shutil.rmtree(self.run_home)

    # Helpers.

    def copy_of(self, twin: Twin) -> Twin:
        self.twins += 1
        modes = twin.modes_by_path()
        return Twin(twin.root, self.run_home + b"/twin%d" % self.twins, modes)

    def pick(self, which: int, *kinds: int, root: bool = False) -> bytes | None:
        found = [
            path
            for path, kind in self.twin.listed()
            if (not kinds or kind in kinds) and (path or root)
        ]
        return found[which % len(found)] if found else None

    def directory(self, which: int) -> bytes:
        path = self.pick(which, DIR, root=True)
        assert path is not None
        return path

    def new_path(self, which: int, name: bytes) -> bytes:
        above = self.directory(which)
        return above + b"/" + name if above else name

    def same(self, twin: Callable[[], object], session: Callable[[], object]) -> bool:
        """Makes a call on both; tells whether it succeeded."""
        expected, got = outcome(twin), outcome(session)
        assert got == expected, f"session: {got}, directory: {expected}"
        return not isinstance(expected, str)

    def same_data(self, path: bytes) -> None:
        ino = self.kernel.resolve(path)
        with open(self.twin.at(path), "rb") as file:
            assert self.kernel.read(ino) == file.read()

    # Making and removing names.

    @rule(where=number, name=names, mode=st.sampled_from(MODES), size=st.sampled_from(SIZES))
    def create(self, where: int, name: bytes, mode: int, size: int) -> None:
        path, data = self.new_path(where, name), noise(size, where)

        def twin() -> None:
            fd = os.open(self.twin.at(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            os.write(fd, data)
            os.close(fd)
            self.twin.made(path, mode)

        def session() -> None:
            ino = self.kernel.create(*self.kernel.parent(path), mode | REG)
            if data:
                assert self.kernel.inode(ino).write(0, data) == len(data)

        self.same(twin, session)

    @rule(where=number, name=names, mode=st.sampled_from(MODES))
    def mkfifo(self, where: int, name: bytes, mode: int) -> None:
        path = self.new_path(where, name)

        def twin() -> None:
            os.mkfifo(self.twin.at(path), 0o600)
            self.twin.made(path, mode)

        self.same(twin, lambda: self.kernel.create(*self.kernel.parent(path), mode | FIFO))

    @rule(where=number, name=names, mode=st.sampled_from(MODES))
    def mkdir(self, where: int, name: bytes, mode: int) -> None:
        path = self.new_path(where, name)

        def twin() -> None:
            os.mkdir(self.twin.at(path), 0o700)
            self.twin.made(path, mode)

        self.same(twin, lambda: self.kernel.mkdir(*self.kernel.parent(path), mode))

    @rule(where=number, name=names, to=st.sampled_from([b"a", b"../b/\xff", b"/etc"]))
    def symlink(self, where: int, name: bytes, to: bytes) -> None:
        path = self.new_path(where, name)

        def twin() -> None:
            os.symlink(to, self.twin.at(path))
            self.twin.made(path, 0o777)

        self.same(twin, lambda: self.kernel.symlink(*self.kernel.parent(path), to))

    @rule(which=number, where=number, name=names)
    def link(self, which: int, where: int, name: bytes) -> None:
        old, path = self.pick(which, REG, LNK, FIFO), self.new_path(where, name)
        if old is None:
            return
        self.same(
            lambda: os.link(self.twin.at(old), self.twin.at(path), follow_symlinks=False),
            lambda: self.kernel.link(self.kernel.resolve(old), *self.kernel.parent(path)),
        )

    @rule(which=number)
    def unlink(self, which: int) -> None:
        path = self.pick(which)
        if path is not None:
            self.same(
                lambda: os.unlink(self.twin.at(path)),
                lambda: self.kernel.unlink(*self.kernel.parent(path)),
            )

    @rule(which=number)
    def rmdir(self, which: int) -> None:
        path = self.pick(which)
        if path is not None:
            self.same(
                lambda: os.rmdir(self.twin.at(path)),
                lambda: self.kernel.rmdir(*self.kernel.parent(path)),
            )

    @rule(which=number)
    def remove_tree(self, which: int) -> None:
        """rm -r, which lists while it removes."""
        path = self.pick(which, DIR)
        if path is None:
            return
        for below, kind in reversed(self.twin.listed()):
            if below.startswith(path + b"/"):
                if kind == DIR:
                    os.rmdir(self.twin.at(below))
                else:
                    os.unlink(self.twin.at(below))
        os.rmdir(self.twin.at(path))
        self._remove_session_tree(*self.kernel.parent(path))

    def _remove_session_tree(self, parent: int, name: bytes) -> None:
        ino = self.kernel.lookup(parent, name)
        assert ino is not None
        for below, child in self.kernel.listing(ino, 2).items():
            if self.kernel.is_directory(child):
                self._remove_session_tree(ino, below)
            else:
                self.kernel.unlink(ino, below)
        self.kernel.rmdir(parent, name)

    @rule(which=number, where=number, name=names, flags=st.sampled_from([0, 0, NOREPLACE]))
    def rename(self, which: int, where: int, name: bytes, flags: int) -> None:
        old, new = self.pick(which), self.new_path(where, name)
        if old is not None:
            self._rename(old, new, flags)

    @rule(which=number, where=number, flags=st.sampled_from([0, EXCHANGE, EXCHANGE]))
    def rename_over(self, which: int, where: int, flags: int) -> None:
        old, new = self.pick(which), self.pick(where)
        if old is not None and new is not None:
            self._rename(old, new, flags)

    @rule(which=number, where=number, name=names)
    def rename_directory(self, which: int, where: int, name: bytes) -> None:
        old, new = self.pick(which, DIR), self.new_path(where, name)
        if old is not None:
            self._rename(old, new, 0)

    def _rename(self, old: bytes, new: bytes, flags: int) -> None:
        self.same(
            lambda: rename(self.twin.at(old), self.twin.at(new), flags),
            lambda: self.kernel.rename(*self.kernel.parent(old), *self.kernel.parent(new), flags),
        )

    # Changing what has a name.

    @rule(which=number, offset=st.sampled_from([0, 3, 4095, 20_000]), size=st.integers(1, 9_000))
    def write(self, which: int, offset: int, size: int) -> None:
        path, data = self.pick(which, REG), noise(size, which)
        if path is None:
            return
        fd = os.open(self.twin.at(path), os.O_RDWR)
        os.pwrite(fd, data, offset)
        os.close(fd)
        assert self.kernel.inode(self.kernel.resolve(path)).write(offset, data) == size

    @rule(which=number, size=st.sampled_from(SIZES))
    def truncate(self, which: int, size: int) -> None:
        path = self.pick(which, REG)
        if path is None:
            return
        fd = os.open(self.twin.at(path), os.O_RDWR)
        os.ftruncate(fd, size)
        os.close(fd)
        self.kernel.change(self.kernel.resolve(path), Changes(size=size))

    @rule(which=number, mode=st.sampled_from(MODES))
    def chmod(self, which: int, mode: int) -> None:
        path = self.pick(which, REG, DIR, FIFO, root=True)
        assert path is not None
        self.twin.made(path, mode)
        self.kernel.change(self.kernel.resolve(path), Changes(mode=mode))

    @rule(which=number, ns=st.sampled_from(TIMES))
    def utimens(self, which: int, ns: int) -> None:
        path = self.pick(which, root=True)
        assert path is not None
        os.utime(self.twin.at(path), ns=(ns, ns), follow_symlinks=False)
        self.kernel.change(self.kernel.resolve(path), Changes(mtime_ns=ns))

    @rule(
        which=number,
        name=st.sampled_from([b"user.x", b"user.y"]),
        value=st.sampled_from([b"", b"\x00value", None]),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def xattr(self, which: int, name: bytes, value: bytes | None, flags: int) -> None:
        path = self.pick(which, REG, DIR, root=True)
        assert path is not None

        def twin() -> None:
            if value is None:
                os.removexattr(self.twin.at(path), name)
            else:
                os.setxattr(self.twin.at(path), name, value, flags)

        def session() -> None:
            inode = self.kernel.inode(self.kernel.resolve(path))
            if value is None:
                inode.remove_xattr(name)
            else:
                inode.set_xattr(name, value, flags)

        self.same(twin, session)

    @rule(which=number)
    def copy_attributes(self, which: int) -> None:
        """cp -a of a directory: same contents, same times, same links, as a new tree."""
        path = self.pick(which, DIR)
        if path is None or b"new2" in path:
            return
        target = b"new2"
        if os.path.lexists(self.twin.at(target)):
            return
        made: dict[int, bytes] = {}
        stamps = []
        kernel = self.kernel
        for below, kind in [(p, k) for p, k in self.twin.listed() if p.startswith(path + b"/")] + [
            (path, DIR)
        ]:
            stamps.append((below, kind))
        stamps.sort()
        for below, kind in stamps:
            status = os.lstat(self.twin.at(below))
            new = target + below[len(path) :]
            twin_new, mode = self.twin.at(new), self.twin.modes[status.st_ino]
            if status.st_ino in made and kind != DIR:
                first = made[status.st_ino]
                os.link(self.twin.at(first), twin_new, follow_symlinks=False)
                kernel.link(kernel.resolve(first), *kernel.parent(new))
                continue
            made[status.st_ino] = new
            if kind == DIR:
                os.mkdir(twin_new)
                kernel.mkdir(*kernel.parent(new), mode)
            elif kind == LNK:
                link = os.readlink(self.twin.at(below))
                os.symlink(link, twin_new)
                kernel.symlink(*kernel.parent(new), link)
            elif kind == FIFO:
                os.mkfifo(twin_new)
                kernel.create(*kernel.parent(new), mode | FIFO)
            else:
                shutil.copyfile(self.twin.at(below), twin_new)
                ino = kernel.create(*kernel.parent(new), mode | REG)
                data = kernel.read(kernel.resolve(below))
                if data:
                    kernel.inode(ino).write(0, data)
            self.twin.made(new, mode)
        for below, _ in reversed(stamps):
            ns = os.lstat(self.twin.at(below)).st_mtime_ns
            new = target + below[len(path) :]
            os.utime(self.twin.at(new), ns=(ns, ns), follow_symlinks=False)
            kernel.change(kernel.resolve(new), Changes(mtime_ns=ns))

    # Looking.

    @rule(which=number)
    def look(self, which: int) -> None:
        path = self.pick(which, root=True)
        assert path is not None
        status = os.lstat(self.twin.at(path))
        attributes = self.kernel.stat(self.kernel.resolve(path))
        assert stat.S_IFMT(attributes.mode) == stat.S_IFMT(status.st_mode)
        assert stat.S_IMODE(attributes.mode) == self.twin.modes[status.st_ino]
        if not stat.S_ISDIR(status.st_mode):
            assert (attributes.size, attributes.nlink) == (status.st_size, status.st_nlink)

    @rule(which=number, batch=st.integers(1, 5))
    def list_directory(self, which: int, batch: int) -> None:
        path = self.directory(which)
        found = self.kernel.listing(self.kernel.resolve(path), batch)
        assert sorted(found) == sorted(os.listdir(self.twin.at(path)))

    @rule(which=number, offset=st.sampled_from([0, 1, 4_000, 100_000]), size=st.integers(1, 9_000))
    def read(self, which: int, offset: int, size: int) -> None:
        path = self.pick(which, REG)
        if path is None:
            return
        with open(self.twin.at(path), "rb") as file:
            file.seek(offset)
            expected = file.read(size)
        assert self.kernel.inode(self.kernel.resolve(path)).read(offset, size) == expected

    @rule(where=number, name=names)
    def miss(self, where: int, name: bytes) -> None:
        path = self.new_path(where, name)
        found = self.kernel.lookup(*self.kernel.parent(path))
        assert (found is not None) == os.path.lexists(self.twin.at(path))

    @rule(batch=st.integers(1, 9))
    def compare(self, batch: int) -> None:
        assert blurred(self.kernel.tree(batch)) == blurred(self.twin.tree())

    # What programs have open.

    @rule(which=number)
    def open(self, which: int) -> None:
        path = self.pick(which)
        if path is None or len(self.handles) > 6:
            return
        kind = stat.S_IFMT(os.lstat(self.twin.at(path)).st_mode)
        flags = {DIR: os.O_RDONLY, LNK: os.O_PATH | os.O_NOFOLLOW}.get(kind, os.O_RDWR)
        ino = self.kernel.pin(self.kernel.resolve(path))
        self.handles.append(Handle(ino, os.open(self.twin.at(path), flags)))

    @precondition(lambda self: self.handles)
    @rule(which=number)
    def close(self, which: int) -> None:
        handle = self.handles.pop(which % len(self.handles))
        os.close(handle.fd)
        self.kernel.unpin(handle.ino)

    def drop_handles(self) -> None:
        for handle in self.handles:
            os.close(handle.fd)
        self.handles = []

    @precondition(lambda self: self.handles)
    @rule(which=number, offset=st.sampled_from([0, 130, 20_000]), size=st.integers(0, 3_000))
    def use_open(self, which: int, offset: int, size: int) -> None:
        """Writes to something open, or truncates it, and reads it; or makes a file in it."""
        handle = self.handles[which % len(self.handles)]
        status = os.fstat(handle.fd)
        inode = self.kernel.inode(handle.ino)
        if stat.S_ISDIR(status.st_mode):
            self.use_directory(handle, NAMES[size % len(NAMES)])
            return
        if stat.S_ISLNK(status.st_mode):
            assert inode.readlink() == os.readlink(b"", dir_fd=handle.fd)
        if not stat.S_ISREG(status.st_mode):
            return
        if size:
            data = noise(size, offset)
            os.pwrite(handle.fd, data, offset)
            assert inode.write(offset, data) == size
        else:
            os.ftruncate(handle.fd, offset)
            self.kernel.change(handle.ino, Changes(size=offset))
        after, attributes = os.fstat(handle.fd), self.kernel.stat(handle.ino)
        assert (attributes.size, attributes.nlink) == (after.st_size, after.st_nlink)
        assert self.kernel.read(handle.ino) == os.pread(handle.fd, after.st_size, 0)
        for path, _, found in paths(self.twin.root):
            if found.st_ino == after.st_ino:  # or pages in the kernel's cache would go stale
                assert self.kernel.resolve(path) == handle.ino

    def use_directory(self, handle: Handle, name: bytes) -> None:
        kernel = self.kernel
        assert sorted(kernel.listing(handle.ino)) == sorted(map(os.fsencode, os.listdir(handle.fd)))

        def twin() -> None:
            os.mkfifo(name, 0o600, dir_fd=handle.fd)
            status = os.stat(name, dir_fd=handle.fd)
            self.twin.modes[status.st_ino] = 0o600

        self.same(twin, lambda: kernel.create(handle.ino, name, 0o600 | FIFO))

    @precondition(lambda self: self.handles)
    @rule(which=number, mode=st.sampled_from(MODES), ns=st.sampled_from(TIMES))
    def change_open(self, which: int, mode: int, ns: int) -> None:
        """fchmod, futimens and fsetxattr on something open, removed or not."""
        handle = self.handles[which % len(self.handles)]
        status = os.fstat(handle.fd)
        if stat.S_ISLNK(status.st_mode):
            return
        self.twin.modes[status.st_ino] = mode
        os.utime(handle.fd, ns=(ns, ns))
        self.kernel.change(handle.ino, Changes(mode=mode, mtime_ns=ns))
        attributes = self.kernel.stat(handle.ino)
        assert (stat.S_IMODE(attributes.mode), attributes.mtime_ns) == (mode, ns)
        if stat.S_ISDIR(status.st_mode):
            self.kernel.sync(handle.ino)
        if stat.S_ISREG(status.st_mode):
            self.kernel.sync(handle.ino)
            os.setxattr(handle.fd, b"user.open", b"1")
            self.kernel.inode(handle.ino).set_xattr(b"user.open", b"1")
            assert b"user.open" in self.kernel.inode(handle.ino).xattrs()

    @rule(which=number)
    def stage(self, which: int) -> None:
        """What the driver does with a large file before it changes it, or is about to."""
        path = self.pick(which, REG)
        if path is not None:
            inode = self.kernel.inode(self.kernel.resolve(path))
            if inode.to_copy():
                inode.stage()

    # What the kernel forgets.

    @rule()
    def numbers_stay(self) -> None:
        """The kernel forgets everything, asks again, and finds the same inode numbers."""
        before = self.kernel.numbers()
        self.kernel.evict_all()
        assert self.kernel.numbers() == before

    @rule(which=number)
    def evict(self, which: int) -> None:
        leaves = self.kernel.leaves()
        if leaves:
            self.kernel.evict(leaves[which % len(leaves)])

    @rule()
    def evict_all(self) -> None:
        self.kernel.evict_all()

    # Sessions.

    @precondition(lambda self: self.freeze is None)
    @rule()
    def begin_commit(self) -> None:
        live = self.vfs.session(self.name)
        self.storing = self.repository.storing()
        self.storing.__enter__()
        self.freeze = live.held.freeze(live.overlay)
        self.freeze.prepare()

    @precondition(lambda self: self.freeze is not None)
    @rule()
    def finish_commit(self) -> None:
        assert self.freeze is not None
        live = self.vfs.session(self.name)
        report = live.held.commit(self.freeze, "machine", None, None, live.overlay)
        self.storing.__exit__(None, None, None)
        self.freeze = None
        live.held.clean()
        self.committed(SnapshotId(report.snapshot), self.kernel.tree())

    @rule()
    def commit(self) -> None:
        if self.freeze is None:
            self.begin_commit()
        self.finish_commit()

    @precondition(lambda self: self.freeze is None)
    @rule()
    def commit_unmounted(self) -> None:
        before = self.kernel.tree()
        self.unmount()
        report = self.repository.commit(self.name)
        self.committed(SnapshotId(report.snapshot), before)
        self.mount()

    def committed(self, identifier: SnapshotId, seen: Tree) -> None:
        """Checks a new snapshot against what the session showed and against the twin."""
        tree = of_entry(self.repository.objects, self.repository.snapshot(identifier).root)
        assert tree == seen
        assert blurred(tree) == blurred(self.twin.tree())
        if identifier != self.world.snapshot:
            self.snapshots[identifier] = tree
        self.base = self.copy_of(self.twin)

    def unmount(self) -> None:
        self.drop_handles()
        self.vfs.drop_session(self.name)

    def mount(self) -> None:
        self.kernel = Kernel(self.vfs, self.name)

    @precondition(lambda self: self.freeze is None)
    @rule()
    def remount(self) -> None:
        """A daemon that was killed, and the next one."""
        self.unmount()
        self.mount()

    @precondition(lambda self: self.freeze is None)
    @rule(go_on=st.booleans(), mounted=st.booleans())
    def fork(self, go_on: bool, mounted: bool) -> None:
        self.sessions += 1
        name = f"s{self.world.runs}-{self.sessions}"
        if mounted:
            live = self.vfs.session(self.name)
            with self.repository.storing():
                freeze = live.held.freeze(live.overlay)
                freeze.prepare()
                live.held.fork(freeze, name, live.overlay)
        else:
            self.unmount()
            self.repository.fork(self.name, name)
            self.mount()
        tree = blurred(self.twin.tree())
        if not go_on:
            self.others[name] = tree
            return
        self.unmount()
        self.others[self.name] = tree
        self.name = name
        self.base = self.copy_of(self.base)
        self.mount()

    @precondition(lambda self: self.freeze is None)
    @rule()
    def reset(self) -> None:
        self.drop_handles()
        self.vfs.reset(self.name, None)
        self.twin = self.copy_of(self.base)
        self.mount()

    @precondition(lambda self: self.freeze is None)
    @rule()
    def rename_session(self) -> None:
        self.sessions += 1
        name = f"s{self.world.runs}-{self.sessions}"
        self.vfs.rename(self.name, name)
        self.name = name

    @precondition(lambda self: self.freeze is None)
    @rule()
    def collect(self) -> None:
        self.repository.collect()

    @precondition(lambda self: self.freeze is None)
    @rule()
    def verify(self) -> None:
        assert self.repository.verify().damage == []


def outcome(call: Callable[[], object]) -> str | None:
    """Returns the name of the error of a call, None without one."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


def run(machine: type[SessionMachine], examples: int, steps: int) -> None:
    machine.world = World()
    try:
        run_machine(machine, examples, steps)
    finally:
        machine.world.close()


def test_a_session_is_like_a_directory() -> None:
    run(SessionMachine, 150, 50)


def test_a_session_in_a_narrow_place_is_like_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No whiteout devices, few descriptors, directories in pages."""
    monkeypatch.setattr(engine.sessions.sessions, "Upper", WithoutDevices)
    monkeypatch.setattr(engine.mounted.overlay, "OPEN_FILES", 2)
    monkeypatch.setattr(engine.mounted.overlay, "OPEN_DIRECTORIES", 2)
    monkeypatch.setattr(engine.trees.directory, "PAGED_FROM", 3)
    run(type("Machine", (SessionMachine,), {}), 50, 50)
