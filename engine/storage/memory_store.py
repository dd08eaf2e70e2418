"""A store in memory, stricter than the one on disk.

It refuses what LMDB forgives: values used after their transaction, a write inside a write, a
read transaction left open at `close`. For tests, and for scratch trees that nobody keeps.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import TypeVar

from engine.storage.store import LONGEST_KEY, Db, Store, StoreStatistics

T = TypeVar("T")


class _Table:
    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.order: list[bytes] = []

    def copy(self) -> "_Table":
        twin = _Table()
        twin.values, twin.order = dict(self.values), list(self.order)
        return twin


class _Transaction:
    def __init__(self, tables: dict[Db, _Table], number: int) -> None:
        self._tables, self._number = tables, number
        self._lent: list[memoryview] = []
        self._open = True

    def _table(self, db: Db) -> _Table:
        if not self._open:
            raise RuntimeError("the transaction has ended")
        return self._tables[db]

    def get(self, db: Db, key: bytes) -> memoryview | None:
        value = self._table(db).values.get(_checked(key))
        if value is None:
            return None
        view = memoryview(value)
        self._lent.append(view)
        return view

    def has(self, db: Db, key: bytes) -> bool:
        return _checked(key) in self._table(db).values

    def keys(self, db: Db, start: bytes = b"") -> Iterator[bytes]:
        table = self._table(db)
        for key in table.order[bisect_left(table.order, start) :]:
            self._table(db)
            yield key

    def items(self, db: Db, start: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        for key in self.keys(db, start):
            value = self.get(db, key)
            if value is not None:
                yield key, value

    def last(self, db: Db, below: bytes) -> bytes | None:
        order = self._table(db).order
        at = bisect_left(order, _checked(below))
        return order[at - 1] if at else None

    def count(self, db: Db) -> int:
        return len(self._table(db).values)

    def put(self, db: Db, key: bytes, value: bytes) -> None:
        table = self._table(db)
        if _checked(key) not in table.values:
            insort(table.order, key)
        table.values[key] = bytes(value)

    def put_many(self, db: Db, pairs: list[tuple[bytes, bytes]]) -> None:
        for key, value in pairs:
            self.put(db, key, value)

    def delete(self, db: Db, key: bytes) -> bool:
        table = self._table(db)
        if table.values.pop(_checked(key), None) is None:
            return False
        del table.order[bisect_left(table.order, key)]
        return True

    def number(self) -> int:
        return self._number

    def end(self) -> None:
        self._open = False
        for view in self._lent:
            view.release()


def _checked(key: bytes) -> bytes:
    if not 1 <= len(key) <= LONGEST_KEY:
        raise ValueError(f"a key of {len(key)} bytes")
    return key


class MemoryStore(Store):
    """Keeps everything in dictionaries; gone when dropped."""

    def __init__(self) -> None:
        self._tables = {db: _Table() for db in Db}
        self._lock = RLock()
        self._turn: int | None = None
        self._writing = False
        self._readers = 0
        self._transaction = 0
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[_Transaction]:
        if self._closed:
            raise RuntimeError("the store is closed")
        with self._lock:
            tables = dict(self._tables)
            self._readers += 1
            transaction = _Transaction(tables, self._transaction)
        try:
            yield transaction
        finally:
            self._readers -= 1
            transaction.end()

    def write(self, change: Callable[[_Transaction], T], *, frees: bool = False) -> T:
        with self._lock:
            if self._writing or self._closed:
                raise RuntimeError("a write inside a write, or on a closed store")
            self._writing = True
            tables = {db: table.copy() for db, table in self._tables.items()}
            transaction = _Transaction(tables, self._transaction + 1)
            try:
                result = change(transaction)
                self._tables = transaction._tables
                self._transaction += 1
                return result
            finally:
                self._writing = False
                transaction.end()

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._lock.acquire()
        self._turn = get_ident()
        try:
            yield
        finally:
            self.give_turn()

    def give_turn(self) -> None:
        if self._turn == get_ident():
            self._turn = None
            self._lock.release()

    def transaction_id(self) -> int:
        return self._transaction

    def statistics(self) -> StoreStatistics:
        used = sum(len(k) + len(v) for t in self._tables.values() for k, v in t.values.items())
        counts = {db.value: len(table.values) for db, table in self._tables.items()}
        return StoreStatistics(used, used, used, counts)

    def trim(self) -> None:
        pass

    def compact(self, wait: float = 0.0) -> None:
        pass

    def flaws(self) -> list[str]:
        return []

    def close(self) -> None:
        if self._readers:
            raise RuntimeError(f"{self._readers} read transactions are open")
        self._closed = True
