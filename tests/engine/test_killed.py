"""Operations that are killed before each of their changes of the disk, one after the other.

Afterwards there is what was before or what was to be, nothing in between, and all goes on.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import engine.sessions.sessions
from engine import Repository, SnapshotId
from engine.errors import NotFoundError
from engine.mounted.inodes import Changes
from engine.mounted.vfs import Vfs
from engine.storage.nodes import Owner
from engine.storage.store import StoreExistsError
from tests.engine.kernel import EXCHANGE, KINDS, Kernel
from tests.engine.killing import KILLER, Killed
from tests.engine.test_session_machine import WithoutDevices, World
from tests.engine.trees import Tree, of_directory, of_entry

REG, DIR, FIFO = stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


class Mounted:
    """A new session on the base with the calls that the tests make, by path."""

    count = 0

    def __init__(self, world: World) -> None:
        Mounted.count += 1
        self.world, self.repository = world, world.repository
        self.name = f"killed-{Mounted.count}"
        self.repository.sessions.create(self.name, (None, None, world.snapshot))
        self.vfs = Vfs(self.repository, Owner(os.getuid(), os.getgid()), {})
        self.kernel = Kernel(self.vfs, self.name)

    def remount(self) -> Tree:
        """What the next daemon shows."""
        self.vfs.close()
        self.vfs = Vfs(self.repository, Owner(os.getuid(), os.getgid()), {})
        self.kernel = Kernel(self.vfs, self.name)
        return settled(self.kernel.tree(counts=False))

    def left_in_work(self) -> list[bytes]:
        """What was begun in the session's work directory; the whiteout for others is not."""
        upper = self.repository.sessions.upper(self.repository.sessions.get(self.name))
        paths = [os.path.join(upper.work, name) for name in os.listdir(upper.work)]
        return [path for path in paths if not stat.S_ISCHR(os.lstat(path).st_mode)]

    def remove(self) -> None:
        self.vfs.close()
        self.repository.sessions.remove(self.repository.sessions.hold(self.name, "a test"))

    def create(self, path: bytes, data: bytes = b"") -> None:
        ino = self.kernel.create(*self.kernel.parent(path), 0o644 | REG)
        if data:
            self.kernel.inode(ino).write(0, data)

    def write(self, path: bytes, data: bytes) -> None:
        self.kernel.inode(self.kernel.resolve(path)).write(0, data)

    def truncate(self, path: bytes, size: int) -> None:
        self.kernel.change(self.kernel.resolve(path), Changes(size=size))

    def chmod(self, path: bytes, mode: int) -> None:
        self.kernel.change(self.kernel.resolve(path), Changes(mode=mode))

    def set_xattr(self, path: bytes) -> None:
        self.kernel.inode(self.kernel.resolve(path)).set_xattr(b"user.new", b"new")

    def mkdir(self, path: bytes) -> None:
        self.kernel.mkdir(*self.kernel.parent(path), 0o755)

    def symlink(self, path: bytes) -> None:
        self.kernel.symlink(*self.kernel.parent(path), b"target")

    def link(self, old: bytes, new: bytes) -> None:
        self.kernel.link(self.kernel.resolve(old), *self.kernel.parent(new))

    def unlink(self, path: bytes) -> None:
        self.kernel.unlink(*self.kernel.parent(path))

    def rmdir(self, path: bytes) -> None:
        self.kernel.rmdir(*self.kernel.parent(path))

    def remove_tree(self, path: bytes) -> None:
        for below in sorted(p for p in self.kernel.tree() if p.startswith(path + b"/"))[::-1]:
            if self.kernel.is_directory(self.kernel.resolve(below)):
                self.rmdir(below)
            else:
                self.unlink(below)
        self.rmdir(path)

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        self.kernel.rename(*self.kernel.parent(old), *self.kernel.parent(new), flags)


def settled(tree: Tree) -> Tree:
    """Returns a tree without what may change on the way: directories' times."""
    return {
        path: seen._replace(mtime_ns=0 if seen.kind == 2 else min(seen.mtime_ns, 1 << 60))
        for path, seen in tree.items()
    }


def without_links(tree: Tree) -> Tree:
    return {path: seen._replace(names=()) for path, seen in tree.items()}


Steps = Callable[[Mounted], object]

OPERATIONS: dict[str, tuple[Steps, Steps]] = {
    "write to the base's file": (lambda m: None, lambda m: m.write(b"a/sub/d", b"new")),
    "write to a linked file": (lambda m: None, lambda m: m.write(b"c", b"new")),
    "truncate to nothing": (lambda m: None, lambda m: m.truncate(b"a/c", 0)),
    "truncate": (lambda m: None, lambda m: m.truncate(b"a/c", 5)),
    "chmod the base's directory": (lambda m: None, lambda m: m.chmod(b"a/sub/deep", 0o700)),
    "chmod a file": (lambda m: None, lambda m: m.chmod(b"a/b", 0o400)),
    "set an attribute": (lambda m: None, lambda m: m.set_xattr(b"a/sub/deep/a")),
    "mkdir": (lambda m: None, lambda m: m.mkdir(b"a/sub/made")),
    "mkdir over a whiteout": (lambda m: m.unlink(b"a/b"), lambda m: m.mkdir(b"a/b")),
    "mkdir where one was": (lambda m: m.remove_tree(b"a"), lambda m: m.mkdir(b"a")),
    "create": (lambda m: None, lambda m: m.create(b"a/made")),
    "create over a whiteout": (lambda m: m.unlink(b"a/b"), lambda m: m.create(b"a/b")),
    "symlink over a whiteout": (lambda m: m.unlink(b"a/b"), lambda m: m.symlink(b"a/b")),
    "link": (lambda m: None, lambda m: m.link(b"a/c", b"b/linked")),
    "link over a whiteout": (lambda m: m.unlink(b"a/b"), lambda m: m.link(b"a/c", b"a/b")),
    "link to a link": (lambda m: None, lambda m: m.link(b"c", b"b/linked")),
    "unlink the base's file": (lambda m: None, lambda m: m.unlink(b"a/sub/d")),
    "unlink a linked file": (lambda m: None, lambda m: m.unlink(b"c")),
    "unlink a changed file": (lambda m: m.write(b"a/b", b"x"), lambda m: m.unlink(b"a/b")),
    "unlink a new file": (lambda m: m.create(b"a/made"), lambda m: m.unlink(b"a/made")),
    "rmdir the base's": (lambda m: None, lambda m: m.rmdir(b"empty")),
    "rmdir a merged one": (lambda m: m.unlink(b"a/sub/deep/a"), lambda m: m.rmdir(b"a/sub/deep")),
    "rename a file": (lambda m: None, lambda m: m.rename(b"a/c", b"b/moved")),
    "rename a file over another": (lambda m: None, lambda m: m.rename(b"a/c", b"a/b")),
    "rename a new file over one of the base": (
        lambda m: m.create(b"made", b"content"), lambda m: m.rename(b"made", b"a/b")),
    "rename over a linked file": (lambda m: None, lambda m: m.rename(b"a/c", b"c")),
    "rename a linked file": (lambda m: None, lambda m: m.rename(b"c", b"a/moved")),
    "rename onto a whiteout": (lambda m: m.unlink(b"a/b"), lambda m: m.rename(b"a/c", b"a/b")),
    "rename a directory": (lambda m: None, lambda m: m.rename(b"a", b"b/moved")),
    "rename a directory again": (lambda m: m.rename(b"a", b"z"), lambda m: m.rename(b"z", b"a")),
    "rename a directory out of another": (lambda m: None, lambda m: m.rename(b"a/sub", b"out")),
    "rename a directory over another": (lambda m: None, lambda m: m.rename(b"a/sub", b"empty")),
    "rename a directory over a changed one": (
        lambda m: (m.create(b"empty/x"), m.unlink(b"empty/x")),
        lambda m: m.rename(b"a", b"empty")),
    "rename a directory over one that looks empty": (
        lambda m: m.unlink(b"a/sub/deep/a"), lambda m: m.rename(b"d", b"a/sub/deep")),
    "rename a directory onto a whiteout": (
        lambda m: m.unlink(b"a/b"), lambda m: m.rename(b"d", b"a/b")),
    "rename a new directory onto a whiteout": (
        lambda m: (m.unlink(b"a/b"), m.mkdir(b"made"), m.create(b"made/x")),
        lambda m: m.rename(b"made", b"a/b")),
    "exchange files": (lambda m: None, lambda m: m.rename(b"a/b", b"d/sub", EXCHANGE)),
    "exchange directories": (lambda m: None, lambda m: m.rename(b"a/sub", b"d/deep", EXCHANGE)),
    "exchange a directory and a file": (lambda m: None, lambda m: m.rename(b"d", b"a/c", EXCHANGE)),
}  # fmt: skip


@pytest.fixture(params=["devices", "files"])
def whiteouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    if kind == "files":
        monkeypatch.setattr(engine.sessions.sessions, "Upper", WithoutDevices)
    return kind


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_killed_operation_was_done_or_not(world: World, whiteouts: str, operation: str) -> None:
    setup, act = OPERATIONS[operation]
    mounted = Mounted(world)
    setup(mounted)
    before = mounted.remount()
    act(mounted)
    after = mounted.remount()
    assert after != before
    mounted.remove()
    for step in range(100):
        mounted = Mounted(world)
        setup(mounted)
        assert mounted.remount() == before
        KILLER.arm(step)
        try:
            act(mounted)
        except Killed:
            finished = False
        else:
            finished = True
        finally:
            KILLER.disarm()
        found = mounted.remount()
        if finished:
            assert found == after
            mounted.remove()
            break
        check(operation, whiteouts, found, before, after)
        assert os.listdir(mounted.vfs.session(mounted.name).overlay.upper.work) == []
        mounted.vfs.close()
        report = mounted.repository.commit(mounted.name)
        root = mounted.repository.snapshot(SnapshotId(report.snapshot)).root
        assert settled(of_entry(mounted.repository.objects, root, counts=False)) == found
        mounted.remove()
    else:
        raise AssertionError("it takes more than a hundred steps")
    assert step > 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_operation_was_done_or_not(world: World, whiteouts: str, operation: str) -> None:
    """On a full disk: what the session shows is what is on the disk, and it works later."""
    setup, act = OPERATIONS[operation]
    mounted = Mounted(world)
    setup(mounted)
    before = mounted.remount()
    act(mounted)
    after = mounted.remount()
    mounted.remove()
    for step in range(100):
        mounted = Mounted(world)
        setup(mounted)
        mounted.remount()
        descriptors = len(os.listdir("/proc/self/fd"))
        KILLER.arm(step, errno.ENOSPC)
        try:
            act(mounted)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            finished = False
        else:
            finished = True
        failed = not KILLER.armed
        KILLER.disarm()
        live = mounted.vfs.statistics()
        kept = live.open_files + live.open_directories
        assert len(os.listdir("/proc/self/fd")) <= descriptors + kept
        if not finished:
            assert not mounted.left_in_work()
        shown = settled(mounted.kernel.tree(counts=False))
        found = mounted.remount()
        if found != shown:
            assert whiteouts == "files"
            check(operation, whiteouts, found, before, after)
        if not finished:
            check(operation, whiteouts, shown, before, after)
            if shown == before:
                act(mounted)
                assert mounted.remount() == after
        mounted.remove()
        if not failed:
            assert shown == after
            break
    else:
        raise AssertionError("it takes more than a hundred steps")


def check(operation: str, whiteouts: str, found: Tree, before: Tree, after: Tree) -> None:
    if found in (before, after):
        return
    if whiteouts == "files" and operation.startswith("rename"):
        # Without whiteout devices a rename is made in two steps: for a moment both names show.
        before, after, found = (without_links(tree) for tree in (before, after, found))
        assert found.keys() in (before.keys(), after.keys(), before.keys() | after.keys())
        assert all(found[path] in (before.get(path), after.get(path)) for path in found)
    elif operation in {"create", "mkdir"}:
        # What was made may not have its permission bits yet.
        path = b"a/made" if operation == "create" else b"a/sub/made"
        assert found == {**after, path: after[path]._replace(mode=found[path].mode & 0o700)}
    elif operation == "truncate to nothing":
        # It is empty before its time tells of it.
        assert found == {**after, b"a/c": before[b"a/c"]._replace(data=b"")}
    else:
        assert found == before


@pytest.mark.parametrize("live", [True, False])
def test_a_killed_commit_was_done_or_not(world: World, live: bool) -> None:
    for step in range(100):
        mounted = Mounted(world)
        mounted.write(b"a/sub/d", b"changed")
        mounted.rename(b"a", b"moved")
        mounted.unlink(b"c")
        mounted.create(b"new", b"new " * 10_000)
        for place in (b"socket", b"b/socket", b"moved/sub/socket"):
            mounted.kernel.create(*mounted.kernel.parent(place), 0o600 | stat.S_IFSOCK)
        before = mounted.remount()
        parent = mounted.repository.sessions.get(mounted.name).parent
        if not live:
            mounted.vfs.close()
        KILLER.arm(step)
        finished = False
        try:
            if live:
                held = mounted.vfs.session(mounted.name)
                freeze = held.held.freeze(held.overlay)
                freeze.prepare()
                held.held.commit(freeze, "", None, None, held.overlay)
                held.held.clean()
            else:
                mounted.repository.commit(mounted.name)
            finished = True
        except Killed:
            pass
        finally:
            KILLER.disarm()
        assert mounted.remount() == before
        session = mounted.repository.sessions.get(mounted.name)
        home = os.path.join(mounted.repository.path, "sessions", session.uid)
        assert sorted(os.listdir(home)) == [f"upper.{session.generation}", "work"]
        if session.parent == parent:
            assert not finished
        else:
            root = mounted.repository.snapshot(SnapshotId(session.parent)).root
            assert settled(of_entry(mounted.repository.objects, root)) == without_socket(before)
        assert mounted.repository.verify().damage == []
        mounted.remove()
        if finished:
            assert session.parent != parent
            break
    assert step > 3


@pytest.mark.parametrize("live", [True, False])
def test_a_failed_commit_leaves_the_session_as_it_is(world: World, live: bool) -> None:
    mounted = Mounted(world)
    mounted.write(b"a/sub/d", b"changed")
    mounted.rename(b"a", b"moved")
    mounted.unlink(b"c")
    mounted.kernel.create(mounted.kernel.root, b"socket", stat.S_IFSOCK | 0o600)
    for step in range(100):
        mounted.write(b"moved/sub/d", b"changed %d" % step)
        shown = settled(mounted.kernel.tree())
        parent = mounted.repository.sessions.get(mounted.name).parent
        if not live:
            mounted.vfs.close()
        KILLER.arm(step, errno.ENOSPC)
        error = None
        try:
            if live:
                held = mounted.vfs.session(mounted.name)
                freeze = held.held.freeze(held.overlay)
                freeze.prepare()
                held.held.commit(freeze, "", None, None, held.overlay)
                held.held.clean()
            else:
                mounted.repository.commit(mounted.name)
        except OSError as raised:
            error = raised
        failed = not KILLER.armed
        KILLER.disarm()
        if live:
            seen = settled(mounted.kernel.tree())
            assert seen in (shown, without_socket(shown))
        assert mounted.remount() == shown  # what could not be moved was kept, and is moved now
        session = mounted.repository.sessions.get(mounted.name)
        assert not mounted.repository.sessions.left_over(session)
        now = mounted.repository.sessions.get(mounted.name).parent
        assert (now == parent) == (error is not None)
        if error is None:
            root = mounted.repository.snapshot(SnapshotId(now)).root
            tree = settled(of_entry(mounted.repository.objects, root))
            assert tree == without_socket(shown)
        if not failed:
            break
    mounted.remove()


def without_socket(tree: Tree) -> Tree:
    return {path: seen for path, seen in tree.items() if seen.kind != KINDS[stat.S_IFSOCK]}


def test_killed_changes_of_sessions_themselves(world: World) -> None:
    """Create, fork, reset and remove: a session is whole or not there."""
    repository = world.repository
    base = settled(of_directory(world.base))

    def session(name: str) -> Tree | None:
        try:
            with repository.tree("@" + name) as root:
                return settled(of_entry(repository.objects, root))
        except NotFoundError:
            return None

    def act(step: int, call: Callable[[], object]) -> bool:
        KILLER.arm(step)
        try:
            call()
        except Killed:
            return False
        finally:
            KILLER.disarm()
        return True

    def remove() -> None:
        repository.sessions.remove(repository.sessions.hold("one", "a test"))

    for step in range(100):
        done = act(step, lambda: repository.sessions.create("one", (None, None, world.snapshot)))
        assert session("one") == base if done else session("one") in (base, None)
        if session("one") is not None:
            remove()
        if done:
            break
    mounted = Mounted(world)
    mounted.write(b"a/c", b"changed")
    changed = mounted.remount()
    mounted.vfs.close()
    for step in range(100):
        done = act(step, lambda: repository.fork(mounted.name, "one"))
        assert session(mounted.name) == changed
        assert session("one") == changed if done else session("one") in (changed, None)
        if session("one") is not None:
            remove()
        if done:
            break
    for step in range(100):
        repository.fork(mounted.name, "one")
        if act(step, remove):
            assert session("one") is None
            break
        if session("one") is not None:
            remove()
    for step in range(100):
        with repository.sessions.hold(mounted.name, "a test") as held:
            done = act(step, held.reset)
        seen = session(mounted.name)
        assert seen == base if done else seen in (base, changed)
        if done:
            break
        if seen == base:
            mounted.remount()
            mounted.write(b"a/c", b"changed")
            mounted.vfs.close()
    mounted.remove()
    repository.collect()
    uids = {record.uid for record in repository.sessions.all()}
    assert set(os.listdir(repository.path + "/sessions")) == uids


def test_a_killed_checkout_leaves_no_half_target(world: World, tmp_path: Path) -> None:
    root = world.repository.snapshot(world.snapshot).root
    target = tmp_path / "target"
    for step in range(1000):
        KILLER.arm(step)
        try:
            world.repository.check_out(root, str(target), outside_links=True)
        except Killed:
            KILLER.disarm()
            assert not target.exists()
            assert all(name.startswith(".target.checkout-") for name in os.listdir(tmp_path))
        else:
            break
        finally:
            KILLER.disarm()
    assert of_directory(target) == of_directory(world.base)
    assert step > 20


def test_a_killed_import_leaves_nothing_that_is_in_the_way(tmp_path: Path) -> None:
    """Killed between transactions; within one, LMDB's rules hold (test_import_killed)."""
    with Repository.create(str(tmp_path / "store")) as repository:
        home = repository.path
        assert repository.snapshots() == []
    for step in range(20):
        other = tmp_path / f"other{step}"
        KILLER.arm(step)
        try:
            Repository.create(str(other)).close()
        except Killed:
            KILLER.disarm()
            with contextlib.suppress(StoreExistsError):  # it was whole but for its reserve
                Repository.create(str(other)).close()
            Repository.open(str(other)).close()
        else:
            break
        finally:
            KILLER.disarm()
    assert os.path.isdir(home)
