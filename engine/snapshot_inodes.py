"""The inodes of `/snapshots`: immutable, so the kernel may keep all of it for ever.

A directory's number belongs to its snapshot and path, a file's to its path inside the tree and
its entry: the same file in a hundred snapshots is one inode, and one copy in the page cache.
"""

import errno
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise

from engine import content
from engine.directory import Directory, directory_id
from engine.ids import InodeNo
from engine.inodes import Attributes, Inode, Owner, entry_attributes, fail, number
from engine.nodes import LONGEST_NAME, Entry, Kind, Totals
from engine.objects import Objects

KEPT_LISTING = 1 << 20
"""A directory with more below it than this is listed page by page and not kept."""

_NOTHING = Totals(0, 0)

Find = Callable[[InodeNo], Inode | None]


class SnapshotFile(Inode):
    """A file, link or fifo in a snapshot."""

    __slots__ = ("_entry", "_objects", "_owner", "next")

    def __init__(self, ino: InodeNo, objects: Objects, owner: Owner, entry: Entry) -> None:
        super().__init__(ino)
        self._objects, self._owner, self._entry = objects, owner, entry
        self.next: SnapshotFile | None = None

    def attributes(self) -> Attributes:
        return entry_attributes(self.ino, self._entry, self._owner)

    def read(self, offset: int, size: int) -> bytes:
        return content.read(self._objects, self._entry, offset, size)

    def stream(self, offset: int, end: int) -> Iterator[memoryview]:
        return content.stream(self._objects, self._entry, offset, end)

    def unchanging(self) -> int:
        return self._entry.size if self._entry.kind == Kind.FILE else 0

    def followers(self) -> Iterator[Inode]:
        at = self.next
        while at is not None and at is not self:
            yield at
            at = at.next

    def readlink(self) -> bytes:
        if self._entry.kind != Kind.SYMLINK or not isinstance(self._entry.content, bytes):
            return super().readlink()
        return self._entry.content

    def xattrs(self) -> dict[bytes, bytes]:
        return dict(self._entry.xattrs)


class SnapshotDirectory(Inode):
    """A directory in a snapshot. `key` names the snapshot, `path` the place in it."""

    __slots__ = ("_below", "_entry", "_find", "_key", "_objects", "_owner", "_path")

    def __init__(
        self, find: Find, objects: Objects, owner: Owner, entry: Entry, key: bytes, path: bytes
    ) -> None:
        super().__init__(number(b"directory", key, path))
        self._find, self._objects, self._owner = find, objects, owner
        self._entry, self._key, self._path = entry, key, path
        self._below: list[tuple[bytes, Inode]] | None = None

    def attributes(self) -> Attributes:
        return entry_attributes(self.ino, self._entry, self._owner)

    def xattrs(self) -> dict[bytes, bytes]:
        return dict(self._entry.xattrs)

    def _open(self) -> Directory:
        return Directory(self._objects, directory_id(self._entry))

    def _inode(self, entry: Entry) -> Inode:
        path = self._path + b"/" + entry.name
        if entry.kind == Kind.DIRECTORY:
            return SnapshotDirectory(self._find, self._objects, self._owner, entry, self._key, path)
        place = entry.link.group if entry.link is not None else path
        ino = number(b"file", place, _essence(entry))
        known = self._find(ino)
        if isinstance(known, SnapshotFile):
            return known
        return SnapshotFile(ino, self._objects, self._owner, entry)

    def lookup(self, name: bytes) -> Inode | None:
        if len(name) > LONGEST_NAME:
            raise fail(errno.ENAMETOOLONG)
        if self._below is not None:
            at = bisect_left(self._below, name, key=_first)
            found = at < len(self._below) and self._below[at][0] == name
            return self._below[at][1] if found else None
        entry = self._open().get(name)
        return None if entry is None else self._inode(entry)

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        """Yields the entries after the `cookie`th; keeps the inodes while the kernel knows it."""
        below = self._below
        if below is None and (self._entry.totals or _NOTHING).entries <= KEPT_LISTING:
            below = self._below = [(e.name, self._inode(e)) for e in self._open()]
            files = list(self.files())
            for file, following in pairwise(files):
                file.next = following
        if below is not None:
            for at in range(cookie, len(below)):
                name, inode = below[at]
                yield at + 1, name, inode
            return
        for at, entry in enumerate(self._open().from_index(cookie), cookie + 1):
            yield at, entry.name, self._inode(entry)

    def files(self) -> "Iterator[SnapshotFile]":
        for _, inode in self._below or ():
            if isinstance(inode, SnapshotFile) and inode.unchanging():
                yield inode

    def forgotten(self) -> None:
        for file in self.files():
            file.next = None
        self._below = None


def _first(pair: tuple[bytes, Inode]) -> bytes:
    return pair[0]


def _essence(entry: Entry) -> bytes:
    """Returns what makes a file what it is, its name apart."""
    head = struct.pack(">BHqq", entry.kind, entry.mode, entry.mtime_ns, entry.size)
    if isinstance(entry.content, bytes):
        body = entry.content
    else:
        body = b"".join((ref.id or b"-%d" % ref.length) for ref in entry.content)
    if entry.xattrs:
        body += b"".join(b"\0%d %s=%s" % (len(n), n, v) for n, v in entry.xattrs)
    count = entry.link.count if entry.link is not None else 1
    return head + b"%d " % count + body
