"""The frame of a store's file: every flaw that LMDB would stumble on is seen without LMDB."""

import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from engine.storage import lmdb_errors
from engine.storage.lmdb_store import LmdbStore
from engine.storage.metas import read_metas
from engine.storage.pages import (
    BRANCH,
    LEAF,
    META,
    OVERFLOW,
)
from engine.storage.store import (
    Db,
    NotAStoreError,
    StoreDamagedError,
    StoreDiskError,
    StoreError,
    StoreFullError,
    StoreMemoryError,
)
from engine.storage.structure import check
from engine.upkeep.salvaging import examine

PAGE = 4096
LONG = 12


def fill(store: LmdbStore) -> None:
    """Writes and removes until there are branch, leaf and overflow pages, and free ones."""
    for turn in range(6):

        def change(writer, turn: int = turn) -> None:
            for number in range(100):
                key = bytes([turn]) + number.to_bytes(31, "big")
                if number < LONG:
                    writer.put(Db.CHUNKS, key, bytes([number]) * (40 + 900 * number))
                writer.put(Db.NODES, key, bytes([number]) * 90)
            writer.put(Db.REFS, b"name-%d" % turn, bytes(32))
            writer.put(Db.SESSIONS, b"s%d" % turn, b"x" * (turn + 10))

        store.write(change)
    for turn in (1, 3):

        def remove(writer, turn: int = turn) -> None:
            for number in range(LONG):
                writer.delete(Db.CHUNKS, bytes([turn]) + number.to_bytes(31, "big"))

        store.write(remove)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("structure") / "store"
    store = LmdbStore(str(path), create=True)
    fill(store)
    assert store.flaws() == []
    store.close()
    return (path / "db" / "data.mdb").read_bytes()


class File:
    """A store's file in which bits are flipped."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.data = data
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.pwrite(self.fd, data, 0)

    def flaws(self, at: int, bit: int) -> list[str]:
        os.pwrite(self.fd, bytes([self.data[at] ^ 1 << bit]), at)
        try:
            return [str(flaw) for flaw in check(self.fd).flaws]
        finally:
            os.pwrite(self.fd, self.data[at : at + 1], at)


@pytest.fixture
def file(tmp_path: Path, whole: bytes) -> Iterator[File]:
    made = File(tmp_path / "data.mdb", whole)
    yield made
    os.close(made.fd)


def pages(file: File, kind: int) -> list[int]:
    """Returns the pages of a kind that are in use: of free ones no flip in the number matters."""
    found, number = [], 0
    while number < len(file.data) // PAGE:
        at = number * PAGE
        own, _, flags, lower, upper = struct.unpack_from("=QHHHH", file.data, at)
        if own == number and flags == kind and (kind == META or file.flaws(at, 0)):
            found.append(number)
        number += lower | upper << 16 if (own, flags) == (number, OVERFLOW) else 1
    return found


def test_a_whole_file_has_none(file: File):
    found = check(file.fd)
    assert found.flaws == []
    assert found.entries["chunks"] == 4 * LONG
    assert found.entries["nodes"] == 600


@pytest.mark.parametrize("kind", [BRANCH, LEAF], ids=["branch", "leaf"])
def test_the_frame_of_a_page(file: File, kind: int):
    found = pages(file, kind)
    assert found
    for page in found[::6]:
        at = page * PAGE
        lower = struct.unpack_from("=H", file.data, at + 12)[0]
        pad = {at + 8, at + 9}
        places = [*range(at, at + 16), *range(at + 16, at + lower, 7)]
        missed = [
            (place - at, bit)
            for place in places
            if place not in pad
            for bit in range(8)
            if not file.flaws(place, bit)
        ]
        assert missed == [], page


def test_the_frame_of_a_long_value(file: File):
    for page in pages(file, OVERFLOW)[::8]:
        at = page * PAGE
        for place in [*range(at, at + 8), *range(at + 10, at + 16)]:
            assert file.flaws(place, place % 8), place - at


def test_what_leads_to_pages(file: File):
    for page in pages(file, BRANCH):
        at = page * PAGE
        count = (struct.unpack_from("=H", file.data, at + 12)[0] - 16) // 2
        for start in struct.unpack_from(f"={count}H", file.data, at + 16):
            for place in range(at + start, at + start + 8):
                for bit in range(0, 8, 3):
                    assert file.flaws(place, bit), (page, start, place - at, bit)


def test_the_list_of_free_pages(file: File):
    root = struct.unpack_from("=Q", file.data, newest(file.data) * PAGE + 16 + 24 + 40)[0]
    at = root * PAGE
    count = (struct.unpack_from("=H", file.data, at + 12)[0] - 16) // 2
    seen = 0
    for start in struct.unpack_from(f"={count}H", file.data, at + 16):
        size, _, key = struct.unpack_from("=IHH", file.data, at + start)
        for place in range(at + start + 8 + key, at + start + 8 + key + size, 5):
            assert file.flaws(place, 1), (start, place - at)
            seen += 1
    assert seen > 5


def newest(data: bytes) -> int:
    numbers = [struct.unpack_from("=Q", data, page * PAGE + 16 + 128)[0] for page in (0, 1)]
    return numbers.index(max(numbers))


def meta_places(data: bytes, page: int) -> dict[str, int]:
    at = page * PAGE
    return {
        "number": at, "flags": at + 10, "magic": at + 16, "version": at + 20,
        "size of a page": at + 40, "main root": at + 16 + 24 + 48 + 40 + 5,
        "free root": at + 16 + 24 + 40 + 5, "flags of main": at + 16 + 24 + 48 + 4,
        "last page": at + 16 + 120 + 4, "transaction": at + 16 + 128,
    }  # fmt: skip


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("which", [0, 1])
def test_a_meta_page_is_seen_when_the_store_is_opened(
    tmp_path: Path, whole: bytes, which: int, bit: int
):
    path = tmp_path / "store"
    LmdbStore(str(path), create=True).close()
    for what, place in meta_places(whole, which).items():
        data = bytearray(whole)
        data[place] ^= 1 << bit
        (path / "db" / "data.mdb").write_bytes(data)
        with pytest.raises(StoreDamagedError, match="meta page"):
            LmdbStore(str(path))
        assert what


def test_a_store_whose_databases_have_no_name_is_damaged_and_not_absent(
    tmp_path: Path, whole: bytes
):
    path = tmp_path / "store"
    LmdbStore(str(path), create=True).close()
    for name in (b"meta", b"chunks"):
        (path / "db" / "data.mdb").write_bytes(whole.replace(name, b"x" + name[1:]))
        with pytest.raises(StoreDamagedError):
            LmdbStore(str(path))
    with pytest.raises(NotAStoreError):
        LmdbStore(str(tmp_path))


# What LMDB's errors mean.

CLASSES = [
    found for found in vars(lmdb).values()
    if isinstance(found, type) and issubclass(found, lmdb.Error) and found is not lmdb.Error
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_error_of_the_library_has_a_meaning(kind: type[lmdb.Error]):
    assert (kind in lmdb_errors.MEANINGS) != (kind in lmdb_errors.HANDLED)


def test_only_damage_is_called_damage(tmp_path: Path):
    kinds = {kind: type(lmdb_errors.meaning(str(tmp_path), kind("why"))) for kind in CLASSES}
    for kind in lmdb_errors.HANDLED:
        del kinds[kind]
    assert all(issubclass(made, StoreError) for made in kinds.values())
    damaged = {kind.__name__ for kind, made in kinds.items() if made is StoreDamagedError}
    assert damaged == {
        "BadChecksumError", "CorruptedError", "CursorFullError", "IncompatibleError",
        "InvalidError", "PageFullError", "PageNotFoundError", "ProblemError",
        "VersionMismatchError",
    }  # fmt: skip
    assert kinds[lmdb.DiskError] is StoreFullError
    assert kinds[lmdb.MemoryError] is StoreMemoryError
    assert kinds[lmdb.PanicError] is StoreDiskError


def test_a_write_that_the_disk_refused_is_no_damage(tmp_path: Path):
    error = lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EIO)}")
    error.code = errno.EIO  # type: ignore[misc]  # the library sets it
    said = lmdb_errors.meaning(str(tmp_path), error)
    assert type(said) is StoreDiskError
    assert os.strerror(errno.EIO) in str(said)
    assert "damaged" not in str(said)


def test_others_write_meanwhile(tmp_path: Path):
    path = tmp_path / "store"
    store = LmdbStore(str(path), create=True)
    fill(store)
    end = threading.Event()

    def write() -> None:
        turn = 0
        while not end.is_set():
            turn += 1

            def change(writer, turn: int = turn) -> None:
                for number in range(20):
                    key = bytes([turn % 7]) + number.to_bytes(31, "big")
                    writer.put(Db.CHUNKS, key, bytes(turn % 5000))
                    writer.delete(Db.NODES, key)
                writer.put(Db.META, b"turn", str(turn).encode())

            store.write(change)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        before = store.transaction_id()
        for _ in range(30):
            assert store.flaws() == []
            assert examine(str(path)) == []
            with open(path / "db" / "data.mdb", "rb") as file:
                read_metas(file.fileno())
        assert store.transaction_id() > before
    finally:
        end.set()
        writer.join()
        store.close()
