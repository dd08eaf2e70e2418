"""Sessions through the repository, and what only several threads or processes can show."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from engine import Repository, SnapshotId
from engine.errors import (
    CorruptObjectError,
    InvalidNameError,
    MissingObjectError,
    NameTakenError,
    NotFoundError,
)
from engine.host.leases import LeaseHeldError
from engine.mounted.inodes import Changes
from engine.mounted.vfs import SESSIONS, SNAPSHOTS, Vfs
from engine.sessions.freezing import TooDeepError
from engine.storage.lmdb_store import LmdbStore
from engine.storage.nodes import Owner
from engine.storage.objects import Objects
from engine.storage.store import Db
from tests.conftest import ROOT
from tests.engine.kernel import EXCHANGE, Kernel
from tests.engine.test_killed import settled
from tests.engine.trees import Tree, noise, of_directory, of_entry

OWNER = Owner(os.getuid(), os.getgid())
REG = stat.S_IFREG


@pytest.fixture
def vfs(repository: Repository, session: str) -> Iterator[Vfs]:
    made = Vfs(repository, OWNER, {})
    yield made
    made.close()


def tree(repository: Repository, name: str) -> Tree:
    with repository.tree(name) as root:
        return of_entry(repository.objects, root)


def write(repository: Repository, name: str, path: str, data: bytes) -> None:
    with repository.sessions.hold(name, "writing") as held:
        (Path(os.fsdecode(held.upper().root)) / path).write_bytes(data)


# The records.


def test_a_new_session_shows_its_snapshot(
    repository: Repository, base: Path, first: SnapshotId, session: str
):
    assert tree(repository, "@s") == of_directory(base)
    record = repository.sessions.get("s")
    assert (record.name, record.parent, record.generation) == ("s", first, 0)
    assert record.layers == (("2-blueprint", first),)
    assert repository.resolve("@s") == first
    assert not repository.commit("s").changed
    assert repository.snapshots() == [first]


def test_a_session_in_use(repository: Repository, session: str):
    with repository.sessions.hold("s", "testing") as held:
        calls: list[Any] = [repository.commit, lambda name: repository.fork(name, "t")]
        for call in calls:
            with pytest.raises(LeaseHeldError, match=rf"session 's' is held .*{os.getpid()}"):
                call("s")
        with pytest.raises(LeaseHeldError), repository.tree("@s"):
            pass
        assert held.session.name == "s"
    repository.commit("s")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "a\0b", "ä", "x" * 201, "0" * 64, "-x"]
)
def test_names_that_no_session_can_have(repository: Repository, session: str, name: str):
    first = repository.resolve("@s")
    with pytest.raises(InvalidNameError):
        repository.sessions.create(name, (None, None, first))
    with pytest.raises(InvalidNameError):
        repository.sessions.rename("s", name)
    with pytest.raises(InvalidNameError):
        repository.fork("s", name)
    assert [record.name for record in repository.sessions.all()] == ["s"]
    repository.collect()
    assert len(os.listdir(repository.path + "/sessions")) == 1


@pytest.mark.parametrize("name", ["", "none", "\udcff", "x" * 1000, "a\0b", "a/b"])
def test_sessions_that_are_not_there(repository: Repository, name: str):
    calls: list[Any] = [
        repository.sessions.get,
        repository.commit,
        lambda name: repository.fork(name, "t"),
        lambda name: repository.sessions.rename(name, "t"),
        lambda name: repository.sessions.hold(name, ""),
        lambda name: repository.resolve("@" + name),
        repository.resolve,
        repository.remove_ref,
    ]
    for call in calls:
        with pytest.raises(NotFoundError):
            call(name)


def test_names_that_are_taken(repository: Repository, session: str, first: SnapshotId):
    repository.sessions.create("t", (None, None, first))
    with pytest.raises(NameTakenError):
        repository.sessions.create("s", (None, None, first))
    with pytest.raises(NameTakenError):
        repository.fork("s", "t")
    with pytest.raises(NameTakenError):
        repository.sessions.rename("s", "t")
    assert len(os.listdir(repository.path + "/sessions")) == 2


def test_a_session_on_what_is_not_there(repository: Repository, session: str, first: SnapshotId):
    with pytest.raises(MissingObjectError):
        repository.sessions.create("t", (None, None, SnapshotId(bytes(32))))
    with repository.sessions.hold("s", "") as held, pytest.raises(MissingObjectError):
        held.reset(SnapshotId(bytes(32)))
    assert os.listdir(repository.path + "/sessions") == [repository.sessions.get("s").uid]


def test_a_snapshot_that_goes_while_a_session_is_made(repository: Repository, first: SnapshotId):
    """The record is not there yet, so nothing keeps the snapshot from removal."""
    sessions = repository.sessions
    make_upper = sessions._make_upper

    def remove_first(record: Any) -> None:
        repository.remove_snapshot(first)
        make_upper(record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "_make_upper", remove_first)
        with pytest.raises(MissingObjectError):
            sessions.create("s", (None, None, first))
    assert sessions.all() == []


# Commits.


def test_a_commit_goes_on_from_the_session(repository: Repository, base: Path, session: str):
    first = repository.resolve("@s")
    write(repository, "s", "new", noise(50_000))
    report = repository.commit("s", message="why", metadata={"by": "test"}, ref="main")
    assert report.changed
    assert report.new_bytes > 50_000
    snapshot = repository.snapshot(SnapshotId(report.snapshot))
    assert (snapshot.message, snapshot.metadata) == ("why", {"by": "test"})
    assert snapshot.parents == (first,)
    assert repository.refs() == {"main": report.snapshot}
    shown = tree(repository, "main")
    assert shown == tree(repository, "@s")
    assert shown.keys() == of_directory(base).keys() | {b"new"}
    assert shown[b"new"].data == noise(50_000)
    record = repository.sessions.get("s")
    assert (record.parent, record.generation) == (report.snapshot, 1)
    again = repository.commit("s")
    assert (again.snapshot, again.changed, again.new_bytes) == (report.snapshot, False, 0)
    second = repository.resolve("main")
    write(repository, "s", "newer", b"x")
    assert repository.snapshot(SnapshotId(repository.commit("s").snapshot)).parents == (second,)
    assert tree(repository, first.hex()) == of_directory(base)


def test_a_commit_reads_what_changed_and_no_more(repository: Repository, tmp_path: Path):
    base = tmp_path / "many"
    for n in range(200):
        (base / f"{n}").mkdir(parents=True)
        (base / f"{n}/file").write_bytes(b"%d" % n)
    first = SnapshotId(repository.import_directory(str(base)).snapshot)
    repository.sessions.create("s", (None, None, first))
    with repository.sessions.hold("s", "") as held:
        directory = Path(os.fsdecode(held.upper().root)) / "77"
        directory.mkdir()
        (directory / "new").write_bytes(b"new")
    repository.objects.shed()
    before = repository.objects.statistics().node_misses
    repository.commit("s")
    assert repository.objects.statistics().node_misses - before <= 3


def test_a_ref_that_cannot_be(repository: Repository, session: str):
    with pytest.raises(InvalidNameError):
        repository.commit("s", ref="../x")
    write(repository, "s", "new", b"")
    assert repository.commit("s").changed


def test_a_session_renamed_by_somebody_else_while_it_is_held(
    repository: Repository, session: str, first: SnapshotId
):
    """The holder goes on with it under its new name, whoever took the old one."""
    with repository.sessions.hold("s", "") as held:
        repository.sessions.rename("s", "moved")
        other = repository.sessions.create("s", (None, None, first))
        (Path(os.fsdecode(held.upper().root)) / "new").write_bytes(b"new")
        freeze = held.freeze()
        held.commit(freeze)
        assert held.session.name == "moved"
        held.clean()
    assert b"new" in tree(repository, "@moved")
    assert repository.sessions.get("s") == other
    with repository.sessions.hold("moved", "") as held:
        repository.sessions.rename("moved", "again")
        held.reset(first)
    assert b"new" not in tree(repository, "@again")
    held = repository.sessions.hold("again", "")
    repository.sessions.rename("again", "last")
    repository.sessions.remove(held)
    assert [record.name for record in repository.sessions.all()] == ["s"]


def test_a_name_that_means_another_session_after_the_wait(
    repository: Repository, session: str, first: SnapshotId
):
    """Whoever waits for a session by name gets the one that has the name then."""
    held = repository.sessions.hold("s", "the first")
    got: list[str] = []

    def wait() -> None:
        with repository.sessions.hold("s", "waiting", wait=30) as mine:
            got.append(mine.session.uid)
            assert os.path.isdir(mine.upper().root)

    thread = threading.Thread(target=wait)
    thread.start()
    repository.sessions.rename("s", "old")
    other = repository.sessions.create("s", (None, None, first))
    held.release()
    thread.join(120)
    assert got in ([held.session.uid], [other.uid])
    assert got == [other.uid] or repository.sessions.get("old").uid == got[0]


def test_a_session_too_deep_for_a_tree(repository: Repository, session: str):
    with repository.sessions.hold("s", "") as held:
        at = os.open(held.upper().root, os.O_RDONLY)
        for _ in range(520):
            os.mkdir("d", dir_fd=at)
            below = os.open("d", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(at)
    with pytest.raises(TooDeepError):
        repository.commit("s")
    assert not repository.sessions.get("s").generation
    with repository.sessions.hold("s", "") as held:
        held.reset()
        held.clean()


def test_times_beyond_the_format(repository: Repository, session: str, vfs: Vfs):
    kernel = Kernel(vfs, "s")
    ino = kernel.create(kernel.root, b"late", 0o644 | REG)
    kernel.inode(ino).change(Changes(mtime_ns=(2**33 + 2**32) * 10**9))
    kernel.inode(kernel.resolve(b"a")).change(Changes(mtime_ns=(2**33 + 2**32) * 10**9))
    if kernel.stat(ino).mtime_ns < 2**63:
        pytest.skip("the filesystem has no such times")
    vfs.close()
    report = repository.commit("s")
    found = tree(repository, report.snapshot.hex())
    assert found[b"late"].mtime_ns == found[b"a"].mtime_ns == 2**63 - 1


def test_a_damaged_record(repository: Repository, session: str):
    repository.store.write(lambda w: w.put(Db.SESSIONS, b"s", b"rubbish"))
    with pytest.raises(CorruptObjectError):
        repository.sessions.get("s")
    with pytest.raises(CorruptObjectError):
        repository.collect()


# Live, with the kernel's view of it.


def live_commit(vfs: Vfs, name: str = "s") -> SnapshotId:
    live = vfs.session(name)
    with vfs.repository.storing():
        freeze = live.held.freeze(live.overlay)
        freeze.prepare()
        report = live.held.commit(freeze, "", None, None, live.overlay)
    live.held.clean()
    return SnapshotId(report.snapshot)


def test_what_is_written_while_a_commit_prepares_is_in_it(repository: Repository, vfs: Vfs):
    """Also when size and times do not tell, as within one tick of the clock."""
    kernel = Kernel(vfs, "s")
    ino = kernel.create(kernel.root, b"new", 0o644 | REG)
    kernel.inode(ino).write(0, b"first")
    kernel.change(ino, Changes(mtime_ns=5))
    live = vfs.session("s")
    freeze = live.held.freeze(live.overlay)
    freeze.prepare()
    kernel.inode(ino).write(0, b"later")
    kernel.change(ino, Changes(mtime_ns=5))
    report = live.held.commit(freeze, "", None, None, live.overlay)
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    assert of_entry(repository.objects, root)[b"new"].data == b"later"
    assert kernel.read(ino) == b"later"


def test_a_socket_lives_on_after_a_commit(repository: Repository, vfs: Vfs):
    kernel = Kernel(vfs, "s")
    ino = kernel.create(kernel.resolve(b"a/sub"), b"sock", stat.S_IFSOCK | 0o600)
    live = vfs.session("s")
    freeze = live.held.freeze(live.overlay)
    report = live.held.commit(freeze, "", None, None, live.overlay)
    assert "a/sub/sock" in report.warnings[0]
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    assert b"a/sub/sock" not in of_entry(repository.objects, root)
    assert kernel.stat(ino).mode == stat.S_IFSOCK | 0o600
    assert b"sock" in kernel.listing(kernel.resolve(b"a/sub"))
    live.held.clean()
    vfs.close()
    again = Kernel(Vfs(repository, OWNER, {}), "s")
    assert b"sock" in again.listing(again.resolve(b"a/sub"))
    again.vfs.close()
    repository.commit("s")
    with repository.sessions.hold("s", "") as held:
        path = held.upper().at(b"a/sub/sock")
        assert stat.S_ISSOCK(os.lstat(path).st_mode)


def test_an_open_file_that_lost_its_name_outlives_commits(repository: Repository, vfs: Vfs):
    kernel = Kernel(vfs, "s")
    changed, pristine = kernel.resolve(b"a/c"), kernel.resolve(b"a/sub/d")
    data = kernel.read(pristine)
    for ino in (changed, pristine):
        kernel.pin(ino)
    kernel.inode(changed).write(0, b"changed")
    kernel.unlink(kernel.resolve(b"a"), b"c")
    kernel.unlink(kernel.resolve(b"a/sub"), b"d")
    for _ in range(2):
        live_commit(vfs)
        assert kernel.read(changed)[:7] == b"changed"
        assert kernel.read(pristine) == data
        assert kernel.stat(pristine).nlink == kernel.stat(changed).nlink == 0
    kernel.inode(pristine).write(3, b"written")
    assert kernel.read(pristine) == data[:3] + b"written" + data[10:]
    assert vfs.statistics().orphans == 2
    kernel.unpin(changed)
    kernel.unpin(pristine)
    assert vfs.statistics().orphans == 0
    assert vfs.statistics().open_files == 0


def test_an_open_file_with_a_name_that_nobody_looked_at(repository: Repository, vfs: Vfs):
    """A file that lost the name it was opened by is the one that another name leads to."""
    kernel = Kernel(vfs, "s")
    ino = kernel.create(kernel.root, b"one", 0o644 | REG)
    kernel.inode(ino).write(0, b"before")
    kernel.link(ino, kernel.resolve(b"a/sub"), b"two")
    vfs.close()
    kernel = Kernel(vfs, "s")
    ino = kernel.pin(kernel.resolve(b"one"))
    kernel.unlink(kernel.root, b"one")
    kernel.inode(ino).write(0, b"after ")
    assert kernel.stat(ino).nlink == 1
    other = kernel.resolve(b"a/sub/two")
    assert other == ino
    assert kernel.read(other) == b"after "
    kernel.rename(kernel.resolve(b"a/sub"), b"two", kernel.root, b"three")
    kernel.unpin(ino)
    assert vfs.statistics().orphans == 0
    assert kernel.read(kernel.resolve(b"three")) == b"after "
    kernel.pin(ino)
    kernel.unlink(kernel.root, b"three")
    assert vfs.statistics().orphans == 1
    kernel.unpin(ino)
    assert (vfs.statistics().orphans, vfs.statistics().open_files) == (0, 0)
    new = kernel.create(kernel.root, b"new", 0o644 | REG)
    assert new != ino


def test_few_descriptors_stay_open(repository: Repository, vfs: Vfs, monkeypatch):
    import engine.mounted.overlay

    monkeypatch.setattr(engine.mounted.overlay, "OPEN_FILES", 5)
    kernel = Kernel(vfs, "s")
    inos = [kernel.create(kernel.root, b"n%d" % n, 0o644 | REG) for n in range(50)]
    before = len(os.listdir("/proc/self/fd"))
    for round_ in range(2):
        for n, ino in enumerate(inos):
            kernel.inode(ino).write(round_, b"%d" % n)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert vfs.statistics().open_files <= 5
    for n, ino in enumerate(inos):
        assert kernel.read(ino)[1:] == b"%d" % n


def test_what_is_under_way_when_a_session_goes_changes_nothing(repository: Repository, vfs: Vfs):
    """The driver may have waited for a copy meanwhile, and goes on with what it had."""
    kernel = Kernel(vfs, "s")
    changed, pristine = kernel.resolve(b"a/b"), kernel.resolve(b"c")
    kernel.inode(changed).write(0, b"before")
    files = [kernel.inode(changed), kernel.inode(pristine)]
    directory = kernel.inode(kernel.resolve(b"a"))
    descriptors = len(os.listdir("/proc/self/fd"))
    vfs.drop_session("s")
    calls: list[Any] = [
        lambda: files[0].write(0, b"after"),
        lambda: files[1].write(0, b"after"),
        lambda: files[0].change(Changes(size=0)),
        lambda: files[1].change(Changes(mode=0o600)),
        lambda: files[0].set_xattr(b"user.late", b""),
        lambda: directory.create(b"late", 0o644 | REG, OWNER),
        lambda: directory.mkdir(b"late", 0o644, OWNER),
        lambda: directory.unlink(b"b"),
        lambda: directory.rename(b"b", directory, b"late", 0),
        lambda: directory.link(b"late", files[0]),
    ]
    for call in calls:
        with pytest.raises(OSError, match="Stale"):
            call()
    assert len(os.listdir("/proc/self/fd")) < descriptors
    found = tree(repository, "@s")
    assert found[b"a/b"].data == b"before"
    assert b"a/late" not in found
    assert found[b"c"].data == b"linked " * 30


def test_numbers_of_the_kernel_end_with_the_session(repository: Repository, vfs: Vfs):
    kernel = Kernel(vfs, "s")
    ino = kernel.resolve(b"a/b")
    vfs.reset("s", None)
    with pytest.raises(OSError, match="Stale"):
        kernel.stat(ino)
    again = Kernel(vfs, "s")
    assert again.resolve(b"a/b") != ino
    vfs.remove("s")
    with pytest.raises(OSError, match="Stale"):
        again.stat(again.root)
    assert repository.sessions.all() == []


def test_another_process_holds_it(repository: Repository, session: str):
    with repository.sessions.hold("s", "elsewhere"):
        mounted = Vfs(repository, OWNER, {})
        ((_, name, inode),) = mounted.inode(SESSIONS).listing(0)
        assert name == b"s"
        assert stat.S_ISDIR(inode.attributes().mode)
        with pytest.raises(OSError, match="busy"):
            inode.lookup(b"a")
    assert inode.lookup(b"a") is not None
    mounted.close()


def test_looking_at_the_sessions_takes_none(repository: Repository, session: str, vfs: Vfs):
    ((_, _, found),) = vfs.inode(SESSIONS).listing(0)
    shown = vfs.refer(found)
    before = shown.attributes()
    with repository.sessions.hold("s", "another process") as held, repository.storing():
        freeze = held.freeze()
        freeze.prepare()
        held.commit(freeze)
        held.clean()
        assert shown.attributes().ino == before.ino
    kernel = Kernel(vfs, "s")
    assert kernel.root == before.ino
    assert vfs.inode(kernel.root) is shown
    kernel.create(kernel.root, b"made", 0o644 | REG)
    root = vfs.inode(kernel.root)
    assert root is vfs.session("s").overlay.root
    assert root.lookups == 2
    with pytest.raises(LeaseHeldError):
        repository.sessions.hold("s", "another process")
    vfs.reset("s", None)
    with pytest.raises(OSError, match="Stale"):
        vfs.inode(kernel.root)
    assert Kernel(vfs, "s").root != kernel.root


@pytest.mark.parametrize("act", ["rename", "remove", "replace"])
def test_a_session_that_was_only_looked_at_may_go(
    repository: Repository, first: SnapshotId, session: str, vfs: Vfs, act: str
):
    kernel = Kernel(vfs, "s")
    inode = vfs.inode(kernel.root)
    if act == "rename":
        vfs.rename("s", "other")
        assert inode.attributes().ino == kernel.root
        assert inode.lookup(b"a") is not None
        return
    repository.sessions.remove(repository.sessions.hold("s", "another process"))
    if act == "replace":
        repository.sessions.create("s", (None, None, first))
        assert Kernel(vfs, "s").root != kernel.root
    with pytest.raises(OSError, match=r"Stale|No such"):
        inode.attributes()
    with pytest.raises(OSError, match="Stale"):
        inode.lookup(b"a")


@pytest.mark.parametrize("where", [SNAPSHOTS, SESSIONS])
def test_a_listing_goes_on_where_it_was_while_names_come_and_go(
    repository: Repository, first: SnapshotId, vfs: Vfs, where: int
):
    def add(name: str) -> None:
        if where == SESSIONS:
            repository.sessions.create(name, (None, None, first))
        else:
            repository.set_ref(name, first)

    def remove(name: str) -> None:
        if where == SESSIONS:
            repository.sessions.remove(repository.sessions.hold(name, "a test"))
        else:
            repository.remove_ref(name)

    for n in range(10, 30):
        add(f"n{n}")
    found: list[bytes] = []
    cookie = 0
    for n in range(10, 20):
        batch = [item[:2] for item in islice(vfs.inode(where).listing(cookie), 2)]
        if not batch:  # of what was removed much may have been still to come
            break
        found += [name for _, name in batch]
        cookie = batch[-1][0]
        add(f"a{n}")
        remove(f"n{n}")
    found += [name for _, name, _ in vfs.inode(where).listing(cookie)]
    assert len(found) == len(set(found))
    assert {b"n%d" % n for n in range(20, 30)} <= set(found)


# Threads.


class SlowStore(LmdbStore):
    """A store whose first read in a chosen thread waits until it is let go on."""

    slow: threading.Thread | None = None

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reading, self.go_on = threading.Event(), threading.Event()

    def read(self) -> Any:
        if threading.current_thread() is self.slow:
            self.slow = None
            self.reading.set()
            assert self.go_on.wait(120)
        return super().read()


@pytest.mark.parametrize("act", ["truncate", "write", "unlink", "rename over", "commit after"])
def test_a_copy_in_another_thread_that_comes_late(repository: Repository, session: str, act: str):
    """The driver copies a large file in a thread; meanwhile other requests are answered."""
    repository.store.close()
    store = SlowStore(repository.path)
    repository.store, repository.objects = store, Objects(store)
    repository.sessions._store, repository.sessions._objects = store, repository.objects
    vfs = Vfs(repository, OWNER, {})
    kernel = Kernel(vfs, "s")
    ino = kernel.pin(kernel.resolve(b"a/sub/d"))
    inode = kernel.inode(ino)
    original = kernel.read(ino)
    repository.objects.shed()
    thread = threading.Thread(target=inode.stage)
    store.slow = thread
    thread.start()
    assert store.reading.wait(120)
    if act in {"truncate", "commit after"}:
        kernel.change(ino, Changes(size=0))
        kernel.inode(ino).write(0, b"meanwhile")
        expected = b"meanwhile"
    elif act == "write":
        inode.write(0, b"meanwhile")
        expected = b"meanwhile" + original[9:]
    elif act == "unlink":
        kernel.unlink(kernel.resolve(b"a/sub"), b"d")
        expected = original
    else:
        kernel.rename(kernel.resolve(b"a"), b"b", kernel.resolve(b"a/sub"), b"d")
        expected = original
    if act == "commit after":
        live_commit(vfs)
    store.go_on.set()
    thread.join(120)
    assert kernel.read(ino) == expected
    live_commit(vfs)
    inode.write(len(expected), b"!")
    assert kernel.read(ino) == expected + b"!"
    live_commit(vfs)
    assert kernel.read(ino) == expected + b"!"
    kernel.unpin(ino)
    assert repository.verify().damage == []
    vfs.close()


CHANGES: dict[str, Callable[[Kernel, int], object]] = {
    "nothing": lambda kernel, ino: None,
    "read": lambda kernel, ino: kernel.read(ino),
    "write": lambda kernel, ino: kernel.inode(ino).write(0, b"other"),
    "truncate": lambda kernel, ino: kernel.change(ino, Changes(size=2)),
    "chmod": lambda kernel, ino: kernel.change(ino, Changes(mode=0o600)),
    "xattr": lambda kernel, ino: kernel.inode(ino).set_xattr(b"user.x", b"y"),
    "create": lambda kernel, ino: kernel.create(kernel.root, b"more", 0o640 | REG),
    "mkdir": lambda kernel, ino: kernel.mkdir(kernel.root, b"more", 0o750),
    "symlink": lambda kernel, ino: kernel.symlink(kernel.root, b"more", b"target"),
    "link": lambda kernel, ino: kernel.link(ino, kernel.root, b"more"),
    "unlink": lambda kernel, ino: kernel.unlink(kernel.root, b"new"),
    "rmdir": lambda kernel, ino: kernel.rmdir(kernel.root, b"empty"),
    "rename": lambda kernel, ino: kernel.rename(kernel.root, b"new", kernel.root, b"newer"),
    "exchange": lambda kernel, ino: kernel.rename(
        kernel.root, b"new", kernel.resolve(b"a"), b"c", EXCHANGE
    ),
    "write to the base's": lambda kernel, ino: kernel.inode(kernel.resolve(b"a/c")).write(0, b"x"),
    "chmod the root": lambda kernel, ino: kernel.change(kernel.root, Changes(mode=0o711)),
}


@pytest.mark.parametrize("act", CHANGES)
def test_a_tree_built_ahead_is_taken_if_nothing_changed(
    repository: Repository, session: str, vfs: Vfs, act: str
):
    kernel = Kernel(vfs, session)
    ino = kernel.create(kernel.root, b"new", 0o644 | REG)
    kernel.inode(ino).write(0, b"first")
    live = vfs.session(session)
    with repository.storing():
        freeze = live.held.freeze(live.overlay)
        freeze.prepare()
        kernel.inode(ino).write(0, b"again")
        freeze.mark()
        freeze.build_ahead()
        assert freeze.is_ahead()
        CHANGES[act](kernel, ino)
        assert freeze.is_ahead() == (act in {"nothing", "read"})
        shown = kernel.tree()
        report = live.held.commit(freeze, "", None, None, live.overlay)
    live.held.clean()
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    assert settled(of_entry(repository.objects, root)) == settled(shown)
    assert settled(kernel.tree()) == settled(shown)
    assert repository.verify().damage == []


@pytest.mark.parametrize("act", ["commit", "rename", "unlink", "close"])
def test_a_sync_reaches_the_file_that_was_written(
    repository: Repository, vfs: Vfs, monkeypatch: pytest.MonkeyPatch, act: str
):
    """Whatever comes between opening it and syncing it, which another thread does."""
    import engine.mounted.overlay

    monkeypatch.setattr(engine.mounted.overlay, "OPEN_FILES", 2)
    kernel = Kernel(vfs, "s")
    inos = [kernel.create(kernel.root, b"n%d" % n, 0o644 | REG) for n in range(4)]
    hosts = [os.stat(vfs.session("s").overlay.upper.at(b"n%d" % n)).st_ino for n in range(4)]
    fds = [kernel.inode(ino).open_to_sync() for ino in inos]
    directory = kernel.inode(kernel.root).open_to_sync()
    if act == "commit":
        live_commit(vfs)
        assert [kernel.inode(ino).open_to_sync() for ino in inos] == [-1] * 4
    elif act == "rename":
        kernel.rename(kernel.root, b"n0", kernel.root, b"n1")
    elif act == "unlink":
        kernel.unlink(kernel.root, b"n0")
    else:
        inode = kernel.inode(inos[0])
        vfs.drop_session("s")
        with pytest.raises(OSError, match="Stale"):
            inode.open_to_sync()
    assert vfs.statistics().open_files <= 2
    for fd, host in zip(fds, hosts, strict=True):
        assert os.fstat(fd).st_ino == host
        os.fsync(fd)
        os.close(fd)
    os.fsync(directory)
    os.close(directory)


# Killed.

COMMITTER = """
import os, sys
from engine import Repository
from engine.storage.nodes import Owner
from engine.mounted.vfs import Vfs
from tests.engine.kernel import Kernel
start = int(sys.argv[2])
with Repository.open(sys.argv[1]) as repository:
    vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    kernel = Kernel(vfs, "s")
    for n in range(start, start + 1000):
        data = (b"%06d " % n) * 3000
        ino = kernel.lookup(kernel.root, b"file")
        if ino is None:
            ino = kernel.create(kernel.root, b"file", 0o100644)
        kernel.create(kernel.root, b"n%06d" % n, 0o100644)
        kernel.inode(ino).write(0, data)
        print("wrote", n, flush=True)
        live = vfs.session("s")
        with repository.storing():
            freeze = live.held.freeze(live.overlay)
            freeze.prepare()
            report = live.held.commit(freeze, str(n), None, None, live.overlay)
        print("commit", n, report.snapshot.hex(), flush=True)
        live.held.clean()
"""


def test_kill_during_commits_loses_nothing_acknowledged(repository: Repository, session: str):
    store = repository.path
    repository.close()
    last, start = -1, 0
    for n in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", COMMITTER, store, str(start)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        deadline = time.monotonic() + 0.013 * n
        while time.monotonic() < deadline:
            os.sched_yield()
        while n == 11 and not lines[-1].startswith("commit"):
            lines.append(child.stdout.readline().removesuffix("\n"))  # however slow the disk is
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().split("\n")[:-1]  # what came last may be half a line
        child.wait()
        child.stdout.close()
        words = [line.split() for line in lines]
        wrote = max(int(w[1]) for w in words if w[0] == "wrote")
        commits = {int(w[1]): w[2] for w in words if w[0] == "commit" and len(w) == 3}
        with Repository.open(store) as again:
            for number, identifier in commits.items():
                snapshot = again.snapshot(again.resolve(identifier))
                assert snapshot.message == str(number)
                data = of_entry(again.objects, snapshot.root)[b"file"].data
                assert data == (b"%06d " % number) * 3000
            found = tree(again, "@s")
            number = int(found[b"file"].data[:6])
            assert wrote <= number <= wrote + 1
            assert found[b"file"].data[7:] == (b"%06d " % number) * 2999 or number > wrote
            assert {b"n%06d" % k for k in range(wrote + 1)} <= found.keys()
            assert again.verify().damage == []
            home = store + "/sessions/" + again.sessions.get("s").uid
            assert len(os.listdir(home)) == 2
        last, start = max([last, *commits]), wrote + 2
        if start > wrote + 1:  # the number between may be half made
            with Repository.open(store) as again:
                write(again, "s", f"n{wrote + 1:06}", b"")
    assert last >= 0
