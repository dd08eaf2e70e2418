"""Bundles: the format of one file that carries snapshots with all that they are made of.

A bundle is 8 bytes `89 66 6C 70 6B 67 0D 0A`, then records, each one byte of type, 4 bytes of
length (big-endian) and so many bytes:

    M   the manifest, first, and once: canonical CBOR
        [version, [snapshot id, ...], [id of a snapshot the receiver has, ...], [[ref, id], ...],
         [chunks, nodes, snapshots that follow]]
    C   a chunk: its id, then its bytes as a store keeps them (see codec)
    N   a node: its id, then its encoding (see nodes)
    S   a snapshot: its id, then its record (see snapshots)
    E   the end: BLAKE3 of all bytes before this record

Ids in the manifest ascend, refs by name, each once. An object comes after all that it names, so
that whoever reads the stream can check each one as it comes and keep it: what it names came
before, or is in the tree of a snapshot that the manifest says the receiver has. Nothing follows
the end. A reader allocates what has really come, never what a length claims.

This module knows the bytes; what they mean for a store, `bundle_creating` and
`bundle_applying` know.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import IO, NamedTuple, TypeVar

import cbor2
import msgspec
from blake3 import blake3

from engine.errors import EngineError, InvalidNameError
from engine.ids import ID_BYTES, check_name
from engine.storage.chunking import LARGEST_CHUNK
from engine.storage.nodes import encode

_Sorted = TypeVar("_Sorted", bytes, str)

MAGIC = b"\x89flpkg\r\n"
VERSION = 2
"""2 is for trees that keep owners; without them a bundle is still of version 1."""

MANIFEST, CHUNK, NODE, SNAPSHOT, END = b"MCNSE"

LONGEST_RECORD = 64 << 20
"""A manifest, node or snapshot of more bytes than this is in no bundle."""
MOST_SNAPSHOT_BYTES = 256 << 20
"""The records of all snapshots of a bundle: a receiver keeps them in memory until the end."""

_PIECE = 1 << 20
_CHUNK_BYTES = ID_BYTES + 1 + LARGEST_CHUNK
_NAMES = {MANIFEST: "manifest", CHUNK: "chunk", NODE: "node", SNAPSHOT: "snapshot", END: "end"}


class BundleFormatError(EngineError):
    """A file is no bundle, or a damaged one. `offset` is the byte where that was seen."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"not a sound bundle, at byte {offset:,}: {why}")
        self.offset, self.why = offset, why


class BundleTruncatedError(BundleFormatError):
    """A bundle ends before its end record: at `offset`."""

    def __init__(self, offset: int, where: str) -> None:
        super().__init__(offset, f"it ends there, {where}")


class BundleVersionError(EngineError):
    """A bundle was written by a later version of the program."""

    def __init__(self, found: int) -> None:
        super().__init__(f"the bundle has version {found}; this program knows up to {VERSION}")
        self.found = found


class BundleTooLargeError(EngineError):
    """Something does not fit into a bundle."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"a {what} of {size:,} bytes does not fit into a bundle")
        self.what, self.size = what, size


class Counts(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """How many objects a bundle carries."""

    chunks: int
    nodes: int
    snapshots: int

    @property
    def objects(self) -> int:
        """All of them."""
        return self.chunks + self.nodes + self.snapshots


class Manifest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a bundle says of itself: snapshots asked for, those it builds on, refs, counts."""

    version: int
    snapshots: tuple[bytes, ...]
    have: tuple[bytes, ...]
    refs: tuple[tuple[str, bytes], ...]
    counts: Counts


class Record(NamedTuple):
    """A record of an object as it came; `offset` is where it begins."""

    kind: int
    identifier: bytes
    value: memoryview
    offset: int


class BundleWriter:
    """Writes a bundle to a stream that need not seek."""

    def __init__(self, out: IO[bytes], manifest: Manifest) -> None:
        """Writes what a bundle begins with. Raises BundleTooLargeError."""
        self._out, self._hasher = out, blake3()
        self.bytes = 0
        self._write(MAGIC)
        self._record(MANIFEST, encode(manifest))

    def add(self, kind: int, identifier: bytes, value: bytes | memoryview) -> None:
        """Writes an object; the caller keeps the order. Raises BundleTooLargeError."""
        self._record(kind, identifier, value)

    def end(self) -> None:
        """Writes the end and flushes the stream, which stays open."""
        self._record(END, self._hasher.digest())
        self._out.flush()

    def _record(self, kind: int, *parts: bytes | memoryview) -> None:
        length = sum(map(len, parts))
        if length > LONGEST_RECORD:
            raise BundleTooLargeError(_NAMES[kind], length)
        self._write(bytes([kind]) + length.to_bytes(4, "big"))
        for part in parts:
            self._write(part)

    def _write(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._out.write(data)
        self.bytes += len(data)


class BundleReader:
    """Reads a bundle from a stream: its manifest at once, then its records.

    Checks the frame only: order of types, lengths, counts, the digest at the end, and that
    nothing follows. Raises a BundleFormatError, and OSError of the stream.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hasher = stream, blake3()
        self.offset = 0
        self.done = 0
        self.total: int | None = None
        magic = self._read(len(MAGIC), "in its first bytes")
        if magic != MAGIC:
            raise BundleFormatError(0, "it does not begin as a bundle does")
        kind, length = self._head()
        if kind != MANIFEST:
            raise BundleFormatError(len(MAGIC), "it does not begin with a manifest")
        self.manifest = _decode_manifest(self._payload(kind, length), self.offset)
        self.total = self.manifest.counts.objects

    def __iter__(self) -> Iterator[Record]:
        """Yields the objects in their order; ends when the end has been checked."""
        left = {CHUNK: self.manifest.counts.chunks, NODE: self.manifest.counts.nodes,
                SNAPSHOT: self.manifest.counts.snapshots}  # fmt: skip
        while True:
            start, expected = self.offset, self._hasher.digest
            digest = expected() if not any(left.values()) else b""
            kind, length = self._head()
            payload = self._payload(kind, length)
            if kind == END:
                if any(left.values()):
                    raise BundleFormatError(start, "fewer objects came than it promises")
                if payload != digest:
                    raise BundleFormatError(start, "its digest does not match what came")
                if self._stream.read(1):
                    raise BundleFormatError(self.offset, "something follows its end")
                return
            if not left.get(kind):
                raise BundleFormatError(start, f"one {_NAMES[kind]} more than it promises")
            left[kind] -= 1
            self.done += 1
            view = memoryview(payload)
            yield Record(kind, payload[:ID_BYTES], view[ID_BYTES:], start)

    def _head(self) -> tuple[int, int]:
        start = self.offset
        head = self._read(5, "without an end record")
        kind, length = head[0], int.from_bytes(head[1:], "big")
        if kind not in _NAMES:
            raise BundleFormatError(start, f"no record has the type {kind}")
        most = {CHUNK: _CHUNK_BYTES, END: ID_BYTES}.get(kind, LONGEST_RECORD)
        least = ID_BYTES + (kind in {CHUNK, NODE, SNAPSHOT})
        if not (least if kind != MANIFEST else 1) <= length <= most:
            raise BundleFormatError(start, f"no {_NAMES[kind]} has {length:,} bytes")
        return kind, length

    def _payload(self, kind: int, length: int) -> bytes:
        return self._read(length, f"inside of its {_NAMES[kind]} record")

    def _read(self, size: int, where: str) -> bytes:
        parts = []
        left = size
        while left:
            part = self._stream.read(min(left, _PIECE))
            if not part:
                of = "" if self.total is None else f" ({self.done:,} of {self.total:,} objects)"
                raise BundleTruncatedError(self.offset, where + of)
            self._hasher.update(part)
            self.offset += len(part)
            left -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _decode_manifest(data: bytes, offset: int) -> Manifest:
    try:
        plain = cbor2.loads(data)
        version = plain[0] if isinstance(plain, list) and plain else None
        if isinstance(version, int) and version > VERSION:
            raise BundleVersionError(version)
        manifest = msgspec.convert(plain, Manifest)
        if encode(manifest) != data or not 1 <= manifest.version <= VERSION:
            raise ValueError("its encoding is not canonical")
        _check_manifest(manifest)
    except (ValueError, TypeError, RecursionError, OverflowError, cbor2.CBORError,
            InvalidNameError) as error:  # fmt: skip
        raise BundleFormatError(offset, f"its manifest is wrong: {error}") from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    for ids in (manifest.snapshots, manifest.have):
        if any(len(each) != ID_BYTES for each in ids) or not _ascend(ids):
            raise ValueError("its ids are not ids in ascending order")
    if set(manifest.snapshots) & set(manifest.have):
        raise ValueError("it carries a snapshot that the receiver has")
    if not _ascend([name for name, _ in manifest.refs]):
        raise ValueError("its refs are not in order")
    named = {*manifest.snapshots, *manifest.have}
    for name, target in manifest.refs:
        check_name("ref", name)
        if target not in named:
            raise ValueError(f"its ref {name!r} names no snapshot of it")
    counts = manifest.counts
    if min(counts.chunks, counts.nodes, counts.snapshots) < 0:
        raise ValueError("its counts are negative")


def _ascend(values: Sequence[_Sorted]) -> bool:
    return all(a < b for a, b in pairwise(values))
