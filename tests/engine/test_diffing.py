"""Diff against what comparing the two trees path by path gives."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.trees.directory
from engine import Repository, SnapshotId
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import Entry, Kind, Link
from engine.storage.objects import NodeBuffer, Objects
from engine.trees.diffing import Change, ChangeKind, diff
from engine.trees.directory import directory_entry, walk
from tests.engine.trees import age

names = st.sampled_from([b"a", b"b", b"c", b"d", b"ab", b"\xff", b"a-"])
modes = st.sampled_from([0o644, 0o755])
times = st.sampled_from([1, 2])
attributes = st.sampled_from([(), ((b"user.a", b"1"),)])
leaf = st.one_of(
    st.tuples(st.just(Kind.FILE), modes, times, st.sampled_from([b"", b"1", b"2"]), attributes),
    st.tuples(st.just(Kind.SYMLINK), modes, times, st.sampled_from([b"x", b"y"]), st.just(())),
    st.tuples(st.just(Kind.FIFO), modes, times, st.just(b""), st.just(())),
)
Spec = dict[bytes, "tuple[int, int, int, bytes | Spec, tuple[tuple[bytes, bytes], ...]]"]
below = st.recursive(
    st.dictionaries(names, leaf, max_size=4),
    lambda tree: st.dictionaries(
        names,
        st.one_of(leaf, st.tuples(st.just(Kind.DIRECTORY), modes, times, tree, attributes)),
        max_size=5,
    ),
    max_leaves=12,
)


class Trees:
    """A store in which trees are made."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.objects = Objects(self.store)
        self.nodes = NodeBuffer()

    def make(self, tree: Spec, name: bytes = b"", mode: int = 0o755, mtime_ns: int = 0,
             xattrs: tuple[tuple[bytes, bytes], ...] = ()) -> Entry:  # fmt: skip
        entries = []
        for child, (kind, bits, time, what, pairs) in sorted(tree.items()):
            if isinstance(what, dict):
                entries.append(self.make(what, child, bits, time, pairs))
            else:
                entries.append(Entry(child, kind, bits, time, len(what), what, pairs))
        return directory_entry(
            self.nodes.put, entries, name=name, mode=mode, mtime_ns=mtime_ns, xattrs=xattrs
        )

    def save(self) -> None:
        self.store.write(self.nodes.flush)

    def flat(self, root: Entry) -> dict[bytes, Entry]:
        return dict(walk(self.objects, root))


def naive(old: dict[bytes, Entry], new: dict[bytes, Entry]) -> set[tuple[bytes, ChangeKind]]:
    found = set()
    for path in old.keys() | new.keys():
        before, after = old.get(path), new.get(path)
        if before is None:
            found.add((path, ChangeKind.ADDED))
        elif after is None:
            found.add((path, ChangeKind.REMOVED))
        elif before.kind != after.kind:
            found.add((path, ChangeKind.TYPE))
        elif before.kind == Kind.DIRECTORY:
            if (before.mode, before.xattrs) != (after.mode, after.xattrs):
                found.add((path, ChangeKind.METADATA))
        elif before.content != after.content:
            found.add((path, ChangeKind.MODIFIED))
        elif before != after:
            found.add((path, ChangeKind.METADATA))
    return found


def check(trees: Trees, old: Entry, new: Entry) -> list[Change]:
    changes = list(diff(trees.objects, old, new))
    assert len({change.path for change in changes}) == len(changes)
    flat_old, flat_new = trees.flat(old), trees.flat(new)
    found = {(change.path, change.kind) for change in changes if change.path}
    assert found == naive(flat_old, flat_new)
    for change in changes:
        if change.path:
            assert change.old == flat_old.get(change.path)
            assert change.new == flat_new.get(change.path)
    apply(flat_old, changes)
    assert without_node_ids(flat_old) == without_node_ids(flat_new)
    return changes


def apply(tree: dict[bytes, Entry], changes: list[Change]) -> None:
    """Makes the changes in the order they came: a directory is there before what is in it."""
    for change in changes:
        if not change.path:
            continue
        above = change.path.rpartition(b"/")[0]
        if change.new is None:
            assert not any(path.startswith(change.path + b"/") for path in tree)
            del tree[change.path]
        else:
            assert not above or tree[above].kind == Kind.DIRECTORY
            tree[change.path] = change.new


def without_node_ids(tree: dict[bytes, Entry]) -> dict[bytes, Entry | tuple[int, object]]:
    return {
        path: (entry.mode, entry.xattrs) if entry.kind == Kind.DIRECTORY else entry
        for path, entry in tree.items()
    }


@given(old=below, new=below)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_diff_is_what_comparing_every_path_gives(old: Spec, new: Spec):
    trees = Trees()
    one, other = trees.make(old), trees.make(new)
    trees.save()
    check(trees, one, other)
    check(trees, other, one)
    assert check(trees, one, one) == []


@given(old=below, data=st.data())
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_a_diff_of_paged_directories(old: Spec, data: st.DataObject):
    """With pages of a few names, so that trees share some of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.trees.directory, "PAGED_FROM", 2)
        patch.setattr(engine.trees.directory, "_ends_page", lambda name, level: name[0] % 2 > level)
        trees = Trees()
        many = {b"%02d" % n: (Kind.FILE, 0o644, 1, b"", ()) for n in range(40)}
        new = dict(many)
        for key in data.draw(st.sets(st.sampled_from(sorted(many)), max_size=5)):
            if data.draw(st.booleans()):
                del new[key]
            else:
                new[key] = (Kind.FILE, 0o644, 1, b"changed", ())
        one = trees.make({**many, **old})
        other = trees.make({**new, **old})
        trees.save()
        check(trees, one, other)
        check(trees, other, one)


def test_the_roots_own_attributes(repository: Repository):
    trees = Trees()
    one, other = trees.make({}), trees.make({}, mode=0o700, mtime_ns=5)
    trees.save()
    (change,) = diff(trees.objects, one, other)
    assert (change.path, change.kind) == (b"", ChangeKind.METADATA)
    (change,) = diff(trees.objects, one, other, b"sub")
    assert change.path == b"sub"
    assert list(diff(trees.objects, one, trees.make({}, mtime_ns=7))) == []


def test_equal_subtrees_are_not_read():
    trees = Trees()
    deep: Spec = {b"a": (Kind.DIRECTORY, 0o755, 1, {b"b": (Kind.FILE, 0o644, 1, b"x", ())}, ())}
    one = trees.make({b"same": (Kind.DIRECTORY, 0o755, 1, deep, ())})
    other = trees.make(
        {b"same": (Kind.DIRECTORY, 0o755, 1, deep, ()), b"new": (Kind.FIFO, 0, 0, b"", ())}
    )
    trees.save()
    assert [change.path for change in diff(trees.objects, one, other)] == [b"new"]
    statistics = trees.objects.statistics()
    assert statistics.node_misses == 2  # the roots


def test_a_link_that_comes_or_goes_is_a_change_of_metadata():
    trees = Trees()
    file = Entry(b"a", Kind.FILE, 0o644, 1, 1, b"x")
    linked = msgspec.structs.replace(file, link=Link(b"8 bytes.", 2))
    one = directory_entry(trees.nodes.put, [file], name=b"", mode=0o755, mtime_ns=0)
    other = directory_entry(trees.nodes.put, [linked], name=b"", mode=0o755, mtime_ns=0)
    trees.save()
    (change,) = check(trees, one, other)
    assert change.kind == ChangeKind.METADATA


def test_the_cost_follows_the_difference(repository: Repository, tmp_path: Path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for n in range(3_000):
        os.mknod(tree / f"{n}")
    age(tree)
    first = repository.import_directory(str(tree))
    (tree / "1500").write_bytes(b"changed")
    second = repository.import_directory(str(tree))
    repository.objects.shed()
    before = repository.objects.statistics().node_misses
    roots = [repository.snapshot(SnapshotId(s.snapshot)).root for s in (first, second)]
    (change,) = repository.diff(*roots)
    assert change.path == b"1500"
    assert repository.objects.statistics().node_misses - before <= 8
