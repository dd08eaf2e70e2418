"""The stat cache: what files looked like when their folder was last known to be as a stored one.

Database `imports`, a value per folder: key BLAKE3(absolute path of the root)[:16] +
BLAKE3(relative path)[:16]; value 4 bytes length, that many bytes of MessagePack [[name, mode,
inode, size, mtime, ctime, links], ...] sorted by name, then MessagePack of the folder's result,
[node, size, entries, owners]. A file whose row is the same today is the one that `node` has under
its name. A row whose ctime was too fresh to be trusted is stored with ctime -1 (the "racy git"
problem: Documentation/technical/racy-git.txt). Import and checkout write the cache; import and
whoever looks for changes in a checkout read it. A folder's value says of the folders in it what
theirs say, so values are written together. What a value leads to is taken unread, so it stands
in the store for as long as the value does: GC removes values before their nodes. Losing the
cache costs time, nothing else.
"""

import os
from collections.abc import Iterable

import msgspec

from engine.host.hostfs import mtime_of
from engine.ids import digest
from engine.storage.nodes import Entry, Totals
from engine.storage.store import Db, Writer
from engine.trees.directory import directory_id

Row = tuple[bytes, int, int, int, int, int, int]
"""name, mode, inode, size, mtime ns, ctime ns, links."""

FRESH_NS = 100_000_000
"""A ctime younger than this may hide a later change in the same tick."""
FRESH = -1
"""Stands for such a ctime in a row, which then is like no other, nor like itself later."""

ROWS_CHANGED = b"rows"
"""The key in `meta` whose value changes with every transaction that stores rows."""

encode_rows = msgspec.msgpack.Encoder().encode
decode_rows = msgspec.msgpack.Decoder(list[Row]).decode


class FolderResult(msgspec.Struct, array_like=True):
    """A folder as it is stored: its node, the size and the entries below it, those with owners."""

    node: bytes
    size: int
    entries: int
    owners: int = 0


def folder_result(entry: Entry, totals: Totals) -> FolderResult:
    """Returns what a value says of a directory's entry, which has these totals."""
    return FolderResult(directory_id(entry), entry.size, totals.entries, totals.owners)


def cache_prefix(root: str, *, owners: bool = False) -> bytes:
    """Returns what the keys of all folders below a directory begin with.

    Of trees that keep `owners`, others: the same directory makes another tree.
    """
    return digest(os.fsencode(root) + (b"\0owners" if owners else b""))[:16]


def cache_key(prefix: bytes, path: bytes) -> bytes:
    """Returns the key of a folder by its path below the root."""
    return prefix + digest(path)[:16]


def encode_folder(rows: bytes, result: FolderResult) -> bytes:
    """Returns the value of a folder with encoded rows."""
    return len(rows).to_bytes(4, "big") + rows + msgspec.msgpack.encode(result)


def split_folder(value: memoryview) -> tuple[bytes, FolderResult]:
    """Returns the encoded rows of a folder and its result. Raises msgspec.DecodeError."""
    end = 4 + int.from_bytes(value[:4], "big")
    return bytes(value[4:end]), msgspec.msgpack.decode(value[end:], type=FolderResult)


def node_of_row(value: memoryview) -> bytes:
    """Returns the node that a value of the database leads to; empty if it leads nowhere."""
    end = 4 + int.from_bytes(value[:4], "big")
    try:
        return bytes(msgspec.msgpack.decode(value[end:])[0])
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        return b""


def sums_of_row(value: memoryview) -> tuple[int, int]:
    """Returns the size and the number of entries that a value says of its node; -1 if none."""
    try:
        _, result = split_folder(value)
    except msgspec.DecodeError:
        return -1, -1
    return result.size, result.entries


def put_rows(writer: Writer, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Stores values of the database under their keys, and lets a collection know."""
    ordered = sorted(pairs)
    if ordered:
        writer.put(Db.META, ROWS_CHANGED, os.urandom(8))
        writer.put_many(Db.IMPORTS, ordered)


def row_of(name: bytes, status: os.stat_result) -> Row:
    """Returns the row of a file."""
    return (
        name, status.st_mode, status.st_ino, status.st_size, mtime_of(status),
        status.st_ctime_ns, status.st_nlink,
    )  # fmt: skip
