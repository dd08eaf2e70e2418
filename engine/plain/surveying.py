"""Survey: what a tree would take on a disk, before anything of it is written.

What a tree says of its own size may be wrong, and nodes that name each other many times can
stand for more files than there is room for in the world. So everything is counted, each node
once, in numbers that have no end. The time it takes follows the nodes, not what they stand for.
"""

import os
from typing import NamedTuple

from engine.errors import CorruptObjectError, EngineError
from engine.storage.content import listed
from engine.storage.nodes import DEEPEST, Entry, Kind, Ref
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id


class TreeTooLargeError(EngineError):
    """The disk has no room for a tree: what `what` counts, entries or bytes, is `needed`."""

    def __init__(self, path: str, what: str, needed: int, free: int) -> None:
        super().__init__(
            f"there is no room for {path!r}: it needs {needed:,} {what}, and {free:,} are free"
        )
        self.path, self.what, self.needed, self.free = path, what, needed, free


class Needs(NamedTuple):
    """What a directory takes: everything below it, its files' bytes, its symbolic links."""

    entries: int = 0
    bytes: int = 0
    links: int = 0


class Survey:
    """Counts what trees of one store take; names of one file count as one, over all trees."""

    def __init__(self, objects: Objects, *, exact: bool = False) -> None:
        """With `exact`, holes inside of long lists are not counted: the lists are read for it."""
        self._objects, self._exact = objects, exact
        self._known: dict[bytes, Needs] = {}
        self._lists: dict[bytes, int] = {}
        self._groups: set[bytes] = set()
        self._linked = 0

    def of(self, *entries: Entry) -> Needs:
        """Returns what files take, and directories with all below them but not themselves.

        Raises CorruptObjectError or MissingObjectError.
        """
        number = size = links = 0
        for entry in entries:
            if entry.kind == Kind.DIRECTORY:
                below = self.below(entry, 0)
            else:
                below = Needs(1, self._file(entry), entry.kind == Kind.SYMLINK)
            number, size, links = number + below.entries, size + below.bytes, links + below.links
        return Needs(number, size + self._linked, links)

    def below(self, folder: Entry, depth: int) -> Needs:
        """Returns what a directory takes, without its files of several names."""
        identifier = directory_id(folder)
        known = self._known.get(identifier)
        if known is not None:
            return known
        if depth > DEEPEST:
            raise CorruptObjectError("node", identifier, "the tree is too deep")
        entries = size = links = 0
        for entry in Directory(self._objects, identifier):
            entries += 1
            if entry.kind == Kind.FILE:
                size += self._file(entry)
            elif entry.kind == Kind.DIRECTORY:
                under = self.below(entry, depth + 1)
                entries, size, links = (
                    entries + under.entries, size + under.bytes, links + under.links
                )  # fmt: skip
            else:
                links += entry.kind == Kind.SYMLINK
        found = self._known[identifier] = Needs(entries, size, links)
        return found

    def _file(self, entry: Entry) -> int:
        """Returns the bytes of a file; none of one with several names, which are counted apart."""
        if entry.link is None:
            return self._data(entry)
        if entry.link.group not in self._groups:
            self._groups.add(entry.link.group)
            self._linked += self._data(entry)
        return 0

    def _data(self, entry: Entry) -> int:
        if isinstance(entry.content, bytes):
            return entry.size
        return sum(self._data_of(ref) for ref in entry.content)

    def _data_of(self, ref: Ref) -> int:
        if ref.id is None:
            return 0
        if not ref.level or not self._exact:
            return ref.length
        key = ref.id + ref.length.to_bytes(8, "big") + bytes([ref.level])
        if key not in self._lists:
            self._lists[key] = sum(self._data_of(below) for below in listed(self._objects, ref))
        return self._lists[key]


class Room(NamedTuple):
    """What a disk has room for; without a limit of entries, that is None."""

    entries: int | None
    bytes: int

    @classmethod
    def free(cls, fd: int) -> "Room":
        """Returns what is free on the disk of an open directory."""
        status = os.fstatvfs(fd)
        entries = status.f_favail if status.f_files else None
        return cls(entries, status.f_bavail * status.f_frsize)

    @classmethod
    def whole(cls, fd: int) -> "Room":
        """Returns what the disk of an open directory could have."""
        status = os.fstatvfs(fd)
        return cls(status.f_files or None, status.f_blocks * status.f_frsize)

    def check(self, objects: Objects, entries: list[Entry], survey: Survey, path: str) -> None:
        """Raises TreeTooLargeError if there is no room for what `Survey.of` counts.

        What a filesystem would compress is counted as it is. Where entries have no limit each is
        taken for a byte.
        """
        needs = survey.of(*entries)
        if self.entries is not None and needs.entries > self.entries:
            raise TreeTooLargeError(path, "entries", needs.entries, self.entries)
        if needs.entries + needs.bytes > self.bytes:
            needs = Survey(objects, exact=True).of(*entries)
            if needs.entries + needs.bytes > self.bytes:
                raise TreeTooLargeError(path, "bytes", needs.bytes, self.bytes)
