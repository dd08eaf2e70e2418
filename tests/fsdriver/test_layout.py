"""What a mount shows, and that what is committed cannot be changed through it."""

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.storage.nodes import Entry, Kind
from engine.storage.objects import NodeBuffer
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.trees.directory import directory_entry
from fsdriver import messages
from tests.engine.trees import of_directory
from tests.fsdriver.conftest import Mount, until
from tests.fsdriver.syscalls import refused, renameat2

pytestmark = pytest.mark.fuse


def test_the_root_and_what_is_in_it(mount, snapshot, session):
    assert sorted(os.listdir(mount.path)) == [".amalgam", "layers", "sessions", "snapshots"]
    assert snapshot.hex() in os.listdir(mount.snapshots)
    assert session.name in os.listdir(mount.sessions)
    assert (mount.snapshots / "main").readlink() == Path(snapshot.hex())
    assert sorted(os.listdir(mount.path / "layers" / session.name)) == ["2-blueprint", "3-session"]
    layers = mount.path / "layers" / session.name
    assert (layers / "2-blueprint").resolve() == mount.snapshots / snapshot.hex()
    assert (layers / "3-session").resolve() == session


def test_a_session_on_three_layers_shows_them_all(mount, tmp_path):
    ids = []
    with mount.repository() as repository:
        for name in ["infrastructure", "global", "blueprint"]:
            (tmp_path / name).mkdir()
            (tmp_path / name / "who").write_text(name)
            (tmp_path / name / name).write_text("")
            ids.append(repository.import_directory(str(tmp_path / name)).snapshot)
        repository.sessions.create("three", tuple(ids))
    try:
        layers = mount.path / "layers" / "three"
        names = ["0-infrastructure", "1-global", "2-blueprint"]
        assert [(layers / name / "who").read_text() for name in names] == [
            "infrastructure", "global", "blueprint"
        ]  # fmt: skip
        assert (layers / "3-session" / "who").read_text() == "blueprint"
        assert sorted(os.listdir(layers / "3-session")) == [
            "blueprint", "global", "infrastructure", "who"
        ]  # fmt: skip
    finally:
        mount.ask(messages.Remove("three", force=True))


def test_it_tells_of_itself(mount):
    status = json.loads((mount.path / ".amalgam" / "status").read_text())
    assert status["store"] == str(mount.store)
    assert status["mountpoint"] == str(mount.path)
    assert status["vfs"]["inodes"] >= 5
    assert (mount.path / ".amalgam" / "socket").read_text() == f"{mount.store}/locks/control\n"


def test_a_mounted_snapshot_is_its_source(mount, snapshot, tree):
    seen = of_directory(mount.snapshots / snapshot.hex())
    assert seen == of_directory(tree)


def test_a_fresh_session_is_its_snapshot(session, tree):
    assert of_directory(session) == of_directory(tree)


@pytest.mark.parametrize("place", ["snapshots", "sessions"])
def test_link_counts_and_numbers_are_the_files_own(mount, session, place):
    root = mount.snapshots / "main" if place == "snapshots" else session
    linked = [root / "README", root / "docs/linked", root / "src/lib/deep/linked"]
    assert {path.lstat().st_nlink for path in linked} == {3}
    assert len({path.lstat().st_ino for path in linked}) == 1
    assert (root / "src/main.c").stat().st_nlink == 1
    listed = {entry.name: entry.inode() for entry in os.scandir(root)}
    assert listed == {name: (root / name).lstat().st_ino for name in listed}


def test_the_same_file_in_two_snapshots_is_one_inode(mount, session):
    (session / "docs/other").write_text("changed")
    second = mount.snapshots / mount.commit(session.name).hex()
    first = mount.snapshots / "main"
    assert (first / "src/main.c").stat().st_ino == (second / "src/main.c").stat().st_ino
    assert (first / "docs").stat().st_ino != (second / "docs").stat().st_ino


def test_programs_run_from_a_snapshot(mount):
    tool = mount.snapshots / "main" / "src" / "tool.sh"
    assert subprocess.run([tool], capture_output=True, check=True).stdout == b"it runs\n"


@pytest.fixture(scope="module")
def many(shared, tmp_path_factory) -> tuple[str, list[str]]:
    """The snapshot of a directory of 20,000 names, and the names."""
    root = tmp_path_factory.mktemp("many")
    names = [f"a name of some length {number:06}" for number in range(20_000)]
    for name in names:
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY))
    with shared[0].repository() as repository:
        return repository.import_directory(str(root)).snapshot.hex(), names


def test_large_directories_list_completely_and_again(mount, many):
    found, names = many
    for _ in range(2):
        assert sorted(os.listdir(mount.snapshots / found)) == names


def test_large_directories_are_changed(mount, many):
    found, names = many
    at = mount.create("large", bytes.fromhex(found))
    try:
        for name in names[::20]:
            (at / name).unlink()
            (at / f"new {name}").touch()
        left = [name for number, name in enumerate(names) if number % 20]
        assert sorted(os.listdir(at)) == left + [f"new {name}" for name in names[::20]]
        mount.commit("large")
        assert sorted(os.listdir(at)) == left + [f"new {name}" for name in names[::20]]
    finally:
        mount.ask(messages.Remove("large", force=True))


def write(path: Path, flags: int) -> None:
    """The kernel opens without asking, so it may be the write that fails."""
    fd = os.open(path, flags)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda at: (at / "new").write_text("x"),
    "write": lambda at: write(at / "README", os.O_RDWR),
    "append": lambda at: write(at / "README", os.O_WRONLY | os.O_APPEND),
    "truncate on open": lambda at: os.open(at / "README", os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda at: os.truncate(at / "README", 1),
    "mkdir": lambda at: (at / "new").mkdir(),
    "rmdir": lambda at: (at / "empty").rmdir(),
    "unlink": lambda at: (at / "README").unlink(),
    "unlink a link": lambda at: (at / "docs/link").unlink(),
    "symlink": lambda at: (at / "new").symlink_to("x"),
    "link": lambda at: os.link(at / "README", at / "new"),
    "mkfifo": lambda at: os.mkfifo(at / "new"),
    "rename": lambda at: (at / "README").rename(at / "new"),
    "rename over": lambda at: (at / "README").rename(at / "src/main.c"),
    "rename a directory": lambda at: (at / "src").rename(at / "new"),
    "exchange": lambda at: renameat2(at / "README", at / "src/main.c", 2),
    "chmod": lambda at: (at / "README").chmod(0o600),
    "chmod a directory": lambda at: (at / "src").chmod(0o700),
    "chown": lambda at: os.chown(at / "README", os.getuid(), os.getgid()),
    "utime": lambda at: os.utime(at / "README"),
    "setxattr": lambda at: os.setxattr(at / "README", b"user.note", b"x"),
    "removexattr": lambda at: os.removexattr(at / "README", b"user.note"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_cannot_be_changed(mount, snapshot, tree, change):
    place = mount.snapshots / snapshot.hex()
    with refused(errno.EROFS):
        CHANGES[change](place)
    assert set(os.listdir(place)) == set(os.listdir(tree))


@pytest.mark.parametrize("place", ["", "snapshots", "sessions", "layers", ".amalgam"])
def test_nothing_is_made_beside_what_the_mount_shows(mount, session, place):
    at = mount.path / place
    for change in [
        (at / "new").mkdir,
        lambda: (at / "new").write_text(""),
        lambda: (at / "new").symlink_to("x"),
        lambda: os.rename(session, at / "new"),
        lambda: os.rmdir(session),
    ]:
        # Users find no write permission; `snapshots` may be a mount of its own.
        with refused(errno.EROFS, errno.EACCES, errno.EXDEV):
            change()


def test_what_is_not_there_is_not_there(mount, session):
    for path in [
        mount.snapshots / ("0" * 64),
        mount.snapshots / "nobody",
        mount.snapshots / "zz",
        mount.sessions / "nobody",
        mount.sessions / os.fsdecode(b"\xff"),
        mount.path / "layers" / "nobody",
        mount.path / "other",
        session / ("x" * 254),
    ]:
        assert not os.path.lexists(path)
    for path in [session, mount.snapshots / "main"]:
        with refused(errno.ENAMETOOLONG):
            os.stat(path / ("x" * 256))


def test_a_snapshot_of_another_process_is_there_at_once(mount, tree):
    with mount.repository() as repository:
        found = repository.import_directory(str(tree / "src"), ref="sources").snapshot
        try:
            assert of_directory(mount.snapshots / found.hex()) == of_directory(tree / "src")
            assert (mount.snapshots / "sources" / "main.c").exists()
            assert {"sources", found.hex()} <= set(os.listdir(mount.snapshots))
        finally:
            repository.remove_ref("sources")
        assert not os.path.lexists(mount.snapshots / "sources")
        until(lambda: "sources" not in os.listdir(mount.snapshots))


@pytest.mark.parametrize("told", [True, False])
def test_a_removed_snapshot_goes(mount, tmp_path, told):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text(f"{tmp_path}")
    with mount.repository() as repository:
        found = repository.import_directory(str(tmp_path / "one")).snapshot
        place = mount.snapshots / found.hex()
        assert (place / "file").read_text() == f"{tmp_path}"
        repository.remove_snapshot(found)
    if told:
        mount.ask(messages.Refresh())
        assert not place.exists()
    else:
        until(lambda: not place.exists(), 3.0)
    assert found.hex() not in os.listdir(mount.snapshots)


def test_a_moved_ref_leads_elsewhere_at_once(mount, snapshot, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only").write_text("here")
    with mount.repository() as repository:
        repository.set_ref("moving", snapshot)
        assert (mount.snapshots / "moving" / "README").exists()
        other = repository.import_directory(str(tmp_path / "one")).snapshot
        repository.set_ref("moving", other)
        assert os.listdir(mount.snapshots / "moving") == ["only"]
        repository.remove_ref("moving")


def test_statfs_is_the_stores_disk(mount, session):
    ours, disk = os.statvfs(session), os.statvfs(mount.store)
    assert (ours.f_blocks, ours.f_bsize, ours.f_namemax) == (disk.f_blocks, disk.f_bsize, 255)
    assert ours.f_bavail > 0


def test_files_belong_to_who_mounts(mount, session):
    for path in [mount.path, mount.snapshots / "main" / "README", session / "src"]:
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())


def test_sparse_files_and_times_before_1970_survive(mount, tmp_path):
    (tmp_path / "tree").mkdir()
    old = tmp_path / "tree" / "old"
    old.write_text("")
    os.utime(old, ns=(-1_500_000_001, -1_500_000_001))
    with mount.repository() as repository:
        found = repository.import_directory(str(tmp_path / "tree")).snapshot
    status = (mount.snapshots / found.hex() / "old").stat()
    assert status.st_mtime_ns == -1_500_000_001
    assert stat.S_ISREG(status.st_mode)


def test_what_overlayfs_would_obey_is_not_shown(mount: Mount):
    """A tree that somebody else made may hold anything; `run` mounts overlayfs over it."""
    xattrs = ((b"user.note", b"kept"), (b"user.overlay.redirect", b"/elsewhere"))
    nodes = NodeBuffer()
    file = Entry(b"file", Kind.FILE, 0o644, 0, 0, b"", xattrs)
    root = directory_entry(nodes.put, [file], name=b"", mode=0o755, mtime_ns=0, xattrs=xattrs)
    identifier, record = encode_snapshot(make_snapshot(root))
    with mount.repository() as repository:

        def change(writer: Writer) -> None:
            nodes.flush(writer)
            writer.put(Db.SNAPSHOTS, identifier, record)

        repository.store.write(change)
    for place in (mount.snapshots / identifier.hex(), mount.snapshots / identifier.hex() / "file"):
        assert os.listxattr(place) == ["user.note"]
        assert os.getxattr(place, "user.note") == b"kept"
        with pytest.raises(OSError, match=r"No data") as caught:
            os.getxattr(place, "user.overlay.redirect")
        assert caught.value.errno == errno.ENODATA
