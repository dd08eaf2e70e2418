"""Directories: the same entries are the same nodes; pages are what a list of all would be."""

import random
from collections.abc import Iterable

import msgspec
import pytest

from engine.errors import CorruptObjectError, MissingObjectError
from engine.ids import NodeId, digest
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import (
    DEEPEST,
    DirectoryNode,
    Entry,
    IndexNode,
    Kind,
    Link,
    Totals,
    decode,
    list_node,
)
from engine.storage.nodes import Ref as Piece
from engine.storage.objects import NodeBuffer, Objects
from engine.trees.directory import (
    PAGED_FROM,
    Directory,
    directory_entry,
    directory_id,
    find,
    store_directory,
    walk,
)


class Tree(NodeBuffer):
    """Nodes in memory, and a reader of them."""

    def objects(self) -> Objects:
        store = MemoryStore()
        store.write(self.flush)
        return Objects(store)

    def directory(self, entries: Iterable[Entry]) -> Directory:
        identifier = store_directory(self.put, entries)
        return Directory(self.objects(), identifier)


def file(name: bytes, size: int = 0, **facts: object) -> Entry:
    entry = Entry(name, Kind.FILE, 0o644, 0, size, bytes(size))
    return msgspec.structs.replace(entry, **facts) if facts else entry


def files(count: int) -> list[Entry]:
    """Returns files whose names differ in length and in what they begin with, sorted."""
    names = [b"%x" % (n * 2654435761 % 2**32) for n in range(count)]
    return [file(name) for name in sorted(set(names))]


@pytest.fixture(scope="module")
def many() -> list[Entry]:
    return files(20_000)


def test_a_directory_is_split_when_it_has_more_entries_than_fit():
    for count in [0, 1, PAGED_FROM - 1, PAGED_FROM]:
        tree = Tree()
        store_directory(tree.put, files(count))
        assert len(tree.nodes) == 1
    tree = Tree()
    identifier = store_directory(tree.put, files(PAGED_FROM + 1))
    index = decode(identifier, tree.nodes[identifier])
    assert isinstance(index, IndexNode)
    assert len(tree.nodes) == len(index.pages) + 1 > 3


def test_the_order_in_which_entries_came_leaves_no_trace(many: list[Entry]):
    seen = set()
    for count in [0, 3, PAGED_FROM, PAGED_FROM + 1, 5_000]:
        entries = many[:count]
        for seed in range(3):
            shuffled = list(entries)
            random.Random(seed).shuffle(shuffled)
            held: dict[bytes, Entry] = {}
            for entry in [*many[count : count + 100], *shuffled]:
                held[entry.name] = entry
            for entry in many[count : count + 100]:
                del held[entry.name]
            tree = Tree()
            root = store_directory(tree.put, sorted(held.values(), key=lambda entry: entry.name))
            seen.add((count, root, frozenset(tree.nodes)))
    assert len(seen) == 5


def test_where_pages_end_is_decided_by_the_names(many: list[Entry]):
    tree = Tree()
    directory = tree.directory(many)
    index = decode(directory.identifier, tree.nodes[directory.identifier])
    assert isinstance(index, IndexNode)
    ends = [page.last for page in index.pages]
    assert index.level == 2
    ends_index = [e.name for e in many[:-1] if digest(e.name)[:2] < b"\0\x40"]  # 10 zero bits
    assert ends[:-1] == ends_index
    assert ends[-1] == many[-1].name
    low = decode(NodeId(index.pages[0].node), tree.nodes[NodeId(index.pages[0].node)])
    assert isinstance(low, IndexNode)
    first = [e.name for e in many if e.name <= ends[0]]
    assert [page.last for page in low.pages] == [n for n in first if digest(n)[0] < 8]


@pytest.mark.parametrize("count", [0, 1, 2_048, 2_049, 6_000])
def test_a_directory_is_what_a_list_would_be(count: int):
    entries = files(count)
    directory = Tree().directory(entries)
    assert list(directory) == entries
    assert len(directory) == count
    starts = {0, 1, 2, 255, 256, 257, count // 2, count - 1, count, count + 1}
    for start in (s for s in starts if s >= 0):
        assert list(directory.from_index(start)) == entries[start:]
    for entry in entries[:: max(1, count // 300)]:
        assert directory.get(entry.name) == entry
        assert directory.get(entry.name + b"\0") is None
        assert directory.get(entry.name[:-1] + b"!") is None
    for name in [b"", b"\0", b"~", b"\xff" * 255]:
        assert directory.get(name) is None


def test_every_start_gives_the_rest(many: list[Entry]):
    entries = many[:3_000]
    directory = Tree().directory(entries)
    for start in range(len(entries)):
        assert next(directory.from_index(start)) is not None
        assert next(directory.from_index(start)).name == entries[start].name


def test_one_entry_reads_one_page_of_each_level(many: list[Entry]):
    tree = Tree()
    directory = tree.directory(many)
    before = directory._objects.statistics().node_misses
    assert directory.get(many[7_777].name) == many[7_777]
    assert next(directory.from_index(7_777)) == many[7_777]
    assert directory._objects.statistics().node_misses == before + 2


@pytest.mark.parametrize("change", ["change", "remove", "add"])
def test_one_change_writes_few_nodes(many: list[Entry], change: str):
    tree = Tree()
    old = store_directory(tree.put, many)
    known = set(tree.nodes)
    assert len(known) > 50
    for at in [0, 5_000, 12_345, len(many) - 1]:
        entries = list(many)
        if change == "change":
            entries[at] = file(many[at].name, 1)
        elif change == "remove":
            del entries[at]
        else:
            entries.insert(at + 1, file(many[at].name + b"+"))
        new = Tree()
        assert store_directory(new.put, entries) != old
        assert 2 <= len(set(new.nodes) - known) <= 3


def test_outside_of_shared_pages_is_what_differs(many: list[Entry]):
    tree = Tree()
    entries = list(many)
    entries[9_000] = file(entries[9_000].name, 1)
    ids = [store_directory(tree.put, which) for which in [many, entries]]
    objects = tree.objects()
    old, new = (Directory(objects, identifier) for identifier in ids)
    shared = set(old.page_ids()) & set(new.page_ids())
    left, right = list(old.outside(shared)), list(new.outside(shared))
    assert 1 <= len(left) == len(right) < 2_000
    assert [(a, b) for a, b in zip(left, right, strict=True) if a != b] == [
        (many[9_000], entries[9_000])
    ]
    assert list(old.outside(set())) == many
    assert list(old.outside({old.identifier})) == []


def test_page_ids_are_all_the_nodes_of_a_directory(many: list[Entry]):
    for entries in [[], many[:10], many]:
        tree = Tree()
        directory = tree.directory(entries)
        identifiers = list(directory.page_ids())
        assert identifiers[0] == directory.identifier
        assert sorted(identifiers) == sorted(tree.nodes)


def test_a_directory_of_two_levels(monkeypatch: pytest.MonkeyPatch):
    """As of 17 million entries, where pages end eight times as often at every level."""
    monkeypatch.setattr(
        "engine.trees.directory._ends_page",
        lambda name, level: int.from_bytes(digest(name)[:4], "big") % 8 ** (level + 1) == 0,
    )
    entries = files(5_000)
    tree = Tree()
    directory = tree.directory(entries)
    root = decode(directory.identifier, tree.nodes[directory.identifier])
    assert isinstance(root, IndexNode)
    assert root.level >= 3
    assert list(directory) == entries
    assert len(directory) == 5_000
    assert sorted(directory.page_ids()) == sorted(tree.nodes)
    for start in range(0, 5_000, 97):
        assert next(directory.from_index(start)) == entries[start]
        assert directory.get(entries[start].name) == entries[start]
    entries[2_500] = file(entries[2_500].name, 1)
    changed = Tree()
    store_directory(changed.put, entries)
    assert len(set(changed.nodes) - set(tree.nodes)) == root.level + 1


def test_the_sums_of_a_directory():
    link = Link(b"12345678", 2)
    below = Tree()
    inner = directory_entry(
        below.put,
        [file(b"a", 100), file(b"b", 7, link=link), Entry(b"c", Kind.FIFO, 0, 0, 0, b"")],
        name=b"inner", mode=0o700, mtime_ns=5,
    )  # fmt: skip
    assert (inner.size, inner.totals) == (107, Totals(3, 1))
    outer = directory_entry(
        below.put,
        [
            inner,
            file(b"z", 7, link=link),
            Entry(b"z2", Kind.SYMLINK, 0o777, 0, 50, b"t" * 50, (), Link(b"abcdefgh", 2)),
            Entry(b"z3", Kind.SYMLINK, 0o777, 0, 50, b"t" * 50, (), Link(b"abcdefgh", 2)),
        ],
        name=b"", mode=0o755, mtime_ns=-3, xattrs=((b"user.x", b"y"),),
    )  # fmt: skip
    assert (outer.size, outer.totals) == (114, Totals(7, 4))
    assert (outer.mode, outer.mtime_ns, outer.xattrs) == (0o755, -3, ((b"user.x", b"y"),))
    objects = below.objects()
    assert [path for path, _ in walk(objects, outer)] == [
        b"inner", b"inner/a", b"inner/b", b"inner/c", b"z", b"z2", b"z3",
    ]  # fmt: skip
    assert find(objects, outer, b"") == outer
    assert find(objects, outer, b"inner/a") == file(b"a", 100)
    assert find(objects, outer, b"inner/nothing") is None
    assert find(objects, outer, b"z/a") is None
    with pytest.raises(ValueError, match="not a directory"):
        directory_id(file(b"a"))


def test_what_is_not_there_and_what_is_no_directory():
    tree = Tree()
    pieces = tree.put(list_node((Piece(digest(b""), 1, 0),)))
    objects = tree.objects()
    with pytest.raises(MissingObjectError):
        Directory(objects, NodeId(digest(b"nothing")))
    with pytest.raises(CorruptObjectError, match="not a directory"):
        Directory(objects, pieces)


def test_a_tree_may_be_as_deep_as_the_format_says():
    tree = Tree()
    entry = directory_entry(tree.put, [], name=b"d", mode=0o755, mtime_ns=0)
    for _ in range(DEEPEST):
        entry = directory_entry(tree.put, [entry], name=b"d", mode=0o755, mtime_ns=0)
    paths = [path for path, _ in walk(tree.objects(), entry)]
    assert len(paths) == DEEPEST
    assert paths[-1] == b"/".join([b"d"] * DEEPEST)
    assert isinstance(decode(directory_id(entry), tree.nodes[directory_id(entry)]), DirectoryNode)
