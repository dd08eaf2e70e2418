"""Decoding is strict: bytes that break a rule are refused, whoever made them."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Repository
from engine.errors import CorruptObjectError
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.plain.filling import CheckoutRefusedError
from engine.storage.chunking import LARGEST_CHUNK
from engine.storage.codec import LEVEL, OFF, pack, unpack
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import (
    DEEPEST,
    EARLIEST_NS,
    LATEST_NS,
    Entry,
    Kind,
    Link,
    Page,
    Ref,
    Totals,
    decode,
    directory_node,
    encode,
    encode_item,
    index_node,
    list_node,
    node_id,
)
from engine.storage.objects import NodeBuffer, Objects
from engine.storage.snapshots import Snapshot, decode_snapshot, encode_snapshot, make_snapshot
from engine.storage.store import Db
from engine.trees.diffing import diff
from engine.trees.directory import Directory, walk
from tests.engine.make_vectors import entries

ID = digest(b"some object")
FILE = Entry(b"file", Kind.FILE, 0o644, 0, 3, b"abc")
BELOW = Entry(b"below", Kind.DIRECTORY, 0o755, 0, 0, ID, (), None, Totals(0, 0))
ROOT_ENTRY = msgspec.structs.replace(BELOW, name=b"")
RECORD = Snapshot(1, ROOT_ENTRY, (ID,), 5, "message", {"a": [1, "b", None]})


def refused(data: bytes) -> None:
    """Fails unless `data`, under its right id, is no node."""
    with pytest.raises(CorruptObjectError) as caught:
        decode(node_id(data), data)
    assert caught.value.kind == "node"
    assert caught.value.identifier == digest(data)


def plain(value: msgspec.Struct) -> Any:
    return cbor2.loads(encode(value))


def cbor(value: Any) -> bytes:
    return cbor2.dumps(value, canonical=True)


# The bytes.


@pytest.mark.parametrize(
    "node",
    [
        directory_node(()),
        directory_node(entries()),
        directory_node((FILE,)),
        index_node(1, (Page(b"a", ID, 1), Page(b"b", ID, 300))),
        index_node(6, (Page(b"a", ID, 1 << 40),)),
        list_node((Ref(ID, 5, 0), Ref(None, 1 << 50, 0))),
        list_node((Ref(ID, 5, 3), Ref(ID, 5, 3))),
    ],
)
def test_what_is_right_is_accepted(node: msgspec.Struct):
    data = encode(node)
    assert decode(node_id(data), data) == node
    assert decode(node_id(data), memoryview(data)) == node


NUMBERS = st.sampled_from([0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1])
TOTALS = st.builds(Totals, NUMBERS, NUMBERS)


@given(
    st.builds(
        Entry, st.binary(min_size=1, max_size=255), st.integers(1, 4), st.integers(0, 0o7777),
        NUMBERS | st.integers(EARLIEST_NS, LATEST_NS), NUMBERS,
        st.binary(max_size=300) | st.just((Ref(ID, 5, 0),)),
        st.just(()) | st.just(((b"user.a", b"b"),)), st.none() | st.just(Link(b"12345678", 2)),
        st.none() | TOTALS,
    )
    | st.builds(Page, st.binary(max_size=255), st.just(ID), NUMBERS)
)  # fmt: skip
def test_an_item_is_encoded_as_it_is_in_a_node(item: Entry | Page):
    assert encode_item(item) == encode(item)


def test_bytes_that_are_not_of_the_id():
    data = encode(directory_node((FILE,)))
    for identifier, found in [(node_id(data), data[:-1]), (NodeId(ID), data), (NodeId(b""), data)]:
        with pytest.raises(CorruptObjectError, match="do not match"):
            decode(identifier, found)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x82\x01\x80\x00",  # a byte too many
        b"\x82\x01",  # one too few
        b"\x82\x18\x01\x80",  # 1 in two bytes
        b"\x82\x19\x00\x01\x80",  # in three
        b"\x82\x01\x98\x00",  # an array's length in two
        b"\x98\x02\x01\x80",
        b"\x9f\x01\x80\xff",  # arrays of indefinite length
        b"\x82\x01\x9f\xff",
        b"\x82\xf9\x3c\x00\x80",  # 1.0
        b"\x82\xf5\x80",  # true
        b"\x82\xc2\x41\x01\x80",  # 1 as a big number
        b"\xd9\xd9\xf7\x82\x01\x80",  # with CBOR's mark
        b"\x82\xd8\x1c\x01\x80",  # with a tag for shared values
        b"\x82\x01\xd8\x1c\x81\xd8\x1d\x00",  # an array that holds itself
        b"\x82\x04\x80",  # no such node
        b"\x82\x00\x80",
        b"\x82\x20\x80",
        b"\x81\x01",
        b"\x83\x01\x80\x80",  # too many parts
        b"\x84\x02\x01\x80\x80",
        b"\x82\x01\xa0",  # a map
        b"\xa1\x01\x80",
        b"\xa2\x63tag\x01\x67entries\x80",
        b"\x80",
        b"\x01",
        b"\x40",
        b"\xf6",
        b"\xf7",
        b"\xff",
        b"\x82\x01\x81\x80",
        b"\x82\x03\x80",  # a list of nothing
        b"\x83\x02\x01\x80",  # an index of nothing
        b"\x82\x01\x9b\x7f" + b"\xff" * 7,  # an array of 2**63 parts
        b"\x82\x01\x5b\x7f" + b"\xff" * 7,
        b"\x81" * 100_000 + b"\x80",
        b"\x82\x01" * 100_000,
    ],
    ids=lambda data: f"{len(data)}-{data[:12].hex()}",
)
def test_bytes_that_are_no_canonical_node(data: bytes):
    refused(data)


def test_byte_strings_in_pieces_and_text_are_not_bytes():
    data = encode(directory_node((FILE,)))
    name = b"\x44file"
    assert data.count(name) == 1
    for other in [b"\x5f\x44file\xff", b"\x58\x04file", b"\x64file", b"\x5f\x42fi\x42le\xff"]:
        refused(data.replace(name, other))
    # Base64 of a content is not the content.
    refused(cbor([1, [[b"file", 1, 0o644, 0, 3, "YWJj", [], None, None]]]))


# The rules.


def of_one(**facts: Any) -> bytes:
    """Returns a directory of one file that differs in some facts."""
    return encode(directory_node((msgspec.structs.replace(FILE, **facts),)))


@pytest.mark.parametrize(
    "name",
    [b"", b".", b"..", b"a/b", b"/", b"a\0", b"\0", b"n" * 256],
)
def test_impossible_names(name: bytes):
    refused(of_one(name=name))


def test_possible_names():
    for name in [b"...", b"\xff", b" ", b"\n", b"n" * 255, b"-"]:
        data = of_one(name=name)
        decode(node_id(data), data)


@pytest.mark.parametrize("names", [b"aa", b"ba", b"aba", b"abcb"])
def test_names_that_are_not_sorted_or_twice_the_same(names: bytes):
    refused(
        encode(
            directory_node(
                tuple(msgspec.structs.replace(FILE, name=bytes([name])) for name in names)
            )
        )
    )


CHUNK = Ref(ID, 3, 0)


@pytest.mark.parametrize(
    "facts",
    [
        {"kind": 0}, {"kind": 5}, {"kind": -1}, {"kind": 1 << 70}, {"kind": Kind.DIRECTORY},
        {"kind": Kind.SYMLINK, "size": 2}, {"kind": Kind.FIFO},
        {"mode": -1}, {"mode": 0o10000}, {"mode": 0o100644},
        {"mtime_ns": 1 << 63}, {"mtime_ns": -(1 << 63) - 1}, {"mtime_ns": 1 << 100},
        {"size": 2}, {"size": 4}, {"size": 0}, {"size": -1}, {"size": 1 << 63},
        {"size": 129, "content": bytes(129)}, {"size": 1 << 64, "content": (CHUNK,)},
        {"content": ()}, {"content": (), "size": 0},
        {"content": (Ref(ID, 2, 0),)}, {"content": (Ref(ID, 4, 0),)},
        {"content": (Ref(ID, 4, 0), Ref(ID, -1, 0))}, {"content": (CHUNK, Ref(ID, 0, 0))},
        {"content": (Ref(ID, 1, 0), Ref(ID, 1, 0))}, {"content": (Ref(ID[:31], 3, 0),)},
        {"content": (Ref(b"", 3, 0),)}, {"content": (Ref(ID + b"x", 3, 0),)},
        {"content": (Ref(ID, 3, 7),)}, {"content": (Ref(ID, 3, -1),)},
        {"content": (Ref(None, 3, 1),)}, {"content": (Ref(ID, 2, 0), Ref(ID, 1, 1))},
        {"content": (Ref(ID, 1, 0),) * 33, "size": 33},
        {"content": (Ref(ID, 1 << 62, 0),) * 2, "size": 1 << 63},
        {"xattrs": ((b"b", b""), (b"a", b""))}, {"xattrs": ((b"a", b""), (b"a", b""))},
        {"xattrs": ((b"", b""),)}, {"xattrs": ((b"a\0", b""),)}, {"xattrs": ((b"a" * 256, b""),)},
        {"xattrs": ((b"a", bytes(65_537)),)},
        {"link": Link(b"1234567", 2)}, {"link": Link(b"123456789", 2)},
        {"link": Link(b"12345678", 1)}, {"link": Link(b"12345678", 0)},
        {"link": Link(b"12345678", -2)},
        {"totals": Totals(0, 0)},
    ],
)  # fmt: skip
def test_files_that_break_a_rule(facts: dict[str, Any]):
    refused(of_one(**facts))


@pytest.mark.parametrize(
    "facts",
    [
        {"content": ID[:31]}, {"content": b""}, {"content": ID + b"x"}, {"content": (CHUNK,)},
        {"size": -1}, {"size": 1 << 63}, {"totals": None}, {"totals": Totals(-1, 0)},
        {"totals": Totals(0, 1)}, {"totals": Totals(1, -1)}, {"totals": Totals(1 << 63, 0)},
        {"link": Link(b"12345678", 2)},
    ],
)  # fmt: skip
def test_directories_that_break_a_rule(facts: dict[str, Any]):
    refused(encode(directory_node((msgspec.structs.replace(BELOW, **facts),))))
    root = msgspec.structs.replace(ROOT_ENTRY, **facts)
    record_refused(encode(msgspec.structs.replace(RECORD, root=root)))


@pytest.mark.parametrize(
    ("size", "target"),
    [(0, b""), (2, b"a"), (3, b"a\0b"), (4096, b"t" * 4096), (1, (Ref(ID, 1, 0),))],
)
def test_links_that_break_a_rule(size: int, target: bytes | tuple[Ref, ...]):
    refused(encode(directory_node((Entry(b"l", Kind.SYMLINK, 0o777, 0, size, target),))))


@pytest.mark.parametrize(("size", "content"), [(1, b""), (0, b"x"), (1, b"x"), (0, ())])
def test_fifos_that_break_a_rule(size: int, content: Any):
    refused(encode(directory_node((Entry(b"f", Kind.FIFO, 0o600, 0, size, content),))))


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("value", [None, -1, 1.5, "text", b"bytes", [], {}, True, [[]], [None]])
def test_entries_with_a_part_of_another_type(at: int, value: Any):
    entry = plain(directory_node((FILE,)))[1][0]
    wrong = [*entry[:at], value, *entry[at + 1 :]]
    if (at, value) in [(0, b"bytes"), (3, -1), (6, []), (7, None), (8, None)]:
        data = cbor([1, [wrong]])
        assert encode(decode(node_id(data), data)) == data
    else:
        refused(cbor([1, [wrong]]))


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 8, 10])
def test_entries_with_too_few_or_too_many_parts(length: int):
    entry = [*plain(directory_node((FILE,)))[1][0], None]
    refused(cbor([1, [entry[:length]]]))


@pytest.mark.parametrize(
    "refs",
    [
        (), (Ref(ID, 0, 0),), (Ref(ID, -5, 0),), (Ref(ID, 1, 7),), (Ref(ID, 1, -1),),
        (Ref(ID, 1, 1), Ref(ID, 1, 0)), (Ref(None, 1, 1),), (Ref(ID[1:], 1, 0),),
        (Ref(ID, 1, 0),) * 1025,
    ],
)  # fmt: skip
def test_lists_that_break_a_rule(refs: tuple[Ref, ...]):
    refused(encode(list_node(refs)))


@pytest.mark.parametrize(
    ("level", "pages"),
    [
        (0, (Page(b"a", ID, 1),)),
        (7, (Page(b"a", ID, 1),)),
        (-1, (Page(b"a", ID, 1),)),
        (1, ()),
        (1, (Page(b"", ID, 1),)),
        (1, (Page(b"a", ID[1:], 1),)),
        (1, (Page(b"a", ID, 0),)),
        (1, (Page(b"a", ID, -1),)),
        (1, (Page(b"b", ID, 1), Page(b"a", ID, 1))),
        (1, (Page(b"a", ID, 1), Page(b"a", ID, 1))),
    ],
)
def test_indexes_that_break_a_rule(level: int, pages: tuple[Page, ...]):
    refused(encode(index_node(level, pages)))


# Nodes that are right alone, and lie about others.


class Forge(NodeBuffer):
    """Makes nodes of any kind."""

    def directory(self, names: bytes) -> NodeId:
        return self.put(
            directory_node(
                tuple(msgspec.structs.replace(FILE, name=bytes([name])) for name in names)
            )
        )

    def index(self, level: int, *pages: tuple[bytes, NodeId, int]) -> NodeId:
        return self.put(index_node(level, tuple(Page(*page) for page in pages)))

    def objects(self) -> Objects:
        store = MemoryStore()
        store.write(self.flush)
        return Objects(store)


def uses(objects: Objects, identifier: NodeId) -> Iterator[Callable[[], object]]:
    yield lambda: list(Directory(objects, identifier))
    yield lambda: list(Directory(objects, identifier).outside({NodeId(ID)}))


def test_an_index_that_is_right():
    forge = Forge()
    low = forge.index(1, (b"b", forge.directory(b"ab"), 2), (b"c", forge.directory(b"c"), 1))
    high = forge.index(1, (b"e", forge.directory(b"de"), 2))
    root = forge.index(2, (b"c", low, 3), (b"e", high, 2))
    for use in uses(forge.objects(), root):
        use()
    names = [entry.name for entry in Directory(forge.objects(), root)]
    assert b"".join(names) == b"abcde"


def test_pages_that_are_not_what_the_index_says():
    forge = Forge()
    ab, cd, empty = forge.directory(b"ab"), forge.directory(b"cd"), forge.directory(b"")
    inner = forge.index(1, (b"b", ab, 2))
    pieces = forge.put(list_node((CHUNK,)))
    for pages in [
        [(b"b", ab, 3)],  # the count
        [(b"b", ab, 1)],
        [(b"a", ab, 2)],  # the last name
        [(b"c", ab, 2)],
        [(b"b", empty, 1)],
        [(b"b", inner, 2)],  # the level
        [(b"b", pieces, 1)],  # the kind
        [(b"b", ab, 2), (b"d", forge.directory(b"bd"), 2)],  # the order
        [(b"b", ab, 2), (b"d", forge.directory(b"ad"), 2)],
        [(b"b", ab, 2), (b"d", ab, 2)],
        [(b"b", ab, 2), (b"d", cd, 3)],
        [(b"b", NodeId(digest(b"nothing")), 2)],
    ]:
        root = forge.index(1, *pages)
        for use in uses(forge.objects(), root):
            with pytest.raises(CorruptObjectError):
                use()


def test_inner_indexes_that_are_not_what_the_outer_one_says():
    forge = Forge()
    ab = forge.directory(b"ab")
    low = forge.index(1, (b"b", ab, 2))
    overlaps = forge.index(1, (b"d", forge.directory(b"ad"), 2), (b"e", forge.directory(b"e"), 1))
    for level, pages in [
        (3, [(b"b", low, 2)]),
        (1, [(b"b", low, 2)]),
        (2, [(b"b", ab, 2)]),
        (2, [(b"b", low, 3)]),
        (2, [(b"c", low, 2)]),
        (2, [(b"b", low, 2), (b"c", low, 2)]),
        (2, [(b"b", low, 2), (b"e", overlaps, 3)]),  # only its first page's names tell
    ]:
        root = forge.index(level, *pages)
        for use in uses(forge.objects(), root):
            with pytest.raises(CorruptObjectError):
                use()


# Trees that are too deep.


DEPTH = 10_000


def deep(put: Callable[[msgspec.Struct], NodeId], depth: int, leaf: tuple[Entry, ...]) -> Entry:
    """Stores a tree of `depth` directories inside each other and returns its root."""
    node = put(directory_node(leaf))
    for level in range(depth):
        totals = Totals(level + len(leaf), 0)
        below = Entry(b"d", Kind.DIRECTORY, 0o755, 0, 3 * len(leaf), node, (), None, totals)
        node = put(directory_node((below,)))
    totals = Totals(depth + len(leaf), 0)
    return Entry(b"", Kind.DIRECTORY, 0o755, 0, 3 * len(leaf), node, (), None, totals)


def with_trees(repository: Repository, depth: int) -> tuple[Entry, Entry, Entry]:
    """Stores two trees that differ in their deepest file, an empty one, and snapshots of them."""
    nodes = NodeBuffer()
    roots = (
        deep(nodes.put, depth, (FILE,)),
        deep(nodes.put, depth, (msgspec.structs.replace(FILE, content=b"xyz"),)),
        deep(nodes.put, 0, ()),
    )
    repository.store.write(nodes.flush)
    records = [encode_snapshot(Snapshot(1, root, (), 1, "", {})) for root in roots]
    pairs = [(bytes(identifier), record) for identifier, record in records]
    repository.store.write(lambda txn: txn.put_many(Db.SNAPSHOTS, pairs))
    return roots


def test_a_forged_tree_that_is_too_deep_is_refused(repository: Repository, tmp_path: Path):
    one, other, empty = with_trees(repository, DEPTH)
    objects = repository.objects
    for call in [
        lambda: list(walk(objects, one)),
        lambda: list(diff(objects, one, other)),
        lambda: list(diff(objects, one, empty)),
        lambda: list(diff(objects, empty, one)),
        lambda: repository.check_out(one, str(tmp_path / "out"), outside_links=True),
        lambda: repository.check_out(one, str(tmp_path / "out")),
    ]:
        with pytest.raises((CorruptObjectError, CheckoutRefusedError), match=r"deep"):
            call()
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    report = repository.verify()
    assert len(report.damage) == 2
    assert all("deep" in damage.problem for damage in report.damage)


def test_a_tree_of_the_greatest_depth_is_as_good_as_any(repository: Repository, tmp_path: Path):
    one, other, empty = with_trees(repository, DEEPEST)
    objects = repository.objects
    path = b"d/" * DEEPEST + b"file"
    assert [p for p, entry in walk(objects, one) if entry.kind == Kind.FILE] == [path]
    assert [change.path for change in diff(objects, one, other)] == [path]
    assert len(list(diff(objects, one, empty))) == DEEPEST + 1
    assert len(list(diff(objects, empty, one))) == DEEPEST + 1
    assert repository.verify().damage == []
    assert repository.collect().nodes == 0
    repository.check_out(one, str(tmp_path / "out"))
    assert repository.import_directory(str(tmp_path / "out")).root == one
    shutil.rmtree(tmp_path / "out")


# Chunks.


def chunk_refused(plain: bytes, value: bytes) -> None:
    with pytest.raises(CorruptObjectError) as caught:
        unpack(ChunkId(digest(plain)), memoryview(value))
    assert caught.value.kind == "chunk"


TEXT = b"some text that repeats itself; " * 100


def test_chunks_that_are_right():
    for data in [b"x", b"x" * 64, TEXT, bytes(LARGEST_CHUNK)]:
        for level in [OFF, 1, LEVEL, 19]:
            value = pack(data, level)
            assert bytes(unpack(ChunkId(digest(data)), memoryview(value))) == data
            assert value[0] == (level != OFF and len(data) >= 64)


@pytest.mark.parametrize("codec", [2, 3, 0x28, 255])
def test_unknown_codecs(codec: int):
    chunk_refused(TEXT, bytes([codec]) + pack(TEXT)[1:])
    chunk_refused(TEXT, bytes([codec]) + TEXT)


def test_every_truncation_of_a_chunk():
    value = pack(TEXT)
    for length in range(len(value)):
        chunk_refused(TEXT, value[:length])
    raw = pack(TEXT, OFF)
    for length in range(0, len(raw), 7):
        chunk_refused(TEXT, raw[:length])
    chunk_refused(TEXT, raw + b"x")


def test_every_changed_byte_of_a_frame():
    value = pack(TEXT)
    for at in range(len(value)):
        for mask in [1, 0x80, 0xFF]:
            data = bytearray(value)
            data[at] ^= mask
            try:
                found = bytes(unpack(ChunkId(digest(TEXT)), memoryview(bytes(data))))
            except CorruptObjectError:
                continue
            assert found == TEXT


def test_frames_that_say_they_are_larger_than_any_chunk():
    bomb = bytes(LARGEST_CHUNK + 1)
    chunk_refused(bomb, b"\x01" + zstandard.ZstdCompressor(level=19).compress(bomb))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    chunk_refused(TEXT, b"\x01" + unsized)
    huge = b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f" + b"\x01\x00\x00"
    chunk_refused(b"", b"\x01" + huge)


def test_a_frame_that_holds_more_than_it_says():
    frame = zstandard.ZstdCompressor(level=3).compress(bytes(100 << 20))
    small = zstandard.ZstdCompressor(level=3).compress(bytes(200_000))
    assert zstandard.frame_content_size(small) == 200_000
    header, small_header = (
        zstandard.get_frame_parameters(data).window_size for data in (frame, small)
    )
    assert header > small_header
    # single segment, 4 bytes of content size: the blocks of the large one
    forged = b"\x28\xb5\x2f\xfd\xa0" + (200_000).to_bytes(4, "little") + frame[10:]
    chunk_refused(bytes(200_000), b"\x01" + forged)


def test_a_frame_of_other_bytes_and_of_a_dictionary():
    chunk_refused(TEXT, pack(TEXT + b"!"))
    samples = zstandard.ZstdCompressionDict(TEXT * 4)
    chunk_refused(TEXT, b"\x01" + zstandard.ZstdCompressor(dict_data=samples).compress(TEXT)[:-4])
    chunk_refused(TEXT, b"\x01")
    chunk_refused(TEXT, b"")


# Snapshots.


def record_refused(data: bytes) -> None:
    with pytest.raises(CorruptObjectError) as caught:
        decode_snapshot(SnapshotId(digest(data)), data)
    assert caught.value.kind == "snapshot"


def test_records_that_are_right():
    for record in [RECORD, msgspec.structs.replace(RECORD, parents=(), message="", metadata={})]:
        identifier, data = encode_snapshot(record)
        assert decode_snapshot(identifier, data) == record
    with pytest.raises(CorruptObjectError, match="do not match"):
        decode_snapshot(SnapshotId(ID), data)


@pytest.mark.parametrize(
    "facts",
    [
        {"version": 0}, {"version": 2}, {"parents": (b"short",)}, {"parents": (ID, b"")},
        {"root": FILE}, {"root": msgspec.structs.replace(FILE, name=b"")}, {"root": BELOW},
        {"root": msgspec.structs.replace(ROOT_ENTRY, totals=None)},
        {"root": msgspec.structs.replace(ROOT_ENTRY, mode=-1)},
    ],
)  # fmt: skip
def test_records_that_break_a_rule(facts: dict[str, Any]):
    record_refused(encode(msgspec.structs.replace(RECORD, **facts)))


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("value", [None, 1.5, [], True, [[]], b"bytes", {1: 2}, {b"a": 1}])
def test_records_with_a_part_of_another_type(at: int, value: Any):
    parts = plain(RECORD)
    parts[at] = value
    if (at, value) == (2, []):
        return  # no parents
    record_refused(cbor(parts))


def test_records_that_are_not_canonical():
    data = encode(RECORD)
    record_refused(b"")
    record_refused(data + b"\0")
    record_refused(data[:-1])
    record_refused(b"\x86\x18\x01" + data[2:])
    record_refused(b"\x9f" + data[1:] + b"\xff")
    assert data.endswith(b"\xa1\x61a\x83\x01\x61b\xf6")
    head = data[: -len(b"\xa1\x61a\x83\x01\x61b\xf6")]
    for metadata in [
        b"\xa2\x61b\x01\x61a\x01",  # keys in another order
        b"\xa2\x62aa\x01\x61b\x01",
        b"\xa2\x61a\x01\x61a\x01",  # twice
        b"\xbf\x61a\x01\xff",
        b"\xa1\x61a\x18\x01",
        b"\xa1\x61a\xfb\x3f\xf0" + bytes(6),  # 1.0 in eight bytes
        b"\xa1\x61a\xc0\x74" + b"2013-03-21T20:04:00Z",  # a date
        b"\xa1\x61a\xf7",  # undefined
        b"\xa1\x61a\xd8\x1c\x81\xd8\x1d\x00",  # an array that holds itself
        b"\xa1\x61\xff\x01",  # no text
        b"\x81\x01",
    ]:
        record_refused(head + metadata)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (b"bytes", "metadata['a']"),
        (float("nan"), "metadata['a']"),
        (float("-inf"), "metadata['a']"),
        ({1: 2}, "metadata['a']"),
        ([0, {"b": b""}], "metadata['a'][1]['b']"),
        ({"b": {None: 1}}, "metadata['a']['b']"),
    ],
)
def test_metadata_is_json(value: object, where: str):
    with pytest.raises(ValueError, match=re.escape(where)):
        make_snapshot(RECORD.root, metadata={"a": value})
    record_refused(encode(msgspec.structs.replace(RECORD, metadata={"a": value})))
    held: dict[str, object] = {"a": [1, -2.5, None, True, "text", {"b": []}, 10**18]}
    made = make_snapshot(RECORD.root, metadata=held)
    assert decode_snapshot(*encode_snapshot(made)).metadata == held


# All that one byte can do.

NODES = [
    encode(directory_node(entries())),
    encode(directory_node((FILE, BELOW)[::-1])),
    encode(index_node(2, (Page(b"a", ID, 1), Page(b"b", ID, 300)))),
    encode(list_node((Ref(ID, 5, 0), Ref(None, 1 << 40, 0)))),
]


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    where = st.integers(0, len(data) - 1)
    one = st.integers(0, 255).map(lambda byte: bytes([byte]))
    return st.one_of(
        st.builds(lambda at, byte: data[:at] + byte + data[at + 1 :], where, one),
        st.builds(lambda at: data[:at], where),
        st.builds(lambda at, byte: data[:at] + byte + data[at:], where, one),
        st.builds(lambda at: data[:at] + data[at + 1 :], where),
        st.binary(min_size=1, max_size=9).map(lambda more: data + more),
    )


@settings(max_examples=1_500, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(NODES).flatmap(mutated))
def test_a_mutated_node_is_refused_or_another_node(data: bytes):
    try:
        node = decode(node_id(data), data)
    except CorruptObjectError:
        return
    assert encode(node) == data


@settings(max_examples=800, deadline=None, derandomize=True, database=None)
@given(mutated(encode(RECORD)))
def test_a_mutated_record_is_refused_or_another_record(data: bytes):
    try:
        record = decode_snapshot(SnapshotId(digest(data)), data)
    except CorruptObjectError:
        return
    assert encode_snapshot(record) == (digest(data), data)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=40))
def test_any_bytes(data: bytes):
    for read in [
        lambda: decode(node_id(data), data),
        lambda: decode_snapshot(SnapshotId(digest(data)), data),
    ]:
        try:
            assert encode(read()) == data
        except CorruptObjectError:
            pass
