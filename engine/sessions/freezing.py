"""Freezing: a session's upper and base become one tree in the store.

Cost follows what the upper holds. Everything the upper does not touch is kept by id and never
read. `prepare` reads and stores the contents of changed files and may run while the session
goes on, and so may `build_ahead`, which builds the whole tree. `build` then gives the tree of
one moment: the one built ahead if nothing was changed meanwhile, else a new one for which it
reads again only what was changed since. During `build` and `mark` nobody may write the session.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from engine.errors import EngineError
from engine.host.hostfs import (
    OVERLAY_PREFIX,
    describe,
    is_in_range,
    kind_of,
    mtime_of,
    read_xattrs,
)
from engine.host.losses import SET_ID, TIME, Losses, is_lost
from engine.host.owners import Recording
from engine.host.set_id import arriving
from engine.sessions.upper import Upper
from engine.storage.content import Content, SourceChangedError, ingest
from engine.storage.nodes import DEEPEST, Entry, Kind
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.store import Store, Writer
from engine.trees.directory import Directory, directory_entry, directory_id, find
from engine.trees.directory_edit import edit_directory
from engine.trees.links import groups_in, linked, number_groups

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TRIES = 4


Sign = tuple[int, int, int, int]
"""Inode, size, modification and change time of a file that was read."""
Known = tuple[Content, int, tuple[tuple[bytes, bytes], ...]]
"""What was read of a file: content, permission bits, attributes."""


class Trees(NamedTuple):
    """The tree of a session, twice: as the session goes on with it, and as a snapshot has it.

    `shown` has the owners of what is not ours, `plain` has none. They share every directory in
    which nothing belongs to somebody else. In a session that keeps owners they are one.
    """

    shown: Entry
    plain: Entry


class _Merged(NamedTuple):
    """What an upper's directory is merged with, in both trees; and what was at its path before."""

    base: Entry | None
    plain: Entry | None
    before: Entry | None

    def is_one(self) -> bool:
        """Tells whether both trees have the same there."""
        return self.plain is None or self.base is None or self.base.content == self.plain.content


class TooDeepError(EngineError):
    """A session has directories inside each other beyond what a tree may have."""

    def __init__(self, path: bytes) -> None:
        super().__init__(f"{os.fsdecode(path)[:200]!r}… is deeper than {DEEPEST} directories")
        self.path = path


class Changed:
    """What is done to a session while it is frozen: files of the upper by inode, and how often."""

    __slots__ = ("count", "inodes")

    def __init__(self) -> None:
        self.inodes: set[int] = set()
        self.count = 0


class Freeze:
    """One freezing of one session."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        upper: Upper,
        base: Trees | None,
        changed: Changed | None = None,
        known: dict[Sign, Known] | None = None,
        *,
        keeps_owners: bool = False,
        before: Entry | None = None,
    ) -> None:
        """Gets ready. `changed` collects what is changed from now on; None if nobody does.

        What is `known` already is not read. With `keeps_owners` a snapshot has all owners. `before`
        is the session's tree where there is no `base`: it tells whose files are that an ordinary
        user sees as his own.
        """
        self._objects, self._upper = objects, upper
        self._base = None if base is None else base.shown
        self._plain = None if base is None else base.shown if keeps_owners else base.plain
        self._before = before or self._base
        self._owners = Recording(keeps=keeps_owners, beside=upper.work)
        self._changed = changed
        self._store, self._sink = store, ChunkSink(store)
        self._lists, self._nodes = NodeBuffer(), NodeBuffer()
        self._known: dict[Sign, Known] = known or {}
        self._files: dict[bytes, Entry] = {}
        self._scans: dict[bytes, list[tuple[bytes, os.stat_result | None]]] = {}
        self._marked = 0
        self._ahead: Trees | None = None
        self._losses = Losses()
        self._others: dict[bytes, list[bytes]] = {}
        self.warnings: list[str] = []
        self.left_out: list[bytes] = []

    @property
    def lost(self) -> dict[str, int]:
        """Returns what files of the built tree lost, and how many; see `losses`."""
        return self._losses.counts()

    def prepare(self) -> None:
        """Stores the contents of what has changed so far. Blocks on the disk."""
        for path, status in self._walk(b"", 0):
            if stat.S_ISREG(status.st_mode) and sign_of(status) not in self._known:
                with contextlib.suppress(OSError, SourceChangedError):  # `build` reads it again
                    self._read(path)
        self._sink.flush()

    def mark(self) -> None:
        """Begins to note changes anew: those up to now will be in what `build_ahead` makes."""
        if self._changed is not None:
            inodes, self._changed.inodes = self._changed.inodes, set()
            for sign in [sign for sign in self._known if sign[0] in inodes]:
                del self._known[sign]
            self._marked = self._changed.count

    def build_ahead(self) -> None:
        """Does all of `build` that can be done while the session goes on. Blocks on the disk."""
        self._ahead = None
        with contextlib.suppress(OSError, SourceChangedError):  # `build` reads it again
            self._ahead = self._build()
        self._sink.flush()
        if self.is_ahead():
            self._store.write(self.save)
            for identifier in self._nodes.nodes:
                self._objects.node(identifier)  # decoded now, not when a commit goes on from them

    def is_ahead(self) -> bool:
        """Tells whether nothing was changed since `mark`, so that `build` has nothing to do."""
        unchanged = self._changed is not None and self._changed.count == self._marked
        return self._ahead is not None and unchanged

    def ahead(self) -> Trees | None:
        """Returns what `build_ahead` made and stored, unless something was changed since."""
        return self._ahead if self.is_ahead() else None

    def build(self) -> Trees:
        """Returns the roots of the session's tree; they are stored by `save`."""
        if self._ahead is None or not self.is_ahead():
            self.mark()
            self._ahead = self._build()
        self._changed = None
        return self._ahead

    def _build(self) -> Trees:
        self._files, self._scans = {}, {}
        self._nodes = NodeBuffer()
        self.warnings, self.left_out, self._losses = [], [], Losses()
        groups: dict[int, list[tuple[bytes, Entry]]] = {}
        for path, status in self._walk(b"", 0):
            entry = self._entry(path, status)
            if entry is None:
                kind = describe(status.st_mode)
                self.warnings.append(f"left out {os.fsdecode(path)!r}: it is a {kind}")
                self.left_out.append(path)
            elif status.st_nlink > 1:
                groups.setdefault(status.st_ino, []).append((path, entry))
            else:
                self._files[path] = entry
        ordered = sorted((sorted(members, key=lambda m: m[0]) for members in groups.values()),
                         key=lambda members: members[0][0])  # fmt: skip
        taken = set(self._kept_links(b"", self._base)) if ordered else set()
        self._files.update(number_groups(ordered, taken))
        trees = self._directory(b"", b"", _Merged(self._base, self._plain, self._before))
        self._files, self._scans = {}, {}
        self.warnings += self._losses.warnings()
        return trees

    def save(self, writer: Writer) -> None:
        """Stores what `build` made, in the transaction that makes something refer to it."""
        self._sink.flush_into(writer)
        self._lists.flush(writer)
        self._nodes.flush(writer)

    @property
    def stored_bytes(self) -> int:
        """How many bytes of chunks were new to the store."""
        return self._sink.stored_bytes

    def _walk(self, path: bytes, depth: int) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yields (path, status) of all files in the upper that are no directories."""
        if depth > DEEPEST:
            raise TooDeepError(path)
        items = self._scans[path] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            items += self._upper.scan(path)
        for name, status in items:
            child = path + b"/" + name if path else name
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(child, depth + 1)
            else:
                yield child, status

    def _read(self, path: bytes) -> tuple[os.stat_result, Known]:
        for _ in range(_TRIES):
            fd = os.open(self._upper.at(path), _OPEN)
            try:
                before = os.fstat(fd)
                sign = sign_of(before)
                known = self._known.get(sign)
                if known is not None:
                    return before, known
                content, size = ingest(fd, before, self._sink, self._lists.put)
                known = (content, self._upper.mode(fd, before), self._read_xattrs(fd, path))
                after = os.fstat(fd)
                if sign == sign_of(after) and size == after.st_size:
                    self._known[sign] = known
                    return after, known
            finally:
                os.close(fd)
        raise SourceChangedError(path)

    def _entry(self, path: bytes, status: os.stat_result) -> Entry | None:
        kind = kind_of(status.st_mode)
        name = path.rpartition(b"/")[2]
        if kind is None:
            return None
        if not is_in_range(status.st_mtime_ns):
            self._losses.note(path, TIME)
        if kind == Kind.FILE:
            known = self._known.get(sign_of(status))
            if known is None:
                status, known = self._read(path)
            content, mode, xattrs = known
            size = status.st_size
            if path in self._others:
                self._losses.note_attributes(path, self._others[path])
            return Entry(name, kind, mode, mtime_of(status), size, content, xattrs)
        target = os.readlink(self._upper.at(path)) if kind == Kind.SYMLINK else b""
        mode = stat.S_IMODE(status.st_mode)
        return Entry(name, kind, mode, mtime_of(status), len(target), target)

    def _read_xattrs(self, where: int | bytes, path: bytes) -> tuple[tuple[bytes, bytes], ...]:
        """Returns the attributes that the tree keeps, and notes what somebody will miss."""
        others: list[bytes] = []
        xattrs = read_xattrs(where, others)
        self._others.pop(path, None)
        if others and (lost := [name for name in others if self._is_lost(name)]):
            escaped = OVERLAY_PREFIX + b"overlay."
            self._others[path] = [
                OVERLAY_PREFIX + name[len(escaped) :] if name.startswith(escaped) else name
                for name in lost
            ]
        return xattrs

    def _is_lost(self, name: bytes) -> bool:
        """Tells whether an attribute is a program's, and not of the upper's own format.

        There the kernel's overlayfs keeps a program's `user.overlay.x` as `user.overlay.overlay.x`.
        A full tree, which has no base, was no overlayfs's.
        """
        if name.startswith(OVERLAY_PREFIX):
            if self._base is None:
                return not name.startswith(OVERLAY_PREFIX + b"amalgam.")
            return name.startswith(OVERLAY_PREFIX + b"overlay.")
        return is_lost(name)

    def _directory(self, path: bytes, name: bytes, merged: _Merged) -> Trees:
        base = self._open(merged.base)
        plain = base if merged.is_one() else self._open(merged.plain)
        before = self._open_before(merged, base)
        edits: dict[bytes, Entry | None] = {}
        plain_edits: dict[bytes, Entry | None] = {}
        for child, status in self._scans[path]:
            below = path + b"/" + child if path else child
            if status is None:
                edits[child] = plain_edits[child] = None
            elif stat.S_ISDIR(status.st_mode):
                inside = self._inside(below, child, base, plain, before)
                edits[child], plain_edits[child] = self._directory(below, child, inside)
            elif (file := self._files.get(below)) is None:
                edits[child] = plain_edits[child] = None
            else:
                edits[child], plain_edits[child] = self._owned(below, file, status, before)
        absolute = self._upper.at(path)
        status = os.lstat(absolute)
        xattrs = self._read_xattrs(absolute, path)
        if path in self._others:
            self._losses.note_attributes(path, self._others[path])
        if not is_in_range(status.st_mtime_ns):
            self._losses.note(path, TIME)
        like = Entry(
            name, Kind.DIRECTORY, self._upper.mode(absolute, status), mtime_of(status), 0, b"",
            xattrs, None, None,
            self._owners.owner(status, merged.before.owner if merged.before is not None else None),
        )  # fmt: skip
        shown = self._put(merged.base, edits, like)
        if self._owners.keeps:
            return Trees(shown, shown)
        like = msgspec.structs.replace(like, owner=None)
        if merged.is_one() and all(edits[each] is plain_edits[each] for each in edits):
            return Trees(shown, msgspec.structs.replace(shown, owner=None))
        return Trees(shown, self._put(merged.plain, plain_edits, like))

    def _put(self, base: Entry | None, edits: dict[bytes, Entry | None], like: Entry) -> Entry:
        """Makes a directory of what is merged with `base`; `like` has its name and attributes."""
        if base is not None:
            return edit_directory(
                self._objects, self._nodes, base, edits, name=like.name, mode=like.mode,
                mtime_ns=like.mtime_ns, xattrs=like.xattrs, owner=like.owner,
            )  # fmt: skip
        return directory_entry(
            self._nodes.put,
            [entry for _, entry in sorted(edits.items()) if entry is not None],
            name=like.name,
            mode=like.mode,
            mtime_ns=like.mtime_ns,
            xattrs=like.xattrs,
            owner=like.owner,
        )

    def _owned(
        self, path: bytes, file: Entry, status: os.stat_result, before: Directory | None
    ) -> Trees:
        """Returns a file's entries: one with the owner that it is to have, if any, one without.

        Without its owner it has set-id bits only if it is ours.
        """
        was = None if before is None else before.get(file.name)
        like = was.owner if was is not None and was.kind == file.kind else None
        owner = self._owners.owner(status, like)
        shown = file if owner is None else msgspec.structs.replace(file, owner=owner)
        if self._owners.keeps:
            return Trees(shown, shown)
        plain = file
        if (kept := arriving(file.mode, status)) != file.mode:
            self._losses.note(path, SET_ID)
            plain = msgspec.structs.replace(file, mode=kept)
        return Trees(plain if owner is None else shown, plain)

    def _open(self, directory: Entry | None) -> Directory | None:
        return None if directory is None else Directory(self._objects, directory_id(directory))

    def _open_before(self, merged: _Merged, base: Directory | None) -> Directory | None:
        """Opens what was there before, if it tells of an owner that could not be shown."""
        before = merged.before
        if not self._owners.maps or before is None or not before.totals or not before.totals.owners:
            return None
        return base if before is merged.base else self._open(before)

    def _inside(
        self, path: bytes, name: bytes, base: Directory | None, plain: Directory | None,
        before: Directory | None,
    ) -> _Merged:  # fmt: skip
        """Returns what the upper's directory at `path` is merged with."""
        same_name = None if base is None else base.get(name)
        found = self._merged(path, same_name, self._base)
        if plain is base and self._plain is self._base:
            bare = found
        else:
            same_name = None if plain is None else plain.get(name)
            bare = self._merged(path, same_name, self._plain)
        was = found
        if found is None and self._base is None and before is not None:
            was = before.get(name)
        return _Merged(found, bare, was if was and was.kind == Kind.DIRECTORY else None)

    def _kept_links(self, path: bytes, base: Entry | None) -> Iterator[bytes]:
        """Yields the link groups of what is kept by id; reads what holds some, nothing else."""
        entries: dict[bytes, Entry] = {}
        if base is not None:
            entries = {e.name: e for e in linked(self._objects, base)}
        for child, status in self._scans[path]:
            same_name = entries.pop(child, None)
            if status is not None and stat.S_ISDIR(status.st_mode):
                below = path + b"/" + child if path else child
                yield from self._kept_links(below, self._merged(below, same_name, self._base))
        for entry in entries.values():
            yield from groups_in(self._objects, entry)

    def _merged(self, path: bytes, same_name: Entry | None, root: Entry | None) -> Entry | None:
        """Returns the directory of the base `root` that the upper's at `path` is merged with."""
        if root is None:
            return None
        redirect = self._upper.redirect(path)
        if redirect is not None:
            same_name = find(self._objects, root, redirect)
        elif self._upper.is_opaque(path):
            return None
        if same_name is None or same_name.kind != Kind.DIRECTORY:
            return None
        return same_name


def sign_of(status: os.stat_result) -> Sign:
    """Returns what tells whether a file is still the one that was read."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
