"""Local edits: what in a directory differs from the tree that it was made of.

Reads what it must: a file whose row in the stat cache is as it was is not opened. Writes
nothing. Every directory is opened relative to the one around it, following no link.
"""

import os
import stat

import msgspec

from engine.errors import CorruptObjectError, EngineError
from engine.host.hostfs import kept_xattrs, kind_of, mtime_of, read_xattrs
from engine.host.owners import belongs_to_another
from engine.host.set_id import SET_ID
from engine.host.unlocking import open_file, true_mode, unlocked
from engine.ids import NodeId
from engine.plain.stat_cache import FolderResult, Row, cache_key, decode_rows, row_of, split_folder
from engine.storage import content
from engine.storage.nodes import DEEPEST, Entry, Kind
from engine.storage.objects import Objects
from engine.storage.store import Db
from engine.trees.diffing import ChangeKind
from engine.trees.directory import Directory, directory_id
from engine.trees.paths import joined

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_BLOCK = 1 << 20
_MOST = 5


class Edit(msgspec.Struct, frozen=True):
    """A path of a checkout that is not as its tree has it."""

    path: bytes
    kind: ChangeKind


class LocalEditsError(EngineError):
    """A switch would overwrite what was changed in a checkout. `edits` are all of them."""

    def __init__(self, path: str, edits: list[Edit]) -> None:
        names = ", ".join(repr(os.fsdecode(edit.path)) for edit in edits[:_MOST])
        more = f" and {len(edits) - _MOST:,} more" if len(edits) > _MOST else ""
        super().__init__(f"{path!r} has local edits in the way: {names}{more}")
        self.path, self.edits = path, edits


class Known:
    """What the stat cache knows of one folder; `result` is None if nothing."""

    def __init__(self, objects: Objects, prefix: bytes, path: bytes) -> None:
        self.objects = objects
        self.key = cache_key(prefix, path)
        self.rows: dict[bytes, Row] = {}
        self.result: FolderResult | None = None
        self._directory: Directory | None = None
        with objects.store.read() as reader:
            value = reader.get(Db.IMPORTS, self.key)
            if value is None:
                return
            try:
                rows, self.result = split_folder(value)
                self.rows = {row[0]: row for row in decode_rows(rows)}
                self._directory = Directory(objects, NodeId(self.result.node))
            except (msgspec.DecodeError, CorruptObjectError):  # then everything is read
                self.rows, self.result = {}, None

    def mode(self, name: bytes) -> int | None:
        """Returns the permission bits that a file had when it was written or imported."""
        row = self.rows.get(name)
        return None if row is None else stat.S_IMODE(row[1])

    def entry(self, name: bytes, status: os.stat_result) -> Entry | None:
        """Returns what a file is, if its row says that it is as it was."""
        if self._directory is None or self.rows.get(name) != row_of(name, status):
            return None
        return self._directory.get(name)


def difference(
    objects: Objects, fd: int, entry: Entry, status: os.stat_result, known: Known
) -> ChangeKind | None:
    """Tells how a file, link or fifo in the open directory `fd` differs from `entry`."""
    kind = kind_of(status.st_mode)
    if kind != entry.kind:
        return ChangeKind.TYPE
    cached = known.entry(entry.name, status)
    if cached is not None and _without_link(cached) == _without_link(entry):
        return None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    if kind == Kind.SYMLINK:
        if os.fsencode(os.readlink(entry.name, dir_fd=fd)) != entry.content:
            return ChangeKind.MODIFIED
    elif kind == Kind.FILE:
        if status.st_size != entry.size:
            return ChangeKind.MODIFIED
        file = open_file(entry.name, _OPEN, fd)
        try:
            if not _has(objects, entry, file):
                return ChangeKind.MODIFIED
            xattrs = read_xattrs(file)
        finally:
            os.close(file)
    attributes = (stat.S_IMODE(status.st_mode), mtime_of(status), xattrs)
    if kind == Kind.SYMLINK:
        same = attributes[1] == entry.mtime_ns and not belongs_to_another(status, entry.owner)
        return None if same else ChangeKind.METADATA
    wanted = (entry.mtime_ns, kept_xattrs(entry.xattrs))
    if attributes[1:] != wanted or belongs_to_another(status, entry.owner):
        return ChangeKind.METADATA
    # Where root wrote a file out, its set-id bits are not an edit but for when they were there.
    without = entry.mode & ~SET_ID if kind == Kind.FILE else entry.mode
    same = attributes[0] == entry.mode or (
        attributes[0] == without and known.mode(entry.name) in {None, without}
    )
    return None if same else ChangeKind.METADATA


def _without_link(entry: Entry) -> Entry:
    return entry if entry.link is None else msgspec.structs.replace(entry, link=None)


def _has(objects: Objects, entry: Entry, file: int) -> bool:
    """Tells whether an open file has the content of an entry."""
    stream = content.stream(objects, entry, 0, entry.size)
    try:
        for piece in stream:
            at = 0
            while at < len(piece):
                read = os.read(file, min(_BLOCK, len(piece) - at))
                if not read or piece[at : at + len(read)] != read:
                    return False
                at += len(read)
    finally:
        stream.close()
    return not os.read(file, 1)


def local_edits(objects: Objects, prefix: bytes, fd: int, root: Entry) -> list[Edit]:
    """Returns what differs in the open directory `fd` from the tree, by path.

    Directories' times alone are no difference: their names tell. Sockets and devices, which a
    tree does not have, are passed over. `prefix` is the stat cache's. Raises OSError.
    """
    edits: list[Edit] = []
    if _is_dressed_otherwise(fd, root):
        edits.append(Edit(b"", ChangeKind.METADATA))
    _look_through(objects, prefix, fd, (), root, edits)
    return edits


def _is_dressed_otherwise(fd: int, entry: Entry) -> bool:
    """Tells whether an open directory has other attributes than its entry."""
    attributes = (true_mode(fd), read_xattrs(fd))
    same = attributes == (entry.mode, kept_xattrs(entry.xattrs))
    return not same or belongs_to_another(os.fstat(fd), entry.owner)


def _look_through(
    objects: Objects, prefix: bytes, fd: int, way: tuple[bytes, ...], folder: Entry | None,
    edits: list[Edit],
) -> None:  # fmt: skip
    """Adds the edits below an open directory; `folder` is None for one that its user has made.

    One frame for each directory: 512 of them may stand inside each other.
    """
    if len(way) > DEEPEST:
        return
    known = Known(objects, prefix, joined(way))
    entries = {}
    if folder is not None:
        entries = {entry.name: entry for entry in Directory(objects, directory_id(folder))}
    present = dict(listing(fd))
    for name in sorted(present.keys() | entries.keys()):
        entry, status = entries.get(name), present.get(name)
        path = joined((*way, name))
        if status is None:
            edits.append(Edit(path, ChangeKind.REMOVED))
            continue
        here = stat.S_ISDIR(status.st_mode)
        if entry is None:
            edits.append(Edit(path, ChangeKind.ADDED))
        elif not here or entry.kind != Kind.DIRECTORY:
            kind = difference(objects, fd, entry, status, known)
            if kind is None:
                continue
            edits.append(Edit(path, kind))
            entry = None
        if here:
            with unlocked(name, fd) as below:
                if entry is not None and _is_dressed_otherwise(below, entry):
                    edits.append(Edit(path, ChangeKind.METADATA))
                _look_through(objects, prefix, below, (*way, name), entry, edits)


def listing(fd: int) -> list[tuple[bytes, os.stat_result]]:
    """Returns what is in an open directory, without what a tree cannot have."""
    found = []
    with os.scandir(fd) as items:
        for item in items:
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if kind_of(status.st_mode) is not None:
                found.append((os.fsencode(item.name), status))
    return found
