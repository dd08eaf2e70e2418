"""Tar out: a tree becomes an archive, in the pax format, the same bytes for the same tree.

Members come in the order of the tree's walk, the root first as `./`; owners are 0. Times to the
nanosecond, `user.*` attributes (SCHILY.xattr), long names and names that are no UTF-8 stand in
extended headers. Further names of a file are hard links.

A file with holes is a sparse member in GNU's format 1.0 (tar's manual, "Storing Sparse Files"):
before its data stands a map, lines of decimal numbers: how many pieces, then offset and length
of each. A piece of data is a multiple of 512 bytes long, for which it takes zeros of the hole
after it, unless it is the last. A file that ends in a hole has an empty piece at its end.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import msgspec

from engine.progress import Progress
from engine.storage import content
from engine.storage.chunking import SMALLEST_CHUNK
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import walk

_RECORD = 20 * tarfile.BLOCKSIZE
_TYPES = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
}
_LONGEST = 8**11
"""A size or time from here on does not fit into a plain header."""
_PADDING = bytes(tarfile.BLOCKSIZE)
_SMALL = 256 << 10
"""Files up to this size are read with others, so many files or bytes at a time."""
_BATCH_FILES, _BATCH_BYTES = 64, 1 << 20
LONGEST_MAP = 4 << 20
"""A map of more bytes is not written, but the holes as zeros: readers refuse long headers."""

Piece = tuple[int, int]
"""A run of data in a file: offset and length."""


class TarReport(msgspec.Struct):
    """What was written: members, and bytes before any compression."""

    entries: int = 0
    bytes: int = 0


def everything(objects: Objects, root: Entry) -> Iterator[tuple[bytes, Entry]]:
    """Yields what an archive of a whole tree has: (path, entry), the root first."""
    yield b".", root
    yield from walk(objects, root)


class TarWriter:
    """Writes one archive to a stream that need not seek."""

    def __init__(
        self, objects: Objects, out: IO[bytes], tell: Callable[[], None] = lambda: None
    ) -> None:
        """`tell` is called for each chunk of a file: `report` has changed then."""
        self._objects, self._out, self._tell = objects, out, tell
        self._linked: dict[bytes, bytes] = {}
        self.report = TarReport()

    def add(self, path: bytes, entry: Entry, data: bytes | None = None) -> None:
        """Writes a member; `data` is a file's content, if it was read already.

        Raises what reading the content does, and OSError of the stream.
        """
        first = None
        if entry.link is not None:
            first = self._linked.setdefault(entry.link.group, path)
        if first is not None and first != path:
            self._write(_header(path, entry, first))
        elif data is not None:
            self._write(
                b"".join(
                    (_header(path, entry, None), data, _PADDING[: -entry.size % tarfile.BLOCKSIZE])
                )
            )
        elif entry.kind == Kind.FILE and (sparse := _sparse_map(self._objects, entry)):
            pieces, text = sparse
            self._write(_header(path, entry, None, len(text) + sum(size for _, size in pieces)))
            self._write(text)
            for start, size in pieces:
                self._data(entry, start, start + size)
        else:
            self._write(_header(path, entry, None))
            if entry.kind == Kind.FILE and entry.size:
                self._data(entry, 0, entry.size)
        self.report.entries += 1

    def link(self, path: bytes, entry: Entry, target: bytes) -> None:
        """Writes another name of a file that is not in this archive."""
        self._write(_header(path, entry, target))

    def mark(self, path: bytes) -> None:
        """Writes an empty file with no attributes: a whiteout."""
        self._write(_header(path, Entry(b"", Kind.FILE, 0o644, 0, 0, b""), None))
        self.report.entries += 1

    def end(self) -> None:
        """Writes the archive's end."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.report.bytes % _RECORD))

    def _data(self, entry: Entry, start: int, end: int) -> None:
        for part in content.stream(self._objects, entry, start, end):
            self._write(part)
            self._tell()
        self._write(bytes((start - end) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self.report.bytes += len(data)


def write_tar(
    objects: Objects,
    members: Iterable[tuple[bytes, Entry]],
    out: IO[bytes],
    *,
    total: int | None = None,
    progress: Progress | None = None,
) -> TarReport:
    """Writes members and the end; see `everything`."""

    def tell() -> None:
        if progress is not None:
            progress(writer.report.entries, total, writer.report.bytes)

    writer = TarWriter(objects, out, tell)
    for path, entry, data in _read_ahead(objects, members):
        writer.add(path, entry, data)
        tell()
    writer.end()
    return writer.report


def _read_ahead(
    objects: Objects, members: Iterable[tuple[bytes, Entry]]
) -> Iterator[tuple[bytes, Entry, bytes | None]]:
    """Yields members in their order, small files with their content.

    One view of the store serves many: opening one takes longer than reading a small file.
    """
    for batch in _batches(members):
        for (path, entry), data in zip(batch, _contents(objects, batch), strict=True):
            yield path, entry, data


def _batches(
    members: Iterable[tuple[bytes, Entry]],
) -> Iterator[list[tuple[bytes, Entry]]]:
    batch: list[tuple[bytes, Entry]] = []
    size = 0
    for member in members:
        batch.append(member)
        size += min(member[1].size, _SMALL)
        if len(batch) >= _BATCH_FILES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _contents(objects: Objects, batch: list[tuple[bytes, Entry]]) -> list[bytes | None]:
    """Returns the contents of small files without holes and further names; else None."""
    found: list[bytes | None] = []
    with objects.chunks() as chunk:
        for _, entry in batch:
            if entry.kind != Kind.FILE or entry.link is not None or entry.size > _SMALL:
                found.append(None)
            elif isinstance(entry.content, bytes):
                found.append(entry.content)
            else:
                found.append(content.read_small(entry, chunk))
    return found


def _sparse_map(objects: Objects, entry: Entry) -> tuple[list[Piece], bytes] | None:
    """Returns the pieces of a file with holes, and the map of them; None for another file."""
    if entry.size <= SMALLEST_CHUNK or isinstance(entry.content, bytes):
        return None  # by the format it is one chunk
    runs: list[tuple[int, int]] = []
    at = 0
    for ref in content.pieces(objects, entry):
        at += ref.length
        if ref.id is None:
            continue
        begins = at - ref.length
        if runs:
            start, end = runs[-1]
            end += (start - end) % tarfile.BLOCKSIZE
            if end >= begins:
                runs[-1] = start, at
                continue
            runs[-1] = start, end
        runs.append((begins, at))
    if runs == [(0, at)]:
        return None
    pieces = [(start, end - start) for start, end in runs]
    listed = pieces if runs and runs[-1][1] == at else [*pieces, (at, 0)]
    text = b"%d\n" % len(listed) + b"".join(b"%d\n%d\n" % piece for piece in listed)
    return (pieces, _filled(text)) if len(text) <= LONGEST_MAP else None


def _header(path: bytes, entry: Entry, target: bytes | None, sparse: int | None = None) -> bytes:
    """Returns a member's header, after the extended one if it needs that.

    `sparse` is how many bytes a sparse member has in the archive, its map included.

    By hand: tarfile takes three times as long, and cannot write attributes' names that are no
    UTF-8.
    """
    kind = _TYPES[Kind(entry.kind)] if target is None else tarfile.LNKTYPE
    plain = path
    if target is None and entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
        target = entry.content
    if entry.kind == Kind.DIRECTORY:
        plain = path = path + b"/"
    size = entry.size if kind == tarfile.REGTYPE else 0
    if sparse is not None:
        above, slash, last = path.rpartition(b"/")
        size, plain = sparse, above + slash + b"GNUSparseFile.0/" + last
    seconds, ns = divmod(entry.mtime_ns, 1_000_000_000)
    extended: list[tuple[bytes, bytes]] = []
    if sparse is not None:
        extended += [
            (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", path), (b"GNU.sparse.realsize", b"%d" % entry.size),
        ]  # fmt: skip
    elif len(path) > 100 or not path.isascii():
        extended.append((b"path", path))
    if target is not None and (len(target) > 100 or not target.isascii()):
        extended.append((b"linkpath", target))
    if size >= _LONGEST and sparse is None:  # for a sparse one tarfile takes that wrong
        extended.append((b"size", b"%d" % size))
    if ns or not 0 <= seconds < _LONGEST:
        extended.append((b"mtime", _decimal(entry.mtime_ns)))
    if kind != tarfile.LNKTYPE:
        for name, value in entry.xattrs:
            escaped = name.replace(b"%", b"%25").replace(b"=", b"%3D")
            extended.append((b"SCHILY.xattr." + escaped, value))
    head = _block(
        plain, entry.mode, size if size < _LONGEST or sparse is not None else 0,
        seconds if 0 <= seconds < _LONGEST else 0, kind, target or b"",
    )  # fmt: skip
    if not extended:
        return head
    if not all(_is_utf8(value) for _, value in extended):
        extended.insert(0, (b"hdrcharset", b"BINARY"))
    records = b"".join(_record(*pair) for pair in extended)
    before = _block(b"././@PaxHeader", 0, len(records), 0, tarfile.XHDTYPE, b"")
    return before + _filled(records) + head


def _block(path: bytes, mode: int, size: int, mtime: int, kind: bytes, target: bytes) -> bytes:
    """Returns a ustar header; what is too long for it stands in an extended one before it."""
    digits = b"%011o\0" % size if size < _LONGEST else b"\x80" + size.to_bytes(11, "big")
    head = b"%b%07o\0%07o\0%07o\0%b%011o\0        %b%bustar\00000%183b" % (
        path[:100].ljust(100, b"\0"), mode, 0, 0, digits, mtime, kind,
        target[:100].ljust(100, b"\0"), b"",
    )  # fmt: skip
    head = head[:265] + b"\0" * 64 + b"0000000\0" * 2 + b"\0" * 167
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _filled(data: bytes) -> bytes:
    """Returns whole blocks."""
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _record(key: bytes, value: bytes) -> bytes:
    """Returns `LENGTH KEY=VALUE\\n`; the length counts its own digits."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d%b" % (length, rest)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decimal(ns: int) -> bytes:
    seconds, fraction = divmod(abs(ns), 1_000_000_000)
    text = f"{'-' if ns < 0 else ''}{seconds}.{fraction:09d}"
    return text.rstrip("0").rstrip(".").encode()
