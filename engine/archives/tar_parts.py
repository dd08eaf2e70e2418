"""Parts of an archive: a tree is cut into runs of members that can be made apart from each other.

Members stand in the order of the tree's walk, so an archive is its parts one after the other. What
a member needs to know of others is only which name of a file came first: names in a link group
are left to who puts the parts together. Directories say how much is below them, so only those that
are larger than a part are opened here. What they say is not believed: a part that turns out
larger is made all the same, only not in one of the buffers that others are made in.

Parts are messages, too (`tar_worker`): they name directories and chunks, not what is in them.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from engine.errors import CorruptObjectError
from engine.ids import NodeId
from engine.storage import content
from engine.storage.nodes import DEEPEST, Entry, Kind, Ref
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id, walk

MOST_ENTRIES, MOST_BYTES = 512, 2 << 20
"""A part has no more members, and of their contents no more bytes, than this."""
LARGE = 1 << 20
"""A file of more bytes is a part of its own, and its content is cut as well."""


class Run(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The entries of a directory from `start` up to `stop`; with all below them if `deep`."""

    path: bytes
    directory: bytes
    start: int
    stop: int
    deep: bool


class Members(msgspec.Struct, array_like=True, frozen=True, tag="members"):
    """Whole members."""

    runs: tuple[Run, ...]


class Extent(msgspec.Struct, array_like=True, frozen=True, tag="extent"):
    """Bytes of a large file: of each chunk or hole, from where up to where."""

    pieces: tuple[tuple[Ref, int, int], ...]


class Large(msgspec.Struct, frozen=True):
    """A member whose content is cut."""

    path: bytes
    entry: Entry


Part = Members | Extent


def parts(objects: Objects, root: Entry) -> Iterator[Members | Large]:
    """Yields the parts of all that is below `root`. Raises CorruptObjectError."""
    cutter = _Cutter(objects)
    yield from cutter.cut(b"", root, 0)
    yield from cutter.flush()


class _Cutter:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._runs: list[Run] = []
        self._entries = self._bytes = 0

    def cut(self, path: bytes, directory: Entry, depth: int) -> Iterator[Members | Large]:
        if depth > DEEPEST:
            raise CorruptObjectError("node", directory_id(directory), "the tree is too deep")
        identifier = directory_id(directory)
        prefix = path + b"/" if path else b""
        start = at = 0

        def end(stop: int, deep: bool = True) -> None:
            if stop > start:
                self._runs.append(Run(path, identifier, start, stop, deep))

        for at, entry in enumerate(Directory(self._objects, identifier)):
            entries, size = 1, entry.size
            if entry.totals is not None:
                entries += entry.totals.entries
                if entries > MOST_ENTRIES or size > MOST_BYTES:
                    end(at)
                    start = at
                    end(at + 1, deep=False)
                    self._entries += 1
                    yield from self.cut(prefix + entry.name, entry, depth + 1)
                    start = at + 1
                    continue
            elif size > LARGE and entry.kind == Kind.FILE:
                end(at)
                start = at + 1
                yield from self.flush()
                yield Large(prefix + entry.name, entry)
                continue
            if self._entries + entries > MOST_ENTRIES or self._bytes + size > MOST_BYTES:
                end(at)
                start = at
                yield from self.flush()
            self._entries += entries
            self._bytes += size
        end(at + 1)

    def flush(self) -> Iterator[Members]:
        if self._runs:
            yield Members(tuple(self._runs))
        self._runs, self._entries, self._bytes = [], 0, 0


def members(objects: Objects, runs: Iterable[Run]) -> Iterator[tuple[bytes, Entry]]:
    """Yields (path, entry) of what a part has. Raises CorruptObjectError."""
    for run in runs:
        prefix = run.path + b"/" if run.path else b""
        entries = Directory(objects, NodeId(run.directory)).from_index(run.start)
        for entry in islice(entries, run.stop - run.start):
            path = prefix + entry.name
            yield path, entry
            if run.deep and entry.kind == Kind.DIRECTORY:
                yield from walk(objects, entry, path, path.count(b"/") + 1)


def extents(objects: Objects, entry: Entry, start: int, end: int) -> Iterator[Extent]:
    """Yields the parts of a file's content from `start` up to `end`."""
    gathered: list[tuple[Ref, int, int]] = []
    size = 0
    for ref, begin, stop in content.parts(objects, entry, start, end):
        if ref.id is None:  # of any length
            for at in range(begin, stop, LARGE):
                yield from _some(gathered)
                yield Extent(((ref, at, min(at + LARGE, stop)),))
            gathered, size = [], 0
            continue
        gathered.append((ref, begin, stop))
        size += stop - begin
        if size >= LARGE:
            yield Extent(tuple(gathered))
            gathered, size = [], 0
    yield from _some(gathered)


def _some(gathered: list[tuple[Ref, int, int]]) -> Iterator[Extent]:
    if gathered:
        yield Extent(tuple(gathered))
        gathered.clear()
