"""Free pages given back where they lie, and a full disk that the store leaves by itself."""

import contextlib
import os
import random
import struct
import threading
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.storage import free_pages
from engine.storage.free_pages import NotAsExpectedError
from engine.storage.lmdb_store import LmdbStore
from engine.storage.metas import read_metas
from engine.storage.store import Db, Reader, StoreFullError
from tests.engine.test_store import fill, small_disk  # noqa: F401  # a fixture
from tests.engine.trees import noise, of_entry

PAGE = 4096
HEADER = 16


def allocated(path: Path) -> int:
    return (path / "db/data.mdb").stat().st_blocks * 512


def rows(reader: Reader) -> dict[bytes, bytes]:
    return {key: bytes(value) for key, value in reader.items(Db.CHUNKS)}


def test_what_anybody_can_see_stays_as_it_is(tmp_path: Path) -> None:
    """Random changes with holes made at any time, under views of any age, and after a reopening."""
    store, dice = LmdbStore(str(tmp_path), create=True), random.Random(1)
    model: dict[bytes, bytes] = {}
    given = 0
    for round_ in range(30):
        old, seen, done = dict(model), threading.Event(), threading.Event()
        failures: list[str] = []

        def look(
            store: LmdbStore = store,
            expected: dict[bytes, bytes] = old,
            seen: threading.Event = seen,
            done: threading.Event = done,
            failures: list[str] = failures,
        ) -> None:
            with store.read() as reader:
                seen.set()
                done.wait(60)
                if rows(reader) != expected:
                    failures.append("a view has changed")

        thread = threading.Thread(target=look)
        thread.start()
        assert seen.wait(60)
        for _ in range(3):
            new = {dice.randbytes(32): dice.randbytes(dice.choice([30, 3000, 50_000]))
                   for _ in range(20)}  # fmt: skip
            gone = dice.sample(sorted(model), len(model) // 3)
            store.write(
                lambda writer, new=new, gone=gone: (  # type: ignore[misc]  # no types for defaults
                    writer.put_many(Db.CHUNKS, sorted(new.items())),
                    [writer.delete(Db.CHUNKS, key) for key in gone],
                )
            )
            model = {key: value for key, value in (model | new).items() if key not in gone}
            given += store._give_back() or 0
        done.set()
        thread.join(60)
        assert not failures
        if round_ % 10 == 9:
            store.close()
            store = LmdbStore(str(tmp_path))
        with store.read() as reader:
            assert rows(reader) == model
    assert given > 1 << 20
    store.close()


def test_most_of_an_emptied_file_goes_back(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path), create=True)
    for number in range(20):
        pair = [(b"%d" % number, noise(300_000, number))]
        store.write(lambda writer, pair=pair: writer.put_many(Db.CHUNKS, pair))  # type: ignore[misc]  # likewise
    before = allocated(tmp_path)
    for number in range(20):
        store.write(lambda writer, key=b"%d" % number: writer.delete(Db.CHUNKS, key))  # type: ignore[misc]  # likewise
    store.write(lambda writer: writer.put(Db.META, b"k", b"v"))
    with store.read():
        facts = store.statistics()
        assert facts.file_bytes - facts.used_bytes > 5_000_000
    assert (store._give_back() or 0) > 5_000_000
    assert store._give_back() is not None
    assert allocated(tmp_path) < before - 5_000_000
    facts = store.statistics()
    assert facts.used_bytes <= facts.file_bytes < 1_000_000
    store.close()


@pytest.mark.parametrize("harm", ["a count", "a page", "an order", "a page twice"])
def test_a_list_that_does_not_add_up_is_left_alone(tmp_path: Path, harm: str) -> None:
    store = LmdbStore(str(tmp_path), create=True)
    for number in range(8):
        store.write(lambda writer, key=b"%d" % number: writer.put(Db.CHUNKS, key, bytes(99_000)))  # type: ignore[misc]  # likewise
    store.write(lambda writer: [writer.delete(Db.CHUNKS, b"%d" % number) for number in range(7)])
    store.write(lambda writer: writer.put(Db.META, b"k", b"v"))
    store.close()
    path = tmp_path / "db/data.mdb"
    with path.open("r+b") as file:
        fd = file.fileno()
        meta = read_metas(fd).newer
        data = bytearray(os.pread(fd, PAGE, meta.free.root * PAGE))
        at = struct.unpack_from("=H", data, HEADER)[0]
        count, first = struct.unpack_from("=QQ", data, at + 16)
        assert count > 1
        count = {"a count": 1, "a page": 2, "an order": 1 << 40}.get(harm, count)
        struct.pack_into("=Q", data, at + 16, count)
        if harm == "a page":
            struct.pack_into("=Q", data, at + 24, 1 << 30)
        if harm == "a page twice":
            struct.pack_into("=Q", data, at + 32, first)
        os.pwrite(fd, data, meta.free.root * PAGE)
    before = path.read_bytes()
    store = LmdbStore(str(tmp_path))
    with contextlib.suppress(StoreFullError):
        assert store._give_back() is None
    assert path.read_bytes() == before
    store.close()


def test_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * PAGE))
    with path.open("rb") as file, pytest.raises(NotAsExpectedError):
        list(free_pages.free_runs(file.fileno(), PAGE, 1, 1, 5))


def made_full(disk: Path) -> tuple[Repository, SnapshotId, SnapshotId]:
    """A store with two snapshots, on a disk without one free block."""
    source = disk.parent / "source"
    source.mkdir()
    (source / "kept").write_bytes(noise(300_000, 1))
    repository = Repository.create(str(disk / "store"))
    kept = SnapshotId(repository.import_directory(str(source), ref="kept").snapshot)
    for number in range(20):
        (source / str(number)).write_bytes(noise(80_000, number))
    large = SnapshotId(repository.import_directory(str(source)).snapshot)
    with (disk / "filler").open("wb", buffering=0) as file:
        fill(file)
    return repository, kept, large


def test_a_full_disk_is_left_by_the_stores_own_means(small_disk: Path) -> None:  # noqa: F811
    repository, kept, large = made_full(small_disk)
    assert os.statvfs(small_disk).f_bavail == 0
    tree = of_entry(repository.objects, repository.snapshot(kept).root)
    repository.remove_snapshot(large)
    repository.collect()
    report = repository.compact()
    assert report.bytes_after < report.bytes_before - 1_000_000
    assert os.statvfs(small_disk).f_bavail * PAGE > 1_000_000
    assert of_entry(repository.objects, repository.snapshot(kept).root) == tree
    assert repository.verify().damage == []
    again = repository.import_directory(str(small_disk.parent / "source"))
    assert SnapshotId(again.snapshot) != kept
    repository.close()
    with Repository.open(str(small_disk / "store")) as repository:
        assert repository.verify().damage == []
        assert (small_disk / "store/db/reserve").stat().st_blocks * 512 >= 256 << 10


def test_without_a_reserve_or_a_free_page_nothing_can_be_removed(small_disk: Path) -> None:  # noqa: F811
    """What the reserve is for: this is how it would be without."""
    store = LmdbStore(str(small_disk / "store"), create=True)
    keys = [b"%d" % number for number in range(100)]
    store.write(lambda writer: [writer.put(Db.META, key, bytes(200)) for key in keys])
    with (small_disk / "filler").open("wb", buffering=0) as file:
        fill(file)
    assert (small_disk / "store/db/reserve").exists()
    failed = 0
    with store.read():  # who keeps what later transactions could write over
        for key in keys:
            try:
                store_write(store, key, frees=False)
            except StoreFullError:
                failed += 1
                store_write(store, key, frees=True)
                break
    assert failed
    assert not (small_disk / "store/db/reserve").exists()
    store.close()


def store_write(store: LmdbStore, key: bytes, *, frees: bool) -> None:
    """Removes a key, from another thread, for this one has a view."""
    failures: list[StoreFullError] = []

    def change() -> None:
        try:
            store.write(lambda writer: writer.delete(Db.META, key), frees=frees)
        except StoreFullError as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    thread.join(60)
    if failures:
        raise failures[0]
