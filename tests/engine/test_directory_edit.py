"""Directory edits: the nodes are those of the full set of entries, and few of them are new."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.trees.directory
from engine.errors import CorruptObjectError
from engine.ids import digest
from engine.storage.nodes import Entry, IndexNode, Kind, Link, Totals, decode, encode
from engine.storage.objects import NodeBuffer
from engine.trees.directory import Directory, directory_entry, directory_id
from engine.trees.directory_edit import edit_directory
from tests.engine.test_directory import Tree, file, files

FACTS: dict[str, Any] = {"name": b"d", "mode": 0o755, "mtime_ns": 7}


def edited(tree: Tree, base: Entry, edits: dict[bytes, Entry | None]) -> tuple[Entry, NodeBuffer]:
    nodes = NodeBuffer()
    entry = edit_directory(tree.objects(), nodes, base, edits, **FACTS)
    return entry, nodes


def whole(tree: Tree, entries: dict[bytes, Entry]) -> Entry:
    return directory_entry(tree.put, [entries[name] for name in sorted(entries)], **FACTS)


SMALL = st.integers(0, 150)
EDITS = st.dictionaries(SMALL, st.none() | st.integers(0, 3), max_size=40)


def name(number: int) -> bytes:
    return b"%x" % (number * 2654435761 % 2**32)


def entry(number: int, kind: int) -> Entry:
    if kind == 3:
        size, totals = number, Totals(number + 1, 1)
        return Entry(name(number), Kind.DIRECTORY, 0, 0, size, digest(b""), (), None, totals)
    return file(name(number), kind * 3, link=Link(b"12345678", 2) if kind == 2 else None)


@given(st.sets(SMALL, max_size=140), st.lists(EDITS, min_size=1, max_size=4), st.integers(1, 2))
@settings(deadline=None, max_examples=300)
def test_the_nodes_are_those_of_the_full_set(start, rounds, bits):
    """With pages of two or four items from nine entries on, so that trees are high."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.trees.directory, "PAGED_FROM", 8)
        patch.setattr(engine.trees.directory, "PAGE_BITS", bits)
        tree = Tree()
        held = {name(number): entry(number, number % 4) for number in start}
        base = whole(tree, held)
        for edits in rounds:
            changes = {name(n): None if kind is None else entry(n, kind)
                       for n, kind in edits.items()}  # fmt: skip
            made, nodes = edited(tree, base, changes)
            for key, new in changes.items():
                if new is None:
                    held.pop(key, None)
                else:
                    held[key] = new
            base = whole(tree, held)
            assert made == base
            assert all(tree.nodes[i] == data for i, data in nodes.nodes.items() if i in tree.nodes)
            assert list(Directory(tree.objects(), directory_id(base))) == sorted(
                held.values(), key=lambda e: e.name
            )


@given(st.sets(SMALL, min_size=1, max_size=140), st.data(), st.integers(1, 2))
@settings(deadline=None, max_examples=200)
def test_one_entry_after_the_other_in_the_place_of_another(start, data, bits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.trees.directory, "PAGED_FROM", 8)
        patch.setattr(engine.trees.directory, "PAGE_BITS", bits)
        tree = Tree()
        held = {name(number): entry(number, number % 4) for number in start}
        base = whole(tree, held)
        for _ in range(4):
            number = data.draw(st.sampled_from(sorted(start)))
            held[name(number)] = entry(number, data.draw(st.integers(0, 3)))
            made, nodes = edited(tree, base, {name(number): held[name(number)]})
            base = whole(tree, held)
            assert made == base
            assert all(tree.nodes[i] == data for i, data in nodes.nodes.items())


@pytest.mark.parametrize("seed", range(4))
def test_at_the_size_from_which_there_are_pages(seed: int):
    """Grows and shrinks across PAGED_FROM, with the format's own numbers."""
    rng = random.Random(seed)
    every = files(engine.trees.directory.PAGED_FROM + 60)
    tree = Tree()
    held = {e.name: e for e in every[:-70]}
    base = whole(tree, held)
    for step in range(12):
        changes: dict[bytes, Entry | None] = {}
        for e in rng.sample(every, 40):
            grow = (step % 4 < 2) == (rng.random() < 0.9)
            changes[e.name] = file(e.name, rng.randrange(20)) if grow else None
        made, nodes = edited(tree, base, changes)
        held = {k: v for k, v in (held | changes).items() if v is not None}
        base = whole(tree, held)
        assert made == base
        assert set(nodes.nodes) <= set(tree.nodes)


@pytest.fixture(scope="module")
def large() -> tuple[Tree, Entry, dict[bytes, Entry]]:
    tree = Tree()
    held = {e.name: e for e in files(20_000)}
    return tree, whole(tree, held), held


@pytest.mark.parametrize("what", ["change", "add", "remove", "remove an end", "add at the end"])
def test_one_change_makes_a_node_for_each_level(large, what: str):
    tree, base, held = large
    node = decode(directory_id(base), tree.nodes[directory_id(base)])
    assert isinstance(node, IndexNode)
    assert node.level == 2
    key = sorted(held)[12_345]
    if what == "remove an end":
        key = next(k for k in sorted(held) if engine.trees.directory.ends_page(k, 0))
    elif what == "add at the end":
        key = b"~"
    elif what == "add":
        key += b"+"
    new = None if what.startswith("remove") else file(key, 100)
    made, nodes = edited(tree, base, {key: new})
    other = {k: v for k, v in (held | {key: new}).items() if v is not None}
    assert made == whole(Tree(), other)
    assert 3 <= len(nodes.nodes) <= 4
    assert sum(map(len, nodes.nodes.values())) < 64 << 10


def test_what_looks_like_an_entry_inside_of_another_is_not_taken_for_it():
    tree = Tree()
    second = file(b"2", 3)
    trap = Entry(b"1", Kind.FILE, 0o644, 0, len(encode(second)), encode(second))
    held = {e.name: e for e in [trap, second, *(file(b"3%d" % n) for n in range(10))]}
    base = whole(tree, held)
    for new in [None, file(b"2", 9)]:
        made, _ = edited(tree, base, {b"2": new})
        assert made == whole(Tree(), {k: v for k, v in (held | {b"2": new}).items() if v})
    made, _ = edited(tree, base, {b"11": file(b"11")})
    assert made == whole(Tree(), held | {b"11": file(b"11")})


def test_nothing_is_edited():
    tree = Tree()
    base = whole(tree, {e.name: e for e in files(500)})
    made, nodes = edited(tree, base, {})
    assert (made, nodes.nodes) == (base, {})
    made, _ = edited(tree, base, {b"not there": None})
    assert made == base


def test_forged_sums_are_found():
    tree = Tree()
    base = whole(tree, {b"a": file(b"a", 100)})
    forged = Entry(b"d", Kind.DIRECTORY, 0, 0, 5, base.content, (), None, Totals(1, 0))
    with pytest.raises(CorruptObjectError, match="sums"):
        edited(tree, forged, {b"a": None})


@pytest.mark.parametrize("seed", range(3))
def test_pages_of_format_1_are_read_and_cut_anew_where_they_change(seed: int):
    rng = random.Random(seed)
    tree = Tree()
    held = {e.name: e for e in files(9_000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.trees.directory, "PAGED_FROM", 2_048)
        patch.setattr(engine.trees.directory, "PAGE_BITS", 8)
        base = whole(tree, held)
    for _ in range(5):
        changes = {key: rng.choice([None, file(key, 3)]) for key in rng.sample(sorted(held), 50)}
        changes |= {key + b"+": file(key + b"+") for key in rng.sample(sorted(held), 50)}
        held = {k: v for k, v in (held | changes).items() if v is not None}
        base, nodes = edited(tree, base, changes)
        tree.nodes.update(nodes.nodes)
        made = Directory(tree.objects(), directory_id(base))
        assert list(made) == [held[key] for key in sorted(held)]
        assert (base.size, base.totals) == engine.trees.directory.sums(held.values())
