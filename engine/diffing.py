"""Diff: what differs between two trees, found by walking both Merkle trees together.

Subtrees with equal ids are never read, nor are equal pages of large directories, so the cost
follows the difference.
"""

from collections.abc import Iterator
from enum import Enum

import msgspec

from engine.directory import Directory, directory_id, fits_one_node, shared_pages
from engine.errors import CorruptObjectError
from engine.nodes import DEEPEST, Entry, Kind
from engine.objects import Objects


class ChangeKind(Enum):
    """How a path differs."""

    ADDED = "added"
    REMOVED = "removed"
    MODIFIED = "modified"
    TYPE = "type"
    METADATA = "metadata"


class Change(msgspec.Struct, frozen=True):
    """One path that differs. `old` and `new` are its entries, None where it is not."""

    path: bytes
    kind: ChangeKind
    old: Entry | None
    new: Entry | None


_Step = Change | Iterator["_Step"]
"""A change, or the changes of a directory: a stack of these, for a deep tree is no recursion."""


def diff(objects: Objects, old: Entry, new: Entry, path: bytes = b"") -> Iterator[Change]:
    """Yields the changes from `old` to `new`, both directories, by path.

    An added or removed directory is followed by all that is in it. The attributes of a
    directory that differ are a METADATA change of its own; those of the roots have the path
    `path`. A directory's time alone is no change: it tells of its names, which are reported.
    Raises CorruptObjectError for a tree deeper than DEEPEST, as forged nodes could make.
    """
    stack = [_between(objects, path, old, new)]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
        elif isinstance(step, Change):
            yield step
        elif len(stack) > DEEPEST:
            raise CorruptObjectError("node", directory_id(new), "the tree is too deep")
        else:
            stack.append(step)


def _between(objects: Objects, path: bytes, old: Entry, new: Entry) -> Iterator[_Step]:
    if _attributes(old) != _attributes(new):
        yield Change(path, ChangeKind.METADATA, old, new)
    if old.content == new.content:
        return
    for before, after in _pairs(objects, old, new):
        name = (after or before or old).name
        yield from _change(objects, path + b"/" + name if path else name, before, after)


def _change(
    objects: Objects, path: bytes, before: Entry | None, after: Entry | None
) -> Iterator[_Step]:
    if before is None and after is not None:
        yield Change(path, ChangeKind.ADDED, None, after)
        yield _whole(objects, path, after, ChangeKind.ADDED)
    elif after is None and before is not None:
        yield _whole(objects, path, before, ChangeKind.REMOVED)
        yield Change(path, ChangeKind.REMOVED, before, None)
    elif before is not None and after is not None:
        if before.kind != after.kind:
            if before.kind == Kind.DIRECTORY:
                yield _whole(objects, path, before, ChangeKind.REMOVED)
            yield Change(path, ChangeKind.TYPE, before, after)
            if after.kind == Kind.DIRECTORY:
                yield _whole(objects, path, after, ChangeKind.ADDED)
        elif before.kind == Kind.DIRECTORY:
            yield _between(objects, path, before, after)
        elif before.content != after.content or before.size != after.size:
            yield Change(path, ChangeKind.MODIFIED, before, after)
        else:
            yield Change(path, ChangeKind.METADATA, before, after)


def _whole(objects: Objects, path: bytes, entry: Entry, kind: ChangeKind) -> Iterator[_Step]:
    if entry.kind != Kind.DIRECTORY:
        return
    for below in Directory(objects, directory_id(entry)):
        child = path + b"/" + below.name
        if kind == ChangeKind.ADDED:
            yield Change(child, kind, None, below)
        if below.kind == Kind.DIRECTORY:
            yield _whole(objects, child, below, kind)
        if kind == ChangeKind.REMOVED:
            yield Change(child, kind, below, None)


def _pairs(objects: Objects, old: Entry, new: Entry) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Yields the entries of two directories that differ, side by side, by name."""
    one, other = Directory(objects, directory_id(old)), Directory(objects, directory_id(new))
    if fits_one_node(max(len(one), len(other))):
        yield from _few_pairs(list(one), list(other))
        return
    shared = shared_pages(one, other)
    left, right = one.outside(shared), other.outside(shared)
    a, b = next(left, None), next(right, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a.name < b.name):
            yield a, None
            a = next(left, None)
        elif a is None or b.name < a.name:
            yield None, b
            b = next(right, None)
        else:
            if a != b:
                yield a, b
            a, b = next(left, None), next(right, None)


def _few_pairs(old: list[Entry], new: list[Entry]) -> list[tuple[Entry | None, Entry | None]]:
    """Does the same at once; most entries are equal, and many the same object."""
    before = {entry.name: entry for entry in old}
    pairs: list[tuple[bytes, Entry | None, Entry | None]] = []
    for entry in new:
        same = before.pop(entry.name, None)
        if same is not entry and same != entry:
            pairs.append((entry.name, same, entry))
    pairs += [(name, entry, None) for name, entry in before.items()]
    return [pair[1:] for pair in sorted(pairs, key=lambda pair: pair[0])]


def _attributes(entry: Entry) -> tuple[int, tuple[tuple[bytes, bytes], ...]]:
    return (entry.mode, entry.xattrs)
