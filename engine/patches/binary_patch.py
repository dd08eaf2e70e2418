"""Binary contents in git's patches: literals and deltas, deflated and in base85.

A hunk is `literal SIZE` or `delta SIZE`, lines, and an empty line. SIZE is that of the bytes
before they were deflated. A line begins with a letter for the number of its bytes, A to Z for 1
to 26, a to z for 27 to 52, then the bytes in base85, filled up to fours with zeros. A delta has
the sizes of the old and the new content as varints, then copies from the old content (a byte
with its top bit set, whose other bits tell which bytes of offset and size follow, little-endian;
a size of 0 means 65,536) and inserts (a byte from 1 to 127, and so many bytes). Described in
git's Documentation/gitformat-pack and its apply.c and diff.c.
"""

import base64
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from engine.storage import content
from engine.storage.nodes import Entry, Ref
from engine.storage.objects import Objects

_LINE = 52
_LONGEST_COPY = 0xFFFFFF
_LONGEST_INSERT = 127
_FARTHEST = 0xFFFFFFFF
"""A delta can copy from no greater offset."""
_WINDOW = 1 << 20
_TRIMMED = 4 << 20
"""A changed run of up to so many bytes is cut down to what differs in it."""


class _Piece(NamedTuple):
    """Consecutive bytes of the new content: from the old one at `start`, or its own."""

    copied: bool
    start: int
    size: int


def encoded(method: bytes, size: int, data: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a hunk, without their ends. `data` is what to deflate, in parts."""
    yield b"%s %d" % (method, size)
    deflate = zlib.compressobj()
    rest = b""
    for part in _deflated(deflate, data):
        rest += part
        whole = len(rest) - len(rest) % _LINE
        for at in range(0, whole, _LINE):
            yield _line(rest[at : at + _LINE])
        rest = rest[whole:]
    if rest:
        yield _line(rest)
    yield b""


def _deflated(deflate: "zlib._Compress", data: Iterable[bytes]) -> Iterator[bytes]:
    for part in data:
        yield deflate.compress(part)
    yield deflate.flush()


def _line(data: bytes) -> bytes:
    size = len(data)
    letter = b"%c" % (size + 64 if size <= 26 else size + 70)
    return letter + base64.b85encode(data + bytes(-size % 4))


def decoded_line(line: bytes) -> bytes:
    """Returns the bytes of one line. Raises ValueError."""
    letter = line[0] if line else 0
    if 65 <= letter <= 90:
        size = letter - 64
    elif 97 <= letter <= 122:
        size = letter - 70
    else:
        raise ValueError("it does not begin with a length")
    if len(line) - 1 != (size + 3) // 4 * 5:
        raise ValueError("it is not as long as it says")
    return base64.b85decode(line[1:])[:size]


def inflated(data: bytes, size: int) -> bytes:
    """Returns `size` deflated bytes. Raises ValueError if they are more, or fewer."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(plain) != size or not inflate.eof:
        raise ValueError(f"it does not hold the {size} bytes that it promises")
    return plain


def hunk_lines(objects: Objects, old: Entry | None, new: Entry | None) -> Iterator[bytes]:
    """Yields the lines that make one file's content out of another's, in the shorter way.

    Reads what differs, in parts; chunks that both have stay unread.
    """
    size = new.size if new is not None else 0
    if old is not None and new is not None and max(old.size, new.size) <= _FARTHEST:
        pieces = _pieces(objects, old, new)
        if sum(piece.size for piece in pieces if piece.copied) * 2 > size:
            parts = [_header(old.size) + _header(new.size)]
            length = len(parts[0]) + sum(map(_encoded_size, pieces))
            yield from encoded(b"delta", length, _delta(objects, new, parts[0], pieces))
            return
    yield from encoded(b"literal", size, _range(objects, new, 0, size))


def _range(objects: Objects, entry: Entry | None, start: int, size: int) -> Iterator[bytes]:
    while size and entry is not None:
        part = content.read(objects, entry, start, min(size, _WINDOW))
        yield part
        start, size = start + len(part), size - len(part)


def _pieces(objects: Objects, old: Entry, new: Entry) -> list[_Piece]:
    """Returns the new content as copies of chunks that the old one has, and runs between them."""
    places: dict[tuple[bytes | None, int], int] = {}
    at = 0
    for ref in _refs(objects, old):
        places.setdefault((ref.id, ref.length), at)
        at += ref.length
    pieces: list[_Piece] = []
    at = 0
    for ref in _refs(objects, new):
        place = places.get((ref.id, ref.length))
        last = pieces[-1] if pieces else None
        start = at if place is None else place
        if last and last.copied == (place is not None) and last.start + last.size == start:
            pieces[-1] = last._replace(size=last.size + ref.length)
        else:
            pieces.append(_Piece(place is not None, start, ref.length))
        at += ref.length
    return list(_trimmed(objects, old, new, pieces))


def _refs(objects: Objects, entry: Entry) -> Iterable[Ref]:
    if isinstance(entry.content, bytes):
        return [Ref(entry.content, entry.size, 0)] if entry.size else []
    return content.pieces(objects, entry)


def _trimmed(objects: Objects, old: Entry, new: Entry, pieces: list[_Piece]) -> Iterator[_Piece]:
    """Yields the pieces with runs cut down to what differs from the old bytes in their place."""
    before = 0
    for number, piece in enumerate(pieces):
        if piece.copied:
            yield piece
            before = piece.start + piece.size
            continue
        after = pieces[number + 1].start if number + 1 < len(pieces) else old.size
        gap = after - before
        if not 0 < gap <= _TRIMMED or piece.size > _TRIMMED:
            yield piece
            continue
        one = content.read(objects, old, before, gap)
        other = content.read(objects, new, piece.start, piece.size)
        head = common_prefix(one, other)
        tail = common_prefix(one[head:][::-1], other[head:][::-1])
        if head:
            yield _Piece(True, before, head)
        if piece.size > head + tail:
            yield _Piece(False, piece.start + head, piece.size - head - tail)
        if tail:
            yield _Piece(True, after - tail, tail)


def common_prefix(one: bytes, other: bytes) -> int:
    """Returns how many bytes two strings begin with that are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _header(size: int) -> bytes:
    data = bytearray()
    while size > 127:
        data.append(size & 127 | 128)
        size >>= 7
    return bytes([*data, size])


def _copy(start: int, size: int) -> bytes:
    code, rest = 128, b""
    for bit, byte in enumerate(start.to_bytes(4, "little") + size.to_bytes(3, "little")):
        if byte:
            code |= 1 << bit
            rest += bytes([byte])
    return bytes([code]) + rest


def _copies(piece: _Piece) -> Iterator[bytes]:
    for at in range(0, piece.size, _LONGEST_COPY):
        yield _copy(piece.start + at, min(_LONGEST_COPY, piece.size - at))


def _encoded_size(piece: _Piece) -> int:
    if piece.copied:
        return sum(map(len, _copies(piece)))
    return piece.size + -(-piece.size // _LONGEST_INSERT)


def _delta(objects: Objects, new: Entry, header: bytes, pieces: list[_Piece]) -> Iterator[bytes]:
    yield header
    for piece in pieces:
        if piece.copied:
            yield from _copies(piece)
            continue
        rest = b""
        for part in _range(objects, new, piece.start, piece.size):
            rest += part
            whole = len(rest) - len(rest) % _LONGEST_INSERT
            for at in range(0, whole, _LONGEST_INSERT):
                yield b"\x7f" + rest[at : at + _LONGEST_INSERT]
            rest = rest[whole:]
        if rest:
            yield bytes([len(rest)]) + rest


def apply_delta(delta: bytes, old: bytes, most: int) -> bytes:
    """Returns the new content that a delta makes of the old one; ValueError for a wrong delta.

    `most` is how large it may become.
    """
    at = 0

    def byte() -> int:
        nonlocal at
        at += 1
        if at > len(delta):
            raise ValueError("a delta ends early")
        return delta[at - 1]

    if _varint(byte) != len(old):
        raise ValueError("a delta is for a file of another size")
    size = _varint(byte)
    if size > most:
        raise ValueError(f"a delta makes more than {most:,} bytes")
    parts = []
    made = 0
    while at < len(delta):
        code = byte()
        if code & 128:
            start = sum(byte() << 8 * bit for bit in range(4) if code & 1 << bit)
            length = sum(byte() << 8 * bit for bit in range(3) if code & 16 << bit) or 65536
            if start + length > len(old):
                raise ValueError("a delta copies what is not there")
            part = old[start : start + length]
        elif code:
            part = delta[at : at + code]
            at += code
        else:
            raise ValueError("a delta has an unknown instruction")
        parts.append(part)
        made += len(part)
        if made > size:
            break
    if made != size:
        raise ValueError("a delta does not make what it promises")
    return b"".join(parts)


def _varint(byte: Callable[[], int]) -> int:
    value = shift = 0
    while True:
        code = byte()
        value |= (code & 127) << shift
        shift += 7
        if code < 128:
            return value
        if shift > 63:
            raise ValueError("a delta has an impossible number")
