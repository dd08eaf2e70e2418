"""Compaction: the file becomes smaller, whoever reads and writes, and whenever it is killed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.host.leases import LeaseHeldError, acquire
from engine.storage.lmdb_store import LmdbStore
from engine.storage.store import CompactionRefusedError, Db
from tests.conftest import ROOT
from tests.engine.test_store import fill, small_disk  # noqa: F401  # a fixture
from tests.engine.trees import Tree, noise, of_entry

MIB = 1 << 20


def file_bytes(path: Path) -> int:
    return (path / "db/data.mdb").stat().st_size


def make(path: Path, source: Path) -> tuple[SnapshotId, Tree]:
    """A store most of whose file is free pages."""
    source.mkdir()
    with Repository.create(str(path)) as repository:
        (source / "kept").write_bytes(noise(300_000, 1))
        kept = SnapshotId(repository.import_directory(str(source)).snapshot)
        tree = of_entry(repository.objects, repository.snapshot(kept).root)
        (source / "large").write_bytes(noise(6 * MIB, 2))
        large = SnapshotId(repository.import_directory(str(source)).snapshot)
        repository.set_ref("kept", kept)
        repository.remove_snapshot(large)
        repository.collect()
    return kept, tree


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Repository, SnapshotId, Tree]]:
    kept, tree = make(tmp_path / "store", tmp_path / "source")
    with Repository.open(str(tmp_path / "store")) as repository:
        yield repository, kept, tree


Made = tuple[Repository, SnapshotId, Tree]


def check(repository: Repository, kept: SnapshotId, tree: Tree) -> None:
    repository.objects.shed()
    assert of_entry(repository.objects, repository.snapshot(kept).root) == tree
    assert repository.verify().damage == []
    assert repository.refs() == {"kept": kept}


def test_free_pages_go_back_to_the_disk(made: Made):
    repository, kept, tree = made
    before = file_bytes(Path(repository.path))
    assert before > 6 * MIB
    report = repository.compact()
    assert report.bytes_before == before
    assert report.bytes_after == file_bytes(Path(repository.path)) < MIB
    check(repository, kept, tree)
    assert sorted(os.listdir(Path(repository.path) / "db")) == ["data.mdb", "lock.mdb", "reserve"]
    assert (Path(repository.path) / "db/data.mdb").stat().st_mode & 0o777 == 0o600
    repository.set_ref("after", kept)
    repository.close()
    with Repository.open(repository.path) as again:
        assert again.refs() == {"kept": kept, "after": kept}


def test_reads_go_on_meanwhile(made: Made):
    repository, kept, tree = made
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                repository.objects.shed()
                assert of_entry(repository.objects, repository.snapshot(kept).root) == tree
                repository.store.transaction_id()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test fails
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        repository.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    check(repository, kept, tree)


def test_a_reader_that_stays_is_waited_for(made: Made):
    repository, kept, tree = made
    with repository.store.read() as reader:
        with pytest.raises(RuntimeError, match="wait for itself"):
            repository.compact()
        done = threading.Thread(target=repository.compact)
        done.start()
        assert reader.get(Db.SNAPSHOTS, kept) is not None
        done.join(0.3)
        assert done.is_alive()
        raw = reader.get(Db.SNAPSHOTS, kept)  # what it sees is still there
        assert raw is not None
        assert len(bytes(raw)) > 32
    done.join()
    check(repository, kept, tree)


def test_what_was_written_meanwhile_is_not_lost(made: Made, monkeypatch: pytest.MonkeyPatch):
    """The first copies are of a state that is no longer the last one."""
    repository, kept, tree = made
    copies = []
    copy = LmdbStore._copy

    def copy_and_write(store: LmdbStore, home: str) -> None:
        copy(store, home)
        copies.append(home)
        if len(copies) != 3:
            repository.set_ref(f"late-{len(copies)}", kept)

    monkeypatch.setattr(LmdbStore, "_copy", copy_and_write)
    repository.compact()
    assert len(copies) == 3
    assert set(repository.refs()) == {"kept", "late-1", "late-2"}
    copies = [""] * 3
    with pytest.raises(CompactionRefusedError, match="all the time"):
        repository.compact()
    assert set(repository.refs()) >= {"kept", "late-1", "late-2", "late-4", "late-6"}
    for name in set(repository.refs()) - {"kept"}:
        repository.remove_ref(name)
    check(repository, kept, tree)


HOLD = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    print("open", flush=True)
    sys.stdin.readline()
    print(len(repository.snapshots()), flush=True)
    repository.remove_ref("kept")
"""


def test_who_has_it_open_is_named(made: Made):
    repository, kept, tree = made
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, repository.path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    with pytest.raises(CompactionRefusedError, match=rf"process {child.pid} \(python"):
        repository.compact(wait=0.05)
    check(repository, kept, tree)
    out, _ = child.communicate("\n")
    assert out == "1\n"
    assert child.returncode == 0
    assert repository.refs() == {}  # it is one file that both had
    repository.set_ref("kept", kept)
    repository.compact()
    check(repository, kept, tree)


def test_one_at_a_time(made: Made):
    repository = made[0]
    with acquire(repository.path, "gc", what="a test"):
        calls: list[Callable[[], object]] = [
            repository.compact, repository.collect, repository.repair,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(LeaseHeldError, match="maintenance is held by process"):
                call()


def test_without_room_for_a_copy_free_pages_go_where_they_lie(small_disk: Path):  # noqa: F811
    with Repository.create(str(small_disk / "store")) as repository:
        source = small_disk.parent / "source"
        source.mkdir()
        (source / "file").write_bytes(noise(2 * MIB, 3))
        kept = SnapshotId(repository.import_directory(str(source), ref="kept").snapshot)
        tree = of_entry(repository.objects, repository.snapshot(kept).root)
        number = (small_disk / "store/db/data.mdb").stat().st_ino
        for _ in range(2):
            report = repository.compact()
            assert report.bytes_after <= report.bytes_before
            check(repository, kept, tree)
            found = sorted(os.listdir(small_disk / "store/db"))
            assert found == ["data.mdb", "lock.mdb", "reserve"]
            assert (small_disk / "store/db/data.mdb").stat().st_ino == number
            with (small_disk / "filler").open("wb", buffering=0) as file:
                fill(file)


KILLED = """
import os, signal, sys
from engine import Repository
left = int(sys.argv[2])
def hook(event, arguments):
    global left
    if event in {"os.mkdir", "os.chmod", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"} or (
        event == "open" and str(arguments[0]).startswith(sys.argv[1] + "/db")
    ):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
with Repository.open(sys.argv[1]) as repository:
    sys.addaudithook(hook)
    repository.compact()
    left = 1 << 30
    print("done")
"""


def test_killed_at_every_step(tmp_path: Path):
    kept, tree = make(tmp_path / "store", tmp_path / "source")
    before = file_bytes(tmp_path / "store")
    for step in range(40):
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(step)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        with Repository.open(str(tmp_path / "store")) as repository:
            check(repository, kept, tree)
            repository.set_ref("more", kept)
            repository.remove_ref("more")
        if child.returncode == 0:
            assert child.stdout == "done\n"
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
    assert step >= 5
    assert file_bytes(tmp_path / "store") < MIB < before
    assert sorted(os.listdir(tmp_path / "store/db")) == ["data.mdb", "lock.mdb", "reserve"]


def test_a_reader_that_stays_keeps_nobody_else(made: Made):
    """A compaction waits for it in moments; between them others read, and open the store."""
    repository, kept, tree = made
    reading, let_go, refused = threading.Event(), threading.Event(), threading.Event()

    def read() -> None:
        with repository.store.read():
            reading.set()
            let_go.wait()

    def compact() -> None:
        with pytest.raises(CompactionRefusedError, match="reads it all the time"):
            repository.compact(1.0)
        refused.set()

    threads = [threading.Thread(target=read), threading.Thread(target=compact)]
    threads[0].start()
    reading.wait()
    threads[1].start()
    looks = 0
    while not refused.is_set():
        with repository.store.read():
            looks += 1
    let_go.set()
    for thread in threads:
        thread.join()
    assert looks > 3
    repository.compact()
    check(repository, kept, tree)
