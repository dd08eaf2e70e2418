"""The free pages of an LMDB file given back to the disk where they lie, by holes.

For a disk without room for a second file: a compaction by copy cannot be made there, and this
needs none. LMDB lists the pages that each transaction freed in a database of its own, under the
transaction's number. Those of transactions that no reader and neither of the two meta pages can
see any more are what LMDB itself would write over next; only these become holes. A hole reads as
zeros, which nobody reads, and is filled by the next write there: on a full disk that fails as
any write does, and LMDB rolls back.

The layout read here is that of LMDB 0.9 on 64 bits (`lmdb.h`, `mdb.c`: MDB_meta, MDB_page,
MDB_node, MDB_ID). Nothing is given back unless all of it adds up: every page of the file is a
meta page, used by a database, or listed as free exactly once. Only `lmdb_store` calls this, which
keeps writers away meanwhile.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("=QHHHH")
"""A page's number, what LMDB calls padding, flags, and where its free room begins and ends."""
_META = struct.Struct("=IIQQ")
_DATABASE = struct.Struct("=IHHQQQQQ")
_LAST = struct.Struct("=QQ")
_NODE = struct.Struct("=HHHH")
_NUMBER = struct.Struct("=Q")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_KINDS = _BRANCH | _LEAF | _OVERFLOW
_BIG = 0x01
_NONE = (1 << 64) - 1
_DEEPEST = 32
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class NotAsExpectedError(Exception):
    """The file is not laid out as this module knows it; nothing was given back."""


class _Meta(NamedTuple):
    page: int
    root: int
    own_pages: int
    last_page: int
    transaction: int


def free_runs(fd: int, page: int, transaction: int, before: int, used: int) -> Iterator[range]:
    """Yields the pages, in order and in runs, that transactions earlier than `before` have freed.

    `transaction` is the last one, `page` the size of one, and `used` how many pages all
    databases have but that of free pages. Raises NotAsExpectedError, OSError.
    """
    meta = max((_meta(fd, number, page) for number in (0, 1)), key=lambda meta: meta.transaction)
    if meta.page != page or meta.transaction != transaction:
        raise NotAsExpectedError("the meta pages name another transaction")
    free: set[int] = set()
    listed = 0
    for number, pages in _records(fd, meta):
        listed += len(pages)
        if number < before:
            free.update(pages)
    total = meta.last_page + 1
    if listed + meta.own_pages + used + 2 != total:
        raise NotAsExpectedError("the pages do not add up")
    if free and (min(free) < 2 or max(free) > meta.last_page):
        raise NotAsExpectedError("a free page is not in the file")
    yield from _runs(sorted(free))


def punch(fd: int, offset: int, length: int) -> bool:
    """Gives a part of a file back to the disk; False where the file system has no holes."""
    mode = _KEEP_SIZE | _PUNCH_HOLE
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
            return False
        raise OSError(code, os.strerror(code))
    return True


def _meta(fd: int, number: int, page: int) -> _Meta:
    data = os.pread(fd, page, number * page)
    try:
        magic, version, _, _ = _META.unpack_from(data, _HEADER.size)
        at = _HEADER.size + _META.size
        size, _, _, branches, leaves, overflows, _, root = _DATABASE.unpack_from(data, at)
        last, transaction = _LAST.unpack_from(data, at + 2 * _DATABASE.size)
    except struct.error as error:
        raise NotAsExpectedError("a meta page is cut short") from error
    if magic != _MAGIC or version != _VERSION:
        raise NotAsExpectedError("a meta page is of another format")
    return _Meta(size, root, branches + leaves + overflows, last, transaction)


def _records(fd: int, meta: _Meta) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields each transaction's number and the pages that it freed."""
    pending = [(meta.root, 0)] if meta.root != _NONE else []
    while pending:
        number, depth = pending.pop()
        if depth > _DEEPEST:
            raise NotAsExpectedError("the list of free pages goes in circles")
        data = _page(fd, meta, number)
        _, _, flags, lower, _ = _HEADER.unpack_from(data)
        for index in range((lower - _HEADER.size) // 2):
            (at,) = struct.unpack_from("=H", data, _HEADER.size + 2 * index)
            if at + _NODE.size > len(data):
                raise NotAsExpectedError("a node is not on its page")
            low, high, node_flags, key = _NODE.unpack_from(data, at)
            if flags & _KINDS == _BRANCH:
                pending.append((low | high << 16 | node_flags << 32, depth + 1))
                continue
            start = at + _NODE.size
            if flags & _KINDS != _LEAF or key != _NUMBER.size:
                raise NotAsExpectedError("a page is none of the list of free pages")
            (transaction,) = _NUMBER.unpack_from(data, start)
            value = data[start + key : start + key + (low | high << 16)]
            if node_flags & _BIG:
                (first,) = _NUMBER.unpack_from(data, start + key)
                value = _big(fd, meta, first, low | high << 16)
            yield transaction, _ids(value)


def _page(fd: int, meta: _Meta, number: int) -> bytes:
    data = os.pread(fd, meta.page, number * meta.page)
    if len(data) < meta.page or _HEADER.unpack_from(data)[0] != number:
        raise NotAsExpectedError(f"page {number} is not where it should be")
    return data


def _big(fd: int, meta: _Meta, number: int, size: int) -> bytes:
    data = os.pread(fd, _HEADER.size + size, number * meta.page)
    header = _HEADER.unpack_from(data)
    if len(data) < _HEADER.size + size or header[0] != number or header[2] & _KINDS != _OVERFLOW:
        raise NotAsExpectedError(f"page {number} is no overflow page")
    return data[_HEADER.size :]


def _ids(value: bytes) -> tuple[int, ...]:
    """Returns the page numbers of a list, which begins with how many there are."""
    if len(value) < _NUMBER.size:
        raise NotAsExpectedError("a list of free pages is cut short")
    (count,) = _NUMBER.unpack_from(value)
    if len(value) < (count + 1) * _NUMBER.size:
        raise NotAsExpectedError("a list of free pages is cut short")
    return struct.unpack_from(f"={count}Q", value, _NUMBER.size)


def _runs(pages: list[int]) -> Iterator[range]:
    first = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1:
            yield range(pages[first], pages[at - 1] + 1)
            first = at
