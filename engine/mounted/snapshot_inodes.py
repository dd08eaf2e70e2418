"""The inodes of `/snapshots`: immutable, so the kernel may keep all of it for ever.

A directory's number belongs to its snapshot and path, a file's to its path inside the tree and
its entry: the same file in a hundred snapshots is one inode, and one copy in the page cache.
That of a file with several names belongs to its snapshot as well: who copies two snapshots would
take equal numbers for one file, and link the copies to each other.
"""

import errno
import struct
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise
from typing import NamedTuple

from engine.ids import InodeNo, NodeId
from engine.mounted.inodes import Attributes, Inode, entry_attributes, fail, number
from engine.storage import content
from engine.storage.holes import seek
from engine.storage.nodes import LONGEST_NAME, DirectoryNode, Entry, Kind, Owner, Totals
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id

KEPT_LISTING = 1 << 20
"""A directory with more below it than this is listed page by page and not kept."""

_NOTHING = Totals(0, 0)


class Shown(NamedTuple):
    """What all inodes of a mount's snapshots share. `find` gives those that the kernel knows."""

    find: Callable[[InodeNo], Inode | None]
    objects: Objects
    owner: Owner


class SnapshotFile(Inode):
    """A file, link or fifo in a snapshot.

    The kernel keeps a million of them after a `find`, so its entry stays in the store: only the
    page and the place there are known here, until a second directory turns out to have the file,
    which must not be lost with the first.
    """

    __slots__ = ("_at", "_page", "_second", "_shown", "next")

    def __init__(self, ino: InodeNo, shown: Shown, page: NodeId, at: int) -> None:
        super().__init__(ino)
        self._shown, self._page, self._at = shown, page, at
        self._second: Entry | None = None
        self.next: SnapshotFile | None = None

    def seen(self, page: NodeId, entry: Entry) -> None:
        """Notes that it was found in a page, with the entry that it has there."""
        if page != self._page:
            self._second = entry

    @property
    def _objects(self) -> Objects:
        return self._shown.objects

    @property
    def _entry(self) -> Entry:
        if self._second is not None:
            return self._second
        node = self._shown.objects.node(self._page)
        assert isinstance(node, DirectoryNode)
        return node.entries[self._at]

    def attributes(self) -> Attributes:
        return entry_attributes(self.ino, self._entry, self._shown.owner)

    def read(self, offset: int, size: int) -> bytes:
        return content.read(self._objects, self._entry, offset, size)

    def seek(self, offset: int, whence: int) -> int:
        found = seek(self._objects, self._entry, offset, whence)
        if found is None:
            raise fail(errno.ENXIO)
        return found

    def stream(self, offset: int, end: int) -> Generator[memoryview, None, None]:
        return content.stream(self._objects, self._entry, offset, end)

    def unchanging(self) -> int:
        entry = self._entry
        return entry.size if entry.kind == Kind.FILE else 0

    def followers(self) -> Iterator[Inode]:
        at = self.next
        while at is not None and at is not self:
            yield at
            at = at.next

    def readlink(self) -> bytes:
        entry = self._entry
        if entry.kind != Kind.SYMLINK or not isinstance(entry.content, bytes):
            return super().readlink()
        return entry.content

    def xattrs(self) -> dict[bytes, bytes]:
        return dict(self._entry.xattrs)


class SnapshotDirectory(Inode):
    """A directory in a snapshot. `key` names the snapshot, `path` the place in it."""

    __slots__ = ("_below", "_entry", "_key", "_path", "_shown")

    def __init__(self, shown: Shown, entry: Entry, key: bytes, path: bytes) -> None:
        super().__init__(number(b"directory", key, path))
        self._shown, self._entry, self._key, self._path = shown, entry, key, path
        self._below: list[Inode] | None = None

    def attributes(self) -> Attributes:
        return entry_attributes(self.ino, self._entry, self._shown.owner)

    def xattrs(self) -> dict[bytes, bytes]:
        return dict(self._entry.xattrs)

    def _open(self) -> Directory:
        return Directory(self._shown.objects, directory_id(self._entry))

    def _inode(self, page: NodeId, at: int, entry: Entry) -> Inode:
        path = self._path + b"/" + entry.name
        if entry.kind == Kind.DIRECTORY:
            return SnapshotDirectory(self._shown, entry, self._key, path)
        if entry.link is not None:
            ino = number(b"linked", self._key, entry.link.group)
        else:
            ino = number(b"file", path, _essence(entry))
        known = self._shown.find(ino)
        if isinstance(known, SnapshotFile):
            known.seen(page, entry)
            return known
        return SnapshotFile(ino, self._shown, page, at)

    def lookup(self, name: bytes) -> Inode | None:
        if len(name) > LONGEST_NAME:
            raise fail(errno.ENAMETOOLONG)
        found = self._open().place(name)
        return None if found is None else self._inode(*found)

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        """Yields the entries after the `cookie`th; keeps the inodes while the kernel knows it."""
        directory = self._open()
        below = self._below
        if below is None and (self._entry.totals or _NOTHING).entries <= KEPT_LISTING:
            below = self._below = [
                self._inode(page, at, entry)
                for page, _, entries in directory.pages()
                for at, entry in enumerate(entries)
            ]
            files = list(self.files())
            for file, following in pairwise(files):
                file.next = following
        for page, first, entries in directory.pages(cookie):
            for at in range(max(cookie - first, 0), len(entries)):
                entry, behind = entries[at], first + at
                inode = below[behind] if below is not None else self._inode(page, at, entry)
                yield behind + 1, entry.name, inode

    def files(self) -> "Iterator[SnapshotFile]":
        for inode in self._below or ():
            if isinstance(inode, SnapshotFile) and inode.unchanging():
                yield inode

    def forgotten(self) -> None:
        for inode in self._below or ():
            if isinstance(inode, SnapshotFile):
                inode.next = None
        self._below = None


def _essence(entry: Entry) -> bytes:
    """Returns what makes a file what it is, its name apart."""
    head = struct.pack(">BHqq", entry.kind, entry.mode, entry.mtime_ns, entry.size)
    if isinstance(entry.content, bytes):
        body = entry.content
    else:
        body = b"".join((ref.id or b"-%d" % ref.length) for ref in entry.content)
    if entry.xattrs:
        body += b"".join(b"\0%d %s=%s" % (len(n), n, v) for n, v in entry.xattrs)
    if entry.owner is not None:
        body += b"\0owner %d:%d" % entry.owner
    return head + body
