"""Tar headers: what stands before a member's data, in the pax format.

Times to the nanosecond, `user.*` attributes (SCHILY.xattr), long names and names that are no UTF-8
stand in an extended header before the plain one. Owners are those of the entries, by number
alone, and 0 of those that have none.

By hand: tarfile takes many times as long, and cannot write attributes' names that are no UTF-8.
"""

import tarfile
from functools import lru_cache

from engine.host.hostfs import kept_xattrs
from engine.storage.nodes import Entry, Kind

_TYPES: dict[int, bytes] = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
}
_LONGEST = 8**11
"""A size or time from here on does not fit into a plain header."""
_LARGEST_ID = 8**7
"""A user's or group's number from here on likewise."""
_NOBODY = (0, 0)
_LATER = b"ustar\00000".ljust(72, b"\0") + b"0000000\0" * 2 + bytes(167)
"""What a plain header ends with, after the target: the format, no names of owners, no device."""


def header(path: bytes, entry: Entry, target: bytes | None, sparse: int | None = None) -> bytes:
    """Returns a member's header, after the extended one if it needs that.

    `target` is for another name of a file: the name that stands in the archive already. `sparse`
    is how many bytes a sparse member has in the archive, its map included.
    """
    kind = _TYPES[entry.kind] if target is None else tarfile.LNKTYPE
    plain = path
    if target is None and entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
        target = entry.content
    if kind == tarfile.DIRTYPE or entry.kind == Kind.DIRECTORY:
        plain = path = path + b"/"
    size = entry.size if kind == tarfile.REGTYPE else 0
    seconds, ns = divmod(entry.mtime_ns, 1_000_000_000)
    extended: list[tuple[bytes, bytes]] = []
    if sparse is not None:
        above, slash, last = path.rpartition(b"/")
        size, plain = sparse, above + slash + b"GNUSparseFile.0/" + last
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
    if entry.xattrs and kind != tarfile.LNKTYPE:
        for name, value in kept_xattrs(entry.xattrs):  # a bundle may have others
            escaped = name.replace(b"%", b"%25").replace(b"=", b"%3D")
            extended.append((b"SCHILY.xattr." + escaped, value))
    uid, gid = entry.owner or _NOBODY
    if uid >= _LARGEST_ID:
        extended.append((b"uid", b"%d" % uid))
    if gid >= _LARGEST_ID:
        extended.append((b"gid", b"%d" % gid))
    head = _block(
        plain, entry.mode, size if size < _LONGEST or sparse is not None else 0,
        seconds if 0 <= seconds < _LONGEST else 0, kind, target or b"",
        uid if uid < _LARGEST_ID else 0, gid if gid < _LARGEST_ID else 0,
    )  # fmt: skip
    if not extended:
        return head
    if not all(value.isascii() or _is_utf8(value) for _, value in extended):
        extended.insert(0, (b"hdrcharset", b"BINARY"))
    records = b"".join([_record(*pair) for pair in extended])
    return b"".join((_before(len(records)), filled(records), head))


def filled(data: bytes) -> bytes:
    """Returns whole blocks."""
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _block(
    path: bytes, mode: int, size: int, mtime: int, kind: bytes, target: bytes,
    uid: int = 0, gid: int = 0,
) -> bytes:  # fmt: skip
    """Returns a ustar header; what is too long for it stands in an extended one before it."""
    digits = b"%011o\0" % size if size < _LONGEST else b"\x80" + size.to_bytes(11, "big")
    front = b"%b%07o\0%07o\0%07o\0%b%011o\0" % (
        path[:100].ljust(100, b"\0"), mode, uid, gid, digits, mtime,
    )  # fmt: skip
    back, weight = _back(kind) if not target else _weighed(kind + target[:100].ljust(100, b"\0"))
    return b"%b%06o\0 %b" % (front, sum(front) + weight, back)


def _weighed(named: bytes) -> tuple[bytes, int]:
    """Returns what follows the checksum, and what it adds to it with the checksum's own place."""
    back = named + _LATER
    return back, sum(back) + sum(b" " * 8)


@lru_cache(16)
def _back(kind: bytes) -> tuple[bytes, int]:
    """Returns `_weighed` of what has no target, as almost all members have none."""
    return _weighed(kind + bytes(100))


@lru_cache(64)
def _before(size: int) -> bytes:
    """Returns the plain header of an extended one; most are as long as the one before them."""
    return _block(b"././@PaxHeader", 0, size, 0, tarfile.XHDTYPE, b"")


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
