"""Collection: what something refers to stays, all else goes, whoever writes meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine.repository
from engine import Repository, SnapshotId
from engine.collecting import CollectReport
from engine.errors import CorruptObjectError, InUseError, MissingObjectError, NotFoundError
from engine.leases import LeaseHeldError
from engine.store import Db
from tests.conftest import ROOT
from tests.engine.test_session_machine import make_base
from tests.engine.trees import noise, of_entry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    make_base(path)
    return path


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
    assert repository.collect() == said
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


def test_it_waits_for_those_who_store_and_they_for_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.repository, "GC_WAIT", 0.0)
    with repository.storing(), repository.storing(), pytest.raises(LeaseHeldError):
        repository.collect()
    repository.collect()


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
            ids = {session.parent for session in repository.sessions.all()}
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
