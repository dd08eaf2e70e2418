"""Import: what a directory holds is in the tree, and what did not change is not read again."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Repository, SnapshotId
from engine.plain import importing
from engine.plain.importing import ImportResult, ImportSourceError
from engine.progress import Progress
from engine.storage import content
from engine.storage.content import SourceChangedError
from engine.storage.nodes import Ref
from engine.storage.objects import ChunkSink
from engine.storage.store import Db
from engine.trees.directory import find
from tests.conftest import ROOT, Run
from tests.engine.trees import Tree, age, noise, of_directory, of_entry


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files that were only just written count as written long ago."""
    monkeypatch.setattr(importing, "FRESH_NS", -(10**18))


def imported(repository: Repository, path: Path, **options: Any) -> ImportResult:
    return repository.import_directory(str(path), **options)


def stored(repository: Repository, result: ImportResult) -> Tree:
    root = repository.snapshot(SnapshotId(result.snapshot)).root
    assert root == result.root
    return of_entry(repository.objects, root)


def same(repository: Repository, path: Path) -> ImportResult:
    """Imports a directory and checks that the tree is what the directory holds."""
    result = imported(repository, path)
    assert stored(repository, result) == of_directory(path)
    return result


# What a tree holds.


def test_every_kind_of_file(repository: Repository, tree: Path):
    (tree / "empty").touch()
    (tree / "inline").write_bytes(bytes(range(128)))
    (tree / "one chunk").write_bytes(noise(129))
    (tree / "several chunks").write_bytes(noise(1_000_000))
    (tree / "text").write_text("compressible\n" * 10_000)
    (tree / "link").symlink_to("../outside")
    (tree / "long link").symlink_to("x/" * 2047)
    os.mkfifo(tree / "fifo", 0o640)
    (tree / "directory").mkdir()
    (tree / "directory/empty").mkdir()
    same(repository, tree)
    assert repository.verify().damage == []


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o755, 0o1777, 0o4711, 0o2070, 0o7777])
def test_modes(repository: Repository, tree: Path, mode: int):
    (tree / "file").write_bytes(b"content")
    (tree / "directory").mkdir()
    if os.geteuid() != 0:
        mode |= 0o600
    (tree / "file").chmod(mode)
    (tree / "directory").chmod(mode | 0o700)
    os.mkfifo(tree / "fifo")
    (tree / "fifo").chmod(mode)
    same(repository, tree)


@pytest.mark.parametrize("ns", [-1, -1_500_000_001, 0, 1, 1_700_000_000_123_456_789, 2**33 * 10**9])
def test_times(repository: Repository, tree: Path, ns: int):
    (tree / "file").write_bytes(b"content")
    (tree / "link").symlink_to("target")
    (tree / "directory").mkdir()
    for path in [tree / "file", tree / "link", tree / "directory", tree]:
        os.utime(path, ns=(ns, ns), follow_symlinks=False)
    result = imported(repository, tree)
    tree_times = {seen.mtime_ns for seen in of_directory(tree).values()}
    assert {seen.mtime_ns for seen in stored(repository, result).values()} == tree_times


def test_times_beyond_the_format_are_its_last(repository: Repository, memory_path: Path):
    """Some filesystems keep seconds in 64 bits; the format has nanoseconds in 64."""
    for name, seconds in [("late", 2**34 * 100), ("early", -(2**34) * 100)]:
        (memory_path / name).touch()
        subprocess.run(["touch", "-d", f"@{seconds}", memory_path / name], check=True)
    if os.stat(memory_path / "late").st_mtime_ns < 2**63:
        pytest.skip("the filesystem has no such times")
    found = stored(repository, imported(repository, memory_path))
    assert found[b"late"].mtime_ns == 2**63 - 1
    assert found[b"early"].mtime_ns == -(2**63)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="afs", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def test_attributes(repository: Repository, tree: Path):
    (tree / "file").write_bytes(b"content")
    (tree / "directory").mkdir()
    for path in [tree / "file", tree / "directory", tree]:
        for name, value in [(b"user.b", b"\x00\xff"), (b"user.a", b""), (b"user.c", bytes(900))]:
            os.setxattr(path, name, value)
    os.setxattr(tree / "file", b"user.overlay.origin", b"of an overlay, not of the file")
    result = same(repository, tree)
    assert [name for name, _ in result.root.xattrs] == [b"user.a", b"user.b", b"user.c"]


def test_hard_links(repository: Repository, tree: Path, tmp_path: Path):
    (tree / "a/deep").mkdir(parents=True)
    (tree / "b").mkdir()
    (tree / "a/one").write_bytes(b"shared")
    os.link(tree / "a/one", tree / "a/two")
    os.link(tree / "a/one", tree / "b/three")
    (tree / "a/deep/other").write_bytes(b"shared")
    os.link(tree / "a/deep/other", tree / "zzz")
    os.utime(tree / "a/one", ns=(7, 7))
    os.utime(tree / "zzz", ns=(7, 7))  # two groups alike in everything
    (tree / "link").symlink_to("x")
    os.link(tree / "link", tree / "b/link", follow_symlinks=False)
    os.mkfifo(tree / "fifo")
    os.link(tree / "fifo", tree / "b/fifo")
    (tree / "outside").write_bytes(b"the other name is not in the tree")
    os.link(tree / "outside", tmp_path / "outside")
    result = same(repository, tree)
    found = stored(repository, result)
    assert found[b"a/one"].names == (b"a/one", b"a/two", b"b/three")
    assert found[b"zzz"].names == (b"a/deep/other", b"zzz")
    assert found[b"outside"].names == ()
    assert not same(repository, tree).changed
    os.unlink(tree / "b/three")
    assert same(repository, tree).changed
    os.unlink(tree / "a/two")
    same(repository, tree)


def test_names(repository: Repository, tree: Path):
    for name in [b"\xff\xfe", b"new\nline", b" ", b"\x01", b"x" * 255, b"...", b"-rf", b"a\\b"]:
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    os.mkdir(os.fsencode(tree) + b"/\xe9")
    os.symlink(b"\xff\n", os.fsencode(tree) + b"/\xe9/\xe9")
    same(repository, tree)


def test_a_directory_with_a_name_that_is_not_text(repository: Repository, tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    path.mkdir()
    result = same(repository, path)
    metadata = repository.snapshot(SnapshotId(result.snapshot)).metadata
    assert metadata["source"] == str(tmp_path) + r"/\udcff"


def test_messages_and_metadata_that_are_not_text(repository: Repository, tree: Path):
    bad = os.fsdecode(b"\xff")
    result = imported(repository, tree, message=bad, metadata={"a": bad, bad: {"b": [bad]}})
    snapshot = repository.snapshot(SnapshotId(result.snapshot))
    assert snapshot.message == r"\udcff"
    assert snapshot.metadata["a"] == r"\udcff"
    assert snapshot.metadata[r"\udcff"] == {"b": [r"\udcff"]}


def test_a_large_directory(repository: Repository, tree: Path):
    for n in range(5_000):
        os.mknod(tree / f"{n}")
    result = same(repository, tree)
    assert result.report.files == 5_000
    (tree / "2500").write_bytes(b"new")
    with repository.store.read() as reader:
        before = reader.count(Db.NODES)
    same(repository, tree)
    with repository.store.read() as reader:
        assert reader.count(Db.NODES) - before <= 3  # a page and the indexes above it


def test_a_file_of_many_chunks(repository: Repository, tree: Path, monkeypatch: pytest.MonkeyPatch):
    """As long as lists of lists are, with lists that are shorter than usual."""
    monkeypatch.setattr(content, "LIST_REFS", 3)
    (tree / "file").write_bytes(noise(4_000_000))
    result = same(repository, tree)
    entry = find(repository.objects, result.root, b"file")
    assert entry is not None
    assert isinstance(entry.content, tuple)
    assert entry.content[0].level == 1
    assert len(list(content.pieces(repository.objects, entry))) > 40
    for offset in [0, 1, 100_000, 3_999_999, 4_000_000, 5_000_000]:
        for size in [0, 1, 70_000, 4_000_000]:
            read = content.read(repository.objects, entry, offset, size)
            assert read == noise(4_000_000)[offset : offset + size]
    assert repository.verify().damage == []
    (tree / "file").unlink()
    imported(repository, tree)


# Sparse files.


def data_ranges(path: Path) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return list(content._data_ranges(file.fileno(), path.stat().st_size))  # type: ignore[arg-type]


def test_holes_stay_holes(repository: Repository, tree: Path, tmp_path: Path):
    with (tree / "middle").open("wb") as file:
        file.write(noise(40_000))
        file.seek(10_000_000)
        file.write(noise(40_000, 1))
    with (tree / "front").open("wb") as file:
        file.seek(1_000_000)
        file.write(b"end")
    with (tree / "back").open("wb") as file:
        file.write(b"start")
        file.truncate(1_000_000)
    with (tree / "nothing").open("wb") as file:
        file.truncate(1_000_000)
    result = same(repository, tree)
    assert result.report.new_bytes < 100_000
    target = tmp_path / "target"
    repository.check_out(result.root, str(target))
    assert of_directory(target) == of_directory(tree)
    for name in os.listdir(tree):
        assert data_ranges(target / name) == data_ranges(tree / name)
    again = imported(repository, target)
    assert again.root == result.root


def test_a_huge_sparse_file_is_imported_at_once(repository: Repository, memory_path: Path):
    with (memory_path / "huge").open("wb") as file:
        file.seek((1 << 40) - 5)
        file.write(b"end.\n")
    result = imported(repository, memory_path)
    assert result.root.size == 1 << 40
    entry = find(repository.objects, result.root, b"huge")
    assert entry is not None
    assert isinstance(entry.content, tuple)
    assert entry.content[0] == Ref(None, (1 << 40) - 4096, 0)
    assert content.read(repository.objects, entry, (1 << 40) - 8, 100) == b"\0\0\0end.\n"
    repository.check_out(result.root, str(memory_path / "out"))
    assert (memory_path / "out/huge").stat().st_blocks < 100


# What is left out.


def test_sockets_are_left_out_by_name(repository: Repository, tree: Path):
    (tree / "kept").touch()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tree)  # a socket's path is short
        server.bind("sock\udcff")
        os.chdir("/")
        for _ in range(2):
            result = imported(repository, tree)
            (warning,) = result.report.warnings
            assert repr(str(tree / "sock\udcff")) in warning
            assert "socket" in warning
            assert set(stored(repository, result)) == {b"", b"kept"}


def test_devices_are_left_out_by_name(repository: Repository, tree: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can make devices")
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    result = imported(repository, tree)
    assert "null" in result.report.warnings[0]
    assert set(stored(repository, result)) == {b""}


def test_the_store_itself(repository: Repository, tmp_path: Path):
    for path in [repository.path, repository.path + "/db", repository.path + "/sessions"]:
        with pytest.raises(ImportSourceError, match="the store itself"):
            repository.import_directory(path)
    link = tmp_path / "link"
    link.symlink_to(repository.path)
    with pytest.raises(ImportSourceError):
        imported(repository, link)


def test_a_directory_that_contains_the_store(repository: Repository, tmp_path: Path):
    (tmp_path / "file").touch()
    result = imported(repository, tmp_path)
    assert set(stored(repository, result)) == {b"", b"file"}
    (warning,) = result.report.warnings
    assert repr(repository.path) in warning


def test_what_cannot_be_imported(repository: Repository, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, why in [("file", "no directory"), ("link", "no directory"), ("none", "No such")]:
        with pytest.raises(ImportSourceError, match=why) as caught:
            imported(repository, tmp_path / name)
        assert caught.value.path in {str(tmp_path / name), str(tmp_path / "file")}
    assert repository.snapshots() == []


def test_a_directory_by_way_of_a_link_to_it(
    repository: Repository, tree: Path, tmp_path: Path, settled: None
):
    plain_tree(tree)
    (tmp_path / "link").symlink_to(tree)
    assert imported(repository, tmp_path / "link").report.read_files == 12
    assert imported(repository, tree).report.read_files == 0


UNREADABLE = """
import sys
from engine import Repository
from engine.plain.importing import ImportSourceError
with Repository.create(sys.argv[1]) as repository:
    try:
        repository.import_directory(sys.argv[2])
    except ImportSourceError as error:
        print(error.path)
    assert repository.snapshots() == []
"""


@pytest.mark.unprivileged
@pytest.mark.parametrize("name", ["file", "directory"])
def test_what_may_not_be_read_is_named(public_path: Path, as_user: Run, name: str):
    tree = public_path / "tree"
    tree.mkdir()
    (tree / "file").touch()
    (tree / "directory").mkdir()
    (tree / name).chmod(0)
    done = as_user("-c", UNREADABLE, str(public_path / "store"), str(tree))
    (tree / name).chmod(0o700)
    assert (done.stdout, done.stderr) == (f"{tree / name}\n", "")


# The cache.


def plain_tree(tree: Path) -> None:
    for directory in ["", "a", "a/b", "c"]:
        (tree / directory).mkdir(exist_ok=True)
        for name in ["x", "y", "z"]:
            (tree / directory / name).write_bytes(noise(1000, len(directory)))
        (tree / directory / "link").symlink_to("target")


def reads(repository: Repository, tree: Path) -> int:
    """Imports, checks the tree, and returns how many files were read."""
    return same(repository, tree).report.read_files


def test_what_did_not_change_is_not_read(repository: Repository, tree: Path, settled: None):
    plain_tree(tree)
    assert reads(repository, tree) == 12
    first = imported(repository, tree)
    assert (first.report.read_files, first.report.files, first.changed) == (0, 19, False)
    assert repository.snapshots() == [first.snapshot]


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "one file": (lambda t: (t / "a/b/x").write_bytes(b"new"), 1),
    "same size and time": (
        lambda t: (
            (t / "new").write_bytes(noise(1000, 99)),
            os.utime(t / "new", ns=(0, t.joinpath("a/b/x").stat().st_mtime_ns)),
            (t / "new").rename(t / "a/b/x"),
        ),
        1,
    ),
    "same size and time, in place": (
        lambda t: (
            before := t.joinpath("a/b/x").stat().st_mtime_ns,
            (t / "a/b/x").write_bytes(noise(1000, 99)),
            os.utime(t / "a/b/x", ns=(0, before)),
        ),
        1,
    ),
    "touch": (lambda t: os.utime(t / "c/y"), 1),
    "chmod": (lambda t: (t / "c/y").chmod(0o600), 1),
    "attribute": (lambda t: os.setxattr(t / "c/y", b"user.x", b""), 1),
    "touch a directory": (lambda t: os.utime(t / "a/b"), 0),
    "chmod a directory": (lambda t: (t / "a/b").chmod(0o700), 0),
    "attribute of a directory": (lambda t: os.setxattr(t / "a/b", b"user.x", b""), 0),
    "chmod the root": (lambda t: t.chmod(0o711), 0),
    "attribute of the root": (lambda t: os.setxattr(t, b"user.x", b""), 0),
    "another link": (lambda t: ((t / "c/link").unlink(), (t / "c/link").symlink_to("other")), 0),
    "delete": (lambda t: (t / "a/b/x").unlink(), 0),
    "a new file": (lambda t: (t / "a/b/new").write_bytes(b"new"), 1),
    "rename": (lambda t: (t / "a/b/x").rename(t / "c/new"), 1),
    "rename over another": (lambda t: (t / "a/b/x").rename(t / "a/b/y"), 1),
    "rename a directory": (lambda t: (t / "a/b").rename(t / "c/b"), 3),
    "swap": (
        lambda t: ((t / "x").rename(t / "t"), (t / "y").rename(t / "x"), (t / "t").rename(t / "y")),
        2,
    ),
    "a file for a directory": (
        lambda t: ([(t / "c" / n).unlink() for n in ["x", "y", "z", "link"]], (t / "c").rmdir(),
                   (t / "c").write_bytes(b"file")),
        1,
    ),
    "a directory for a file": (lambda t: ((t / "c/x").unlink(), (t / "c/x").mkdir()), 0),
    "a hard link": (lambda t: os.link(t / "a/x", t / "c/hard"), 2),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_read(repository: Repository, tree: Path, settled: None, change: str):
    act, expected = CHANGES[change]
    plain_tree(tree)
    age(tree)
    imported(repository, tree)
    act(tree)
    result = same(repository, tree)
    assert result.changed
    assert result.report.read_files == expected
    assert reads(repository, tree) == 0


def test_a_change_right_after_the_import_is_seen(repository: Repository, tree: Path):
    """Within one tick of the clock nothing in a file's status may tell of a change."""
    for n in range(20):
        (tree / "file").write_bytes(b"%02d" % n)
        os.utime(tree / "file", ns=(0, 0))
        same(repository, tree)
        with (tree / "file").open("r+b") as file:
            file.write(b"%02d" % (n + 50))
        os.utime(tree / "file", ns=(0, 0))
        same(repository, tree)


def test_the_cache_can_be_passed_by(repository: Repository, tree: Path, settled: None):
    plain_tree(tree)
    imported(repository, tree)
    result = imported(repository, tree, use_cache=False)
    assert result.report.read_files == 12
    assert not result.changed


def test_a_cache_that_is_rubbish_costs_time_only(repository: Repository, tree: Path, settled: None):
    plain_tree(tree)
    imported(repository, tree)
    with repository.store.read() as reader:
        rows = {key: bytes(value) for key, value in reader.items(Db.IMPORTS)}
    for rubbish in [b"", b"\0", b"\xff" * 40, b"\0\0\0\0", b"\0\0\0\1\x90\xc0"]:
        for whole in [True, False]:
            for key, value in rows.items():
                bad = rubbish if whole else value[: len(value) // 2] + rubbish
                repository.store.write(lambda w, k=key, b=bad: w.put(Db.IMPORTS, k, b))  # type: ignore[misc]
            assert reads(repository, tree) == 12
            repository.collect()
            assert reads(repository, tree) == 0


def test_the_cache_of_what_was_collected_goes(repository: Repository, tree: Path, settled: None):
    plain_tree(tree)
    first = imported(repository, tree)
    repository.remove_snapshot(SnapshotId(first.snapshot))
    repository.collect()
    with repository.store.read() as reader:
        assert reader.count(Db.IMPORTS) == reader.count(Db.NODES) == reader.count(Db.CHUNKS) == 0
    assert reads(repository, tree) == 12


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_damaged_node_is_made_anew(
    repository: Repository, tree: Path, settled: None, use_cache: bool
):
    plain_tree(tree)
    os.link(tree / "a/x", tree / "c/linked")
    imported(repository, tree)
    with repository.store.read() as reader:
        keys = list(reader.keys(Db.NODES))
    for key in keys:
        repository.store.write(lambda w, k=key: w.put(Db.NODES, k, b"damaged"))  # type: ignore[misc]
    repository.objects.shed()
    if use_cache:
        for directory in ["", "a", "a/b", "c"]:
            (tree / directory / "x").write_bytes(b"changed")
    result = imported(repository, tree, use_cache=use_cache)
    assert stored(repository, result) == of_directory(tree)
    if not use_cache:
        assert repository.verify().damage == []


def test_parents(repository: Repository, tree: Path):
    first = imported(repository, tree, message="first")
    (tree / "a").touch()
    second = imported(repository, tree, ref="main", message="second")
    (tree / "b").touch()
    third = imported(repository, tree, ref="main")
    assert [s.message for _, s in repository.log(SnapshotId(third.snapshot))] == [
        "", "second", "first",
    ]  # fmt: skip
    assert repository.refs() == {"main": third.snapshot}
    forced = imported(repository, tree, parents=(SnapshotId(first.snapshot),))
    assert forced.changed
    assert repository.snapshot(SnapshotId(forced.snapshot)).parents == (first.snapshot,)
    assert second.changed


# Trees that change while they are read.


def at_last_scan(act: Callable[[], object]) -> Progress:
    """Returns a progress function that acts once, between the scan and the reading."""
    done: list[object] = []

    def progress(_: int, total: int | None, size: int = 0, /) -> None:
        if total is None and not done:
            done.append(act())

    return progress


def test_a_file_that_vanishes_is_named(repository: Repository, tree: Path):
    (tree / "kept").write_bytes(b"kept")
    (tree / "gone").write_bytes(b"gone")
    result = imported(repository, tree, progress=at_last_scan((tree / "gone").unlink))
    assert "gone" in result.report.warnings[0]
    assert set(stored(repository, result)) == {b"", b"kept"}
    (tree / "gone").write_bytes(b"back")
    same(repository, tree)


def test_a_file_that_changes_before_it_is_read_is_read_as_it_is_then(
    repository: Repository, tree: Path
):
    (tree / "file").write_bytes(b"old")
    act = at_last_scan(lambda: (tree / "file").write_bytes(b"new content"))
    result = imported(repository, tree, progress=act)
    assert stored(repository, result)[b"file"].data == b"new content"
    assert reads(repository, tree) == 1
    (tree / "file").write_bytes(b"newer")
    same(repository, tree)


def test_a_file_that_changes_all_the_time_is_named(repository: Repository, tree: Path):
    class Restless(importing._Import):
        """Something else appends to the file whenever it has been read."""

    (tree / "file").write_bytes(noise(100_000))
    put = ChunkSink.put_hashed

    def writing(sink: Any, data: Any) -> Any:
        with (tree / "file").open("ab") as file:
            file.write(b"more")
        return put(sink, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkSink, "put_hashed", writing)
        with pytest.raises(SourceChangedError, match="'file' changed") as caught:
            imported(repository, tree)
    assert caught.value.path == b"file"
    assert repository.snapshots() == []
    same(repository, tree)


def test_a_linked_file_whose_name_becomes_anothers(repository: Repository, tree: Path):
    """Names that were one file at the scan are not when they are read: no link joins them."""
    (tree / "a").write_bytes(b"one")
    os.link(tree / "a", tree / "b")

    def swap() -> None:
        (tree / "b").unlink()
        (tree / "b").write_bytes(b"another")

    result = imported(repository, tree, progress=at_last_scan(swap))
    found = stored(repository, result)
    assert (found[b"a"].data, found[b"b"].data) == (b"one", b"another")
    assert found[b"a"].names == found[b"b"].names == ()
    same(repository, tree)


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "socket"])
def test_a_file_that_becomes_something_else(repository: Repository, tree: Path, kind: str):
    (tree / "file").write_bytes(b"content")

    def change() -> None:
        (tree / "file").unlink()
        if kind == "directory":
            (tree / "file").mkdir()
        elif kind == "link":
            (tree / "file").symlink_to("/etc/passwd")
        elif kind == "fifo":
            os.mkfifo(tree / "file")
        else:
            os.mknod(tree / "file", stat.S_IFSOCK | 0o600)

    with pytest.raises((ImportSourceError, SourceChangedError), match="file"):
        imported(repository, tree, progress=at_last_scan(change))
    assert repository.snapshots() == []


def test_a_directory_that_becomes_a_link_does_not_lead_out(
    repository: Repository, tree: Path, tmp_path: Path
):
    (tree / "directory").mkdir()
    (tree / "directory/file").write_bytes(b"inside")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_bytes(b"secret")

    def swap() -> None:
        (tree / "directory").rename(tree / "moved")
        (tree / "directory").symlink_to(tmp_path / "secret")

    try:
        result = imported(repository, tree, progress=at_last_scan(swap))
    except (ImportSourceError, SourceChangedError):
        assert repository.snapshots() == []
    else:
        assert all(seen.data != b"secret" for seen in stored(repository, result).values())


def deep(root: Path, levels: int, name: str, data: bytes = b"at the bottom") -> None:
    """Makes directories inside each other, deeper than a path can name, and a file in the last."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "wb") as file:
        file.write(data)
    os.close(fd)


def test_a_deep_tree(repository: Repository, tree: Path, tmp_path: Path, settled: None):
    """All that the format allows is imported, checked, compared and checked out."""
    empty = imported(repository, tree)
    deep(tree, 511, "d" * 100)
    result = imported(repository, tree)
    assert len(stored(repository, result)) == 513
    assert repository.verify().damage == []
    assert len(list(repository.diff(empty.root, result.root))) == 512
    assert len(list(repository.diff(result.root, empty.root))) == 512
    target = tmp_path / "target"
    repository.check_out(result.root, str(target))
    assert imported(repository, target).root == result.root
    repository.collect()
    assert repository.verify().damage == []
    assert imported(repository, tree).report.read_files == 0
    deep(tree, 511, "d" * 100, b"changed")
    changed = imported(repository, tree)
    (change,) = repository.diff(result.root, changed.root)
    assert change.path.count(b"/") == 511
    subprocess.run(["rm", "-r", str(tree), str(target)], check=True)


def test_a_tree_that_is_too_deep(repository: Repository, tree: Path):
    deep(tree, 600, "d")
    with pytest.raises(ImportSourceError, match="deeper than"):
        imported(repository, tree)
    assert repository.snapshots() == []


def test_open_files_are_few(repository: Repository, tree: Path, tmp_path: Path):
    """Hard links, directories and files are more than the descriptors of a process."""
    code = """
import resource, sys
from engine import Repository
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with Repository.create(sys.argv[1]) as repository:
    result = repository.import_directory(sys.argv[2])
    repository.check_out(result.root, sys.argv[3])
"""
    for n in range(100):
        (tree / f"{n}").mkdir()
        (tree / f"{n}/a").write_bytes(b"%d" % n)
    for n in range(100):
        os.link(tree / f"{n}/a", tree / f"{(n * 7) % 100}/b")
    store, target = tmp_path / "other", tmp_path / "target"
    subprocess.run(
        [sys.executable, "-c", code, str(store), str(tree), str(target)],
        cwd=ROOT, check=True, timeout=120,
    )  # fmt: skip
    assert of_directory(target) == of_directory(tree)


# Killed.

IMPORT = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    print("started", flush=True)
    repository.import_directory(sys.argv[2])
    print("done", flush=True)
"""


def test_a_killed_import_leaves_a_whole_store(tmp_path: Path, tree: Path):
    for n in range(30):
        (tree / f"{n}").write_bytes(noise(400_000, n))
    for n in range(600):
        (tree / f"small{n}").write_bytes(noise(500, n))
    store = tmp_path / "store"
    Repository.create(str(store)).close()
    finished = 0
    for n in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", IMPORT, str(store), str(tree)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        deadline = time.monotonic() + n * 0.02
        while child.poll() is None and time.monotonic() < deadline:
            os.sched_yield()
        child.send_signal(signal.SIGKILL)
        finished += "done" in child.stdout.read()
        child.wait()
        child.stdout.close()
        with Repository.open(str(store)) as repository:
            assert repository.verify().damage == []
            assert len(repository.snapshots()) >= min(finished, 1)
            if n % 5 == 4:
                repository.collect()
    with Repository.open(str(store)) as repository:
        same(repository, tree)
