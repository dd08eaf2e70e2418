"""A damaged store's file as a store that can be read, without LMDB.

Everything that still has a place in the file is there; the rest is absent, so whoever verifies
names it as missing. One flipped bit in the frame of a page (its header, the places and sizes of
its nodes, a number that leads to another page) is found by trying every bit, and taken back where
exactly one bit makes the page whole. A database whose record is lost is read as it was one
transaction before. Holds all keys in memory.
"""

import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

from engine.ids import ID_BYTES
from engine.storage import pages
from engine.storage.metas import (
    BadMetaError,
    both,
    raw_metas,
    read_meta,
    read_metas,
    transaction_of,
)
from engine.storage.pages import (
    BIG,
    BRANCH,
    HEADER,
    LEAF,
    MAIN,
    NO_PAGE,
    Flaw,
    Meta,
    Node,
    Tree,
    leaf_nodes,
    look,
    overflow_pages,
)
from engine.storage.store import Db, Store, StoreStatistics
from engine.storage.structure import ALWAYS, check, trees

T = TypeVar("T")

_BITS_OF_NUMBER = 48


class HealingTree(Tree):
    """A tree that takes back one flipped bit in a page where that makes the page whole."""

    heals = True

    def __init__(self, claimed: bytearray, *rest: Any) -> None:
        """`claimed` is what `check` found used or free: no such page was meant."""
        super().__init__(*rest)
        self.claimed = claimed

    def heal(self, page: int, level: int) -> tuple[int, int, bytes, tuple[int, ...]] | None:
        """Returns what a page was before one bit flipped in it, or in the number that names it."""
        size = self.meta.page_bytes
        raw = os.pread(self.fd, size, page * size)
        if 2 <= page < len(self.used) and len(raw) == size and isinstance(look(page, raw), str):
            healed = healed_page(page, raw, self.fits)
            if healed is not None:
                return page, *healed
        found = []
        for other in (page ^ 1 << bit for bit in range(_BITS_OF_NUMBER)):
            if not 2 <= other < len(self.used) or self.used[other] or self.claimed[other]:
                continue
            raw = os.pread(self.fd, size, other * size)
            seen = look(other, raw) if len(raw) == size else ""
            if isinstance(seen, str) or seen[0] != (LEAF if level == self.record.depth else BRANCH):
                continue
            first = next(leaf_nodes(other, raw, seen[1]))
            if seen[0] == BRANCH or (self.follows(first.key) and self.fits(first.key, first.size)):
                found.append((other, seen[0], raw, seen[1]))
        if len(found) != 1:
            return None
        self.used[found[0][0]] = 1
        return found[0]

    def heal_value(self, node: Node, first: int, pages: int) -> Node | None:
        """Returns a node with its value where one other bit of its number leads to."""
        size = self.meta.page_bytes
        for bit in range(_BITS_OF_NUMBER):
            other = first ^ 1 << bit
            if not 2 <= other <= len(self.used) - pages or any(
                self.used[other : other + pages] + self.claimed[other : other + pages]
            ):
                continue
            if overflow_pages(os.pread(self.fd, HEADER, other * size), other) == pages:
                self.used[other : other + pages] = b"\1" * pages
                return node._replace(value=struct.pack("=Q", other))
        return node if 2 <= first <= len(self.used) - pages else None


def _frame(raw: bytes) -> Iterator[int]:
    """Yields where the bytes of a page are that say what is where in it."""
    lower = struct.unpack_from("=H", raw, 12)[0]
    yield from range(HEADER)
    if not HEADER < lower <= len(raw) or lower % 2:
        return  # the flipped bit is one of those
    yield from range(HEADER, lower)
    for start in set(struct.unpack_from(f"={(lower - HEADER) // 2}H", raw, HEADER)):
        if lower <= start <= len(raw) - 8:
            yield from range(start, start + 8)


def healed_page(
    page: int, raw: bytes, fits: pages.Fits
) -> tuple[int, bytes, tuple[int, ...]] | None:
    """Returns flags, bytes and nodes of a page after one bit is taken back, if only one can be."""
    found = []
    for at in _frame(raw):
        byte = raw[at]
        for bit in range(8):
            tried = b"".join((raw[:at], bytes((byte ^ 1 << bit,)), raw[at + 1 :]))
            seen = look(page, tried)
            if isinstance(seen, str):
                continue
            flags, starts = seen
            nodes = leaf_nodes(page, tried, starts) if flags == LEAF else ()
            if all(fits(node.key, node.size) and node.flags in {0, 1, 2} for node in nodes):
                found.append((flags, tried, starts))
    return found[0] if len(found) == 1 else None


def choose_metas(fd: int) -> tuple[Meta | None, Meta | None]:
    """Returns the newer and the older state of the file, one flipped bit taken back."""
    try:
        return read_metas(fd)
    except BadMetaError:
        pass
    size = os.fstat(fd).st_size
    raws = raw_metas(fd)
    found = []
    for which in range(2):
        for at in range(len(raws[which])):
            for bit in range(8):
                tried = list(raws)
                byte = bytes((raws[which][at] ^ 1 << bit,))
                tried[which] = b"".join((raws[which][:at], byte, raws[which][at + 1 :]))
                try:
                    metas = both(tried[0], tried[1], size)
                except BadMetaError:
                    continue
                if all(_plausible(fd, meta) for meta in metas) and metas not in found:
                    found.append(metas)
    whole = [metas for metas in found if not check(fd, metas.newer).flaws]
    if whole or found:
        return (whole or found)[0]
    single = []
    for which in range(2):
        try:
            meta = read_meta(raws[which], which)
        except BadMetaError:
            continue
        single.append((transaction_of(fd, meta) or 0, meta))
    single.sort(reverse=True)
    return (single[0][1], None) if single else (None, None)


def _plausible(fd: int, meta: Meta) -> bool:
    """True if both trees of a state begin with a page of the right kind."""
    for record in (meta.free, meta.main):
        if record.root == NO_PAGE:
            continue
        found = look(record.root, os.pread(fd, meta.page_bytes, record.root * meta.page_bytes))
        if isinstance(found, str) or found[0] != (LEAF if record.depth == 1 else BRANCH):
            return False
    return transaction_of(fd, meta) in {None, meta.transaction}


class _Place:
    __slots__ = ("node", "tree")

    def __init__(self, tree: Tree, node: Node) -> None:
        self.tree, self.node = tree, node


class PageStore(Store):
    """Reads what a store's file still has; refuses to write. The file may not change meanwhile."""

    def __init__(self, path: str) -> None:
        """Reads all keys of the store at `path`. Raises OSError."""
        self.path = path
        self.fd = os.open(os.path.join(path, "db", "data.mdb"), os.O_RDONLY | os.O_CLOEXEC)
        self.lost: dict[Db, int] = {}
        """How many entries each database should have and has not."""
        self.older_entries: dict[Db, int] = {}
        """How many entries are as they were one transaction before."""
        self._flaws: list[Flaw] = []
        self._tables: dict[Db, dict[bytes, _Place]] = {db: {} for db in Db}
        self._orders: dict[Db, list[bytes]] = {}
        try:
            self.newer, self.older = choose_metas(self.fd)
            self._load()
        except BaseException:
            os.close(self.fd)
            raise

    def _load(self) -> None:
        if self.newer is None:
            self.lost = dict.fromkeys(Db, 1)
            return
        found = self._trees(self.newer)
        before: dict[Db, Tree] = {}
        if self.older is not None and (self._flaws or set(found) != set(Db)):
            before = self._trees(self.older)
        for db in Db:
            tree = found.get(db)
            table = self._tables[db]
            if tree is not None:
                table.update((node.key, _Place(tree, node)) for node in tree.nodes())
            if tree is None or (tree.flaws and len(table) - tree.disordered < tree.record.entries):
                self._add_older(db, before, tree)
        self._orders = {db: sorted(table) for db, table in self._tables.items()}

    def _trees(self, meta: Meta) -> dict[Db, Tree]:
        used, claimed = bytearray(meta.last_page + 1), bytearray()
        check(self.fd, meta, claimed)
        kind = partial(HealingTree, claimed)
        named = trees(self.fd, meta, used, self._flaws.append, kind)
        known = {db.value: db for db in Db}
        return {known[tree.name]: tree for tree in named if tree.name in known}

    def _add_older(self, db: Db, before: dict[Db, Tree], tree: Tree | None) -> None:
        """Adds what only the state before has of a database that cannot be read in whole."""
        table = self._tables[db]
        if not before and self.older is not None:
            before.update(self._trees(self.older))
        older = before.get(db)
        if older is not None:
            read = len(table)
            for node in older.nodes():
                table.setdefault(node.key, _Place(older, node))
            self.older_entries[db] = len(table) - read
        wanted = tree.record.entries if tree is not None and tree.record.entries < 1 << 40 else None
        if wanted is None and older is not None:
            wanted = older.record.entries
        if wanted is None:  # no record of it in either state
            wanted = len(table) + (db.value in ALWAYS)
        missing = wanted + (tree.disordered if tree is not None else 0) - len(table)
        if missing > 0:
            self.lost[db] = missing

    def orphans(self) -> Iterator[tuple[bytes, bytes]]:
        """Yields what leaves hold under keys of 32 bytes, wherever in the file they are.

        Pages that no tree leads to any more may be among them.
        """
        if self.newer is None:
            return
        size = self.newer.page_bytes
        tree = Tree(self.fd, self.newer, MAIN, self.newer.main, bytearray(), self._flaws.append)
        there = os.fstat(self.fd).st_size // size
        for page in range(2, there):
            head = os.pread(self.fd, HEADER, page * size)
            if head[:8] != struct.pack("=Q", page):
                continue
            raw = os.pread(self.fd, size, page * size)
            found = look(page, raw) if len(raw) == size else ""
            if isinstance(found, str) or found[0] != LEAF:
                continue
            for node in leaf_nodes(page, raw, found[1]):
                if len(node.key) != ID_BYTES or node.flags not in {0, BIG}:
                    continue
                value = tree.value(node)
                if value is not None:
                    yield node.key, value

    @contextmanager
    def read(self) -> Iterator["_PageReader"]:
        yield _PageReader(self)

    def turn(self) -> NoReturn:
        raise RuntimeError("a damaged file is never written to")

    def give_turn(self) -> None:
        """Nothing was taken."""

    def write(self, change: Callable[..., T], *, frees: bool = False) -> NoReturn:
        raise RuntimeError("a damaged file is never written to")

    def transaction_id(self) -> int:
        return self.newer.transaction if self.newer is not None else 0

    def statistics(self) -> StoreStatistics:
        size = os.fstat(self.fd).st_size
        counts = {db.value: len(table) for db, table in self._tables.items()}
        return StoreStatistics(size, size, size, counts)

    def trim(self) -> None:
        pass

    def compact(self, wait: float = 0.0) -> None:
        raise RuntimeError("a damaged file is never written to")

    def flaws(self) -> list[str]:
        return [str(flaw) for flaw in check(self.fd).flaws]

    def close(self) -> None:
        os.close(self.fd)


class _PageReader:
    """A view of a PageStore: the same for all."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    def get(self, db: Db, key: bytes) -> memoryview | None:
        place = self._store._tables[db].get(key)
        value = None if place is None else place.tree.value(place.node)
        return None if value is None else memoryview(value)

    def has(self, db: Db, key: bytes) -> bool:
        return key in self._store._tables[db]

    def keys(self, db: Db, start: bytes = b"") -> Iterator[bytes]:
        order = self._store._orders.get(db, [])
        yield from order[bisect_left(order, start) :]

    def items(self, db: Db, start: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        for key in self.keys(db, start):
            value = self.get(db, key)
            if value is not None:
                yield key, value

    def last(self, db: Db, below: bytes) -> bytes | None:
        order = self._store._orders.get(db, [])
        at = bisect_left(order, below)
        return order[at - 1] if at else None

    def count(self, db: Db) -> int:
        return len(self._store._tables[db])

    def number(self) -> int:
        return self._store.transaction_id()
