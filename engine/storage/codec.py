"""How a chunk's bytes stand in the store: one byte of codec, then the payload.

`\\x00` raw, `\\x01` one zstd frame that carries its content size. Compression is kept where it
saves at least an eighth. The id of a chunk is of its plain bytes, so the codec may change
without changing any id.
"""

import re
import threading

import zstandard

from engine.errors import CorruptObjectError, EngineError
from engine.ids import ChunkId, digest
from engine.storage.chunking import LARGEST_CHUNK
from engine.storage.store import Db, Reader, Writer

RAW, ZSTD = 0, 1
LEVEL = 3
"""What a store has that says nothing else; measured in docs/design/0008-gc.md."""
OFF = 0
"""Stands for no compression where a level is asked for."""

_SETTING = b"compression"
_TEXT = re.compile(r"zstd:([1-9]|1[0-9])")

_SHORTEST = 64
_thread = threading.local()


class CompressionError(EngineError):
    """A compression that there is not was asked for."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text!r} is no compression; there are `off` and `zstd:1` to `zstd:19`")
        self.text = text


def parse_compression(text: str) -> int:
    """Returns the level that a setting means, OFF for `off`. Raises CompressionError."""
    found = _TEXT.fullmatch(text)
    if found is None and text != "off":
        raise CompressionError(text)
    return int(found[1]) if found else OFF


def name_compression(level: int) -> str:
    """Returns a setting as it is written."""
    return f"zstd:{level}" if level else "off"


def read_compression(reader: Reader) -> int:
    """Returns the level that a store's new chunks are packed with."""
    raw = reader.get(Db.META, _SETTING)
    try:
        return LEVEL if raw is None else parse_compression(bytes(raw).decode("ascii", "replace"))
    except CompressionError:  # of a later version; only size depends on it
        return LEVEL


def write_compression(writer: Writer, level: int) -> None:
    """Sets the level for new chunks; those that are there stay as they are."""
    writer.put(Db.META, _SETTING, name_compression(level).encode())


def is_of_memory(error: BaseException) -> bool:
    """True if what libzstd lacked is memory, which it says in words only."""
    return isinstance(error, zstandard.ZstdError) and "not enough memory" in str(error)


def pack(data: bytes | memoryview, level: int = LEVEL) -> bytes:
    """Returns the stored form of a chunk's plain bytes. Releases the GIL while compressing."""
    if level and len(data) >= _SHORTEST:
        compressors = _thread.__dict__.setdefault("compressors", {})
        if level not in compressors:
            compressors[level] = zstandard.ZstdCompressor(level=level)
        try:
            packed: bytes = compressors[level].compress(data)
        except zstandard.ZstdError as error:
            if is_of_memory(error):
                raise MemoryError from error
            raise
        if len(packed) + len(data) // 8 < len(data):
            return b"\x01" + packed
    return b"\x00" + data


def unpack(identifier: ChunkId, value: memoryview) -> bytes | memoryview:
    """Returns a chunk's plain bytes, checked against its id; raw ones without a copy.

    What is returned may be a view of `value`. Raises CorruptObjectError.
    """
    codec = value[0] if len(value) else None
    plain: bytes | memoryview
    if codec == RAW:
        plain = value[1:]
    elif codec == ZSTD:
        decompressor = getattr(_thread, "decompressor", None)
        if decompressor is None:
            decompressor = _thread.decompressor = zstandard.ZstdDecompressor()
        try:
            size = zstandard.frame_content_size(value[1:])
            if not 0 <= size <= LARGEST_CHUNK:
                raise CorruptObjectError("chunk", identifier, f"it says it has {size} bytes")
            plain = decompressor.decompress(value[1:], allow_extra_data=False)
        except zstandard.ZstdError as error:
            if is_of_memory(error):
                raise MemoryError from error
            raise CorruptObjectError("chunk", identifier, str(error)) from error
    else:
        raise CorruptObjectError("chunk", identifier, f"unknown codec {codec}")
    if digest(plain) != identifier:
        raise CorruptObjectError("chunk", identifier, "its bytes do not match its id")
    return plain


def own_id(value: bytes | memoryview) -> ChunkId | None:
    """Returns the id that a stored chunk's plain bytes have, or None if they cannot be read."""
    value = memoryview(value)
    if not len(value) > 1 or plain_length(value) > LARGEST_CHUNK:
        return None
    if value[0] == RAW:
        return ChunkId(digest(value[1:]))
    try:
        plain = zstandard.ZstdDecompressor().decompress(value[1:], max_output_size=LARGEST_CHUNK)
    except zstandard.ZstdError:
        return None
    return ChunkId(digest(plain))


def plain_length(value: bytes | memoryview) -> int:
    """Returns how many plain bytes a stored chunk says it has; -1 if it does not say."""
    if value[0] == RAW:
        return len(value) - 1
    try:
        return zstandard.frame_content_size(value[1:])
    except zstandard.ZstdError:
        return -1
