"""Filling: an empty directory gets all that is in a tree.

One thread walks the tree and makes directories and links; others write the files, many small
ones at a time, a large one in ranges. A directory gets its attributes when all in it is made.
Everything is named relative to the descriptor of the directory that it is in, and no symbolic
link is ever followed.
"""

import contextlib
import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from engine.errors import EngineError
from engine.host.hostfs import reserve, set_times, write_xattrs
from engine.host.owners import give
from engine.host.set_id import EVERY_BIT
from engine.host.unlocking import unlocked
from engine.plain.stat_cache import FRESH, Row, encode_folder, encode_rows, folder_result, row_of
from engine.progress import Progress, unheard
from engine.storage import content
from engine.storage.nodes import DEEPEST, Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_BATCH_FILES, _BATCH_BYTES = 64, 2 << 20
_RANGE_BYTES = 16 << 20
"""A file larger than this is written in ranges of this size."""
_WAITING = 32
"""How many batches wait for a thread at most; each keeps a directory open."""
_THREADS = min(4, os.cpu_count() or 1)
_FEW_ENTRIES, _FEW_BYTES = 256, 4 << 20
"""A tree of no more than this is written without threads."""


class CheckoutRefusedError(EngineError):
    """The target or the tree does not allow a checkout. `path` names what is in the way."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot check out to {path!r}: {why}")
        self.path, self.why = path, why


class CheckoutReport(msgspec.Struct):
    """What a checkout made. `tracked`: it can be switched, and says what was changed in it.

    `set_id_dropped` files lost their set-id bits; see `set_id`.
    """

    entries: int = 0
    bytes: int = 0
    tracked: bool = False
    set_id_dropped: int = 0


Rows = list[tuple[bytes, bytes]]
"""Paths of folders with what the stat cache keeps of them."""


def write_entry(
    objects: Objects, fd: int, entry: Entry, name: bytes, chunk: content.ReadChunk | None = None,
    *, bits: int = EVERY_BIT,
) -> os.stat_result | None:  # fmt: skip
    """Makes what is not a directory as `name` in an open directory, with all its attributes.

    A file gets those permission bits that are in `bits`. Returns the status of a file, which is
    then as it will stay. Raises FileExistsError.
    """
    if entry.kind == Kind.FILE:
        file = open_new(fd, entry, name)
        try:
            content.write_out(objects, entry, file, chunk)
            return dress_file(file, entry, bits)
        finally:
            os.close(file)
    if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
        os.symlink(entry.content, name, dir_fd=fd)
    else:
        os.mkfifo(name, 0o600, dir_fd=fd)
    give(name, entry.owner, dir_fd=fd)
    if entry.kind == Kind.FIFO:
        os.chmod(name, entry.mode, dir_fd=fd)
    set_times(name, entry.mtime_ns, dir_fd=fd)
    return None


def open_new(fd: int, entry: Entry, name: bytes) -> int:
    """Makes a file and opens it. Its mode is mostly right at once, which saves a call."""
    # An owner without the right to write may not set attributes, even of a file just made.
    return os.open(name, _CREATE, 0o600 if entry.xattrs else entry.mode & 0o777, dir_fd=fd)


def dress_file(file: int, entry: Entry, bits: int = EVERY_BIT) -> os.stat_result:
    """Gives an open file its attributes; nothing is written to it afterwards."""
    if entry.xattrs:
        write_xattrs(file, entry.xattrs)
    if entry.owner is not None:
        give(file, entry.owner)
    os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
    status = os.fstat(file)
    if stat.S_IMODE(status.st_mode) != entry.mode & bits:
        os.fchmod(file, entry.mode & bits)
        status = os.fstat(file)
    return status


def dress_directory(fd: int, entry: Entry) -> None:
    """Gives an open directory its attributes; nothing is made in it afterwards."""
    write_xattrs(fd, entry.xattrs)
    give(fd, entry.owner)
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def open_way(root_fd: int, way: list[bytes]) -> int:
    """Opens a directory name by name, following no link. Raises OSError."""
    fd = os.dup(root_fd)
    for name in way:
        try:
            below = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


@contextlib.contextmanager
def way_opened(root_fd: int, way: list[bytes]) -> Iterator[int]:
    """Gives a directory by its names, open, though some on the way keep their owner out."""
    with contextlib.ExitStack() as stack:
        fd = root_fd
        for name in way:
            fd = stack.enter_context(unlocked(name, fd))
        yield fd


class _Folder:
    """A directory that is being made."""

    __slots__ = ("entry", "fd", "late", "parent", "pending", "rows", "way")

    def __init__(self, parent: "_Folder | None", entry: Entry, fd: int) -> None:
        self.parent, self.entry, self.fd = parent, entry, fd
        self.way: list[bytes] = [*parent.way, entry.name] if parent else []
        self.rows: list[Row] = []
        self.late: list[bytes] = []
        self.pending = 1


class Fill:
    """Makes all that is in a tree in the open, empty directory `fd`, which stays open."""

    def __init__(
        self, objects: Objects, root: Entry, fd: int, target: str, progress: Progress | None,
        *, bits: int = EVERY_BIT,
    ) -> None:  # fmt: skip
        """Gets ready. Files get those of their permission bits that are in `bits`."""
        self.objects, self.root, self.root_fd, self.target = objects, root, fd, target
        self.report = CheckoutReport()
        self._bits, self._dropped = bits, EVERY_BIT & ~bits
        self.rows: Rows = []
        self._progress = progress or unheard
        self._lock = threading.Lock()
        self._groups: dict[bytes, tuple[_Folder, bytes]] = {}
        self._late: list[_Folder] = []
        self._closed: list[_Folder] = []
        self._open: dict[_Folder, None] = {}
        self._futures: deque[Future[None]] = deque()
        self._large: dict[_Large, None] = {}
        entries = root.totals.entries if root.totals else 0
        few = entries <= _FEW_ENTRIES and root.size <= _FEW_BYTES
        self._pool = None if few else ThreadPoolExecutor(_THREADS, "checkout")

    def run(self) -> None:
        """Makes it, with the attributes of the root last."""
        root = _Folder(None, self.root, self.root_fd)
        try:
            self._fill(root, 0)
            while self._futures:
                self._futures.popleft().result()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            for folder in self._open:
                os.close(folder.fd)
            for large in self._large:
                os.close(large.file)
        self._finish(root)
        self._progress(self.report.bytes, self.root.size)

    def _path(self, folder: _Folder, name: bytes = b"") -> str:
        parts = [*folder.way, *([name] if name else [])]
        return os.path.join(self.target, os.fsdecode(b"/".join(parts)))

    @contextlib.contextmanager
    def _named(self, folder: _Folder, name: bytes) -> Iterator[None]:
        """Gives errors about a name in a directory the whole path, and says what they mean."""
        try:
            yield
        except OSError as error:
            raise self._explained(error, folder, name) from error

    def _explained(self, error: OSError, folder: _Folder, name: bytes) -> Exception:
        path = self._path(folder, name)
        if isinstance(error, FileExistsError):
            # All that is there was made here, from names that differ.
            return CheckoutRefusedError(
                path, "the filesystem takes it for a name that is in the directory already, "
                "as one does that does not tell upper from lower case",
            )  # fmt: skip
        if error.errno in {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}:
            return CheckoutRefusedError(
                path, f"the filesystem cannot have that name: {error.strerror}"
            )
        return OSError(error.errno, error.strerror, path)

    # The walk, in the caller's thread.

    def _fill(self, folder: _Folder, depth: int) -> None:
        if depth > DEEPEST:
            raise CheckoutRefusedError("", f"the tree is deeper than {DEEPEST} directories")
        batch: list[Entry] = []
        size = 0
        for entry in Directory(self.objects, directory_id(folder.entry)):
            if entry.kind == Kind.DIRECTORY:
                with self._named(folder, entry.name):
                    os.mkdir(entry.name, 0o700, dir_fd=folder.fd)
                    fd = os.open(entry.name, OPEN_DIRECTORY, dir_fd=folder.fd)
                child = _Folder(folder, entry, fd)
                with self._lock:
                    self._open[child] = None
                    folder.pending += 1
                self._fill(child, depth + 1)
                self._release(child)
            elif entry.link is not None:
                self._make_linked(folder, entry)
            elif entry.size > _RANGE_BYTES and self._pool is not None:
                self._make_large(folder, entry)
            else:
                batch.append(entry)
                size += entry.size
                if size > _BATCH_BYTES or len(batch) >= _BATCH_FILES:
                    self._submit(folder, batch)
                    batch, size = [], 0
        if batch:
            self._submit(folder, batch)

    def _make_linked(self, folder: _Folder, entry: Entry) -> None:
        """Makes one of a file's names here and now; its row is known at the end."""
        assert entry.link is not None
        first = self._groups.get(entry.link.group)
        if first is None:
            self._make(folder, [entry])
            self._groups[entry.link.group] = (folder, entry.name)
        else:
            with self._named(folder, entry.name):
                there = open_way(self.root_fd, first[0].way)
                try:
                    os.link(
                        first[1], entry.name, src_dir_fd=there, dst_dir_fd=folder.fd,
                        follow_symlinks=False,
                    )  # fmt: skip
                finally:
                    os.close(there)
            self._account(1, entry.size if entry.kind == Kind.FILE else 0)
        folder.late.append(entry.name)

    def _submit(self, folder: _Folder, batch: list[Entry]) -> None:
        if self._pool is None:
            self._make(folder, batch)
            return
        with self._lock:
            folder.pending += 1
        self._queue(self._make_batch, folder, batch)

    def _queue(self, task: Callable[..., None], *arguments: object) -> None:
        assert self._pool is not None
        self._futures.append(self._pool.submit(task, *arguments))
        while len(self._futures) > _WAITING:
            self._futures.popleft().result()
        while self._futures and self._futures[0].done():
            self._futures.popleft().result()

    # The files, in any thread.

    def _make_batch(self, folder: _Folder, batch: list[Entry]) -> None:
        self._make(folder, batch)
        self._release(folder)

    def _make(self, folder: _Folder, batch: list[Entry]) -> None:
        rows = []
        size = dropped = 0
        with self.objects.chunks() as chunk:
            for entry in batch:
                try:
                    status = write_entry(
                        self.objects, folder.fd, entry, entry.name, chunk, bits=self._bits
                    )
                    if status is None:
                        status = os.stat(entry.name, dir_fd=folder.fd, follow_symlinks=False)
                except OSError as error:
                    raise self._explained(error, folder, entry.name) from error
                rows.append(row_of(entry.name, status))
                if entry.kind == Kind.FILE:
                    size += entry.size
                    dropped += bool(entry.mode & self._dropped)
        folder.rows += rows
        self._account(len(batch), size, dropped)

    def _account(self, entries: int, size: int, dropped: int = 0) -> None:
        with self._lock:
            self.report.set_id_dropped += dropped
            self.report.entries += entries
            self.report.bytes += size
            self._progress(self.report.bytes, self.root.size)

    def _make_large(self, folder: _Folder, entry: Entry) -> None:
        """Makes a file whose ranges are written by several threads, the last of which ends it."""
        with self._named(folder, entry.name):
            file = open_new(folder.fd, entry, entry.name)
        large = _Large(entry, file)
        with self._lock:
            self._large[large] = None
            folder.pending += 1
        try:
            with self._named(folder, entry.name):
                os.ftruncate(file, entry.size)
            done = 0
            for start, end in content.data_ranges(self.objects, entry, _RANGE_BYTES):
                with self._lock:
                    large.pending += 1
                self._account(0, start - done)  # a hole
                reserve(file, start, end - start)
                self._queue(self._make_range, folder, large, start, end)
                done = end
            self._account(0, entry.size - done)
        except BaseException:
            large.failed = True
            raise
        finally:
            self._end_range(folder, large)

    def _make_range(self, folder: _Folder, large: "_Large", start: int, end: int) -> None:
        try:
            with self._named(folder, large.entry.name):
                content.write_range(self.objects, large.entry, large.file, start, end)
            self._account(0, end - start)
        except BaseException:
            large.failed = True
            raise
        finally:
            self._end_range(folder, large)

    def _end_range(self, folder: _Folder, large: "_Large") -> None:
        with self._lock:
            large.pending -= 1
            if large.pending or large.failed:
                return  # what stopped it is on its way to the caller
            del self._large[large]
        try:
            status = dress_file(large.file, large.entry, self._bits)
            folder.rows.append(row_of(large.entry.name, status))
        finally:
            os.close(large.file)
        self._account(1, 0, bool(large.entry.mode & self._dropped))
        self._release(folder)

    # The directories' attributes.

    def _release(self, folder: _Folder) -> None:
        """Ends a directory when nothing is made in it any more, and then maybe those around it."""
        at: _Folder | None = folder
        while at is not None:
            with self._lock:
                at.pending -= 1
                if at.pending or at.parent is None:
                    return
                self.report.entries += 1
            self._end(at, at.parent)
            at = at.parent

    def _end(self, folder: _Folder, parent: _Folder) -> None:
        # An ordinary user could not enter it again to link what is in it.
        closed = folder.entry.mode & 0o500 != 0o500
        if not closed:
            with self._named(folder, b""):
                dress_directory(folder.fd, folder.entry)
        row = row_of(folder.entry.name, os.fstat(folder.fd))
        parent.rows.append((*row[:5], FRESH, row[6]) if closed else row)
        with self._lock:
            if closed:
                self._closed.append(folder)
            del self._open[folder]
        os.close(folder.fd)
        self._keep(folder)

    def _keep(self, folder: _Folder) -> None:
        if folder.late:
            self._late.append(folder)
            return
        folder.rows.sort()
        entry = folder.entry
        if entry.totals is not None:
            result = folder_result(entry, entry.totals)
            value = encode_folder(encode_rows(folder.rows), result)
            self.rows.append((b"/".join(folder.way), value))
        folder.rows = []

    def _finish(self, root: _Folder) -> None:
        """Does what had to wait for the last link."""
        self._keep(root)
        late, self._late = self._late, []
        for folder in late:
            names = set(folder.late)
            fd = open_way(self.root_fd, folder.way)
            try:
                folder.rows = [row for row in folder.rows if row[0] not in names] + [
                    row_of(name, os.stat(name, dir_fd=fd, follow_symlinks=False)) for name in names
                ]
            finally:
                os.close(fd)
            folder.late = []
            self._keep(folder)
        for folder in self._closed:
            fd = open_way(self.root_fd, folder.way)
            try:
                dress_directory(fd, folder.entry)
            finally:
                os.close(fd)
        dress_directory(self.root_fd, self.root)


class _Large:
    """A large file that is being written in ranges."""

    __slots__ = ("entry", "failed", "file", "pending")

    def __init__(self, entry: Entry, file: int) -> None:
        self.entry, self.file = entry, file
        self.pending, self.failed = 1, False
