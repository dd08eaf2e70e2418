"""File contents: bytes into chunks, holes and lists, and back.

What a file's content looks like is in `nodes`. Holes are what the host's filesystem says is a
hole; they are stored as such and read as zeros, so a sparse file costs what it holds.
"""

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from engine.errors import CorruptObjectError, EngineError
from engine.host.forks import ModuleLock
from engine.ids import ChunkId, NodeId, digest
from engine.storage.chunking import LARGEST_CHUNK, SMALLEST_CHUNK, cut
from engine.storage.nodes import (
    INLINE_BYTES,
    LIST_REFS,
    LONGEST_REFS,
    TALLEST,
    Entry,
    Kind,
    ListNode,
    Ref,
    list_node,
)
from engine.storage.objects import ChunkSink, Objects, PutNode

Content = bytes | tuple[Ref, ...]
PutChunk = Callable[[bytes | memoryview], ChunkId]
Fill = Callable[[memoryview], int]
"""Reads into a buffer; returns how many bytes, 0 at the end only."""

WINDOW_BYTES = 4 << 20
"""How much of a file is in memory at once while it is chunked."""

_cutting = ModuleLock()
"""Held while a window is cut: the chunker holds the GIL, and threads that wait for it in turns
take longer than one after the other."""

_ZEROS = memoryview(bytes(1 << 20))
"""What a hole reads as, piece by piece."""


class WindowSink(Protocol):
    """Takes chunks a window at a time, and says where the next window is read to."""

    def window(self, size: int) -> bytearray:
        """Returns a buffer of `size` bytes, for the caller until it is put."""

    def put_window(self, window: bytearray, chunks: list[tuple[ChunkId, memoryview]]) -> None:
        """Stores chunks, soon, that are parts of the window, which is the sink's again."""


class SourceChangedError(EngineError):
    """A file that is being read is being written by somebody else."""

    def __init__(self, path: bytes) -> None:
        super().__init__(f"{os.fsdecode(path)!r} changed while it was read")
        self.path = path


def ingest(fd: int, status: os.stat_result, sink: ChunkSink, put: PutNode) -> tuple[Content, int]:
    """Reads an open regular file to its end and stores it; returns content and size.

    Blocks on the disk. The size is what was read, which the caller compares with what it
    expected. Sparse files are read around their holes.
    """
    size = status.st_size
    if size <= SMALLEST_CHUNK:
        data = os.read(fd, SMALLEST_CHUNK + 1)
        if len(data) <= INLINE_BYTES:
            return data, len(data)
        if len(data) <= SMALLEST_CHUNK:
            return (Ref(sink.put(data), len(data), 0),), len(data)
    refs: list[Ref] = []
    at = 0
    sparse = status.st_blocks * 512 < size
    for start, end in _data_ranges(fd, size) if sparse else [(0, None)]:
        if start > at:
            refs.append(Ref(None, start - at, 0))
            at = start
        for ref in chunks_of(_filler(fd, start, end), sink):
            refs.append(ref)
            at += ref.length
    if sparse and size > at:
        refs.append(Ref(None, size - at, 0))
        at = size
    if at <= INLINE_BYTES:
        return os.pread(fd, at, 0), at
    return fold(refs, put), at


def ingest_blocks(
    blocks: Iterable[bytes], put_chunk: PutChunk, put: PutNode
) -> tuple[Content, int]:
    """Stores a file that comes in blocks of any size; returns content and size.

    It is cut as `ingest` cuts it; memory holds WINDOW_BYTES and one block at most.
    """
    refs: list[Ref] = []
    waiting: list[bytes] = []
    size = 0
    for block in blocks:
        waiting.append(block)
        size += len(block)
        if size >= WINDOW_BYTES:
            waiting = [_cut_off(waiting, False, put_chunk, refs)]
            size = len(waiting[0])
    if not refs and size <= INLINE_BYTES:
        return b"".join(waiting), size
    _cut_off(waiting, True, put_chunk, refs)
    return fold(refs, put), sum_of(refs)


def _cut_off(blocks: list[bytes], last: bool, put_chunk: PutChunk, refs: list[Ref]) -> bytes:
    """Stores the chunks that `blocks` begin with; returns the rest."""
    window = memoryview(blocks[0] if len(blocks) == 1 else b"".join(blocks))
    at = 0
    for length in cut(window, last):
        refs.append(Ref(put_chunk(window[at : at + length]), length, 0))
        at += length
    return bytes(window[at:])


def sum_of(refs: Sequence[Ref]) -> int:
    """Returns how many bytes consecutive pieces cover."""
    return sum(ref.length for ref in refs)


def fold(refs: list[Ref], put: PutNode) -> tuple[Ref, ...]:
    """Returns the refs for an entry, moved into list nodes if they are many."""
    level = 0
    while len(refs) > LONGEST_REFS:
        level += 1
        parts = [refs[i : i + LIST_REFS] for i in range(0, len(refs), LIST_REFS)]
        refs = [Ref(put(list_node(tuple(part))), sum_of(part), level) for part in parts]
    return tuple(refs)


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int | None]]:
    """Yields the ranges of a sparse file that are not holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end, or just cut short
                return
            raise
        yield start, at


def _filler(fd: int, start: int, end: int | None) -> Fill:
    """Reads a file from `start` to `end` (None: its end)."""
    at = start

    def fill(view: memoryview) -> int:
        nonlocal at
        got = os.preadv(fd, [view if end is None else view[: end - at]], at)
        at += got
        return got

    return fill


def chunks_of(fill: Fill, sink: WindowSink) -> Iterator[Ref]:
    """Stores what `fill` gives, cut in chunks, and yields their refs in order."""
    rest = b""
    last = False
    while not last:
        window = sink.window(WINDOW_BYTES)
        with memoryview(window) as view:
            filled = len(rest)
            view[:filled] = rest
            while filled < len(view) and (got := fill(view[filled:])):
                filled += got
            last = filled < len(view)
            chunks = cut_and_hash(view[:filled], last)
            done = sum(len(chunk) for _, chunk in chunks)
            rest = bytes(view[done:filled])
        refs = [Ref(identifier, len(chunk), 0) for identifier, chunk in chunks]
        sink.put_window(window, chunks)
        yield from refs


def cut_and_hash(data: memoryview, last: bool) -> list[tuple[ChunkId, memoryview]]:
    """Returns the chunks that `data` begins with, and their ids; see `cut`."""
    chunks: list[tuple[ChunkId, memoryview]] = []
    at = 0
    with _cutting:
        for length in cut(data, last):
            chunk = data[at : at + length]
            chunks.append((ChunkId(digest(chunk)), chunk))
            at += length
    return chunks


def pieces(objects: Objects, entry: Entry) -> Iterator[Ref]:
    """Yields the chunks and holes of a file in order, list nodes opened; not for inline files."""
    if isinstance(entry.content, tuple):
        for ref in entry.content:
            yield from _open(objects, ref)


def _open(objects: Objects, ref: Ref) -> Iterator[Ref]:
    if ref.level == 0:
        yield ref
        return
    for below in _list(objects, ref):
        yield from _open(objects, below)


def _list(objects: Objects, ref: Ref) -> tuple[Ref, ...]:
    """Opens a list node and checks it against the ref that names it."""
    identifier = NodeId(ref.id or b"")
    node = objects.node(identifier)
    if (
        not isinstance(node, ListNode)
        or ref.level > TALLEST
        or node.refs[0].level != ref.level - 1
        or sum(r.length for r in node.refs) != ref.length
    ):
        raise CorruptObjectError("node", identifier, "it is not the list that a file promises")
    return node.refs


def listed(objects: Objects, ref: Ref) -> tuple[Ref, ...]:
    """Returns what the list node of a ref above the chunks has, checked against the ref."""
    return _list(objects, ref)


def read(objects: Objects, entry: Entry, offset: int, size: int) -> bytes:
    """Returns up to `size` bytes of a file from `offset`; fewer only at its end.

    Raises MissingObjectError or CorruptObjectError, never returns wrong bytes.
    """
    if entry.kind != Kind.FILE:
        raise ValueError(f"{entry.name!r} is not a file")
    size = min(size, entry.size - offset)
    if size <= 0:
        return b""
    if isinstance(entry.content, bytes):
        return entry.content[offset : offset + size]
    if len(entry.content) == 1 and entry.content[0].level == 0:
        ref = entry.content[0]
        if ref.id is None:
            return bytes(size)
        whole = _plain(objects, ref)
        return whole if size == len(whole) else whole[offset : offset + size]
    return b"".join(
        memoryview(_plain(objects, ref))[start:stop] if ref.id is not None else bytes(stop - start)
        for ref, start, stop in _parts(objects, entry.content, offset, size)
    )


def stream(
    objects: Objects, entry: Entry, offset: int, end: int
) -> Generator[memoryview, None, None]:
    """Yields the bytes of a file from `offset` up to `end`, which is at most its size.

    Past the cache, and raw chunks without a copy: what it yields is valid while the generator is
    open. Raises what `read` does.
    """
    if isinstance(entry.content, bytes):
        yield memoryview(entry.content)[offset:end]
        return
    with objects.chunks() as chunk:
        for part in parts(objects, entry, offset, end):
            yield from part_of(*part, chunk)


def read_small(entry: Entry, chunk: "ReadChunk") -> bytes | None:
    """Returns all of a file that is one run of chunks; None for one with holes or lists.

    `chunk` is what `Objects.chunks` has given. Raises what `read` does.
    """
    assert not isinstance(entry.content, bytes)
    if any(ref.id is None or ref.level for ref in entry.content):
        return None
    parts = []
    for ref in entry.content:
        plain = chunk(ChunkId(ref.id or b""))
        _check_length(ref, plain)
        parts.append(plain)
    return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


def parts(objects: Objects, entry: Entry, offset: int, end: int) -> Iterator[tuple[Ref, int, int]]:
    """Yields (chunk or hole, start in it, stop in it) of a file in pieces, `offset` to `end`."""
    if isinstance(entry.content, bytes):
        raise ValueError(f"{entry.name!r} has no pieces")
    return _parts(objects, entry.content, offset, end - offset)


def part_of(ref: Ref, start: int, stop: int, chunk: "ReadChunk") -> Iterator[memoryview]:
    """Yields the bytes of what `parts` yields; those of a hole piece by piece.

    `chunk` is what `Objects.chunks` has given. Raises what `read` does.
    """
    if ref.id is None:
        for at in range(start, stop, len(_ZEROS)):
            yield _ZEROS[: stop - at]
        return
    plain = chunk(ChunkId(ref.id))
    _check_length(ref, plain)
    yield memoryview(plain)[start:stop]


def _parts(
    objects: Objects, refs: tuple[Ref, ...], offset: int, size: int
) -> Iterator[tuple[Ref, int, int]]:
    """Yields (chunk or hole, start in it, stop in it) of what covers a part of a file."""
    ends = list(accumulate(ref.length for ref in refs))
    at = bisect_right(ends, offset)
    offset -= ends[at - 1] if at else 0
    while size > 0:
        ref = refs[at]
        take = min(size, ref.length - offset)
        if ref.level:
            yield from _parts(objects, _list(objects, ref), offset, take)
        else:
            yield ref, offset, offset + take
        size -= take
        offset = 0
        at += 1


def _plain(objects: Objects, ref: Ref) -> bytes:
    plain = objects.chunk(ChunkId(ref.id or b""))
    _check_length(ref, plain)
    return plain


def _check_length(ref: Ref, plain: bytes | memoryview) -> None:
    if len(plain) != ref.length:
        raise CorruptObjectError("chunk", ref.id or b"", f"{len(plain)} bytes, not {ref.length}")


ReadChunk = Callable[[ChunkId], bytes | memoryview]


def write_out(objects: Objects, entry: Entry, fd: int, chunk: ReadChunk | None = None) -> None:
    """Writes a file's content to an empty open file, leaving holes as holes.

    Streams: memory does not grow with the file. Many small files go faster with a `chunk` that
    `Objects.chunks` has given for all of them. Raises OSError (a full disk) and what `read`
    raises; the file is incomplete then.
    """
    if isinstance(entry.content, bytes):
        _write_all(fd, entry.content)
        return
    if chunk is None:
        with objects.chunks() as read_chunk:
            _write_pieces(objects, entry, fd, read_chunk)
    else:
        _write_pieces(objects, entry, fd, chunk)


def _write_pieces(objects: Objects, entry: Entry, fd: int, chunk: ReadChunk) -> None:
    at = 0
    hole = False
    for ref in pieces(objects, entry):
        if ref.id is None:
            at, hole = at + ref.length, True
            continue
        plain = chunk(ChunkId(ref.id))
        _check_length(ref, plain)
        if hole:
            os.lseek(fd, at, os.SEEK_SET)
            hole = False
        _write_all(fd, plain)
        at += ref.length
    if hole:
        os.ftruncate(fd, at)


def data_ranges(objects: Objects, entry: Entry, size: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of a file that are no holes, in order, none much larger than `size`."""
    start = at = 0
    for ref in pieces(objects, entry):
        if at > start and (ref.id is None or at - start >= size):
            yield start, at
            start = at
        at += ref.length
        if ref.id is None:
            start = at
    if at > start:
        yield start, at


def write_range(objects: Objects, entry: Entry, fd: int, offset: int, end: int) -> None:
    """Writes the bytes of a file from `offset` up to `end` in their place, holes left as holes.

    For files in pieces, whose ranges several threads write; the caller gives the file its length.
    Raises what `write_out` does.
    """
    if isinstance(entry.content, bytes):
        raise ValueError(f"{entry.name!r} has no pieces")
    with objects.chunks() as chunk:
        for ref, start, stop in _parts(objects, entry.content, offset, end - offset):
            if ref.id is not None:
                plain = chunk(ChunkId(ref.id))
                _check_length(ref, plain)
                view, at = memoryview(plain)[start:stop], offset
                while view:
                    count = os.pwrite(fd, view, at)
                    view, at = view[count:], at + count
            offset += stop - start


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def chunk_ids(objects: Objects, entry: Entry, lists: set[bytes]) -> Iterator[ChunkId]:
    """Yields the ids of the chunks that a file is made of, and adds its list nodes to `lists`.

    What is behind a list that is in there already is not opened again, so that lists forged
    to name each other a million times are walked once.
    """
    if isinstance(entry.content, tuple):
        yield from _chunk_ids(objects, entry.content, lists)


def _chunk_ids(objects: Objects, refs: tuple[Ref, ...], lists: set[bytes]) -> Iterator[ChunkId]:
    for ref in refs:
        if ref.id is None:
            continue
        if not ref.level:
            yield ChunkId(ref.id)
        elif ref.id not in lists:
            lists.add(ref.id)
            yield from _chunk_ids(objects, _list(objects, ref), lists)


assert LARGEST_CHUNK <= WINDOW_BYTES
