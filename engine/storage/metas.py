"""The two meta pages of a store's file: which state is the last, and can both be right.

Everything else of the file hangs on them, and LMDB believes what they say. Looked at whenever a
store is opened.
"""

import os
import struct
import time
from typing import NamedTuple

from engine.storage.pages import (
    BRANCH,
    DEEPEST,
    HEADER,
    LEAF,
    META,
    NO_PAGE,
    NODE,
    NUMBER,
    PAGE,
    RECORD,
    Flaw,
    Meta,
    read_record,
)

MAGIC, VERSION = 0xBEEFC0DE, 1

_META = struct.Struct("=IIQQ48s48sQQ")
META_BYTES = HEADER + _META.size
_FREE_FLAGS = 8
_SLACK_PAGES = 16_384
_ATTEMPTS = 4


class BadMetaError(Exception):
    """The meta pages cannot both be right."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__(flaw.problem)
        self.flaw = flaw


def read_meta(raw: bytes, number: int) -> Meta:
    """Returns meta page 0 or 1. Raises BadMetaError if it is none, or impossible in itself."""

    def bad(problem: str) -> BadMetaError:
        return BadMetaError(Flaw("", number, f"meta page {number}: {problem}"))

    if len(raw) < META_BYTES:
        raise bad("the file ends before it")
    own, _, flags, _, _ = PAGE.unpack_from(raw)
    magic, version, _, map_bytes, free, main, last, transaction = _META.unpack_from(raw, HEADER)
    meta = Meta(number, 0, map_bytes, read_record(free), read_record(main), last, transaction)
    meta = meta._replace(page_bytes=meta.free.pad)
    if magic != MAGIC:
        raise bad(f"the magic number is {magic:#x}")
    if version != VERSION:
        raise bad(f"the version is {version}")
    if own != number or flags != META:
        raise bad(f"its header says page {own} with flags {flags:#x}")
    if not 512 <= meta.page_bytes <= 32_768 or meta.page_bytes & (meta.page_bytes - 1):
        raise bad(f"the size of a page is {meta.page_bytes}")
    if transaction and transaction % 2 != number:
        raise bad(f"it has transaction {transaction}, which belongs into the other")
    if meta.free.flags != _FREE_FLAGS or meta.main.flags or meta.main.pad:
        raise bad("the flags of its databases are none that the store uses")
    for record in (meta.free, meta.main):
        if record.root != NO_PAGE and not 2 <= record.root <= last:
            raise bad(f"it names page {record.root} of {last + 1}")
        if record.depth > DEEPEST or (record.root == NO_PAGE) != (record.depth == 0):
            raise bad(f"it says that a tree has {record.depth} levels")
    if last < 1 or (last + 1) * meta.page_bytes > map_bytes:
        raise bad(f"{last + 1} pages do not fit into a map of {map_bytes} bytes")
    return meta


class Metas(NamedTuple):
    """The state of the last transaction, and that of the one before."""

    newer: Meta
    older: Meta


def read_metas(fd: int) -> Metas:
    """Returns both meta pages. Raises BadMetaError if they cannot both be right.

    The two hold consecutive transactions. Each transaction that frees pages lists them under its
    own number, last: that tells a flipped number from a right one. A few small reads.
    """
    for attempt in range(_ATTEMPTS):
        try:
            metas = both(*raw_metas(fd), os.fstat(fd).st_size)
            for meta in metas:
                _check_number(fd, meta)
        except BadMetaError:
            # Another process may be writing one, or have used pages of the older one again.
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.002 * attempt)
        else:
            return metas
    raise AssertionError


def raw_metas(fd: int) -> tuple[bytes, bytes]:
    """Returns the bytes of both meta pages; the second is looked for where its magic number is."""
    first = os.pread(fd, META_BYTES, 0)
    sizes = [4096, *(1 << bits for bits in range(9, 16))]
    if len(first) == META_BYTES:
        sizes.insert(0, RECORD.unpack_from(first, HEADER + 24)[0])
    for size in sizes:
        second = os.pread(fd, META_BYTES, size)
        if second[HEADER : HEADER + 4] == struct.pack("=I", MAGIC):
            return first, second
    return first, os.pread(fd, META_BYTES, 4096)


def both(first: bytes, second: bytes, file_bytes: int) -> Metas:
    """Returns the meta pages that these bytes are. Raises BadMetaError."""
    metas = read_meta(first, 0), read_meta(second, 1)
    older, newer = sorted(metas, key=lambda meta: meta.transaction)
    there = file_bytes // newer.page_bytes
    problem = ""
    if newer.page_bytes != older.page_bytes:
        problem = f"the size of a page is {newer.page_bytes} or {older.page_bytes}"
    elif newer.transaction - older.transaction != 1 and newer.transaction:
        problem = f"they have transactions {metas[0].transaction} and {metas[1].transaction}"
    elif newer.last_page < older.last_page:
        problem = f"transaction {newer.transaction} has fewer pages than the one before"
    elif older.last_page < there < newer.last_page - _SLACK_PAGES:
        problem = f"the file has {there} pages and should have {newer.last_page + 1}"
    if problem:
        raise BadMetaError(Flaw("", newer.number, f"meta pages 0 and 1: {problem}"))
    return Metas(newer, older)


def transaction_of(fd: int, meta: Meta) -> int | None:
    """Returns the transaction of the last list of freed pages, or None if it cannot be read.

    As a transaction with free pages to tell of wrote it last, this is the state's own number.
    """
    if meta.free.root == NO_PAGE:
        return None
    page = meta.free.root
    for _ in range(meta.free.depth):
        raw = os.pread(fd, meta.page_bytes, page * meta.page_bytes)
        try:
            number, _, flags, lower, _ = PAGE.unpack_from(raw)
            at = struct.unpack_from("=H", raw, lower - 2)[0]
            size, high, key_bytes = NODE.unpack_from(raw, at)
            if number != page or flags not in {BRANCH, LEAF} or lower <= HEADER:
                return None
            if flags == LEAF:
                found: int = NUMBER.unpack_from(raw, at + 8)[0]
                return found if key_bytes == 8 else None
            page = size | high << 32
        except struct.error:
            return None
    return None


def _check_number(fd: int, meta: Meta) -> None:
    found = transaction_of(fd, meta)
    if found is not None and found != meta.transaction:
        problem = f"transaction {meta.transaction}, but its last list of free pages is {found}'s"
        raise BadMetaError(Flaw("", meta.number, f"meta page {meta.number}: {problem}"))
