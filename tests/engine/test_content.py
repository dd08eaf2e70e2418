"""Contents: what goes in comes out, in whole or in ranges, holes as holes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CorruptObjectError, MissingObjectError
from engine.ids import digest
from engine.storage import content
from engine.storage.content import chunk_ids, ingest, pieces, read, write_out
from engine.storage.lmdb_store import LmdbStore
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import Entry, Kind, Ref, check_entry, directory_node, encode, list_node
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.store import Db, Store
from tests.engine.trees import noise

MIB = 1 << 20
TIB = 1 << 40


class Box:
    """A store for files, and the way in and out."""

    def __init__(self, path: Path, store: Store | None = None) -> None:
        self.path = path
        self.store = store or MemoryStore()
        self.objects = Objects(self.store)
        self.nodes = NodeBuffer()

    def keep(self, source: Path) -> Entry:
        sink = ChunkSink(self.store)
        with source.open("rb") as file:
            what, size = ingest(file.fileno(), os.fstat(file.fileno()), sink, self.nodes.put)
        sink.flush()
        self.store.write(self.nodes.flush)
        entry = Entry(b"file", Kind.FILE, 0o644, 0, size, what)
        check_entry(entry)
        return entry

    def keep_bytes(self, data: bytes) -> Entry:
        source = self.path / "source"
        source.write_bytes(data)
        return self.keep(source)

    def out(self, entry: Entry) -> Path:
        target = self.path / "target"
        with target.open("wb") as file:
            write_out(self.objects, entry, file.fileno())
        return target

    def replace_chunk(self, identifier: bytes, value: bytes | None) -> None:
        if value is None:
            self.store.write(lambda txn: txn.delete(Db.CHUNKS, identifier))
        else:
            self.store.write(lambda txn: txn.put(Db.CHUNKS, identifier, value))
        self.objects.shed()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.mark.parametrize(
    "size", [0, 1, 127, 128, 129, 16_383, 16_384, 16_385, 70_000, 262_145, MIB + 1]
)
@pytest.mark.parametrize("fill", ["noise", "zeros"])
def test_what_goes_in_comes_out(box: Box, size: int, fill: str):
    data = noise(size, size) if fill == "noise" else bytes(size)
    entry = box.keep_bytes(data)
    assert entry.size == size
    assert isinstance(entry.content, bytes) == (size <= 128)
    if 128 < size <= 16_384:
        assert len(list(pieces(box.objects, entry))) == 1
    assert read(box.objects, entry, 0, size) == data
    assert read(box.objects, entry, 0, size + 1000) == data
    assert read(box.objects, entry, size, 1) == read(box.objects, entry, size + 5, 9) == b""
    assert read(box.objects, entry, size // 2, 3) == data[size // 2 : size // 2 + 3]
    assert box.out(entry).read_bytes() == data


def test_a_file_of_many_chunks_has_a_list(box: Box):
    data = noise(int(3.5 * MIB), 1)
    entry = box.keep_bytes(data)
    assert isinstance(entry.content, tuple)
    assert [ref.level for ref in entry.content] == [1]
    assert len(list(pieces(box.objects, entry))) > 32
    lists: set[bytes] = set()
    identifiers = list(chunk_ids(box.objects, entry, lists))
    assert lists == {entry.content[0].id}
    assert identifiers == [ref.id for ref in pieces(box.objects, entry)]
    assert read(box.objects, entry, 0, len(data)) == data
    assert box.out(entry).read_bytes() == data


def test_lists_of_lists(box: Box):
    """As of a file of more than 32 * 1024 chunks, here of chunks of 1 byte."""
    letters = [bytes([n]) for n in range(256)]
    sink = ChunkSink(box.store)
    for letter in letters:
        sink.put(letter)
    sink.flush()
    data = noise(40_000, 3)
    refs = content.fold([Ref(digest(letters[n]), 1, 0) for n in data], box.nodes.put)
    box.store.write(box.nodes.flush)
    entry = Entry(b"file", Kind.FILE, 0o644, 0, len(data), refs)
    assert [ref.level for ref in refs] == [2]
    assert read(box.objects, entry, 0, len(data)) == data
    for start in [0, 1_023, 1_024, 1_025, 32_768, 39_999]:
        assert read(box.objects, entry, start, 2_050) == data[start : start + 2_050]
    lists: set[bytes] = set()
    assert len(list(chunk_ids(box.objects, entry, lists))) == len(data)
    assert len(lists) == 1 + 40
    assert box.out(entry).read_bytes() == data


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Objects, Entry, bytes]]:
    """A file with holes and lists, and its bytes."""
    path = tmp_path_factory.mktemp("long")
    box = Box(path, LmdbStore(str(path / "store"), create=True))
    with (path / "source").open("wb") as file:
        file.write(noise(2_500_000, 4))
        file.seek(1 * MIB, os.SEEK_CUR)
        file.write(noise(100_000, 5))
        file.truncate(file.tell() + 500_000)
    entry = box.keep(path / "source")
    yield box.objects, entry, (path / "source").read_bytes()
    box.store.close()


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(offset=st.integers(0, 4_300_000), size=st.integers(0, 600_000))
def test_a_range_is_a_slice(long_file: tuple[Objects, Entry, bytes], offset: int, size: int):
    objects, entry, data = long_file
    assert read(objects, entry, offset, size) == data[offset : offset + size]


def test_a_file_is_read_in_the_kernel_s_pieces(long_file: tuple[Objects, Entry, bytes]):
    objects, entry, data = long_file
    for size in [4_096, 131_072, 1_000_003]:
        parts = [read(objects, entry, at, size) for at in range(0, len(data), size)]
        assert b"".join(parts) == data


def sparse(path: Path, size: int, *parts: tuple[int, bytes]) -> Path:
    """Makes a file of `size` bytes that has these parts and is a hole elsewhere."""
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in parts:
            file.seek(at)
            file.write(data)
    if path.stat().st_blocks * 512 >= size:
        pytest.skip("this filesystem has no sparse files")
    return path


def test_a_sparse_file_costs_what_it_holds(box: Box):
    start, middle = noise(4_096, 6), noise(50_000, 7)
    source = sparse(box.path / "sparse", TIB, (0, start), (1 << 39, middle))
    entry = box.keep(source)
    assert entry.size == TIB
    holes = [ref for ref in pieces(box.objects, entry) if ref.id is None]
    assert len(holes) == 2
    assert sum(ref.length for ref in holes) > TIB - 300_000
    assert read(box.objects, entry, 0, 5_000) == start + bytes(904)
    assert read(box.objects, entry, (1 << 39) - 10, 50_020) == bytes(10) + middle + bytes(10)
    assert read(box.objects, entry, TIB - 5, 100) == bytes(5)
    target = box.out(entry)
    status = target.stat()
    assert status.st_size == TIB
    assert status.st_blocks * 512 < 200_000
    with target.open("rb") as file:
        file.seek((1 << 39) - 10)
        assert file.read(50_020) == bytes(10) + middle + bytes(10)


@pytest.mark.parametrize("size", [129, 4_096, 16_384, 16_385, 300_000, TIB])
def test_a_file_that_is_one_hole(box: Box, size: int):
    source = box.path / "hole"
    with source.open("wb") as file:
        file.truncate(size)
    entry = box.keep(source)
    assert entry.size == size
    assert read(box.objects, entry, size - 100, 1_000) == bytes(100)
    status = box.out(entry).stat()
    assert status.st_size == size
    if size > 16_384:
        assert entry.content == (Ref(None, size, 0),)
        assert status.st_blocks == 0


def test_holes_are_pieces_and_cut_the_file(box: Box):
    part = noise(300_000, 8)
    whole = box.keep(sparse(box.path / "one", 20 * MIB, (MIB, part), (10 * MIB, part)))
    ids = [ref.id for ref in pieces(box.objects, whole)]
    assert ids.count(None) == 3
    assert ids[0] is None
    assert ids[-1] is None
    between = ids.index(None, 1)
    assert ids[1:between] == ids[between + 1 : -1]  # equal parts are equal chunks


@pytest.mark.parametrize("window", [262_144, 262_145, 300_001, 1_000_000])
def test_the_window_does_not_change_the_chunks(
    box: Box, monkeypatch: pytest.MonkeyPatch, window: int
):
    data = noise(3 * MIB + 77, 9)
    known = box.keep_bytes(data)
    monkeypatch.setattr(content, "WINDOW_BYTES", window)
    assert box.keep_bytes(data) == known


def test_a_byte_that_is_inserted_changes_few_chunks(box: Box):
    data = noise(2 * MIB, 10)
    old = set(chunk_ids(box.objects, box.keep_bytes(data), set()))
    new = set(chunk_ids(box.objects, box.keep_bytes(data[:MIB] + b"!" + data[MIB:]), set()))
    assert len(new - old) <= 3 < len(old & new)


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_as_long_as_what_was_read(box: Box):
    source = box.path / "source"
    source.write_bytes(noise(50_000, 11))
    status = source.stat()
    sink = ChunkSink(box.store)
    for size in [0, 100, 10_000, 60_000]:
        source.write_bytes(noise(size, 12))
        with source.open("rb") as file:
            what, found = ingest(file.fileno(), status, sink, box.nodes.put)
        sink.flush()
        assert found == size
        entry = Entry(b"file", Kind.FILE, 0o644, 0, found, what)
        check_entry(entry)
        assert read(box.objects, entry, 0, size) == noise(size, 12)


@pytest.mark.parametrize("size", [5_000, 200_000, 3_000_000])
@pytest.mark.parametrize(
    "damage", ["missing", "flipped", "short", "empty", "another", "codec", "not a frame"]
)
def test_a_damaged_chunk_is_never_given_out(box: Box, size: int, damage: str):
    data = noise(size, 13)
    entry = box.keep_bytes(data)
    (*_, last) = pieces(box.objects, entry)
    assert last.id is not None
    with box.store.read() as txn:
        raw = bytes(txn.get(Db.CHUNKS, last.id) or b"")
    values = {
        "missing": None, "flipped": raw[:-1] + bytes([raw[-1] ^ 1]), "short": raw[:-1],
        "empty": b"", "another": b"\0another", "codec": b"\2" + raw[1:],
        "not a frame": b"\1" + raw[1:],
    }  # fmt: skip
    box.replace_chunk(last.id, values[damage])
    for call in [
        lambda: read(box.objects, entry, 0, size),
        lambda: read(box.objects, entry, size - 1, 1),
        lambda: box.out(entry),
    ]:
        with pytest.raises(MissingObjectError if damage == "missing" else CorruptObjectError):
            call()
    if size > 100_000:
        assert read(box.objects, entry, 0, 1_000) == data[:1_000]


def test_a_chunk_of_another_length_than_promised(box: Box):
    sink = ChunkSink(box.store)
    identifier = sink.put(noise(1_000, 14))
    sink.flush()
    for length in [999, 1_001]:
        refs = (Ref(identifier, length, 0), Ref(identifier, 1_000, 0))
        for entry in [
            Entry(b"file", Kind.FILE, 0o644, 0, length, refs[:1]),
            Entry(b"file", Kind.FILE, 0o644, 0, length + 1_000, refs),
        ]:
            with pytest.raises(CorruptObjectError, match="bytes, not"):
                read(box.objects, entry, 0, 10)
            with pytest.raises(CorruptObjectError, match="bytes, not"):
                box.out(entry)


def test_lists_that_lie(box: Box):
    chunk = Ref(digest(b"x"), 1, 0)
    known = box.nodes.put(list_node((chunk, chunk)))
    above = box.nodes.put(list_node((Ref(known, 2, 1),)))

    directory = box.nodes.put(directory_node(()))
    box.store.write(box.nodes.flush)
    for ref in [
        Ref(known, 3, 1), Ref(known, 1, 1), Ref(known, 2, 2), Ref(above, 2, 1),
        Ref(directory, 2, 1), Ref(digest(b"nothing"), 2, 1),
    ]:  # fmt: skip
        entry = Entry(b"file", Kind.FILE, 0o644, 0, ref.length, (ref,))
        check_entry(entry)
        for call in [
            lambda entry=entry: read(box.objects, entry, 0, 1),
            lambda entry=entry: list(pieces(box.objects, entry)),
            lambda entry=entry: list(chunk_ids(box.objects, entry, set())),
            lambda entry=entry: box.out(entry),
        ]:
            with pytest.raises(CorruptObjectError):
                call()


def test_lists_that_repeat_each_other_are_walked_once(box: Box):
    """1,024 ** 5 chunks, all the same one: to enumerate them would take for ever."""
    box.store.write(lambda writer: writer.put(Db.CHUNKS, digest(b"x"), b"\0x"))
    ref = Ref(digest(b"x"), 1, 0)
    for level in range(1, 6):
        node = box.nodes.put(list_node((ref,) * 1_024))
        ref = Ref(node, ref.length * 1_024, level)
    box.store.write(box.nodes.flush)
    entry = Entry(b"file", Kind.FILE, 0o644, 0, ref.length, (ref,))
    lists: set[bytes] = set()
    assert set(chunk_ids(box.objects, entry, lists)) == {digest(b"x")}
    assert len(lists) == 5


def test_a_chunk_that_holds_a_node_is_kept_by_collection(box: Box):
    """A chunk and a node of the same bytes have the same id, in different databases."""
    encoded = encode(list_node((Ref(digest(b"y"), 1, 0),)))
    entry = box.keep_bytes(encoded * 9)
    lists = {digest(encoded * 9)}
    assert list(chunk_ids(box.objects, entry, lists)) == [digest(encoded * 9)]


def test_only_files_are_read(box: Box):
    with pytest.raises(ValueError, match="not a file"):
        read(box.objects, Entry(b"link", Kind.SYMLINK, 0o777, 0, 1, b"t"), 0, 1)
