"""The pages of a store's file, read without LMDB.

LMDB trusts its pages: one flipped bit can end the process inside the library. This module reads
the same pages as bytes and believes none of them, so damage becomes a `Flaw` with a page's number.
It never maps the file, holds no lock and writes nothing.

The format is LMDB 0.9's on a machine of 64 bits, integers in the machine's order:

    page     number u64, pad u16, flags u16, lower u16, upper u16; an overflow page has its
             count of pages, u32, in the place of lower and upper
    meta     page 0 or 1: magic u32, version u32, address u64, map's size u64, the records of the
             list of free pages and of the main database, last page u64, transaction u64
    record   of a database: pad u32, flags u16, depth u16, branch pages, leaf pages, overflow
             pages, entries, root: u64 each
    node     low and high half of a size u32, flags u16, size of the key u16, key, value; in a
             branch page the first six bytes are the number of the page below
"""

import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

HEADER = 16
NO_PAGE = (1 << 64) - 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
BIG, NAMED = 1, 2
"""Flags of a node: its value is in overflow pages; its value is the record of a database."""
DEEPEST = 32
"""Levels of a tree that LMDB can walk."""
FREE = "free pages"
"""The name that messages give to the list of free pages."""
MAIN = "databases"
"""The name that messages give to the main database, which holds the records of all others."""
LONGEST_KEY = 511

PAGE = struct.Struct("=QHHHH")
_PAGES = struct.Struct("=I")
NODE = struct.Struct("=IHH")
NUMBER = struct.Struct("=Q")
RECORD = struct.Struct("=IHHQQQQQ")
_LITTLE = sys.byteorder == "little"
RECORD_BYTES = RECORD.size


class Flaw(msgspec.Struct, frozen=True):
    """One thing that is wrong with the file. `page` is -1 where no one page is to blame."""

    database: str
    page: int
    problem: str

    def __str__(self) -> str:
        return f"{self.database}: {self.problem}" if self.database else self.problem


class Record(NamedTuple):
    """What the file says of a database."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    """A meta page: the state that one transaction left."""

    number: int
    page_bytes: int
    map_bytes: int
    free: Record
    main: Record
    last_page: int
    transaction: int


class Node(NamedTuple):
    """A key of a leaf with the place of its value: bytes, or the first of its overflow pages."""

    key: bytes
    flags: int
    size: int
    value: bytes
    page: int


Tell = Callable[[Flaw], None]


def read_record(raw: bytes) -> Record:
    """Returns a database's record of 48 bytes."""
    return Record(*RECORD.unpack(raw))


Fits = Callable[[bytes, int], bool]
"""True if a key and the size of a value can stand together in a database."""


def anything(key: bytes, size: int) -> bool:
    """Rules nothing out."""
    return True


class Tree:
    """A database's tree, walked in the order of its keys; counts what it finds.

    What is wrong goes to `tell`, and the walk goes on beside it. Pages are counted in `used`, one
    byte each: a page that is there already is not read again.
    """

    heals = False

    def __init__(
        self, fd: int, meta: Meta, name: str, record: Record, used: bytearray, tell: Tell,
        fits: Fits = anything,
    ) -> None:  # fmt: skip
        self.fd, self.meta, self.name, self.record, self.used = fd, meta, name, record, used
        self.fits = fits
        self._tell = tell
        self.branches = self.leaves = self.overflows = self.entries = self.depth = 0
        self.flaws = self.disordered = 0
        self._last: bytes | None = None
        self._low = b""

    def tell(self, page: int, problem: str) -> None:
        """Names something wrong in this database."""
        self.flaws += 1
        self._tell(Flaw(self.name, page, problem))

    def nodes(self) -> Iterator[Node]:
        """Yields the nodes of all leaves that can be read."""
        if self.record.root == NO_PAGE:
            return
        stack = [(self.record.root, b"", 1)]
        while stack:
            page, separator, level = stack.pop()
            if separator:
                if self._last is not None and self._key(self._last) >= self._key(separator):
                    self.tell(page, "a key is greater than those that should follow it")
                self._low = separator
            found = self._read(page, level)
            if found is None:
                continue
            page, flags, raw, starts = found
            self.depth = max(self.depth, level)
            if flags == LEAF:
                self.leaves += 1
                yield from self._leaf(page, raw, starts)
            elif level == DEEPEST:
                self.tell(page, f"the tree has more than {DEEPEST} levels")
            else:
                self.branches += 1
                stack.extend(reversed([(*below, level + 1) for below in self._branch(raw, starts)]))

    def count(self) -> None:
        """Compares what was found with what the file says of it; to be called after a walk."""
        found = (self.depth, self.branches, self.leaves, self.overflows, self.entries)
        said = self.record[2:7]
        if found != said and not self.flaws:  # else it is known that something was out of reach
            names = ("levels", "branch pages", "leaf pages", "overflow pages", "entries")
            wrong = [
                f"{has} {name}, not {says}"
                for name, has, says in zip(names, found, said, strict=True)
                if has != says
            ]
            self.tell(-1, f"it has {', '.join(wrong)}")

    def value(self, node: Node) -> bytes | None:
        """Returns a node's value, or None if the file ends before it."""
        if not node.flags & BIG:
            return node.value
        if len(node.value) < NUMBER.size:
            return None
        first = NUMBER.unpack(node.value)[0]
        if first > self.meta.last_page or node.size > os.fstat(self.fd).st_size:
            return None
        raw = os.pread(self.fd, node.size, first * self.meta.page_bytes + HEADER)
        return raw if len(raw) == node.size else None

    def _key(self, raw: bytes) -> bytes:
        """Returns what compares as LMDB compares keys of this database."""
        return raw[::-1] if self.name == FREE and _LITTLE else raw

    def _taken(self, page: int, pages: int = 1) -> str:
        """Counts pages as used; returns why that cannot be, if it cannot."""
        if page < 2 or page + pages > len(self.used):
            return f"it refers to page {page} of {len(self.used)}"
        if any(self.used[page : page + pages]):
            return f"page {page} is used twice"
        self.used[page : page + pages] = b"\1" * pages
        return ""

    def _read(self, page: int, level: int) -> tuple[int, int, bytes, tuple[int, ...]] | None:
        """Returns number, flags, bytes and places of the nodes of a branch or leaf page."""
        problem = self._taken(page)
        if not problem:
            size = self.meta.page_bytes
            raw = os.pread(self.fd, size, page * size)
            if len(raw) == size:
                found = look(page, raw)
                if not isinstance(found, str):
                    return page, found[0], raw, found[1]
                problem = found
            else:
                problem = f"the file ends before page {page}"
        self.tell(page, problem)
        return self.heal(page, level)

    def heal(self, page: int, level: int) -> tuple[int, int, bytes, tuple[int, ...]] | None:
        """Returns what a page that cannot be read was, if that can be told."""
        return None

    def heal_value(self, node: Node, first: int, pages: int) -> Node | None:
        """Returns a node whose value is not where it says, if it can be told where it is."""
        return None

    def _branch(self, raw: bytes, starts: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
        for index, start in enumerate(starts):
            low, high, key = NODE.unpack_from(raw, start)
            yield low | high << 32, raw[start + 8 : start + 8 + key] if index else b""

    def _leaf(self, page: int, raw: bytes, starts: tuple[int, ...]) -> Iterator[Node]:
        allowed = {0, NAMED} if self.name == MAIN else {0, BIG}
        for node in leaf_nodes(page, raw, starts):
            self.entries += 1
            if not self._in_order(page, node.key) and not self.heals:
                continue
            if node.flags not in allowed:
                self.tell(page, f"a node of page {page} has flags {node.flags:#x}")
                if not self.heals:
                    continue
                node = node._replace(flags=node.flags & (BIG | NAMED))
            if not self.fits(node.key, node.size):
                self.tell(page, f"a node of page {page} has a key or value of the wrong size")
                continue
            if not node.flags & BIG:
                yield node
            elif (found := self._overflow(node)) is not None:
                yield found

    def follows(self, key: bytes) -> bool:
        """True if a key is where the walk is now."""
        own = self._key(key)
        return (not self._low or own >= self._key(self._low)) and (
            self._last is None or own > self._key(self._last)
        )

    def _in_order(self, page: int, key: bytes) -> bool:
        if not 0 < len(key) <= LONGEST_KEY or (self.name == FREE and len(key) != 8):
            self.tell(page, f"a key of page {page} has {len(key)} bytes")
            return False
        in_order = self.follows(key)
        self._last, self._low = key, b""
        if not in_order:
            self.disordered += 1
            self.tell(page, f"the keys of page {page} are not in order")
        return in_order

    def _overflow(self, node: Node) -> Node | None:
        first: int = NUMBER.unpack(node.value)[0]
        pages = pages_of(node.size, self.meta.page_bytes)
        problem = self._taken(first, pages)
        if not problem:
            self.overflows += pages
            raw = os.pread(self.fd, HEADER, first * self.meta.page_bytes)
            if overflow_pages(raw, first) == pages:
                return node
            problem = f"page {first} does not begin a value of {pages} pages"
        self.tell(first, problem)
        return self.heal_value(node, first, pages)


def look(page: int, raw: bytes) -> tuple[int, tuple[int, ...]] | str:
    """Returns the flags of a branch or leaf page and where its nodes are, or what is wrong."""
    number, _, flags, lower, upper = PAGE.unpack_from(raw)
    size = len(raw)
    if number != page:
        return f"page {page} says that it is page {number}"
    if flags not in {BRANCH, LEAF}:
        return f"page {page} has flags {flags:#x}"
    count = (lower - HEADER) // 2
    if not HEADER + 2 <= lower <= upper <= size or lower % 2:
        return f"page {page} has its bounds at {lower} and {upper}"
    starts = struct.unpack_from(f"={count}H", raw, HEADER)
    ends = set()
    for start in starts:
        if start < upper or start + 8 > size:
            return f"page {page} has a node at {start}"
        data, node, key = NODE.unpack_from(raw, start)
        end = start + 8 + key
        if flags == LEAF:
            end += 8 if node & BIG else data
        ends.add(end + 1 & ~1)
    # Nodes fill a page from `upper` to its end without gaps: one size that is wrong shows.
    if len(ends) < count or {*starts, size} != ends | {upper}:
        return f"the nodes of page {page} do not fill it"
    return flags, starts


def leaf_nodes(page: int, raw: bytes, starts: tuple[int, ...]) -> Iterator[Node]:
    """Yields the nodes of a leaf page in their order."""
    for start in starts:
        size, flags, key_bytes = NODE.unpack_from(raw, start)
        at = start + 8 + key_bytes
        yield Node(
            raw[start + 8 : at], flags, size, raw[at : at + (8 if flags & BIG else size)], page
        )


def pages_of(size: int, page_bytes: int) -> int:
    """Returns how many overflow pages a value takes."""
    return (HEADER - 1 + size) // page_bytes + 1


def overflow_pages(raw: bytes, page: int) -> int:
    """Returns how many pages the overflow page `page` says it begins, 0 if it is none."""
    if len(raw) < HEADER:
        return 0
    number, _, flags, _, _ = PAGE.unpack_from(raw)
    pages: int = _PAGES.unpack_from(raw, 12)[0]
    return pages if (number, flags) == (page, OVERFLOW) else 0


def freed_pages(page: int, raw: bytes | None) -> tuple[int, ...] | str:
    """Returns the pages that one value of the list of free pages names, or what is wrong.

    It is their number, then they, the greatest first. `page` is where the value's node is.
    """
    if raw is None or len(raw) < NUMBER.size or len(raw) % NUMBER.size:
        return f"a list of free pages on page {page} cannot be read"
    room = len(raw) // NUMBER.size - 1
    (count,) = NUMBER.unpack_from(raw)
    if count > room:
        return f"a list of free pages on page {page} has {count} of {room}"
    return struct.unpack_from(f"={count}Q", raw, NUMBER.size)
