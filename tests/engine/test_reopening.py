"""The first write of a store opens its environment anew: what if that fails, or comes too early."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import pytest

from engine.storage.lmdb_store import LmdbStore
from engine.storage.store import Db, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    with_a_key = LmdbStore(str(tmp_path / "store"), create=True)
    with_a_key.write(lambda writer: writer.put(Db.META, b"k", b"v"))
    with_a_key.close()
    store = LmdbStore(str(tmp_path / "store"), to_read=True)
    yield store
    store.close()


@contextmanager
def files(more: int) -> Iterator[None]:
    """Lets this process open so many more files than it has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def value(store: LmdbStore) -> bytes | None:
    with store.read() as reader:
        found = reader.get(Db.META, b"k")
        return None if found is None else bytes(found)


def test_a_turn_inside_a_read_is_refused(store: LmdbStore) -> None:
    with store.read(), pytest.raises(RuntimeError), store.turn():
        pass
    with store.turn():
        store.write(lambda writer: writer.put(Db.META, b"k", b"w"))
    assert value(store) == b"w"


def test_without_a_file_for_the_first_write_the_store_reads_on(store: LmdbStore) -> None:
    with files(0):
        with pytest.raises((StoreError, OSError, lmdb.Error)):
            store.write(lambda writer: writer.put(Db.META, b"k", b"w"))
        assert value(store) == b"v"
    store.write(lambda writer: writer.put(Db.META, b"k", b"w"))
    assert value(store) == b"w"


@pytest.mark.parametrize("first", ["a read", "a write", "a turn", "a number"])
def test_one_that_could_not_be_opened_again_is_at_its_next_use(
    store: LmdbStore, first: str
) -> None:
    """As when another thread takes the files that reopening has closed."""
    before = store.transaction_id()
    store._env.close()
    with files(0), pytest.raises((StoreError, OSError, lmdb.Error)) as caught:
        store._reopen(1 << 30, readonly=True)
    assert getattr(caught.value, "errno", 0) == errno.EMFILE
    if first == "a number":
        assert store.transaction_id() == before
    if first == "a turn":
        with store.turn():
            store.write(lambda writer: writer.put(Db.META, b"k", b"v"))
    if first == "a write":
        store.write(lambda writer: writer.put(Db.META, b"k", b"v"))
    assert value(store) == b"v"
    assert store.statistics().file_bytes
    store.write(lambda writer: writer.put(Db.META, b"k", b"w"))
    assert value(store) == b"w"
