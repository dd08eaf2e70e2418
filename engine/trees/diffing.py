"""Diff: what differs between two trees, found by walking both Merkle trees together.

Subtrees with equal ids are never read, nor are equal pages of large directories, so the cost
follows the difference. Which of the changes are renames, `renames` tells.
"""

from collections.abc import Iterator
from enum import Enum
from typing import cast

import msgspec

from engine.errors import CorruptObjectError, EngineError
from engine.ids import NodeId
from engine.storage.nodes import DEEPEST, DirectoryNode, Entry, IndexNode, Kind, Owner
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id, open_node, open_page, shared_pages


class DiffTooLargeError(EngineError):
    """Two trees differ in more entries than the caller wants to hear of."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the trees differ in more than {limit:,} entries")
        self.limit = limit


class ChangeKind(Enum):
    """How a path differs."""

    ADDED = "added"
    REMOVED = "removed"
    MODIFIED = "modified"
    TYPE = "type"
    METADATA = "metadata"
    RENAMED = "renamed"
    COPIED = "copied"


class Change(msgspec.Struct, frozen=True):
    """One path that differs. `old` and `new` are its entries, None where it is not.

    A rename or copy has `old_path`, where its `old` is, and `similarity`, from 0 to 1. A renamed
    directory stands for all that is in it, which is the same on both sides.
    """

    path: bytes
    kind: ChangeKind
    old: Entry | None
    new: Entry | None
    old_path: bytes | None = None
    similarity: float | None = None


_Branch = DirectoryNode | IndexNode
_Pair = tuple[Entry | None, Entry | None]
_Step = Change | Iterator["_Step"]
"""A change, or the changes of a directory: a stack of these, for a deep tree is no recursion."""


def diff(
    objects: Objects,
    old: Entry,
    new: Entry,
    path: bytes = b"",
    *,
    whole: bool = True,
    limit: int | None = None,
) -> Iterator[Change]:
    """Yields the changes from `old` to `new`, both directories, by path.

    An added or removed directory is followed by all that is in it, or, without `whole`, stands
    for it. The attributes of a directory that differ are a METADATA change of its own; those of
    the roots have the path `path`. A directory's time alone is no change: it tells of its
    names, which are reported.

    Nodes that share children can stand for far more paths than there are nodes. Raises
    DiffTooLargeError when more than `limit` entries have been looked at, and CorruptObjectError
    for forged nodes: a tree deeper than DEEPEST, or with more in it than the roots promise.
    """
    promised = sum(entry.totals.entries for entry in (old, new) if entry.totals is not None)
    walk = _Walk(objects, new, promised, limit, whole)
    stack = [walk.between(path, old, new)]
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


class _Walk:
    """One diff: how, and how many entries it may still look at."""

    def __init__(
        self, objects: Objects, root: Entry, promised: int, limit: int | None, whole: bool
    ) -> None:
        self._objects, self._root, self._whole = objects, root, whole
        self._promised, self._limit = promised, limit
        self._seen = 0

    def _count(self, entries: int = 1) -> None:
        self._seen += entries
        if self._seen > self._promised:
            identifier = directory_id(self._root)
            raise CorruptObjectError("node", identifier, "more is in the tree than it promises")
        if self._limit is not None and self._seen > self._limit:
            raise DiffTooLargeError(self._limit)

    def between(self, path: bytes, old: Entry, new: Entry) -> Iterator[_Step]:
        """Yields the changes of two directories of one path."""
        if _attributes(old) != _attributes(new):
            yield Change(path, ChangeKind.METADATA, old, new)
        if old.content == new.content:
            return
        for before, after in pairs(self._objects, old, new):
            self._count(1 if before is None or after is None else 2)
            name = (after or before or old).name
            yield from self._change(path + b"/" + name if path else name, before, after)

    def _change(self, path: bytes, before: Entry | None, after: Entry | None) -> Iterator[_Step]:
        if before is None and after is not None:
            yield Change(path, ChangeKind.ADDED, None, after)
            yield self._all(path, after, ChangeKind.ADDED)
        elif after is None and before is not None:
            yield self._all(path, before, ChangeKind.REMOVED)
            yield Change(path, ChangeKind.REMOVED, before, None)
        elif before is not None and after is not None:
            if before.kind != after.kind:
                yield self._all(path, before, ChangeKind.REMOVED)
                yield Change(path, ChangeKind.TYPE, before, after)
                yield self._all(path, after, ChangeKind.ADDED)
            elif before.kind == Kind.DIRECTORY:
                yield self.between(path, before, after)
            elif before.content != after.content or before.size != after.size:
                yield Change(path, ChangeKind.MODIFIED, before, after)
            else:
                yield Change(path, ChangeKind.METADATA, before, after)

    def _all(self, path: bytes, entry: Entry, kind: ChangeKind) -> Iterator[_Step]:
        if entry.kind != Kind.DIRECTORY or not self._whole:
            return
        for below in Directory(self._objects, directory_id(entry)):
            self._count()
            child = path + b"/" + below.name
            if kind == ChangeKind.ADDED:
                yield Change(child, kind, None, below)
            if below.kind == Kind.DIRECTORY:
                yield self._all(child, below, kind)
            if kind == ChangeKind.REMOVED:
                yield Change(child, kind, below, None)


def pairs(objects: Objects, old: Entry, new: Entry) -> Iterator[_Pair]:
    """Yields the entries of two directories that differ, side by side, by name."""
    sides = directory_id(old), directory_id(new)
    one, other = (open_node(objects, side) for side in sides)
    return _between(objects, sides, one, other, b"")


def _between(
    objects: Objects, ids: tuple[NodeId, NodeId], one: _Branch, other: _Branch, floor: bytes
) -> Iterator[_Pair]:
    """Does so for two nodes with these ids, of directories or of pages for the same names.

    Most edits leave the names that end pages as they are: then it is page by page, and only
    those with other ids are opened.
    """
    if isinstance(one, DirectoryNode) and isinstance(other, DirectoryNode):
        yield from _entry_pairs(one.entries, other.entries)
    elif (
        isinstance(one, IndexNode)
        and isinstance(other, IndexNode)
        and (places := _changed_places(one, other)) is not None
    ):
        for at in places:
            left, after = open_page(objects, one, at, floor)
            right, _ = open_page(objects, other, at, floor)
            if isinstance(left, DirectoryNode) and isinstance(right, DirectoryNode):
                yield from _entry_pairs(left.entries, right.entries)
            else:
                below = NodeId(one.pages[at].node), NodeId(other.pages[at].node)
                yield from _between(objects, below, left, right, after)
    else:
        yield from _merged(*(Directory(objects, identifier) for identifier in ids))


def _changed_places(one: IndexNode, other: IndexNode) -> list[int] | None:
    """Returns which pages of two indexes differ; None if they do not end at the same names."""
    before, after = one.pages, other.pages
    if one.level != other.level or len(before) != len(after):
        return None
    places = [
        at
        for at, (a, b) in enumerate(zip(before, after, strict=True))
        if a is not b and a.node != b.node
    ]
    same = [before[at].last for at in places] == [after[at].last for at in places]
    return places if same else None


def _merged(one: Directory, other: Directory) -> Iterator[_Pair]:
    """Does so for directories that are cut otherwise, without what they share anyhow."""
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


def _entry_pairs(old: tuple[Entry, ...], new: tuple[Entry, ...]) -> list[_Pair]:
    """Does the same at once; most entries are equal, and many the same object."""
    if len(old) == len(new):
        found = [(a, b) for a, b in zip(old, new, strict=True) if a is not b and a != b]
        if [a.name for a, _ in found] == [b.name for _, b in found]:
            return cast(list[_Pair], found)
    before = {entry.name: entry for entry in old}
    pairs: list[tuple[bytes, Entry | None, Entry | None]] = []
    for entry in new:
        same = before.pop(entry.name, None)
        if same is not entry and same != entry:
            pairs.append((entry.name, same, entry))
    pairs += [(name, entry, None) for name, entry in before.items()]
    return [pair[1:] for pair in sorted(pairs, key=lambda pair: pair[0])]


def _attributes(entry: Entry) -> tuple[int, tuple[tuple[bytes, bytes], ...], Owner | None]:
    return (entry.mode, entry.xattrs, entry.owner)
