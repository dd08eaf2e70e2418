"""Renames, and what an InsightDiff says."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CorruptObjectError
from engine.storage.content import pieces
from engine.storage.nodes import Entry, Kind, Totals
from engine.trees.diffing import Change, ChangeKind, DiffTooLargeError, diff
from engine.trees.directory import directory_entry, walk
from engine.trees.insight import InsightDiff, as_json, insight
from engine.trees.renames import diff_with_renames
from engine.trees.similarity import shared_bytes
from tests.engine.plants import EMPTY_DIRECTORY, Garden, Leaf, Plant, link
from tests.engine.test_patching import binaries, names, pairs, texts
from tests.engine.trees import noise

BODY = b"".join(b"line %d of the text\n" % n for n in range(50))


def renames_of(old: Plant, new: Plant, **options: bool) -> dict[bytes, tuple[str, bytes, float]]:
    garden = Garden()
    found = diff_with_renames(garden.objects, garden.plant(old), garden.plant(new), **options)
    return {
        change.path: (change.kind.value, change.old_path, change.similarity or 0)
        for change in found.changes
        if change.old_path is not None
    }


def test_equal_contents_are_renames():
    old = {b"a": Leaf(b"x"), b"d/name": Leaf(b"y"), b"e": Leaf(b"y"), b"l": link(b"to"),
           b"0": Leaf()}  # fmt: skip
    new = {b"b": Leaf(b"x", 0o755), b"f": Leaf(b"y"), b"g/name": Leaf(b"y"), b"m": link(b"to"),
           b"1": Leaf(), b"g/more": Leaf(b"more")}  # fmt: skip
    assert renames_of(old, new) == {
        b"b": ("renamed", b"a", 1.0),
        b"g/name": ("renamed", b"d/name", 1.0),
        b"f": ("renamed", b"e", 1.0),
        b"m": ("renamed", b"l", 1.0),
    }


def test_similar_texts_are_renames():
    edited = BODY.replace(b"line 7 ", b"LINE 7 ")
    far = b"".join(BODY.splitlines(keepends=True)[:20]) + b"other words\n" * 60
    old = {b"a": Leaf(BODY), b"z": Leaf(noise(900))}
    found = renames_of(old, {b"b": Leaf(edited), b"c": Leaf(far)})
    assert found.keys() == {b"b"}
    assert 0.9 < found[b"b"][2] < 1


def test_the_most_similar_one_is_taken():
    old = {b"a": Leaf(BODY), b"b": Leaf(BODY + b"more\n" * 10)}
    new = {b"c": Leaf(BODY + b"more\n" * 12), b"d": Leaf(BODY + b"less\n")}
    assert {path: old for path, (_, old, _) in renames_of(old, new).items()} == {
        b"c": b"b", b"d": b"a"
    }  # fmt: skip


def test_large_files_are_compared_by_chunks_without_reading_them():
    data = noise(3_000_000)
    garden = Garden()
    old = garden.plant({b"a": Leaf(data)})
    new = garden.plant({b"b": Leaf(data[:1_500_000] + b"!" + data[1_500_000:])})
    result = insight(garden.objects, old, new, lines=False)
    statistics = garden.objects.statistics()
    assert statistics.chunk_hits + statistics.chunk_misses == 0
    (entry,) = result.entries
    assert (entry.kind, entry.old_path) == (ChangeKind.RENAMED, b"a")
    assert 0 < entry.bytes_changed < 600_000
    assert entry.bytes_shared + entry.bytes_changed == entry.new_size


def test_a_renamed_directory_is_one_change_and_is_not_read():
    inside: Plant = {b"%03d/f" % n: Leaf(b"%d" % n) for n in range(200)}
    old = {b"old/deep/" + path: leaf for path, leaf in inside.items()}
    new = {b"new/" + path: leaf for path, leaf in inside.items()}
    garden = Garden()
    roots = garden.plant(old), garden.plant(new)
    garden.objects.shed()
    found = diff_with_renames(garden.objects, *roots)
    summary = [(change.path, change.kind.value, change.old_path) for change in found.changes]
    assert summary == [(b"new", "renamed", b"old/deep"), (b"old", "removed", None)]
    assert garden.objects.statistics().node_misses == 3
    entries = insight(garden.objects, *roots).entries
    assert [(entry.entries, entry.bytes_changed) for entry in entries] == [(400, 0), (0, 0)]


def test_copies_are_found_where_asked_for():
    old = {b"a": Leaf(BODY), b"gone": Leaf(b"gone" + BODY)}
    new = {b"a": Leaf(BODY + b"more\n"), b"b": Leaf(BODY), b"c": Leaf(b"gone" + BODY),
           b"d": Leaf(b"gone" + BODY)}  # fmt: skip
    assert b"c" in renames_of(old, new)
    found = renames_of(old, new, copies=True)
    assert found[b"b"] == ("copied", b"a", 1.0)
    assert {found[b"c"][0], found[b"d"][0]} == {"renamed", "copied"}


def test_too_many_files_are_said_not_to_be_compared():
    old = {b"a%d" % n: Leaf(b"%d" % n + BODY) for n in range(40)}
    new = {b"b%d" % n: Leaf(b"x%d" % n + BODY) for n in range(40)}
    garden = Garden()
    roots = garden.plant(old), garden.plant(new)
    found = diff_with_renames(garden.objects, *roots, most_compared=39)
    assert found.limited
    assert all(change.old_path is None for change in found.changes)
    assert not diff_with_renames(garden.objects, *roots, most_compared=40).limited


@given(pairs(names, st.one_of(texts, binaries)), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_diff_with_renames_says_what_one_without_says(pair, copies):
    garden = Garden()
    old, new = map(garden.plant, pair)
    plain = list(diff(garden.objects, old, new))
    found = diff_with_renames(garden.objects, old, new, copies=copies)
    assert not found.limited
    before, after = dict(walk(garden.objects, old)), dict(walk(garden.objects, new))
    added = set()
    removed = set()
    for change in found.changes:
        if change.kind == ChangeKind.RENAMED:
            assert change.old == before[change.old_path or b""]
            below = [b""]
            if change.new is not None and change.new.kind == Kind.DIRECTORY:
                below += [b"/" + path for path, _ in walk(garden.objects, change.new)]
            removed |= {(change.old_path or b"") + path for path in below}
            added |= {change.path + path for path in below}
        elif change.kind in {ChangeKind.ADDED, ChangeKind.COPIED}:
            added.add(change.path)
        elif change.kind == ChangeKind.REMOVED:
            removed.add(change.path)
        else:
            assert change in plain
        assert change.new == after.get(change.path)
    assert added == {change.path for change in plain if change.kind == ChangeKind.ADDED}
    assert removed == {change.path for change in plain if change.kind == ChangeKind.REMOVED}
    one_sided = {ChangeKind.ADDED, ChangeKind.REMOVED}
    rest = [c for c in found.changes if c.old_path is None and c.kind not in one_sided]
    assert len(rest) == sum(change.kind not in one_sided for change in plain)


# The InsightDiff.


def example() -> InsightDiff:
    """What the page on the InsightDiff shows."""
    garden = Garden()
    old: Plant = {
        b"src/main.c": Leaf(b"int main(void)\n{\n  return 0;\n}\n"),
        b"src/list.c": Leaf(BODY), b"tool": Leaf(b"#!/bin/sh\n"), b"logo.png": Leaf(b"\0" * 200),
        b"docs/a.md": Leaf(b"a\n"), b"docs/b.md": Leaf(b"b\n"),
    }  # fmt: skip
    new: Plant = {
        b"src/main.c": Leaf(b"int main(void)\n{\n  run();\n  return 0;\n}\n", mtime_ns=2),
        b"src/table.c": Leaf(BODY.replace(b"line 7 ", b"LINE 7 ")),
        b"tool": Leaf(b"#!/bin/sh\n", 0o755), b"logo.png": Leaf(b"\0" * 300),
        b"manual/a.md": Leaf(b"a\n"), b"manual/b.md": Leaf(b"b\n"),
        b"na\xefve.txt": Leaf(b"text\n"),
    }  # fmt: skip
    return insight(garden.objects, garden.plant(old), garden.plant(new))


def test_an_insight():
    result = example()
    entries = {entry.path: entry for entry in result.entries}
    main = entries[b"src/main.c"]
    assert (main.kind, main.lines_added, main.lines_removed) == (ChangeKind.MODIFIED, 1, 0)
    assert (main.old_size, main.new_size, main.metadata) == (31, 40, ("mtime",))
    assert main.is_binary is False
    table = entries[b"src/table.c"]
    assert (table.kind, table.old_path) == (ChangeKind.RENAMED, b"src/list.c")
    assert (table.lines_added, table.lines_removed) == (1, 1)
    logo = entries[b"logo.png"]
    assert (logo.is_binary, logo.lines_added, logo.bytes_changed) == (True, None, 300)
    assert entries[b"tool"].metadata == ("mode",)
    assert (entries[b"tool"].lines_added, entries[b"tool"].bytes_changed) == (0, 0)
    assert entries[b"manual"].entries == 2
    summary = result.summary
    assert (summary.all.files, summary.all.lines_added, summary.all.lines_removed) == (5, 3, 1)
    assert summary.kinds == {
        ChangeKind.ADDED: 1, ChangeKind.MODIFIED: 2, ChangeKind.METADATA: 1, ChangeKind.RENAMED: 2
    }  # fmt: skip
    assert summary.directories[b"src"].lines_added == 2
    assert summary.extensions[b".c"].files == 2
    assert not result.renames_limited


def test_the_page_has_the_json_of_the_example():
    page = (Path(__file__).parents[2] / "docs/reference/insight-diff.md").read_text()
    match = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert match is not None
    assert json.loads(match[1]) == as_json(example())


def test_every_field_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs/reference/insight-diff.md").read_text()
    entries = as_json(example())["entries"]
    for name in {name for entry in entries for name in entry}:
        assert f"`{name}`" in page, name


def test_without_lines_nothing_is_read():
    garden = Garden()
    roots = [garden.plant({b"f": Leaf(noise(1000, seed))}) for seed in (1, 2)]
    (entry,) = insight(garden.objects, *roots, lines=False).entries
    assert (entry.lines_added, entry.is_binary) == (None, None)
    statistics = garden.objects.statistics()
    assert statistics.chunk_hits + statistics.chunk_misses == 0


def test_types_and_directories():
    garden = Garden()
    old = garden.plant({b"a": Leaf(b"1\n2\n"), b"b/in": Leaf(b"x\n"), b"d": EMPTY_DIRECTORY})
    new = garden.plant({b"a": link(b"to"), b"b": Leaf(b"y\n"), b"e": EMPTY_DIRECTORY})
    entries = {entry.path: entry for entry in insight(garden.objects, old, new).entries}
    assert (entries[b"a"].type, entries[b"a"].old_type) == ("symlink", "file")
    assert (entries[b"a"].lines_added, entries[b"a"].lines_removed) == (1, 2)
    assert (entries[b"b"].type, entries[b"b"].old_type) == ("file", "directory")
    assert entries[b"b/in"].kind == ChangeKind.REMOVED
    assert entries[b"d"].kind == ChangeKind.REMOVED
    assert entries[b"e"].kind == ChangeKind.ADDED


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
@settings(max_examples=100, deadline=None)
def test_shared_bytes_are_those_of_common_chunks(one, other):
    garden = Garden()
    blocks = [noise(300_000, seed) for seed in range(6)]
    files = [
        garden.entry(b"f", Leaf(b"".join(blocks[n] for n in order)[:9_000_000]))
        for order in (one[:4], other[:4])
    ]
    garden.save()
    shared = shared_bytes(garden.objects, *files)
    assert shared == shared_bytes(garden.objects, *reversed(files))
    if all(isinstance(file.content, tuple) for file in files):
        left = [ref.id for ref in pieces(garden.objects, files[1])]
        expected = 0
        for ref in pieces(garden.objects, files[0]):
            if ref.id in left:
                left.remove(ref.id)
                expected += ref.length
        assert shared == expected


# Forged and enormous trees.


def tower(garden: Garden, leaf: bytes, promised: int | None, height: int = 40) -> Entry:
    """Each directory has the one below twice: 2^height paths."""
    below = garden.entry(b"leaf", Leaf(leaf))
    node = directory_entry(garden.nodes.put, [below], name=b"", mode=0o755, mtime_ns=1)
    for _ in range(height):
        pair = [msgspec.structs.replace(node, name=name) for name in (b"a", b"b")]
        node = directory_entry(garden.nodes.put, pair, name=b"", mode=0o755, mtime_ns=1)
        if promised is not None:
            node = msgspec.structs.replace(node, totals=Totals(promised, 0))
    return node


@pytest.mark.parametrize("whole", [True, False])
def test_a_forged_tree_ends_a_diff(whole):
    for promised, error in ((None, DiffTooLargeError), (100, CorruptObjectError)):
        garden = Garden()
        old, new = (tower(garden, leaf, promised) for leaf in (b"1", b"2"))
        empty = garden.plant({})
        for pair in ((old, new), (empty, new), (old, empty)):
            with pytest.raises(error):
                insight(garden.objects, *pair, renames=not whole, limit=10_000)
    assert len(list(diff(garden.objects, empty, empty, limit=0))) == 0


def test_a_diff_within_what_the_trees_promise_is_no_error():
    garden = Garden()
    old, new = (tower(garden, leaf, None, 8) for leaf in (b"1", b"2"))
    garden.save()
    changes: list[Change] = list(diff(garden.objects, old, new))
    assert len(changes) == 256
    assert len(list(diff(garden.objects, garden.plant({}), new))) == 2 * 256 + 256 - 2
