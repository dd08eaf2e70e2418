"""The upper is in overlayfs's format: the kernel's overlayfs shows what the session shows."""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.host.removing import remove_tree
from engine.mounted.inodes import Changes
from engine.mounted.vfs import Vfs
from engine.sessions.upper import Upper
from engine.storage.nodes import Owner
from tests.engine.kernel import Kernel
from tests.engine.test_session_machine import World
from tests.engine.trees import Tree, blurred, of_directory, of_entry

REG = stat.S_IFREG


class Mounts:
    """A session, and the kernel's overlayfs on the same upper, one at a time."""

    def __init__(self, world: World) -> None:
        self.world, self.repository = world, world.repository
        self.mountpoint = Path(os.fsdecode(world.home)) / "mnt"
        self.mountpoint.mkdir()
        self.repository.sessions.create("s", (None, None, world.snapshot))

    def ours(self, act: Callable[[Kernel], object] | None = None) -> Tree:
        vfs = Vfs(self.repository, Owner(os.getuid(), os.getgid()), {})
        kernel = Kernel(vfs, "s")
        if act is not None:
            act(kernel)
        tree = kernel.tree(counts=False)
        vfs.close()
        return blurred(tree)

    def kernels(self, act: Callable[[Path], object] | None = None) -> Tree:
        with self.repository.sessions.hold("s", "the kernel's overlayfs") as held:
            upper = held.upper()
            options = f"userxattr,lowerdir={os.fsdecode(self.world.base)}"
            options += f",upperdir={os.fsdecode(upper.root)},workdir={os.fsdecode(upper.work)}"
            command = ["mount", "-t", "overlay", "amalgamfs-test", "-o", options]
            done = subprocess.run(
                [*command, str(self.mountpoint)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"no overlayfs here: {done.stderr.strip()}")
            try:
                if act is not None:
                    act(self.mountpoint)
                return blurred(of_directory(self.mountpoint))
            finally:
                subprocess.run(["umount", str(self.mountpoint)], check=True)

    def commit(self) -> Tree:
        report = self.repository.commit("s")
        root = self.repository.snapshot(SnapshotId(report.snapshot)).root
        return blurred(of_entry(self.repository.objects, root, counts=False))


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount an overlayfs")
    world = World()
    yield Mounts(world)
    world.close()


def without_links(tree: Tree) -> Tree:
    """overlayfs breaks the links of the lower layer, unless told otherwise."""
    return {path: seen._replace(names=()) for path, seen in tree.items()}


def change(kernel: Kernel) -> None:
    """All that a session does, but for renames of the base's directories."""

    def write(path: bytes, data: bytes) -> None:
        kernel.inode(kernel.resolve(path)).write(0, data)

    write(b"a/sub/d", b"written")
    kernel.unlink(kernel.resolve(b"a"), b"b")
    kernel.mkdir(kernel.resolve(b"a"), b"b", 0o750)
    kernel.create(kernel.resolve(b"a/b"), b"new", 0o640 | REG)
    kernel.unlink(kernel.resolve(b"b"), b"a")
    kernel.symlink(kernel.resolve(b"b"), b"a", b"elsewhere")
    kernel.rmdir(kernel.root, b"empty")
    kernel.create(kernel.root, b"empty", 0o600 | REG)
    for path in [b"a/sub/deep/a"]:
        kernel.unlink(kernel.resolve(b"a/sub/deep"), path.rpartition(b"/")[2])
    kernel.rmdir(kernel.resolve(b"a/sub"), b"deep")
    kernel.mkdir(kernel.resolve(b"a/sub"), b"deep", 0o700)
    kernel.mkdir(kernel.root, b"made", 0o700)
    kernel.mkdir(kernel.resolve(b"made"), b"in", 0o700)
    kernel.rename(kernel.resolve(b"made"), b"in", kernel.resolve(b"d"), b"in")
    kernel.rename(kernel.resolve(b"a"), b"c", kernel.resolve(b"d/in"), b"moved")
    kernel.change(kernel.resolve(b"d/sub"), Changes(mode=0o400, mtime_ns=77))
    kernel.change(kernel.resolve(b"d/deep"), Changes(mode=0o711))
    kernel.inode(kernel.resolve(b"d/deep/deep")).set_xattr(b"user.new", b"new")
    kernel.unlink(kernel.resolve(b"d"), b"a")
    kernel.change(kernel.resolve(b"a/sub/d"), Changes(size=3))


def test_the_kernel_shows_what_a_session_shows(mounts: Mounts):
    assert mounts.kernels() == blurred(of_directory(mounts.world.base))
    shown = mounts.ours(change)
    assert without_links(mounts.kernels()) == without_links(shown)
    assert mounts.ours() == shown
    assert mounts.commit() == shown


def test_a_session_shows_what_the_kernel_shows(mounts: Mounts):
    def act(root: Path) -> None:
        (root / "a/b").write_bytes(b"changed")
        shutil.rmtree(root / "d")
        (root / "d").mkdir()
        (root / "d/new").write_bytes(b"new")
        (root / "c").unlink()
        (root / "b/c").rename(root / "a/fifo")
        (root / "a/c").chmod(0o600)
        os.setxattr(root / "a/sub", b"user.more", b"more")
        (root / "link").symlink_to("a")
        os.link(root / "a/b", root / "linked")
        (root / "empty").rmdir()

    shown = mounts.kernels(act)
    assert without_links(mounts.ours()) == without_links(shown)
    assert mounts.ours()[b"linked"].names == (b"a/b", b"linked")
    assert without_links(mounts.commit()) == without_links(shown)


# What is in the format besides.


@pytest.fixture
def upper(tmp_path: Path) -> Upper:
    for name in ["upper", "work"]:
        (tmp_path / name).mkdir()
    return Upper(str(tmp_path / "upper"), str(tmp_path / "work"))


def names(upper: Upper, path: bytes = b"") -> dict[bytes, bool]:
    """Returns the names in a directory, and whether each is a whiteout."""
    return {name: status is None for name, status in upper.scan(path)}


def test_a_whiteout_is_a_device_or_an_empty_file_in_a_marked_directory(upper: Upper):
    os.mknod(upper.at(b"device"), stat.S_IFCHR, 0)
    upper._make_whiteout_file(upper.at(b"file"))
    Path(os.fsdecode(upper.at(b"plain"))).touch()
    assert names(upper) == {b"device": True, b"file": False, b"plain": False}
    os.setxattr(upper.root, b"user.overlay.opaque", b"x")
    assert names(upper) == {b"device": True, b"file": True, b"plain": False}
    Path(os.fsdecode(upper.at(b"file"))).write_bytes(b"not empty")
    assert names(upper) == {b"device": True, b"file": False, b"plain": False}


def test_whiteouts_are_names_of_one_file(upper: Upper):
    """Until it can have no more, or is gone; a name that is taken is no reason for another."""
    for name in (b"one", b"two"):
        upper.whiteout(name)
    Path(os.fsdecode(upper.at(b"file"))).touch()
    os.mkdir(upper.at(b"directory"))
    for name in (b"file", b"directory", b"three"):
        upper.whiteout(name)
    one = os.lstat(upper.at(b"one"))
    same = {name for name, _ in upper.scan(b"") if os.lstat(upper.at(name)).st_ino == one.st_ino}
    assert same == {b"one", b"two", b"three", b"file", b"directory"}
    for name in os.listdir(upper.work):
        os.unlink(upper.work + b"/" + name)
    for name in (b"four", b"five"):
        upper.whiteout(name)
    assert os.lstat(upper.at(b"four")).st_ino == os.lstat(upper.at(b"five")).st_ino != one.st_ino
    assert set(names(upper).values()) == {True}


def test_modes_that_would_lock_the_owner_out(upper: Upper):
    path = upper.at(b"file")
    Path(os.fsdecode(path)).touch()
    for mode in [0o000, 0o444, 0o200, 0o644, 0o000]:
        upper.chmod(path, mode, directory=False)
        assert upper.mode(path, os.lstat(path)) == mode
        if os.geteuid():
            assert os.lstat(path).st_mode & 0o600 == 0o600


def test_what_only_a_session_understands_is_foreign_to_the_kernel(upper: Upper):
    os.mkdir(upper.at(b"a"))
    os.mkdir(upper.at(b"a/b"))
    upper.make_whiteout(upper.at(b"a/gone"))
    foreign = stat.S_ISREG(os.lstat(upper.at(b"a/gone")).st_mode)
    assert upper.is_foreign() == foreign
    upper.set_redirect(b"a/b", b"elsewhere")
    assert upper.is_foreign()
    os.removexattr(upper.at(b"a/b"), "user.overlay.redirect")
    os.setxattr(upper.at(b"a"), "user.overlay.opaque", b"x")
    assert upper.is_foreign()


def test_permission_bits_go_to_the_kernel_and_come_back(upper: Upper):
    modes = {b"d": 0o555, b"d/file": 0o444, b"d/open": 0o640, b"d/below": 0o000}
    for path in modes:
        if path in {b"d", b"d/below"}:
            os.mkdir(upper.at(path), 0o700)
        else:
            Path(os.fsdecode(upper.at(path))).touch()
    os.symlink("nowhere", upper.at(b"link"))
    for path, mode in reversed(modes.items()):
        upper.chmod(upper.at(path), mode, directory=path in {b"d", b"d/below"}, new=True)

    def bits() -> dict[bytes, int]:
        return {path: stat.S_IMODE(os.lstat(upper.at(path)).st_mode) for path in modes}

    kept = bits()
    upper.hand_over()
    assert bits() == modes
    for _ in range(2):
        upper.take_back()
        assert bits() == kept
    assert {path: upper.mode(upper.at(path), os.lstat(upper.at(path))) for path in modes} == modes


def test_without_the_kernels_note_nothing_is_taken_back(upper: Upper):
    path = upper.at(b"file")
    Path(os.fsdecode(path)).touch(mode=0o400)
    upper.take_back()
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o400


def test_paths_of_any_length(repository: Repository, upper: Upper):
    deep = b"/".join([b"d" * 200] * 40)
    at = os.open(upper.root, os.O_RDONLY)
    for name in deep.split(b"/"):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    before = len(os.listdir("/proc/self/fd"))
    os.mkdir(upper.at(deep + b"/x"))
    upper.whiteout(deep + b"/gone")
    upper.set_redirect(deep + b"/x", b"base")
    upper.move(deep + b"/x", b"x")
    assert upper.redirect(b"x") == b"base"
    assert names(upper, deep) == {b"gone": True}
    upper.make_whiteout = upper._make_whiteout_file  # type: ignore[method-assign]  # as if mknod failed
    upper.whiteout(deep + b"/also")
    assert names(upper, deep) == {b"gone": True, b"also": True}
    remove_tree(upper.root)
    assert not os.path.exists(upper.root)
    assert len(os.listdir("/proc/self/fd")) == before
