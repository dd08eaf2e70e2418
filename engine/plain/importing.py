"""Import: a directory of the host becomes a tree in the store.

Three steps. The scan walks the directory by descriptors (a symlink swapped in cannot lead it
out) and compares each folder's stat rows with those of the last import, so that what did not
change is not read. Workers read, cut and pack what did change, each file checked before and
after it was read. Then the nodes are built from the leaves up, and one transaction stores
them together with the new stat rows.

What the stat cache is, and its format, is in `stat_cache`.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import groupby
from typing import TypeVar

import msgspec

from engine.errors import CorruptObjectError, EngineError
from engine.host.hostfs import describe, is_in_range, kind_of, mtime_of, read_xattrs
from engine.host.losses import SET_ID, TIME, Losses, is_lost
from engine.host.owners import Recording, myself
from engine.host.set_id import SET_ID as SET_ID_BITS
from engine.host.set_id import arriving, has_set_id, is_ours
from engine.host.unlocking import lock_again, open_file, open_unlocked, true_mode
from engine.ids import NodeId
from engine.plain.own_mounts import holds_many, own_devices, place_in_mount
from engine.plain.stat_cache import (
    FRESH,
    FRESH_NS,
    FolderResult,
    Row,
    cache_key,
    cache_prefix,
    decode_rows,
    encode_folder,
    encode_rows,
    folder_result,
    put_rows,
    split_folder,
)
from engine.progress import Progress, unheard
from engine.storage.content import SourceChangedError, ingest
from engine.storage.nodes import DEEPEST, Entry, Kind, Owner, Totals
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.store import Db, Reader, Store, Writer
from engine.trees.directory import Directory, directory_entry, find
from engine.trees.links import number_groups

T = TypeVar("T")


_TRIES = 4
_TELL_SECONDS = 0.2
_BATCH_FILES, _BATCH_BYTES = 256, 4 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


class ImportSourceError(EngineError):
    """The directory cannot be imported as it is. `path` names the file that stops it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot import {path!r}: {why}")
        self.path, self.why = path, why


class ImportReport(msgspec.Struct):
    """What an import did.

    `warnings` name what was left out, `left_out` counts it by kind; `lost` counts what files lost.
    """

    files: int = 0
    read_files: int = 0
    read_bytes: int = 0
    new_bytes: int = 0
    warnings: list[str] = []
    lost_owners: int = 0
    """How many entries belong to others than the rest, or than who imports; not kept."""
    left_out: dict[str, int] = {}
    lost: dict[str, int] = {}


class ImportResult(msgspec.Struct, frozen=True):
    """What an import made. `changed` is False if the tree is the last import's."""

    snapshot: bytes
    root: Entry
    changed: bool
    report: ImportReport


class _Folder:
    __slots__ = (
        "entries", "folders", "mode", "name", "old_rows", "parent", "path", "result", "rows",
        "status", "xattrs",
    )  # fmt: skip

    def __init__(self, parent: "_Folder | None", name: bytes, status: os.stat_result) -> None:
        self.parent, self.name, self.status = parent, name, status
        self.mode = stat.S_IMODE(status.st_mode)
        self.path: bytes = parent.path + b"/" + name if parent and parent.path else name
        self.rows: list[Row] = []
        self.old_rows: dict[bytes, Row] = {}
        self.entries: dict[bytes, Entry] = {}
        self.folders: list[_Folder] = []
        self.xattrs: tuple[tuple[bytes, bytes], ...] = ()
        self.result: FolderResult | None = None


class _Import:
    def __init__(self, store: Store, objects: Objects, root: str, *, use_cache: bool,
                 progress: Progress | None, sink: ChunkSink | None = None,
                 nodes: NodeBuffer | None = None, set_id: bool = False, checkout: bool = False,
                 owners: bool = False, before: Entry | None = None) -> None:  # fmt: skip
        self.store, self.objects, self.root = store, objects, root
        self.owners = Recording(keeps=True) if owners else None
        self.before = before
        self.me = myself()
        self.sink = sink or ChunkSink(store, check=not use_cache)
        self.nodes = nodes or NodeBuffer()
        self.report = ImportReport()
        self.losses = Losses()
        self.use_cache, self.checkout = use_cache, checkout
        self._keeps_all_bits = set_id or owners  # with its owner a file is what it was
        self.written: dict[tuple[_Folder, bytes], Entry] = {}
        """Files of a checkout that have their mode from when they were written, without set-id."""
        self.unlocked = contextlib.ExitStack()
        """The directories that are open for as long as files of theirs may be read."""
        self.asked, self.progress = progress is not None, progress or unheard
        self.prefix = cache_prefix(root, owners=owners)
        self.fresh = time.time_ns() - FRESH_NS
        self.done = 0
        self.batch: list[tuple[_Folder, int]] = []
        self.batch_bytes = 0
        self.futures: list[tuple[int, Future[tuple[int, int]]]] = []
        self.skip: set[tuple[int, int]] = set()
        self.skip_devices: set[int] = set()
        self.linked: list[tuple[_Folder, Row]] = []
        self.records: list[tuple[bytes, bytes]] = []
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "import")
        self.root_fd = -1

    def leave_out(self, store_path: str | None) -> None:
        """Leaves stores and mounts of ours out. Raises ImportSourceError inside of the store."""
        if store_path is not None:
            inside = os.path.realpath(self.root)
            home = os.path.realpath(store_path)
            if inside == home or inside.startswith(home + os.sep):
                raise ImportSourceError(self.root, "it is the store itself, or inside of it")
            status = os.stat(store_path)
            self.skip.add((status.st_dev, status.st_ino))
        place = place_in_mount(os.path.realpath(self.root))
        if place is not None and holds_many(place):
            raise ImportSourceError(
                self.root, "it is an AmalgamFS mount with all its snapshots and sessions, "
                "or what describes them; import one of these",
            )  # fmt: skip
        if os.path.isdir(self.root):
            self.skip_devices = own_devices() - {os.stat(self.root).st_dev}

    def run(self) -> Entry:
        """Does the three steps up to the nodes; nothing refers to what it stored yet."""
        try:
            self.root_fd = os.open(self.root, _OPEN_DIRECTORY)
        except OSError as error:
            why = "it is a symbolic link or no directory"
            if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
                why = error.strerror or ""
            raise ImportSourceError(self.root, why) from error
        try:
            root = _Folder(None, b"", os.fstat(self.root_fd))
            if self.checkout:
                root.mode = true_mode(self.root_fd)
            if not is_in_range(root.status.st_mtime_ns):
                self.losses.note(b"", TIME)
            with self.store.read() as reader:
                self.scan(self.root_fd, root, 0, reader)
            self.submit()
            total = self.done + sum(files for files, _ in self.futures)
            for files, future in self.futures:
                while self.asked and not wait((future,), _TELL_SECONDS).done:
                    self.tell(total)  # one file may take long
                read, size = future.result()
                self.report.read_files += read
                self.report.read_bytes += size
                self.done += files
                self.tell(total)
            self.sink.flush()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.unlocked.close()
            os.close(self.root_fd)
        self.join_links()
        entry = self.build(root)
        self.report.files = entry.totals.entries if entry.totals else 0
        self.report.new_bytes = self.sink.stored_bytes
        self.report.lost = self.losses.counts()
        self.report.warnings += self.losses.warnings(self._name)
        return entry

    def save(self, writer: Writer) -> None:
        """Stores the nodes and the cache in the caller's transaction."""
        self.nodes.flush(writer)
        put_rows(writer, self.records)

    # The scan.

    def scan(self, fd: int, folder: _Folder, depth: int, reader: Reader) -> bool:
        """Reads a folder and all below; True if nothing in it changed since the last import."""
        if depth > DEEPEST:
            raise ImportSourceError(self._name(folder.path), f"deeper than {DEEPEST} directories")
        try:
            rows, below = self._rows(fd, folder)
        except OSError as error:  # which names a descriptor
            raise ImportSourceError(self._name(folder.path), error.strerror or "") from error
        rows.sort()
        encoded = encode_rows(rows)
        folder.xattrs = self._read_xattrs(fd, folder.path)[0]
        same = self._load_cached(folder, encoded, reader)
        same = same and all(row[5] != FRESH for row in rows)
        clean = same
        for row in rows:
            if row[6] > 1 and not stat.S_ISDIR(row[1]):
                self.linked.append((folder, row))
                clean = False
        for name, status in below:
            child = _Folder(folder, name, status)
            try:
                child_fd = self._open_child(fd, child)
            except FileNotFoundError:
                self._warn(child.path, "vanished while it was read")
                clean = False
                continue
            except OSError as error:
                raise ImportSourceError(self._name(child.path), error.strerror or "") from error
            try:
                if not self.scan(child_fd, child, depth + 1, reader):
                    clean = False
            finally:
                os.close(child_fd)
            folder.folders.append(child)
        if clean:
            self.done += len(rows)
            folder.folders.clear()
            return True
        folder.rows = rows
        self._plan(fd, folder, same)
        folder.result = None
        return False

    def _open_child(self, fd: int, child: _Folder) -> int:
        """Opens a directory, also one that keeps its owner out in a checkout."""
        if not self.checkout:
            return os.open(child.name, _OPEN_DIRECTORY, dir_fd=fd)
        child_fd = open_unlocked(child.name, fd)
        child.mode = true_mode(child_fd)
        if child.mode & 0o500 != 0o500 and os.geteuid() != 0:
            self.unlocked.callback(os.close, kept := os.dup(child_fd))
            self.unlocked.callback(lock_again, kept)
        return child_fd

    def _rows(
        self, fd: int, folder: _Folder
    ) -> tuple[list[Row], list[tuple[bytes, os.stat_result]]]:
        rows: list[Row] = []
        below = []
        me, others = tuple(self.me), 0
        with os.scandir(fd) as listing:
            for item in listing:
                name = os.fsencode(item.name)
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                mode, ctime = status.st_mode, status.st_ctime_ns
                if mode & 0o170000 == 0o040000:
                    if (status.st_dev, status.st_ino) in self.skip or (
                        status.st_dev in self.skip_devices
                    ):
                        self._warn(_join(folder.path, name), "is an AmalgamFS store or mount")
                        continue
                    below.append((name, status))
                elif kind_of(mode) is None:
                    self._warn(_join(folder.path, name), f"is a {describe(mode)}")
                    continue
                elif mode & SET_ID_BITS and not self._keeps_set_id(status):
                    self.losses.note(_join(folder.path, name), SET_ID)
                    ctime = FRESH  # the cache may have it from when it was ours
                if ctime > self.fresh:
                    ctime = FRESH
                size, mtime = status.st_size, status.st_mtime_ns
                if not is_in_range(mtime):
                    self.losses.note(_join(folder.path, name), TIME)
                    mtime = mtime_of(status)
                if (status.st_uid, status.st_gid) != me:
                    others += 1
                rows.append((name, mode, status.st_ino, size, mtime, ctime, status.st_nlink))
        if self.owners is None:
            self.report.lost_owners += others
        return rows, below

    def _load_cached(self, folder: _Folder, encoded: bytes, reader: Reader) -> bool:
        if not self.use_cache:
            return False
        value = reader.get(Db.IMPORTS, self._key(folder))
        if value is None:
            return False
        try:
            old, result = split_folder(value)
            folder.result = result
            if old == encoded:
                return True
            folder.old_rows = {row[0]: row for row in decode_rows(old)}
            self._load_entries(folder, result)
        except (msgspec.DecodeError, CorruptObjectError):  # then it is read again
            folder.result, folder.old_rows = None, {}
        return False

    def _load_entries(self, folder: _Folder, result: FolderResult) -> None:
        folder.entries = {e.name: e for e in Directory(self.objects, NodeId(result.node))}

    def _plan(self, fd: int, folder: _Folder, same: bool) -> None:
        """Keeps the entries of rows that are as they were; reads links; queues files."""
        if same and folder.result is not None:
            try:
                self._load_entries(folder, folder.result)
            except CorruptObjectError:
                same = False
        elif self.checkout and folder.result is not None and not folder.entries:
            with contextlib.suppress(CorruptObjectError):
                self._load_entries(folder, folder.result)
        known, folder.entries = folder.entries, {}
        for at, row in enumerate(folder.rows):
            name, mode = row[0], row[1]
            entry = known.get(name)
            old = folder.old_rows.get(name)
            if entry is not None and (same or (old == row and row[5] != FRESH)):
                folder.entries[name] = entry
                self.done += 1
            elif mode & 0o170000 == 0o100000:
                if entry is not None and self.checkout and entry.mode & SET_ID_BITS & ~mode:
                    written = old or (None if folder.old_rows else row)
                    if written is not None and written[1] == mode:
                        self.written[folder, name] = entry
                self.batch.append((folder, at))
                self.batch_bytes += row[3]
                if self.batch_bytes > _BATCH_BYTES or len(self.batch) >= _BATCH_FILES:
                    self.submit()
            elif mode & 0o170000 != 0o040000:
                self._special(fd, folder, row)
                self.done += 1
            else:
                self.done += 1
        folder.old_rows = {}
        self.tell(None)

    def _special(self, fd: int, folder: _Folder, row: Row) -> None:
        kind = kind_of(row[1])
        target = b""
        if kind == Kind.SYMLINK:
            try:
                target = os.fsencode(os.readlink(row[0], dir_fd=fd))
            except FileNotFoundError:
                self._warn(_join(folder.path, row[0]), "vanished while it was read")
                return
        entry = Entry(row[0], int(kind or 0), stat.S_IMODE(row[1]), row[4], len(target), target)
        if self.owners is not None:
            try:
                status = os.stat(row[0], dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                self._warn(_join(folder.path, row[0]), "vanished while it was read")
                return
            entry = self._owned(folder, entry, status)
        folder.entries[row[0]] = entry

    def _owned(self, folder: _Folder, entry: Entry, status: os.stat_result) -> Entry:
        """Returns an entry with the owner that is kept of it, if any is."""
        if self.owners is None:
            return entry
        owner = self._owner(_join(folder.path, entry.name), entry.kind, status)
        return msgspec.structs.replace(entry, owner=owner)

    def _owner(self, path: bytes, kind: int, status: os.stat_result) -> Owner | None:
        if self.owners is None:
            return None
        was = None
        if self.owners.maps and self.before is not None:
            was = find(self.objects, self.before, path)
        like = was.owner if was is not None and was.kind == kind else None
        return self.owners.owner(status, like)

    # Reading what changed, in worker threads.

    def tell(self, total: int | None) -> None:
        """Tells of files, and of bytes: small files are counted when done, chunks as they come."""
        self.progress(self.done, total, max(self.report.read_bytes, self.sink.taken_bytes))

    def submit(self) -> None:
        if self.batch:
            self.futures.append((len(self.batch), self.pool.submit(self._read_batch, self.batch)))
            self.batch, self.batch_bytes = [], 0

    def _read_batch(self, batch: list[tuple[_Folder, int]]) -> tuple[int, int]:
        """Reads files and returns how many there were, and their bytes."""
        sizes: list[int | None] = []
        for folder, items in groupby(batch, key=lambda item: item[0]):
            fd = self._open_again(folder)
            try:
                sizes.extend(self._read_file(fd, folder, at) for _, at in items)
            finally:
                os.close(fd)
        read = [size for size in sizes if size is not None]
        return len(read), sum(read)

    def _open_again(self, folder: _Folder) -> int:
        """Opens a folder name by name, so that no link is followed that took a name's place."""
        names = []
        at: _Folder | None = folder
        while at is not None and at.parent is not None:
            names.append(at.name)
            at = at.parent
        fd = os.dup(self.root_fd)
        for name in reversed(names):
            try:
                below = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
            except OSError as error:
                raise SourceChangedError(folder.path) from error
            finally:
                os.close(fd)
            fd = below
        return fd

    def _read_file(self, directory: int, folder: _Folder, at: int) -> int | None:
        """Stores a file and returns its size; None if it has gone."""
        row = folder.rows[at]
        path = _join(folder.path, row[0])
        for attempt in range(_TRIES):
            try:
                open_it = open_file if self.checkout else _open
                fd = open_it(row[0], _OPEN, directory)
            except FileNotFoundError:
                self._warn(path, "vanished while it was read")
                folder.rows[at] = (*row[:5], FRESH, row[6])
                return None
            except OSError as error:
                raise ImportSourceError(self._name(path), error.strerror or "") from error
            try:
                before = os.fstat(fd)
                if not stat.S_ISREG(before.st_mode):
                    raise SourceChangedError(path)
                content, size = ingest(fd, before, self.sink, self.nodes.put)
                xattrs, complete = self._read_xattrs(fd, path)
                after = os.fstat(fd)
            finally:
                os.close(fd)
            if _same(before, after) and size == after.st_size:
                # A file that another took the place of since the scan is as good as the first.
                break
            if attempt == _TRIES - 1:
                raise SourceChangedError(path)
        mode = self._bits(after)
        written = self.written.get((folder, row[0]))
        if written is not None and (written.content, written.size) == (content, size):
            mode |= written.mode & SET_ID_BITS
        entry = Entry(row[0], Kind.FILE, mode, mtime_of(after), size, content, xattrs)
        entry = self._owned(folder, entry, after)
        fresh = after.st_ctime_ns != row[5] or after.st_ctime_ns > self.fresh or not complete
        folder.rows[at] = (
            row[0], after.st_mode, after.st_ino, size, mtime_of(after),
            FRESH if fresh else after.st_ctime_ns, after.st_nlink,
        )  # fmt: skip
        folder.entries[row[0]] = entry
        return size

    def _keeps_set_id(self, status: os.stat_result) -> bool:
        return self._keeps_all_bits or not has_set_id(status.st_mode) or is_ours(status)

    def _bits(self, status: os.stat_result) -> int:
        mode = stat.S_IMODE(status.st_mode)
        return mode if self._keeps_all_bits else arriving(mode, status)

    def _read_xattrs(self, fd: int, path: bytes) -> tuple[tuple[tuple[bytes, bytes], ...], bool]:
        """Returns the attributes that the tree keeps, and whether nobody misses another."""
        others: list[bytes] = []
        xattrs = read_xattrs(fd, others)
        if not others:
            return xattrs, True
        lost = [name for name in others if is_lost(name)]
        self.losses.note_attributes(path, lost)
        return xattrs, not lost

    # Building.

    def build(self, folder: _Folder) -> Entry:
        """Stores a folder's nodes from the leaves up and returns its entry."""
        result = folder.result
        mode, mtime = folder.mode, mtime_of(folder.status)
        owner = self._owner(folder.path, Kind.DIRECTORY, folder.status)
        if result is None:
            for child in folder.folders:
                folder.entries[child.name] = self.build(child)
            entry = directory_entry(
                self.nodes.put, [folder.entries[name] for name in sorted(folder.entries)],
                name=folder.name, mode=mode, mtime_ns=mtime, xattrs=folder.xattrs, owner=owner,
            )  # fmt: skip
            if entry.totals is not None:
                rows = encode_rows(folder.rows)
                result = folder_result(entry, entry.totals)
                self.records.append((self._key(folder), encode_folder(rows, result)))
            folder.entries = {}
            return entry
        totals = Totals(result.entries, 0, result.owners)
        return Entry(
            folder.name, Kind.DIRECTORY, mode, mtime, result.size, result.node, folder.xattrs, None,
            totals, owner,
        )  # fmt: skip

    def join_links(self) -> None:
        """Finds the names of the tree that are one file, and marks them."""
        groups: dict[tuple[int, Entry], list[tuple[tuple[_Folder, bytes], Entry]]] = {}
        for folder, row in self.linked:
            entry = folder.entries.get(row[0])
            if entry is not None:
                # What was read from names of one file can differ when others change it meanwhile.
                alike = msgspec.structs.replace(entry, name=b"", link=None)
                groups.setdefault((row[2], alike), []).append(((folder, row[0]), entry))
        ordered = sorted(
            (
                sorted(members, key=lambda m: _join(m[0][0].path, m[0][1]))
                for members in groups.values()
            ),
            key=lambda members: _join(members[0][0][0].path, members[0][0][1]),
        )
        for (folder, name), entry in number_groups(ordered):
            folder.entries[name] = entry

    # Small things.

    def _key(self, folder: _Folder) -> bytes:
        return cache_key(self.prefix, folder.path)

    def _name(self, path: bytes) -> str:
        return os.path.join(self.root, os.fsdecode(path)) if path else self.root

    def _warn(self, path: bytes, why: str) -> None:
        self.report.warnings.append(f"left out {self._name(path)!r}: it {why}")


def import_directory(
    store: Store,
    objects: Objects,
    path: str,
    *,
    finish: Callable[[Writer, Entry], T],
    store_path: str | None = None,
    use_cache: bool = True,
    set_id: bool = False,
    checkout: bool = False,
    owners: bool = False,
    before: Entry | None = None,
    progress: Progress | None = None,
) -> tuple[T, Entry, ImportReport]:
    """Imports the directory at `path`; returns what `finish` said, the root and a report.

    `finish` runs in the transaction that stores the tree, and makes something refer to it. The
    caller holds the lease on objects. A store inside of the directory (`store_path`, or another
    AmalgamFS mount) is left out with a warning. Without `use_cache` every file is read, and what
    the store has of it is checked, and stored again if it is damaged. Set-id bits are kept of the
    user's own files, with `owners` or `set_id` of all. A `checkout`
    has files that were written without the set-id bits of their tree, and get them again; what its
    owner cannot read is made readable for as long as it takes. With `owners` they are kept;
    `before` is the tree that the directory was made of, which tells an ordinary user whose files
    they are.

    Raises ImportSourceError, SourceChangedError.
    """
    job = _Import(
        store, objects, os.path.abspath(path), use_cache=use_cache, progress=progress,
        set_id=set_id, checkout=checkout, owners=owners, before=before,
    )  # fmt: skip
    job.leave_out(store_path)
    root = job.run()

    def change(writer: Writer) -> T:
        job.save(writer)
        return finish(writer, root)

    return store.write(change), root, job.report


def read_directory(
    store: Store,
    objects: Objects,
    path: str,
    *,
    sink: ChunkSink,
    nodes: NodeBuffer,
    store_path: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Gives all chunks and nodes of the directory at `path` to `sink` and `nodes`, as an import.

    Raises ImportSourceError, SourceChangedError.
    """
    job = _Import(
        store, objects, os.path.abspath(path),
        use_cache=False, progress=progress, sink=sink, nodes=nodes,
    )  # fmt: skip
    job.leave_out(store_path)
    job.run()


def _open(name: bytes, flags: int, dir_fd: int) -> int:
    return os.open(name, flags, dir_fd=dir_fd)


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def _same(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_ino, a.st_size, a.st_mtime_ns, a.st_ctime_ns) == (
        b.st_ino, b.st_size, b.st_mtime_ns, b.st_ctime_ns,
    )  # fmt: skip
