"""Workspaces: what is large, what is linked, what is refused, who else sees what."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import engine.workspaces.committing
from engine import Repository, SnapshotId
from engine.errors import InvalidNameError, MissingObjectError, NotFoundError
from engine.sessions.freezing import TooDeepError
from engine.storage.codec import parse_compression
from engine.storage.nodes import DEEPEST, Kind
from engine.storage.objects import Objects
from engine.storage.store import Db, StoreFullError, Writer
from engine.trees.directory import directory_id, find
from engine.trees.paths import InvalidPathError, MissingPathError, NoDirectoryError, NoFileError
from engine.workspaces.pins import live_pins
from tests.conftest import ROOT
from tests.engine.trees import noise, of_directory, of_entry, without_times


def stored(repository: Repository, snapshot: SnapshotId) -> dict[bytes, bytes]:
    """What a program that opens the store now would find."""
    objects = Objects(repository.store)
    return {p: seen.data for p, seen in of_entry(objects, objects.snapshot(snapshot).root).items()}


def transactions(repository: Repository) -> int:
    return repository.store.transaction_id()


# Paths.


@pytest.mark.parametrize(
    "path",
    ["/a", "a/", "a//b", "a/../b", "..", "./a", "a\0b", "n" * 256, "\ud800", b"a/..", ""],
    ids=ascii,
)
def test_what_is_no_path_is_refused(repository: Repository, path: str | bytes):
    workspace = repository.workspace()
    calls = [
        lambda: workspace.write(path, b""),
        lambda: workspace.write_stream(path, [b""]),
        lambda: workspace.remove(path),
        lambda: workspace.symlink(path, "x"),
        lambda: workspace.rename("a", path),
    ]
    workspace.write("a", b"a")
    for call in calls:
        with pytest.raises((InvalidPathError, NoFileError, FileExistsError)):
            call()
    if path:
        with pytest.raises(InvalidPathError):
            workspace.read(path)
    assert workspace.list() == ["a"]


def test_errors_are_those_of_python_too(repository: Repository):
    workspace = repository.workspace()
    workspace.write("d/file", b"", parents=True)
    with pytest.raises(FileNotFoundError, match="'missing' does not exist") as caught:
        workspace.read("missing")
    assert caught.value.errno == 2
    with pytest.raises(IsADirectoryError):
        workspace.read("d")
    with pytest.raises(NotADirectoryError):
        workspace.write("d/file/x", b"")
    with pytest.raises(FileExistsError):
        workspace.mkdir("d")
    workspace.mkdir("d", exist_ok=True)
    with pytest.raises(FileExistsError):
        workspace.mkdir("d/file", exist_ok=True)


def test_names_are_bytes_where_bytes_are_given(repository: Repository):
    workspace = repository.workspace()
    workspace.write(b"d/\xff.txt", b"x", parents=True)
    assert workspace.list(b"d") == [b"\xff.txt"]
    assert workspace.list("d") == ["\udcff.txt"]
    assert workspace.read("d/\udcff.txt") == b"x"
    assert [p for p, _ in workspace.walk(b"")] == [b"d", b"d/\xff.txt"]
    assert [p for p, _ in workspace.walk("d")] == ["d/\udcff.txt"]
    assert workspace.glob(b"*/*.txt") == [b"d/\xff.txt"]


def test_glob(repository: Repository):
    workspace = repository.workspace()
    for path in ["a.py", "b.pyc", ".hidden.py", "s/c.py", "s/t/d.py", "s/t/[x].py", "t/e.txt"]:
        workspace.write(path, b"", parents=True)
    workspace.symlink("l", "s")
    assert workspace.glob("*.py") == [".hidden.py", "a.py"]
    assert workspace.glob("**/*.py") == [
        ".hidden.py", "a.py", "s/c.py", "s/t/[x].py", "s/t/d.py",
    ]  # fmt: skip
    assert workspace.glob("s/**") == ["s/c.py", "s/t", "s/t/[x].py", "s/t/d.py"]
    assert workspace.glob("**/t/*") == ["s/t/[x].py", "s/t/d.py", "t/e.txt"]
    assert workspace.glob("s/**/t/**/*.py") == ["s/t/[x].py", "s/t/d.py"]
    assert workspace.glob("s/t/[[]x].py") == ["s/t/[x].py"]
    assert workspace.glob("?.p[x-z]") == ["a.py"]
    assert workspace.glob("l/*") == workspace.glob("a.py/*") == workspace.glob("none") == []


def test_links_are_never_followed(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"text")
    workspace.symlink("link", "file")
    workspace.symlink("up", "..")
    for call in [
        lambda: workspace.read("link"),
        lambda: workspace.write("link", b"x"),
        lambda: workspace.write_at("link", 0, b"x"),
    ]:
        with pytest.raises(NoFileError):
            call()
    with pytest.raises(NoDirectoryError):
        workspace.list("up")
    with pytest.raises(NoDirectoryError):
        workspace.write("up/x", b"")
    assert workspace.exists("link")
    assert not workspace.exists("link/x")
    with pytest.raises(InvalidPathError):
        workspace.chmod("link", 0o600)
    with pytest.raises(InvalidPathError):
        workspace.read_link("file")
    for target in ["", "a\0b", "x" * 5000]:
        with pytest.raises(InvalidPathError):
            workspace.symlink("bad", target)


def test_no_tree_gets_too_deep(repository: Repository):
    workspace = repository.workspace()
    deepest = "/".join(["d"] * DEEPEST)
    workspace.mkdir(deepest, parents=True)
    workspace.write(deepest + "/file", b"x")
    for call in [
        lambda: workspace.mkdir(deepest + "/d"),
        lambda: workspace.write(deepest + "/d/file", b"x", parents=True),
        lambda: (workspace.mkdir("other"), workspace.rename("d", "other/d")),
    ]:
        with pytest.raises(TooDeepError):
            call()
    made = workspace.commit()
    with pytest.raises(TooDeepError):
        workspace.rename("d", "other/d")
    workspace.rename("d", "e")
    workspace.rename("e/d", "other/d")
    assert workspace.read("other/" + deepest[2:] + "/file") == b"x"
    workspace.commit()
    assert repository.verify().damage == []
    assert stored(repository, made.snapshot)[(deepest + "/file").encode()] == b"x"


# Contents.


@pytest.mark.parametrize("size", [0, 1, 128, 129, 16_384, 16_385, 300_000, 9_000_000])
def test_contents_of_every_size(repository: Repository, tmp_path: Path, size: int):
    """As an import would store them, whichever way they are written."""
    data = noise(size)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(data)
    imported = repository.import_directory(str(tmp_path / "d")).root
    known = find(repository.objects, imported, b"file")
    assert known is not None
    workspace = repository.workspace()
    workspace.write("written", data)
    workspace.write_stream("streamed", io.BytesIO(data))
    workspace.write_stream("blocks", iter([b"", data[:5], data[5:], b""]))
    root = workspace.commit().root
    for name in [b"written", b"streamed", b"blocks"]:
        entry = find(repository.objects, root, name)
        assert entry is not None
        assert (entry.content, entry.size, entry.mode) == (known.content, size, 0o644)
        with workspace.open(name) as file:
            assert file.read() == data
            assert file.seek(size // 2) == size // 2
            assert file.read(10_000) == data[size // 2 :][:10_000]
            assert file.seek(-size, io.SEEK_END) == 0
        assert workspace.read(name, size // 3, 5) == data[size // 3 :][:5]
        assert workspace.read(name, size + 5) == b""


def test_a_part_of_a_file_is_written(repository: Repository, monkeypatch: pytest.MonkeyPatch):
    for largest in [1 << 20, 1_000]:
        monkeypatch.setattr("engine.workspaces.workspace.LARGE_BYTES", largest)
        workspace = repository.workspace()
        data = bytearray(noise(200_000))
        workspace.write("file", bytes(data), mode=0o600)
        for at, part in [(0, b"begin"), (100_000, noise(70_000, 1)), (199_999, b"end"), (7, b"")]:
            workspace.write_at("file", at, part)
            data[at : at + len(part)] = part
            assert workspace.read("file") == data
        workspace.write_at("file", 300_000, b"far")
        data += bytes(300_000 - len(data)) + b"far"
        assert workspace.read("file") == data
        assert workspace.stat("file").mode == 0o600
    with pytest.raises(MissingPathError):
        workspace.write_at("none", 0, b"")


def test_modes_and_times(repository: Repository):
    workspace = repository.workspace(now_ns=lambda: 7)
    workspace.write("d/file", "text", parents=True)
    workspace.chmod("d/file", 0o4711)
    workspace.chmod("d", 0o700)
    workspace.chmod("", 0o711)
    workspace.write("d/file", "other")
    one = workspace.commit().root
    assert one.mode == 0o711
    assert (workspace.stat("d").mode, workspace.stat("d/file").mode) == (0o700, 0o4711)
    assert workspace.stat("d/file").mtime_ns == workspace.stat("d").mtime_ns == 7
    for bad in [-1, 0o10000]:
        with pytest.raises(ValueError, match="permission bits"):
            workspace.chmod("d", bad)
    again = repository.workspace(now_ns=lambda: 7)
    again.write("d/file", "other", mode=0o4711, parents=True)
    again.chmod("d", 0o700)
    again.chmod("", 0o711)
    assert again.commit().root == one


# Hard links.


def linked_base(path: Path) -> Path:
    (path / "d/e").mkdir(parents=True)
    (path / "f").mkdir()
    (path / "a").write_bytes(noise(20_000))
    for name in ["d/b", "d/e/c"]:
        os.link(path / "a", path / name)
    (path / "f/x").write_bytes(b"x")
    os.link(path / "f/x", path / "f/y")
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda w, p: (w.write("d/b", b"new"), replace(p / "d/b", b"new")),
        lambda w, p: (w.remove("a"), (p / "a").unlink()),
        lambda w, p: (w.remove("d", recursive=True), remove(p / "d")),
        lambda w, p: (w.rename("d/e", "f/e"), (p / "d/e").rename(p / "f/e")),
        lambda w, p: (w.rename("a", "f/x"), (p / "a").rename(p / "f/x")),
        lambda w, p: (
            w.rename("d/b", "f/b"), w.remove("d", recursive=True),
            (p / "d/b").rename(p / "f/b"), remove(p / "d"),
        ),
        lambda w, p: (w.chmod("f/x", 0o600), replace(p / "f/x", b"x"), (p / "f/x").chmod(0o600)),
    ],
    ids=["write", "remove", "remove all", "move", "move over", "move out", "chmod"],
)  # fmt: skip
def test_hard_links_that_lose_a_name(repository: Repository, tmp_path: Path, change):
    base = linked_base(tmp_path / "base")
    snapshot = SnapshotId(repository.import_directory(str(base)).snapshot)
    workspace = repository.workspace(snapshot)
    change(workspace, base)
    made = workspace.commit()
    tree = without_times(of_entry(repository.objects, made.root))
    assert tree == without_times(of_directory(base))
    assert repository.verify().damage == []


def replace(path: Path, data: bytes) -> None:
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(data)
    path.chmod(mode)


def remove(path: Path) -> None:
    subprocess.run(["rm", "-r", str(path)], check=True)


# Commits.


def test_an_empty_commit_costs_nothing_and_says_so(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"1")
    first = workspace.commit(ref="main")
    before = transactions(repository)
    for durable in [True, False]:
        again = workspace.commit("nothing", durable=durable)
        assert (again.snapshot, again.changed) == (first.snapshot, False)
    fork = repository.workspace("main").fork()
    assert not fork.commit().changed
    workspace.write("x", b"")
    workspace.remove("x")
    workspace.restore()
    assert not workspace.is_changed()
    assert transactions(repository) == before
    named = workspace.commit(ref="other")
    assert not named.changed
    assert repository.resolve("other") == first.snapshot
    merge = workspace.commit("merge", parents=(first.snapshot, first.snapshot))
    assert merge.changed
    assert repository.snapshot(merge.snapshot).parents == (first.snapshot, first.snapshot)


def test_what_was_written_and_is_as_it_was_is_no_change(repository: Repository):
    workspace = repository.workspace(now_ns=lambda: 1)
    workspace.write("d/file", b"1", parents=True)
    first = workspace.commit()
    workspace.write("d/file", b"2")
    assert workspace.is_changed()
    workspace.write("d/file", b"1")
    workspace.write("d/other", b"1")
    workspace.remove("d/other")
    assert not workspace.commit().changed
    assert not workspace.is_changed()
    assert workspace.snapshot == first.snapshot


def test_a_bad_commit_changes_nothing(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"1")
    with pytest.raises(InvalidNameError):
        workspace.commit(ref="not a name")
    with pytest.raises(ValueError, match="JSON"):
        workspace.commit(metadata={"x": object()})
    assert workspace.snapshot is None
    assert repository.snapshots() == []
    made = workspace.commit("text", metadata={"reward": 0.5})
    assert repository.snapshot(made.snapshot).metadata == {"reward": 0.5}
    assert repository.snapshot(made.snapshot).message == "text"


def test_restore_of_what_is_not_there_changes_nothing(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"1")
    with pytest.raises(NotFoundError):
        workspace.restore("none")
    with pytest.raises(MissingObjectError):
        workspace.restore(SnapshotId(bytes(32)))
    with pytest.raises(MissingObjectError):
        repository.workspace(SnapshotId(bytes(32)))
    assert workspace.read("file") == b"1"


def test_what_is_not_durable_is_seen_here_at_once(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.workspaces.committing, "WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    before = transactions(repository)
    made = []
    for n in range(5):
        workspace.write(f"d{n}/file", noise(30_000, n), parents=True)
        made.append(workspace.commit(durable=False).snapshot)
    repository.objects.shed()
    assert transactions(repository) == before
    other = repository.workspace(made[2])
    assert other.read("d2/file") == noise(30_000, 2)
    assert not other.exists("d3")
    assert repository.has_snapshot(made[4])
    assert repository.workspace(made[4].hex()).list() == [f"d{n}" for n in range(5)]
    roots = [repository.snapshot(snapshot).root for snapshot in made]
    assert {c.path for c in repository.diff(roots[3], roots[4])} == {b"d4", b"d4/file"}
    assert [i for i, _ in repository.log(made[4])] == list(reversed(made))
    assert transactions(repository) == before
    with pytest.raises(MissingObjectError):
        Objects(repository.store).snapshot(made[0])
    repository.flush()
    assert transactions(repository) == before + 1
    assert stored(repository, made[4])[b"d4/file"] == noise(30_000, 4)
    assert repository.objects.pending.snapshots == {}
    assert repository.objects.pending.chunks == {}
    repository.flush()
    assert transactions(repository) == before + 1


@pytest.mark.parametrize(
    "how", ["durable", "durable and empty", "refs", "close", "in time", "much"]
)
def test_what_is_written_behind_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    monkeypatch.setattr(
        engine.workspaces.committing, "WRITE_BEHIND", 0.01 if how == "in time" else 3600
    )
    monkeypatch.setattr(engine.workspaces.committing, "WAITING_BYTES", 50_000)
    repository = Repository.create(str(tmp_path / "store"))
    workspace = repository.workspace()
    workspace.write("file", noise(20_000))
    before = transactions(repository)
    made = workspace.commit(durable=False, ref="main").snapshot
    if how == "durable":
        other = repository.workspace()
        other.commit()
    elif how == "durable and empty":
        assert not workspace.commit().changed
    elif how == "refs":
        assert repository.refs() == {"main": made}
    elif how == "much":
        workspace.write("file", noise(40_000, 1))
        workspace.commit(durable=False)
    elif how == "in time":
        waited = threading.Event()
        for _ in range(1000):
            if not repository.objects.pending.snapshots:
                break
            waited.wait(0.01)
    if how != "close":
        assert transactions(repository) == before + 1
        assert stored(repository, made)[b"file"] == noise(20_000)
    repository.close()
    with Repository.open(str(tmp_path / "store")) as again:
        assert again.resolve("main") == made
        assert stored(again, made)[b"file"] == noise(20_000)


def test_a_program_that_ends_without_close_has_written(tmp_path: Path):
    code = """
import sys
from engine import Repository
repository = Repository.create(sys.argv[1])
workspace = repository.workspace()
workspace.write("file", b"text")
workspace.commit(durable=False, ref="main")
"""
    path = str(tmp_path / "store")
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True, timeout=120)
    with Repository.open(path) as repository:
        assert repository.workspace("main").read("file") == b"text"
        assert live_pins(path) == {
            directory_id(repository.snapshot(repository.resolve("main")).root)
        }
    assert live_pins(path) == set()


def test_many_threads_share_a_sync(repository: Repository, monkeypatch: pytest.MonkeyPatch):
    """While one transaction is being written all others wait, and then go together."""
    base = repository.workspace()
    base.write("file", b"")
    base.commit()
    count, released, begun = 8, threading.Event(), threading.Event()
    write = repository.store.write
    before = transactions(repository)

    def slowly(change):
        begun.set()
        assert released.wait(120)
        return write(change)

    monkeypatch.setattr(repository.store, "write", slowly)
    made: list[SnapshotId] = []

    def work(n: int) -> None:
        workspace = base.fork()
        workspace.write(f"file{n}", b"%d" % n)
        made.append(workspace.commit().snapshot)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    threads[0].start()
    assert begun.wait(120)
    for thread in threads[1:]:
        thread.start()
    while len(repository.commits._queue) < count:
        threading.Event().wait(0.001)
    assert made == []
    released.set()
    for thread in threads:
        thread.join()
    assert transactions(repository) == before + 2
    assert sorted(len(stored(repository, snapshot)) for snapshot in made) == [3] * count


def test_threads_on_one_store(repository: Repository):
    """Each thread forks, writes, commits, restores; a reader looks at what they share."""
    base = repository.workspace()
    for n in range(400):
        base.write(f"d{n % 20}/f{n}", noise(300, n), parents=True)
    base.commit()
    errors: list[Exception] = []
    made: list[tuple[SnapshotId, dict[str, bytes]]] = []
    end = threading.Event()

    def work(seed: int) -> None:
        try:
            here, expected = base.fork(), {f"d{n % 20}/f{n}": noise(300, n) for n in range(400)}
            for step in range(40):
                path = f"d{(seed + step) % 20}/new{seed}-{step % 7}"
                expected[path] = noise(2_000, seed * 1000 + step)
                here.write(path, expected[path])
                done = here.commit(durable=step % 5 == 0)
                twin = here.fork()
                twin.write("only here", b"")
                made.append((done.snapshot, dict(expected)))
                if step % 10 == 9:
                    snapshot, tree = made[(seed * 7 + step) % len(made)]
                    here.restore(snapshot)
                    expected = dict(tree)
        except Exception as error:  # noqa: BLE001 - the test's own thread shows it
            errors.append(error)

    def look() -> None:
        try:
            while not end.is_set():
                paths = [p for p, stat in base.fork().walk() if stat.kind == Kind.FILE]
                assert len(paths) == 400
                assert base.read(paths[17]) == noise(300, int(paths[17].partition("/f")[2]))
        except Exception as error:  # noqa: BLE001 - the test's own thread shows it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    reader = threading.Thread(target=look)
    for thread in [reader, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    end.set()
    reader.join()
    assert errors == []
    repository.flush()
    for snapshot, expected in made[::7]:
        tree = repository.workspace(snapshot)
        assert {p: tree.read(p) for p, s in tree.walk() if s.kind == Kind.FILE} == expected
    assert repository.verify().damage == []


def test_reads_beside_a_writer(repository: Repository):
    """A reader sees whole states: a file and its copy are written one after the other."""
    workspace = repository.workspace()
    workspace.write("d/a", b"0", parents=True)
    workspace.write("d/b", b"0")
    end = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        while not end.is_set():
            twin = workspace.fork()
            a, b = int(twin.read("d/a")), int(twin.read("d/b"))
            if not b <= a <= b + 1 or twin.list("d") != ["a", "b"]:
                wrong.append((a, b))

    readers = [threading.Thread(target=look) for _ in range(3)]
    for thread in readers:
        thread.start()
    for n in range(1, 400):
        workspace.write("d/a", b"%d" % n)
        workspace.write("d/b", b"%d" % n)
        if n % 50 == 0:
            workspace.commit(durable=False)
    end.set()
    for thread in readers:
        thread.join()
    assert wrong == []


# A full disk.


def test_a_full_disk(repository: Repository, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine.workspaces.committing, "WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    workspace.write("a", b"a")
    early = workspace.commit(durable=False).snapshot
    write = repository.store.write

    def fails(change):
        def full(writer: Writer) -> None:
            change(writer)
            raise StoreFullError(repository.path)

        return write(full)

    with monkeypatch.context() as patch:
        patch.setattr(repository.store, "write", fails)
        workspace.write("b", noise(30_000))
        for durable in [True, False, True]:
            with pytest.raises(StoreFullError):
                workspace.commit(durable=durable)
            assert workspace.snapshot == early
            assert workspace.is_changed()
        with pytest.raises(StoreFullError):
            repository.flush()
        assert repository.workspace(early).read("a") == b"a"
    made = workspace.commit(durable=False)
    assert stored(repository, early)[b"a"] == b"a"
    repository.flush()
    assert stored(repository, made.snapshot)[b"b"] == noise(30_000)
    assert set(repository.snapshots()) == {early, made.snapshot}


# Chunks beyond what one transaction takes.


def test_a_large_commit_is_stored_in_portions(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.workspaces.committing, "LARGEST_BYTES", 200_000)
    monkeypatch.setattr(engine.workspaces.committing, "PORTION_BYTES", 100_000)
    workspace = repository.workspace()
    for n in range(20):
        workspace.write(f"file{n}", noise(30_000, n))
    before = transactions(repository)
    made = workspace.commit()
    assert transactions(repository) > before + 4
    assert stored(repository, made.snapshot)[b"file19"] == noise(30_000, 19)
    with repository.store.read() as reader:
        assert reader.count(Db.CHUNKS) > 20


def test_chunks_are_packed_as_the_store_says(repository: Repository):
    data = b"the same line again\n" * 4000
    lengths = {}
    for name in ("off", "zstd:3"):
        repository.set_compression(parse_compression(name))
        for durable in (True, False):
            workspace = repository.workspace()
            workspace.write("file", name.encode() + b"%d" % durable + data)
            made = workspace.commit(durable=durable).snapshot
            repository.flush()
            chunk = repository.object_named(f"{made.hex()}:file").identifier
            with repository.store.read() as reader:
                lengths[name, durable] = len(reader.get(Db.CHUNKS, chunk) or b"")
    assert min(lengths["off", True], lengths["off", False]) > 16_000
    assert max(lengths["zstd:3", True], lengths["zstd:3", False]) < 1_000


def test_what_is_not_written_yet_is_asked_for_by_its_id(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.workspaces.committing, "WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    workspace.write("file", noise(30_000, 1))
    made = workspace.commit(durable=False).snapshot
    target = repository.object_named(made.hex())
    assert target.kind == "snapshot"
    assert made.hex() in [tree.name for tree in repository.usage([made]).trees]
