"""A session that a mount lends to another process, and has again."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.errors import InUseError
from engine.host.leases import LeaseHeldError
from engine.mounted.vfs import SESSIONS, SNAPSHOTS, Vfs, base_path
from engine.storage.nodes import Owner
from tests.engine.kernel import Kernel
from tests.engine.test_session_machine import make_base
from tests.engine.trees import of_entry

OWNER = Owner(os.getuid(), os.getgid())
REG = stat.S_IFREG


@pytest.fixture
def vfs(repository: Repository, tmp_path: Path) -> Iterator[Vfs]:
    (tmp_path / "base").mkdir()
    make_base(tmp_path / "base")
    first = SnapshotId(repository.import_directory(str(tmp_path / "base")).snapshot)
    repository.sessions.create("s", (None, None, first))
    made = Vfs(repository, OWNER, {})
    yield made
    made.close()


@pytest.fixture
def kernel(vfs: Vfs) -> Kernel:
    return Kernel(vfs, "s")


def upper(vfs: Vfs) -> Path:
    repository = vfs.repository
    return Path(os.fsdecode(repository.sessions.upper(repository.sessions.get("s")).root))


def test_a_session_with_open_files_is_not_lent(vfs: Vfs, kernel: Kernel):
    file = kernel.pin(kernel.resolve(b"a/b"))
    kernel.evict_all()
    with pytest.raises(InUseError, match="a/b"):
        vfs.lend("s")
    kernel.inode(file).write(0, b"goes on")
    kernel.unpin(file)
    kernel.evict_all()
    vfs.lend("s")


def test_what_is_lent_is_busy_and_comes_back_as_it_is_then(vfs: Vfs, kernel: Kernel):
    made = kernel.mkdir(kernel.root, b"new", 0o755)
    standing = [kernel.pin(made), kernel.pin(kernel.resolve(b"a/sub"))]
    kernel.evict_all()
    known = vfs.lend("s")
    assert set(known) >= {kernel.root, *standing}
    for ino in [kernel.root, *standing]:
        for call in (
            lambda i=ino: vfs.inode(i).lookup(b"x"),
            lambda i=ino: vfs.inode(i).listing(0),
        ):
            with pytest.raises(OSError, match="busy") as caught:
                call()
            assert caught.value.errno == errno.EBUSY
        assert stat.S_ISDIR(vfs.inode(ino).attributes().mode)
    busy = vfs.inode(SESSIONS).lookup(b"s")
    assert busy is not None
    assert busy.ino == kernel.root  # what is mounted over it stays mounted
    with vfs.repository.sessions.hold("s", "a test") as held:
        vfs.lent_out("s")
        with pytest.raises(InUseError, match="a test"):
            vfs.check_not_lent("s")
        with pytest.raises(InUseError):
            vfs.rename("s", "t")
        (Path(os.fsdecode(held.upper().root)) / "new/file").write_text("from elsewhere")
    found = vfs.inode(made).lookup(b"file")  # the first look takes the session again
    assert found is not None
    assert found.read(0, 100) == b"from elsewhere"
    vfs.check_not_lent("s")
    root = vfs.inode(SESSIONS).lookup(b"s")
    assert root is not None
    assert root.ino == kernel.root
    assert kernel.resolve(b"new") == made
    assert kernel.resolve(b"a/sub") == standing[1]
    assert kernel.tree()


def test_numbers_go_on_where_they_were(vfs: Vfs, kernel: Kernel):
    made = {kernel.pin(kernel.mkdir(kernel.root, b"one", 0o755))}
    kernel.evict_all()
    vfs.lend("s")
    vfs.lent_out("s")
    made.add(kernel.mkdir(kernel.root, b"two", 0o755))
    made.add(kernel.create(kernel.root, b"three", 0o644 | REG))
    assert len(made) == 3


def test_a_directory_under_another_name_is_stale_afterwards(vfs: Vfs, kernel: Kernel):
    moved = kernel.pin(kernel.resolve(b"a"))
    kernel.rename(kernel.root, b"a", kernel.root, b"z")
    kernel.evict_all()
    vfs.lend("s")
    vfs.lent_out("s")
    with pytest.raises(OSError, match="tale"):
        vfs.inode(moved).lookup(b"sub")


def test_a_lent_session_waits_for_its_taker(vfs: Vfs, kernel: Kernel):
    kernel.evict_all()
    vfs.lend("s")
    with pytest.raises(LeaseHeldError):
        vfs.session("s")
    vfs.lent_out("s")
    assert vfs.session("s").held.session.name == "s"


def test_a_lent_session_may_be_removed_and_made_anew(vfs: Vfs, kernel: Kernel):
    kernel.evict_all()
    vfs.lend("s")
    vfs.remove("s")
    with pytest.raises(OSError, match="tale"):
        vfs.inode(kernel.root).lookup(b"a")
    assert vfs.inode(SESSIONS).lookup(b"s") is None


def test_folding_keeps_what_is_shown_and_the_parent(vfs: Vfs, kernel: Kernel):
    repository = vfs.repository
    kernel.rename(kernel.root, b"d", kernel.root, b"moved")
    kernel.unlink(kernel.root, b"c")
    kernel.create(kernel.root, b"socket", 0o644 | stat.S_IFSOCK)
    kernel.evict_all()
    vfs.close()
    before = repository.sessions.get("s")
    with repository.tree("@s") as root:
        shown = of_entry(repository.objects, root, counts=False)
    with repository.sessions.hold("s", "a test") as held:
        taken = repository.hand_over(held)
        assert os.listdir(taken.root) == [b"socket"]
        held.take_back()
    after = repository.sessions.get("s")
    assert (after.parent, after.generation) == (before.parent, before.generation + 1)
    assert of_entry(repository.objects, after.root, counts=False) == shown
    name = base_path(repository, after).removeprefix("snapshots/").encode()
    directory = vfs.inode(SNAPSHOTS).lookup(name)
    assert directory is not None
    assert directory.lookup(b"moved") is not None
    assert vfs.inode(SNAPSHOTS).lookup(name + b"9") is None
    assert vfs.removed_snapshots() == []
    repository.commit("s")
    assert vfs.removed_snapshots() == [name]
