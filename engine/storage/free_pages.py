"""The free pages of an LMDB file given back to the disk where they lie, by holes.

For a disk without room for a second file: a compaction by copy cannot be made there, and this
needs none. LMDB lists the pages that each transaction freed in a database of its own, under the
transaction's number. Those of transactions that no reader and neither of the two meta pages can
see any more are what LMDB itself would write over next; only these become holes. A hole reads as
zeros, which nobody reads, and is filled by the next write there: on a full disk that fails as
any write does, and LMDB rolls back.

The pages are read by `metas` and `pages`, which tell of damage and go on; here the first flaw ends
it. Nothing is given back unless all of it adds up: every page of the file is a meta page, used by
a database, or listed as free exactly once. Only `lmdb_store` calls this, which keeps writers away
meanwhile.
"""

import ctypes
import errno
import os
from collections.abc import Iterator

from engine.storage.metas import BadMetaError, read_metas
from engine.storage.pages import FREE, NUMBER, Flaw, Tree, freed_pages

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class NotAsExpectedError(Exception):
    """The file is not laid out as this module knows it; nothing was given back."""


def free_runs(fd: int, page: int, transaction: int, before: int, used: int) -> Iterator[range]:
    """Yields the pages, in order and in runs, that transactions earlier than `before` have freed.

    `transaction` is the last one, `page` the size of one, and `used` how many pages all
    databases have but that of free pages. Raises NotAsExpectedError, OSError.
    """
    try:
        meta = read_metas(fd).newer
    except BadMetaError as error:
        raise NotAsExpectedError(str(error)) from error
    if meta.page_bytes != page or meta.transaction != transaction:
        raise NotAsExpectedError("the meta pages name another transaction")
    total = meta.last_page + 1
    own = bytearray(total)
    tree = Tree(fd, meta, FREE, meta.free, own, _refuse)
    free: set[int] = set()
    later: set[int] = set()
    listed = 0
    for node in tree.nodes():
        pages = freed_pages(node.page, tree.value(node))
        if isinstance(pages, str):
            raise NotAsExpectedError(pages)
        listed += len(pages)
        (free if NUMBER.unpack(node.key)[0] < before else later).update(pages)
    tree.count()
    if listed + tree.branches + tree.leaves + tree.overflows + used + 2 != total:
        raise NotAsExpectedError("the pages do not add up")
    if len(free) + len(later) != listed or not free.isdisjoint(later):
        raise NotAsExpectedError("a page is listed as free twice")
    if any(pages and (min(pages) < 2 or max(pages) >= total) for pages in (free, later)):
        raise NotAsExpectedError("a free page is not in the file")
    at = own.find(1)
    while at >= 0:
        if at in free or at in later:
            raise NotAsExpectedError("a page of the list of free pages is listed as free")
        at = own.find(1, at + 1)
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


def _refuse(flaw: Flaw) -> None:
    raise NotAsExpectedError(str(flaw))


def _runs(pages: list[int]) -> Iterator[range]:
    first = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1:
            yield range(pages[first], pages[at - 1] + 1)
            first = at
