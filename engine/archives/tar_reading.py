"""Tar in: an archive becomes a tree, read once from its beginning to its end.

Python's tarfile knows the formats: ustar, pax, GNU. What is here guards it: it takes a damaged
header for the archive's end, and reads headers as long as they say they are. Compression (gzip,
bzip2, xz, zstd) is told by the first bytes. Owners are left out, and set-id bits with them unless
they are asked for; of attributes only `user.*` is kept. What else is left out is named in a
warning and counted by kind (see `tar_leavings`). The
holes of GNU's sparse files are holes.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, Any

import zstandard

from engine.archives.tar_leavings import XATTR, count_records, unknown_holes
from engine.errors import EngineError
from engine.host.hostfs import is_in_range, is_kept
from engine.host.losses import ACLS, SET_ID, TIME, Losses, is_lost
from engine.host.set_id import EVERY_BIT
from engine.host.set_id import SET_ID as SET_ID_BITS
from engine.ids import ChunkId, digest
from engine.plain.importing import ImportReport
from engine.storage.chunking import SMALLEST_CHUNK
from engine.storage.codec import is_of_memory
from engine.storage.content import Content, Fill, chunks_of, cut_and_hash, fold
from engine.storage.nodes import (
    EARLIEST_NS,
    INLINE_BYTES,
    LARGEST_USER_ID,
    LATEST_NS,
    Entry,
    Kind,
    Owner,
    Ref,
)
from engine.storage.objects import ChunkSink, NodeBuffer
from engine.trees.drafts import ArchiveRefusedError, Draft, Xattrs

_ACL = "SCHILY.acl."
WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"

LONGEST_HEADER = 8 << 20
"""Extended headers of more bytes are refused: they would be read into memory."""

_PIECE = 1 << 20
_BATCH_BYTES, _BATCHES = 256 << 10, 32
_WINDOWS = 3
_EXTENDED = {
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
}  # fmt: skip
_DEVICES = {tarfile.CHRTYPE, tarfile.BLKTYPE}
_DUMPED, _LABEL, _CONTINUED = b"D", b"V", b"M"
"""GNU tar's: a directory with a list of its names, an archive's label, the rest of a file."""
_TIME = re.compile(r"(-?)([0-9]{1,30})(?:\.([0-9]*))?")
_DAMAGE = (
    tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError,
    zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError,
)  # fmt: skip
"""What damaged archives make libraries raise."""


class ArchiveDamagedError(EngineError):
    """An archive is cut short or damaged. `offset` is the byte of the tar where that was seen."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"the archive is damaged at byte {offset:,}: {why}")
        self.offset, self.why = offset, why


class _Forward:
    """What tarfile asks of a file, for a stream: it only ever goes forward."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._at = 0
        self.last = b""

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        """Returns so many bytes; fewer at the end only."""
        if not 0 <= size <= LONGEST_HEADER:
            raise ArchiveDamagedError(self._at, f"no header has {size:,} bytes")
        data = self._stream.read(size)
        if 0 < len(data) < size:
            parts = [data]
            left = size - len(data)
            while left and (part := self._stream.read(min(left, _PIECE))):
                parts.append(part)
                left -= len(part)
            data = b"".join(parts)
        self._at += len(data)
        self.last = data
        return data

    def fill(self, view: memoryview) -> int:
        """Reads into `view`, which has room, and returns how many bytes, 0 at the end only."""
        into = getattr(self._stream, "readinto", None)
        if into is not None:
            got: int = into(view)
        else:
            data = self._stream.read(len(view))
            got = len(data)
            view[:got] = data
        self._at += got
        return got

    def seek(self, to: int) -> None:
        if to < self._at:
            raise ArchiveDamagedError(self._at, "a member has an impossible size")
        while self._at < to:
            if not self.read(min(_PIECE, to - self._at)):
                raise ArchiveDamagedError(self._at, "it ends there, inside of a member")


class _Headers:
    """The same for the headers of one member, maps of sparse files among them: not without end."""

    def __init__(self, forward: _Forward) -> None:
        self._forward = forward
        self.tell, self.seek = forward.tell, forward.seek
        self.left = LONGEST_HEADER

    def read(self, size: int) -> bytes:
        self.left -= max(size, 0)
        if size <= LONGEST_HEADER and self.left < 0:
            raise ArchiveDamagedError(self.tell(), "a member's headers are too long")
        return self._forward.read(size)


class _Begun:
    """A stream of which the first bytes were read already."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._stream.read(size)
        data = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(data) :]
        return data

    def readinto(self, view: memoryview) -> int:
        into = getattr(self._stream, "readinto", None)
        if into is not None and not self._head:
            got: int = into(view)
            return got
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def decompressed(stream: IO[bytes]) -> IO[bytes]:
    """Returns what a stream holds, decompressed if its first bytes say that it is compressed.

    The stream is left open when what is returned is closed.
    """
    head = b""
    while len(head) < 6 and (data := stream.read(6 - len(head))):
        head += data
    begun: Any = _Begun(head, stream)  # what the libraries call of a file is there
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=begun, mode="rb")  # type: ignore[return-value]  # it reads
    if head.startswith(b"BZh"):
        return bz2.BZ2File(begun)
    if head == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(begun)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        reader = zstandard.ZstdDecompressor().stream_reader(
            begun, read_across_frames=True, closefd=False
        )
        return io.BufferedReader(reader, _PIECE)
    return begun  # type: ignore[no-any-return]  # it reads, and no more is asked


class _Packer:
    """Has chunks stored by other threads, a bounded way behind. A WindowSink."""

    def __init__(self, sink: ChunkSink) -> None:
        self._sink = sink
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "tar")
        self._batch: list[tuple[ChunkId, bytes | memoryview]] = []
        self._bytes = 0
        self._coming: deque[Future[None]] = deque()
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._made = 0

    def put(self, data: bytes) -> ChunkId:
        """Stores a chunk, soon. Raises what storing one before it has."""
        identifier = ChunkId(digest(data))
        self.put_hashed([(identifier, data)])
        return identifier

    def put_hashed(self, chunks: Sequence[tuple[ChunkId, bytes | memoryview]]) -> None:
        """The same for several, of bytes that nobody changes."""
        self._batch += chunks
        self._bytes += sum(len(data) for _, data in chunks)
        if self._bytes >= _BATCH_BYTES:
            self._submit()

    def window(self, size: int) -> bytearray:
        """Returns a buffer, when one is free."""
        if self._made < _WINDOWS and self._free.empty():
            self._made += 1
            return bytearray(size)
        window = self._free.get()
        self._look()
        return window

    def put_window(self, window: bytearray, chunks: list[tuple[ChunkId, memoryview]]) -> None:
        """Stores the chunks of a window, soon."""

        def store() -> None:
            try:
                self._sink.put_hashed(chunks)
            finally:
                self._free.put(window)

        self._coming.append(self._pool.submit(store))

    def _submit(self) -> None:
        self._coming.append(self._pool.submit(self._sink.put_hashed, self._batch))
        self._batch, self._bytes = [], 0
        self._look()

    def _look(self) -> None:
        """Raises what storing has; waits while there is too much to come."""
        while self._coming and (len(self._coming) > _BATCHES or self._coming[0].done()):
            self._coming.popleft().result()

    def finish(self) -> None:
        """Waits until all chunks are in the sink."""
        self._submit()
        while self._coming:
            self._coming.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class TarReader:
    """Reads archives into a draft: one, or with `layered` one layer over the other.

    The contents go to `sink`, lists of long files to `nodes`. Who calls it flushes both. Files
    have set-id bits with `set_id` only: an archive's owners are not those who get its files.
    """

    def __init__(
        self, sink: ChunkSink, nodes: NodeBuffer,
        *, layered: bool = False, set_id: bool = False, owners: bool = False,
    ) -> None:  # fmt: skip
        self._losses = Losses()
        self._dropped = 0 if set_id else SET_ID_BITS
        self._sink, self._nodes = sink, nodes
        self._owners = owners
        self._seen: Counter[Owner] = Counter()
        self.draft = Draft()
        self.draft.default_owner = Owner(0, 0) if owners else None
        self.draft.layered = layered
        self.report = ImportReport()
        self._left_out: set[bytes] = set()

    def read(self, stream: IO[bytes], progress: Callable[[int], None] | None = None) -> None:
        """Reads a whole archive. Raises ArchiveDamagedError, ArchiveRefusedError."""
        forward = _Forward(decompressed(stream))
        self._packer = packer = _Packer(self._sink)
        try:
            for member in _members(forward):
                self._take(member, forward)
                if progress is not None:
                    progress(forward.tell())
            behind = 0
            while data := forward.read(_PIECE):  # a checksum at the end of what is compressed
                behind += len(data) if data.strip(b"\0") else 0
            if behind:
                self._count("bytes after the archive's end", behind)
                self.report.warnings.append(
                    "something follows the archive's end and was not read: is it several archives?"
                )
            packer.finish()
        except _DAMAGE as error:
            if is_of_memory(error):
                raise MemoryError from error
            raise ArchiveDamagedError(forward.tell(), str(error)) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise ArchiveDamagedError(forward.tell(), str(error)) from error  # bzip2
        finally:
            packer.close()
        self.draft.layer += 1
        self.report.lost = self._losses.counts()

    def warnings(self) -> list[str]:
        """Returns what was left out of all that was read, and what files lost."""
        return [*self.report.warnings, *self._losses.warnings()]

    def _take(self, member: tarfile.TarInfo, forward: _Forward) -> None:
        path = os.fsencode(member.name)
        mode, mtime_ns = member.mode & EVERY_BIT, self._mtime(path, member)
        if self.draft.layered:
            path = path.lstrip(b"/")  # an image is a whole system: its root is the tree's
            if self._whiteout(path):
                return
        if member.pax_headers:
            self._count_records(path, member)
        if member.isdir() or member.type == _DUMPED:
            self.draft.put_directory(
                path, mode, mtime_ns, self._xattrs(path, member), self._owner(path, member)
            )
            return
        kind, size = Kind.FILE, 0
        content: Content = b""
        if member.issym():
            kind = Kind.SYMLINK
            content = target = os.fsencode(member.linkname)
            size = len(target)
            if not 1 <= size <= 4095 or b"\0" in target:
                raise ArchiveRefusedError(path, "is a link with an impossible target")
        elif member.islnk():
            target = os.fsencode(member.linkname)
            if self.draft.layered:
                target = target.lstrip(b"/")
            if target in self._left_out:
                self._leave_out(path, "name of what is left out", "is another name of such a one")
            else:
                self.draft.link(path, target)
            return
        elif member.isfifo():
            kind = Kind.FIFO
        elif member.type in _DEVICES:
            self._leave_out(path, "device", "is a device")
            return
        elif member.type == _CONTINUED:
            raise ArchiveRefusedError(path, "began in another volume: join the volumes first")
        elif member.type == _LABEL:
            self._leave_out(path, "label", "is the archive's label")
            return
        elif not member.isreg():
            what = f"type {member.type.decode('ascii', 'backslashreplace')}"
            self._leave_out(path, what, f"has the unknown type {member.type!r}")
            return
        else:
            content, size = self._content(member, forward)
            self.report.read_files += 1
            self.report.read_bytes += size
            if mode & self._dropped:
                mode &= ~self._dropped
                self._losses.note(path, SET_ID)
        xattrs = self._xattrs(path, member)
        owner = self._owner(path, member)
        self.draft.put(
            path, Entry(b"", kind, mode, mtime_ns, size, content, xattrs, None, None, owner)
        )

    def _owner(self, path: bytes, member: tarfile.TarInfo) -> Owner | None:
        """Returns the owner of a member if owners are kept, and counts it."""
        owner = Owner(member.uid, member.gid)
        if self._owners and not all(0 <= number <= LARGEST_USER_ID for number in owner):
            raise ArchiveRefusedError(
                path, f"belongs to the impossible user {owner.uid}:{owner.gid}"
            )
        self._seen[owner] += 1
        return owner if self._owners else None

    def lost_owners(self) -> int:
        """Returns how many members belong to others than most do, which the tree does not say."""
        if self._owners or not self._seen:
            return 0
        return self._seen.total() - max(self._seen.values())

    def _mtime(self, path: bytes, member: tarfile.TarInfo) -> int:
        """Returns the time in ns, or the nearest that a tree can keep."""
        ns = _mtime(member)
        if is_in_range(ns):
            return ns
        self._losses.note(path, TIME)
        return min(max(ns, EARLIEST_NS), LATEST_NS)

    def _xattrs(self, path: bytes, member: tarfile.TarInfo) -> Xattrs:
        """Returns the attributes that a tree keeps, and notes what somebody will miss."""
        if not member.pax_headers:
            return ()
        names = [
            os.fsencode(_xattr_name(key)) for key in member.pax_headers if key.startswith(XATTR)
        ]
        others = [name for name in names if not is_kept(name) and is_lost(name)]
        if others:
            self._losses.note_attributes(path, others)
        if any(key.startswith(_ACL) for key in member.pax_headers):
            self._losses.note(path, ACLS)
        return _xattrs(path, member)

    def _content(self, member: tarfile.TarInfo, forward: _Forward) -> tuple[Content, int]:
        size = member.size
        pieces: list[tuple[int, int]] = [(0, size)] if size else []
        if member.issparse():
            sparse: Any = member.sparse  # typeshed has it as bytes
            pieces = [piece for piece in sparse if piece[1]]
        if size <= SMALLEST_CHUNK:  # then it is one chunk, holes and all
            data = b"".join(_filled_up(pieces, size, forward))
            return data if size <= INLINE_BYTES else (Ref(self._packer.put(data), size, 0),), size
        refs: list[Ref] = []
        for gap, length in _runs(pieces, size, forward):
            if gap:
                refs.append(Ref(None, gap, 0))
            if length:
                refs += self._data(length, forward)
        return fold(refs, self._nodes.put), size

    def _data(self, length: int, forward: _Forward) -> Iterable[Ref]:
        """Stores so many bytes and gives their refs."""
        if length > _BATCH_BYTES:
            return chunks_of(_filler(length, forward), self._packer)
        data = memoryview(_exactly(length, forward))
        chunks = cut_and_hash(data, last=True)
        self._packer.put_hashed(chunks)
        return [Ref(identifier, len(chunk), 0) for identifier, chunk in chunks]

    def _whiteout(self, path: bytes) -> bool:
        above, _, name = path.rstrip(b"/").rpartition(b"/")
        if not name.startswith(WHITEOUT):
            return False
        if name == OPAQUE:
            self.draft.clear(above)
        elif name.startswith(b".wh..wh."):
            return True  # what AUFS kept for itself
        else:
            self.draft.remove(above + b"/" + name[len(WHITEOUT) :] if above else name[4:])
        return True

    def _leave_out(self, path: bytes, kind: str, why: str) -> None:
        self._left_out.add(path)
        self._count(kind)
        self.report.warnings.append(f"left out {os.fsdecode(path)!r}: it {why}")

    def _count(self, kind: str, number: int = 1) -> None:
        self.report.left_out[kind] = self.report.left_out.get(kind, 0) + number

    def _count_records(self, path: bytes, member: tarfile.TarInfo) -> None:
        if unknown_holes(member):
            raise ArchiveRefusedError(path, "has holes in a form that is not known")
        count_records(member, self.report.left_out)


def _members(forward: _Forward) -> Iterator[tarfile.TarInfo]:
    headers = _Headers(forward)
    archive = tarfile.TarFile(
        fileobj=headers,  # type: ignore[arg-type]  # what it calls of a file is there
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        headers.left = LONGEST_HEADER
        if member.issparse():
            _set_right(member, archive)
        if member.size < 0:
            raise ArchiveDamagedError(forward.tell(), "a member has an impossible size")
        yield member
    # To tarfile a header that is wrong, or the stream's end, is the archive's end, too.
    if len(forward.last) < tarfile.BLOCKSIZE:
        raise ArchiveDamagedError(forward.tell(), "it ends there, without an end mark")
    if any(forward.last):
        raise ArchiveDamagedError(forward.tell(), "no header is like that")


def _runs(pieces: list[tuple[int, int]], size: int, forward: _Forward) -> Iterator[tuple[int, int]]:
    """Yields the lengths of holes and of the data after them. Raises ArchiveDamagedError."""
    at = 0
    for start, length in [*pieces, (size, 0)]:
        if start < at or length < 0 or start + length > size:
            raise ArchiveDamagedError(forward.tell(), "its map of a sparse file is wrong")
        yield start - at, length
        at = start + length


def _filled_up(pieces: list[tuple[int, int]], size: int, forward: _Forward) -> Iterator[bytes]:
    """Yields the bytes of a short file."""
    for gap, length in _runs(pieces, size, forward):
        yield bytes(gap) + _exactly(length, forward)


def _exactly(size: int, forward: _Forward) -> bytes:
    data = forward.read(size)
    if len(data) < size:
        raise _cut_short(forward)
    return data


def _filler(size: int, forward: _Forward) -> Fill:
    """Reads so many bytes of a member."""
    left = size

    def fill(view: memoryview) -> int:
        nonlocal left
        got = forward.fill(view[:left]) if left else 0
        if left and not got:
            raise _cut_short(forward)
        left -= got
        return got

    return fill


def _cut_short(forward: _Forward) -> ArchiveDamagedError:
    return ArchiveDamagedError(forward.tell(), "it ends there, inside of a member")


def _set_right(member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Takes name, size and end of a sparse member from where they stand.

    tarfile (3.11) lets `path` and `size`, which are for programs that know no sparse files, go
    before what stands for the file itself, and adds the map's length to a `size`.
    """
    records = member.pax_headers
    member.name = records.get("GNU.sparse.name", member.name)
    told = records.get("GNU.sparse.realsize", records.get("GNU.sparse.size"))
    if told is not None:
        member.size = int(told)
    if "size" in records:
        pieces: Any = member.sparse  # typeshed has it as bytes
        held = sum(length for _, length in pieces)
        archive.offset = member.offset_data + held + -held % tarfile.BLOCKSIZE


def _mtime(member: tarfile.TarInfo) -> int:
    """Returns the time in ns; pax says it as a decimal number, to the nanosecond."""
    text = member.pax_headers.get("mtime")
    if text is None:
        ns = int(member.mtime) * 1_000_000_000
    else:
        found = _TIME.fullmatch(text)
        if found is None:
            raise ArchiveDamagedError(member.offset, f"{text[:40]!r} is no time")
        sign, whole, fraction = found.groups()
        ns = int(whole) * 1_000_000_000 + int((fraction or "")[:9].ljust(9, "0"))
        ns = -ns if sign else ns
    return ns


def _xattr_name(key: str) -> str:
    """Returns the attribute that a pax record is of."""
    return key[len(XATTR) :].replace("%3D", "=").replace("%25", "%")


def _xattrs(path: bytes, member: tarfile.TarInfo) -> Xattrs:
    pairs = []
    for key, value in member.pax_headers.items():
        if key.startswith(XATTR + "user."):
            name, data = os.fsencode(_xattr_name(key)), os.fsencode(value)
            if not is_kept(name):
                continue
            if b"\0" in name or len(name) > 255 or len(data) > 65536:
                raise ArchiveRefusedError(path, "has an impossible attribute")
            pairs.append((name, data))
    return tuple(sorted(pairs))
