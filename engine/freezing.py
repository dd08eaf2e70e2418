"""Freezing: a session's upper and base become one tree in the store.

Cost follows what the upper holds. Everything the upper does not touch is kept by id and never
read. `prepare` reads and stores the contents of changed files and may run while the session
goes on; `build` then makes the tree of one moment, reading again only what was written since.
During `build` nobody may write the session.
"""

import contextlib
import os
import stat
from collections.abc import Iterator

from engine.content import Content, SourceChangedError, ingest
from engine.directory import Directory, directory_entry, directory_id, find
from engine.errors import EngineError
from engine.hostfs import describe, kind_of, mtime_of, read_xattrs
from engine.links import groups_in, linked, number_groups
from engine.nodes import DEEPEST, Entry, Kind
from engine.objects import ChunkSink, NodeBuffer, Objects
from engine.store import Store, Writer
from engine.upper import Upper

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TRIES = 4


class TooDeepError(EngineError):
    """A session has directories inside each other beyond what a tree may have."""

    def __init__(self, path: bytes) -> None:
        super().__init__(f"{os.fsdecode(path)[:200]!r}… is deeper than {DEEPEST} directories")
        self.path = path


class Freeze:
    """One freezing of one session."""

    def __init__(
        self, store: Store, objects: Objects, upper: Upper, base: Entry, changed: set[int] | None
    ) -> None:
        """Gets ready. `changed` collects the inodes of upper files written from now on."""
        self._objects, self._upper, self._base = objects, upper, base
        self._changed = changed
        self._sink = ChunkSink(store)
        self._nodes = NodeBuffer()
        self._known: dict[tuple[int, int, int, int], Content] = {}
        self._files: dict[bytes, Entry] = {}
        self.warnings: list[str] = []
        self.left_out: list[bytes] = []

    def prepare(self) -> None:
        """Stores the contents of what has changed so far. Blocks on the disk."""
        for path, status in self._walk(b"", 0):
            if stat.S_ISREG(status.st_mode):
                with contextlib.suppress(OSError, SourceChangedError):  # `build` reads it again
                    self._read(path)

    def build(self) -> Entry:
        """Returns the root of the session's tree; it is stored by `save`."""
        self._files = {}
        self.warnings, self.left_out = [], []
        changed, self._changed = self._changed, None
        for sign in [sign for sign in self._known if changed and sign[0] in changed]:
            del self._known[sign]
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
        return self._directory(b"", b"", self._base)

    def save(self, writer: Writer) -> None:
        """Stores what `build` made, in the transaction that makes something refer to it."""
        self._sink.flush_into(writer)
        self._nodes.flush(writer)

    @property
    def stored_bytes(self) -> int:
        """How many bytes of chunks were new to the store."""
        return self._sink.stored_bytes

    def _walk(self, path: bytes, depth: int) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yields (path, status) of all files in the upper that are no directories."""
        if depth > DEEPEST:
            raise TooDeepError(path)
        try:
            items = list(self._upper.scan(path))
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, status in items:
            child = path + b"/" + name if path else name
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(child, depth + 1)
            else:
                yield child, status

    def _read(self, path: bytes) -> tuple[os.stat_result, Content, tuple[tuple[bytes, bytes], ...]]:
        for _ in range(_TRIES):
            fd = os.open(self._upper.at(path), _OPEN)
            try:
                before = os.fstat(fd)
                sign = _sign(before)
                content = self._known.get(sign)
                if content is not None:
                    return before, content, read_xattrs(fd)
                content, size = ingest(fd, before, self._sink, self._nodes.put)
                after = os.fstat(fd)
                if sign == _sign(after) and size == after.st_size:
                    self._known[sign] = content
                    return after, content, read_xattrs(fd)
            finally:
                os.close(fd)
        raise SourceChangedError(path)

    def _entry(self, path: bytes, status: os.stat_result) -> Entry | None:
        kind = kind_of(status.st_mode)
        name = path.rpartition(b"/")[2]
        absolute = self._upper.at(path)
        if kind is None:
            return None
        if kind == Kind.FILE:
            status, content, xattrs = self._read(path)
            mode = self._upper.mode(absolute, status)
            size = status.st_size
            return Entry(name, kind, mode, mtime_of(status), size, content, xattrs)
        target = os.readlink(absolute) if kind == Kind.SYMLINK else b""
        mode = stat.S_IMODE(status.st_mode)
        return Entry(name, kind, mode, mtime_of(status), len(target), target)

    def _directory(self, path: bytes, name: bytes, base: Entry | None) -> Entry:
        upper = self._upper
        entries: dict[bytes, Entry] = {}
        if base is not None:
            entries = {e.name: e for e in Directory(self._objects, directory_id(base))}
        for child, status in upper.scan(path):
            below = path + b"/" + child if path else child
            if status is None:
                entries.pop(child, None)
            elif stat.S_ISDIR(status.st_mode):
                entries[child] = self._directory(
                    below, child, self._merged(below, entries.get(child))
                )
            elif below in self._files:
                entries[child] = self._files[below]
            else:
                entries.pop(child, None)
        absolute = upper.at(path)
        status = os.lstat(absolute)
        return directory_entry(
            self._nodes.put,
            [entries[n] for n in sorted(entries)],
            name=name,
            mode=upper.mode(absolute, status),
            mtime_ns=mtime_of(status),
            xattrs=read_xattrs(absolute),
        )

    def _kept_links(self, path: bytes, base: Entry | None) -> Iterator[bytes]:
        """Yields the link groups of what is kept by id; reads what holds some, nothing else."""
        entries: dict[bytes, Entry] = {}
        if base is not None:
            entries = {e.name: e for e in linked(self._objects, base)}
        for child, status in self._upper.scan(path):
            same_name = entries.pop(child, None)
            if status is not None and stat.S_ISDIR(status.st_mode):
                below = path + b"/" + child if path else child
                yield from self._kept_links(below, self._merged(below, same_name))
        for entry in entries.values():
            yield from groups_in(self._objects, entry)

    def _merged(self, path: bytes, same_name: Entry | None) -> Entry | None:
        """Returns the base's directory that the upper's at `path` is merged with."""
        redirect = self._upper.redirect(path)
        if redirect is not None:
            same_name = find(self._objects, self._base, redirect)
        elif self._upper.is_opaque(path):
            return None
        if same_name is None or same_name.kind != Kind.DIRECTORY:
            return None
        return same_name


def _sign(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
