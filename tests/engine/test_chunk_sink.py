"""The sink for chunks: batches are written beside what comes, and nothing is lost between."""

import importlib.util
import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.ids import ChunkId, digest
from engine.storage import chunking
from engine.storage.lmdb_store import LmdbStore
from engine.storage.memory_store import MemoryStore
from engine.storage.objects import ChunkSink, Objects
from engine.storage.store import Db, Store, Writer
from tests.engine.trees import noise


def pieces(count: int, seed: int = 1) -> list[bytes]:
    data = noise(count * 1_000, seed)
    return [data[at : at + 1_000] for at in range(0, len(data), 1_000)]


def put_all(sink: ChunkSink, chunks: list[bytes]) -> None:
    for chunk in chunks:
        sink.put(chunk)


def there(store: Store, chunks: list[bytes]) -> int:
    objects = Objects(store)
    return sum(objects.chunk(ChunkId(digest(chunk))) == chunk for chunk in chunks)


@pytest.fixture(params=["lmdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made: Store = MemoryStore()
    if request.param == "lmdb":
        made = LmdbStore(str(tmp_path / "store"), create=True)
    yield made
    made.close()


def test_threads_that_bring_the_same_chunks(store: Store):
    chunks = pieces(200)
    sink = ChunkSink(store, batch_bytes=7_000)
    threads = [
        threading.Thread(target=put_all, args=(sink, chunks[turn:])) for turn in range(0, 200, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.flush()
    assert there(store, chunks) == len(chunks)
    with store.read() as reader:
        assert reader.count(Db.CHUNKS) == len(chunks)


def test_chunks_that_wait_for_the_callers_transaction_are_in_it(store: Store):
    chunks = pieces(15)
    sink = ChunkSink(store, batch_bytes=10_000)

    def change(writer: Writer) -> None:
        put_all(sink, chunks)  # more than a batch, whose own transaction waits for this one
        sink.flush_into(writer)

    store.write(change)
    assert there(store, chunks) == len(chunks)
    sink.flush()
    assert there(store, chunks) == len(chunks)


def test_a_batch_that_cannot_be_written_is_told(tmp_path: Path):
    store = LmdbStore(str(tmp_path / "store"), create=True)
    sink = ChunkSink(store, batch_bytes=3_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write", lambda change: 1 / 0)  # what the disk does is not foreseen
        put_all(sink, pieces(4))
        with pytest.raises(ZeroDivisionError):
            put_all(sink, pieces(8, 2))
    with pytest.raises(ZeroDivisionError):
        sink.flush()
    store.close()


def test_a_store_that_is_closed_waits_for_the_batch(tmp_path: Path):
    store = LmdbStore(str(tmp_path / "store"), create=True)
    chunks = pieces(40)
    began, go = threading.Event(), threading.Event()
    sink = ChunkSink(store, batch_bytes=30_000)
    write = store.write

    def slow(change: Any) -> Any:
        def changed(writer: Writer) -> Any:
            began.set()
            assert go.wait(120)
            return change(writer)

        return write(changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write", slow)
        put_all(sink, chunks)
        assert began.wait(120)
        closing = threading.Thread(target=store.close)
        closing.start()
        go.set()
        closing.join()
    store = LmdbStore(str(tmp_path / "store"))
    with store.read() as reader:
        assert reader.count(Db.CHUNKS) == 30  # the batch is whole
    store.close()


def test_two_threads_that_need_the_chunker_first_leave_stdout_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    find, first, left = importlib.util.find_spec, threading.Event(), threading.Event()
    out = io.StringIO()

    def slow(name: str) -> Any:
        if first.is_set():
            left.wait(0.3)
        else:
            first.set()
            threading.Event().wait(0.1)  # the other thread comes in meanwhile if it can
        return find(name)

    def one() -> None:
        chunking.compiled.__wrapped__()
        left.set()

    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(importlib.util, "find_spec", slow)
    begun = threading.Thread(target=one)
    begun.start()
    assert first.wait(120)
    chunking.compiled.__wrapped__()
    begun.join()
    assert sys.stdout is out
