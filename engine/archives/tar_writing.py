"""Tar out: a tree becomes an archive, in the pax format, the same bytes for the same tree.

Members come in the order of the tree's walk, the root first as `./`. Further names of a file are
hard links. What headers look like is in `tar_headers`. They give every file to root, so set-id
bits are left out unless they are asked for.

A file with holes is a sparse member in GNU's format 1.0 (tar's manual, "Storing Sparse Files"):
before its data stands a map, lines of decimal numbers: how many pieces, then offset and length
of each. A piece of data is a multiple of 512 bytes long, for which it takes zeros of the hole
after it, unless it is the last. A file that ends in a hole has an empty piece at its end.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import msgspec

from engine.archives.tar_headers import filled, header
from engine.host.set_id import SET_ID
from engine.progress import Progress
from engine.storage import content
from engine.storage.chunking import SMALLEST_CHUNK
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import walk

_RECORD = 20 * tarfile.BLOCKSIZE
_PADDING = bytes(tarfile.BLOCKSIZE)
_SMALL = 256 << 10
"""Files up to this size are read with others, so many files or bytes at a time."""
_BATCH_FILES, _BATCH_BYTES = 64, 1 << 20
LONGEST_MAP = 4 << 20
"""A map of more bytes is not written, but the holes as zeros: readers refuse long headers."""

Piece = tuple[int, int]
"""A run of data in a file: offset and length."""


class TarReport(msgspec.Struct):
    """What was written: members, and bytes before any compression.

    `set_id_dropped` files lost their set-id bits.
    """

    entries: int = 0
    bytes: int = 0
    set_id_dropped: int = 0


def everything(objects: Objects, root: Entry) -> Iterator[tuple[bytes, Entry]]:
    """Yields what an archive of a whole tree has: (path, entry), the root first."""
    yield b".", root
    yield from walk(objects, root)


class TarWriter:
    """Writes one archive to a stream that need not seek."""

    def __init__(
        self, objects: Objects, out: IO[bytes], tell: Callable[[], None] = lambda: None,
        *, set_id: bool = False,
    ) -> None:  # fmt: skip
        """`tell` is called for each chunk of a file: `report` has changed then.

        Set-id bits are written with `set_id` only.
        """
        self._dropped = 0 if set_id else SET_ID
        self._objects, self._out, self._tell = objects, out, tell
        self._linked: dict[bytes, bytes] = {}
        self.report = TarReport()

    def add(self, path: bytes, entry: Entry, data: bytes | None = None) -> None:
        """Writes a member; `data` is a file's content, if it was read already.

        Raises what reading the content does, and OSError of the stream.
        """
        first = None
        if entry.mode & self._dropped and entry.kind == Kind.FILE:
            entry = msgspec.structs.replace(entry, mode=entry.mode & ~self._dropped)
            self.report.set_id_dropped += 1
        if entry.link is not None:
            first = self._linked.setdefault(entry.link.group, path)
        if first is not None and first != path:
            self.write(header(path, entry, first))
        elif data is not None:
            self.write(b"".join((header(path, entry, None), data, padding(entry.size))))
        else:
            head, pieces = opening(self._objects, path, entry)
            self.write(head)
            for start, size in pieces:
                self._data(entry, start, start + size)
        self.report.entries += 1

    def link(self, path: bytes, entry: Entry, target: bytes) -> None:
        """Writes another name of a file that is not in this archive."""
        self.write(header(path, entry, target))

    def mark(self, path: bytes) -> None:
        """Writes an empty file with no attributes: a whiteout."""
        self.write(header(path, Entry(b"", Kind.FILE, 0o644, 0, 0, b""), None))
        self.report.entries += 1

    def end(self) -> None:
        """Writes the archive's end."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self.report.bytes % _RECORD))

    def _data(self, entry: Entry, start: int, end: int) -> None:
        for part in content.stream(self._objects, entry, start, end):
            self.write(part)
            self._tell()
        self.write(padding(end - start))

    def write(self, data: bytes | memoryview) -> None:
        """Writes bytes of a member that was made elsewhere."""
        self._out.write(data)
        self.report.bytes += len(data)


def write_tar(
    objects: Objects,
    members: Iterable[tuple[bytes, Entry]],
    out: IO[bytes],
    *,
    total: int | None = None,
    set_id: bool = False,
    progress: Progress | None = None,
) -> TarReport:
    """Writes members and the end; see `everything`, and `TarWriter` for `set_id`."""

    def tell() -> None:
        if progress is not None:
            progress(writer.report.entries, total, writer.report.bytes)

    writer = TarWriter(objects, out, tell, set_id=set_id)
    for path, entry, data in read_ahead(objects, members):
        writer.add(path, entry, data)
        tell()
    writer.end()
    return writer.report


def read_ahead(
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
    with objects.chunks() as chunk:
        return [small(entry, chunk) for _, entry in batch]


def small(entry: Entry, chunk: content.ReadChunk) -> bytes | None:
    """Returns the content of a small file without holes and further names; else None.

    `chunk` is what `Objects.chunks` has given. Raises what reading the content does.
    """
    if entry.kind != Kind.FILE or entry.link is not None or entry.size > _SMALL:
        return None
    if isinstance(entry.content, bytes):
        return entry.content
    return content.read_small(entry, chunk)


def padding(size: int) -> bytes:
    """Returns the zeros that follow so many bytes of data."""
    return _PADDING[: -size % tarfile.BLOCKSIZE]


def opening(objects: Objects, path: bytes, entry: Entry) -> tuple[bytes, list[Piece]]:
    """Returns what a member begins with, and the pieces of its content that follow.

    After each piece come zeros up to a whole block. Not for further names of a file.
    """
    if entry.kind != Kind.FILE:
        return header(path, entry, None), []
    if sparse := _sparse_map(objects, entry):
        pieces, text = sparse
        size = len(text) + sum(size for _, size in pieces)
        return header(path, entry, None, size) + text, pieces
    return header(path, entry, None), [(0, entry.size)] if entry.size else []


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
    return (pieces, filled(text)) if len(text) <= LONGEST_MAP else None
