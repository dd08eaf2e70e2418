"""Collection: what something refers to stays, all else goes, whoever writes meanwhile."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import engine.repository
import engine.storage.content
import engine.trees.directory
from engine import Repository, SnapshotId
from engine.errors import CorruptObjectError, InUseError, MissingObjectError, NotFoundError
from engine.host.leases import LeaseHeldError, acquire
from engine.plain import importing
from engine.storage.store import Db
from engine.upkeep import collecting
from engine.upkeep.collecting import Collection, CollectReport
from tests.conftest import ROOT
from tests.engine.trees import Tree, noise, of_entry


def counts(repository: Repository) -> tuple[int, int]:
    with repository.store.read() as reader:
        return reader.count(Db.CHUNKS), reader.count(Db.NODES)


def imported(repository: Repository, path: Path) -> SnapshotId:
    return SnapshotId(repository.import_directory(str(path)).snapshot)


def test_what_is_reachable_stays(repository: Repository, base: Path):
    first = imported(repository, base)
    tree = of_entry(repository.objects, repository.snapshot(first).root)
    before = counts(repository)
    report = repository.collect()
    assert (report.chunks, report.nodes, report.bytes) == (0, 0, 0)
    assert (report.kept_chunks, report.kept_nodes) == before == counts(repository)
    assert of_entry(repository.objects, repository.snapshot(first).root) == tree


def test_what_is_not_goes_and_a_dry_run_says_how_much(repository: Repository, base: Path):
    first = imported(repository, base)
    with_first = counts(repository)
    (base / "more").mkdir()
    (base / "more/file").write_bytes(noise(500_000, 5))
    second = imported(repository, base)
    repository.remove_snapshot(second)
    said = repository.collect(dry_run=True)
    assert said.chunks > 2
    assert said.nodes == 2
    assert said.bytes > 500_000
    assert counts(repository) == (with_first[0] + said.chunks, with_first[1] + said.nodes)
    done = repository.collect()
    assert (done.chunks, done.nodes, done.bytes) == (said.chunks, said.nodes, said.bytes)
    assert (done.rows, done.kept_nodes) == (said.rows, said.kept_nodes)
    assert counts(repository) == with_first
    assert repository.collect() == CollectReport(
        kept_chunks=with_first[0], kept_nodes=with_first[1]
    )
    assert repository.verify().damage == []
    assert imported(repository, base) != second
    assert repository.verify().damage == []
    repository.remove_snapshot(first)


def test_what_two_snapshots_share_stays_with_one(repository: Repository, base: Path):
    first = imported(repository, base)
    os.unlink(base / "a/c")
    second = imported(repository, base)
    tree = of_entry(repository.objects, repository.snapshot(second).root)
    repository.remove_snapshot(first)
    assert repository.collect().chunks == 1
    assert of_entry(repository.objects, repository.snapshot(second).root) == tree
    assert repository.snapshot(second).parents == (first,)
    assert [identifier for identifier, _ in repository.log(second)] == [second]


def test_an_empty_store(repository: Repository, base: Path):
    repository.remove_snapshot(imported(repository, base))
    repository.collect()
    assert counts(repository) == (0, 0)
    assert repository.collect() == CollectReport()


def test_a_session_keeps_what_it_stands_on(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.sessions.create("s", (None, None, first))
    with pytest.raises(InUseError, match="session 's'"):
        repository.remove_snapshot(first)
    repository.fork("s", "t")
    upper = repository.sessions.hold("s", "a test")
    (Path(os.fsdecode(upper.upper().root)) / "new").write_bytes(noise(400_000, 9))
    upper.release()
    repository.fork("s", "u")  # on a tree that is no snapshot
    repository.sessions.remove(repository.sessions.hold("s", "a test"))
    before = counts(repository)
    report = repository.collect()
    assert (report.chunks, report.nodes) == (0, 0)
    assert counts(repository) == before
    with repository.tree("@u") as root:
        assert of_entry(repository.objects, root)[b"new"].data == noise(400_000, 9)
    repository.sessions.remove(repository.sessions.hold("u", "a test"))
    assert repository.collect().chunks > 1
    assert repository.verify().damage == []


def test_refs_keep_a_snapshot_from_removal(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.set_ref("main", first)
    with pytest.raises(InUseError, match="'main'"):
        repository.remove_snapshot(first)
    repository.remove_ref("main")
    repository.remove_snapshot(first)
    with pytest.raises(NotFoundError):
        repository.remove_snapshot(first)


def test_directories_of_no_session_go(repository: Repository):
    home = Path(repository.path) / "sessions"
    (home / ("0" * 16) / "upper.0/deep").mkdir(parents=True)
    (home / "not a session").mkdir()
    assert repository.collect(dry_run=True).session_directories == 0
    assert repository.collect().session_directories == 1
    assert os.listdir(home) == ["not a session"]


@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_store_loses_nothing_more(repository: Repository, base: Path, missing: bool):
    """What hangs below a node that cannot be read is unknown, so nothing is removed."""
    first = imported(repository, base)
    root = repository.snapshot(first).root
    assert isinstance(root.content, bytes)
    key = root.content
    repository.store.write(
        lambda w: w.delete(Db.NODES, key) and None if missing else w.put(Db.NODES, key, b"x")
    )
    repository.objects.shed()
    before = counts(repository)
    for dry_run in [True, False]:
        with pytest.raises(MissingObjectError if missing else CorruptObjectError):
            repository.collect(dry_run=dry_run)
    assert counts(repository) == before


def test_it_waits_for_those_who_store_and_ends_early(
    repository: Repository, base: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.repository, "GC_WAIT", 0.0)
    repository.remove_snapshot(imported(repository, base))
    before = counts(repository)
    with repository.storing(), repository.storing():
        report = repository.collect()
        assert "storing objects" in report.ended_early
        assert (report.chunks, report.nodes) == (0, 0)
        assert counts(repository) == before
        assert repository.collected_ns() == 0
    report = repository.collect()
    assert report.ended_early == ""
    assert counts(repository) == (0, 0)
    assert repository.collected_ns() > 0


def test_batches_are_small_and_others_come_in_between(
    repository: Repository, base: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever stores waits for one batch, not for the collection."""
    monkeypatch.setattr(collecting, "BATCH_OBJECTS", 2)
    repository.remove_snapshot(imported(repository, base))
    turns = []
    remove = Collection.remove

    def spy(collection: Collection) -> None:
        with pytest.raises(LeaseHeldError):
            acquire(repository.path, "objects", shared=True)
        remove(collection)

    prepare = Collection.prepare

    def look(collection: Collection) -> bool:
        acquire(repository.path, "objects", shared=True).release()
        turns.append(counts(repository))
        return prepare(collection)

    monkeypatch.setattr(Collection, "remove", spy)
    monkeypatch.setattr(Collection, "prepare", look)
    report = repository.collect()
    assert report.batches == len(turns) - 1 > 5
    assert turns == sorted(turns, reverse=True)
    assert counts(repository) == (0, 0)


KILLED = """
import os, signal, sys
from engine import Repository
from engine.upkeep import collecting
collecting.BATCH_OBJECTS = 2
path, left, after = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after"
with Repository.open(path) as repository:
    write = repository.store.write
    def count(change, **more):
        global left
        def last(writer):
            result = change(writer)
            if left < 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        left -= 1
        result = write(last, **more)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    repository.store.write = count
    repository.collect()
    print("done")
"""


def killed_collection(repository: Repository, writes: int, when: str) -> bool:
    """Collects in another process that is killed at a write; True if it came to its end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, repository.path, str(writes), when],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_batch(
    repository: Repository, base: Path, when: str, monkeypatch: pytest.MonkeyPatch
):
    """What is reachable stays whole, and what was garbage can be imported again by the cache."""
    monkeypatch.setattr(importing, "FRESH_NS", -(10**18))
    for n in range(4):
        (base / f"a/more-{n}").write_bytes(noise(2_000, 50 + n))
    trees: list[Tree] = []
    for writes in range(30):
        whole = imported(repository, base)
        os.rename(base / "a", base.parent / "aside")
        kept = imported(repository, base)
        seen = [of_entry(repository.objects, repository.snapshot(i).root) for i in (whole, kept)]
        for tree in seen:
            tree[b""] = tree[b""]._replace(mtime_ns=0)
        trees = trees or seen
        assert seen == trees
        for identifier in set(repository.snapshots()) - {kept}:
            repository.remove_snapshot(identifier)
        finished = killed_collection(repository, writes, when)
        repository.objects.shed()
        assert repository.verify().damage == []
        again = of_entry(repository.objects, repository.snapshot(kept).root)
        assert again == {**trees[1], b"": again[b""]}
        os.rename(base.parent / "aside", base / "a")
        if finished:
            break
    assert finished
    assert writes > 5
    repository.collect()
    assert repository.verify().unreachable == 0


def test_a_damaged_root_is_named_and_nothing_goes(repository: Repository, base: Path):
    repository.remove_snapshot(imported(repository, base))
    (base / "more").touch()
    second = imported(repository, base)
    repository.store.write(lambda w: w.put(Db.SNAPSHOTS, second, b"rubbish"))
    before = counts(repository)
    with pytest.raises(CorruptObjectError):
        repository.collect()
    assert counts(repository) == before


# What keeps an object.


def kept_by(repository: Repository, name: str) -> list[tuple[str, str, bytes]]:
    target = repository.object_named(name)
    return [(held.kind, held.name, held.path) for held in repository.holders(target)]


def test_why_an_object_is_kept(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.set_ref("main", first)
    repository.sessions.create("s", (None, None, first))
    whole = [
        ("ref", "main", b"a/c"), ("snapshot", first.hex(), b"a/c"), ("session", "s", b"a/c"),
    ]  # fmt: skip
    assert kept_by(repository, "main:a/c") == whole
    target = repository.object_named("main:a/c")
    assert target.kind == "chunk"
    assert kept_by(repository, target.identifier.hex()) == whole
    assert kept_by(repository, target.identifier.hex()[:12]) == whole
    assert [path for _, _, path in kept_by(repository, "main:a/sub")] == [b"a/sub"] * 3
    assert repository.object_named("main:a/sub").kind == "node"
    assert [path for _, _, path in kept_by(repository, "main:a/b")] == [b"a"] * 3  # tiny
    assert [path for _, _, path in kept_by(repository, "main:")] == [b""] * 3
    assert kept_by(repository, first.hex()) == [("ref", "main", b""), ("session", "s", b"")]
    for name in ["main:nothing", "f" * 64, "xyz", "ffffffffffff"]:
        with pytest.raises(NotFoundError):
            repository.object_named(name)
    repository.sessions.remove(repository.sessions.hold("s", "a test"))
    repository.remove_ref("main")
    repository.remove_snapshot(first)
    assert kept_by(repository, target.identifier.hex()) == []
    repository.collect()
    with pytest.raises(NotFoundError):
        repository.object_named(target.identifier.hex())


def test_why_goes_through_pages_and_lists(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.trees.directory, "PAGED_FROM", 8)
    monkeypatch.setattr(engine.storage.content, "LONGEST_REFS", 2)
    monkeypatch.setattr(engine.storage.content, "LIST_REFS", 2)
    source = tmp_path / "source"
    (source / "many").mkdir(parents=True)
    for n in range(700):
        (source / f"many/{n:04}").write_bytes(b"%04d" % n * 100)
    (source / "long").write_bytes(noise(900_000, 4))
    first = imported(repository, source)
    name = first.hex()
    assert kept_by(repository, f"{name}:many/0345") == [("snapshot", name, b"many/0345")]
    with repository.store.read() as reader:
        chunks = list(reader.keys(Db.CHUNKS))
    found = {path for key in chunks for _, _, path in kept_by(repository, key.hex())}
    assert found == {b"long", *(b"many/%04d" % n for n in range(700))}


def test_a_pin_keeps_a_tree(repository: Repository, base: Path):
    first = imported(repository, base)
    root = repository.snapshot(first).root
    assert isinstance(root.content, bytes)
    tree = of_entry(repository.objects, root)
    repository.remove_snapshot(first)
    pins = Path(repository.path) / "locks/pins"
    pins.mkdir()
    (pins / "dead").write_text("f" * 64 + "\n")
    with (pins / "living").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(root.content.hex() + "\nrubbish\n")
        file.flush()
        assert repository.collect().chunks == 0
        repository.objects.shed()
        assert of_entry(repository.objects, root) == tree
        name = root.content.hex()
        assert kept_by(repository, name) == [("workspace", name, b"")]
        assert os.listdir(pins) == ["living"]
    assert repository.collect().chunks > 0
    assert os.listdir(pins) == []


COMMITS = """
import os, sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    print("started", flush=True)
    for n in range(60):
        with repository.sessions.hold("s", "writing") as held:
            path = os.fsdecode(held.upper().root) + f"/file{n % 7}"
            with open(path, "wb") as file:
                file.write(os.urandom(30_000))
        repository.commit("s", message=str(n))
        if n % 3:
            (session,) = repository.sessions.all()
            ids = {session.parent, *dict(session.layers).values()}
            for identifier in set(repository.snapshots()) - ids:
                repository.remove_snapshot(identifier)
    print("done", flush=True)
"""


def test_commits_go_on_meanwhile(repository: Repository, base: Path):
    repository.sessions.create("s", (None, None, imported(repository, base)))
    child = subprocess.Popen(
        [sys.executable, "-c", COMMITS, repository.path],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    removed = 0
    while child.poll() is None:
        removed += repository.collect().chunks
        assert repository.verify().damage == []
    assert child.stdout.read() == "done\n"
    child.stdout.close()
    assert child.returncode == 0
    assert removed
    repository.collect()
    assert repository.verify().damage == []
    assert len(repository.snapshots()) >= 1
