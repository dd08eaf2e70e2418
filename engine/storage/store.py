"""The store's interface: named databases of bytes with transactions.

A store is a set of ordered key-value databases and one kind of atomicity, the write
transaction. It knows nothing of chunks or trees. `lmdb_store` is the implementation that
keeps things; `memory_store` is the strict one that tests and scratch work use. Both run the
same conformance suite.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol, TypeVar

import msgspec

from engine.errors import EngineError

T = TypeVar("T")

LONGEST_KEY = 500
"""A key has 1 to 500 bytes (LMDB's limit is 511)."""


class Db(Enum):
    """The parts of a store."""

    CHUNKS = "chunks"
    NODES = "nodes"
    SNAPSHOTS = "snapshots"
    REFS = "refs"
    SESSIONS = "sessions"
    IMPORTS = "imports"
    EPISODES = "episodes"
    META = "meta"


class Reader(Protocol):
    """A consistent view of a store. Its values are valid until the transaction ends."""

    def get(self, db: Db, key: bytes) -> memoryview | None:
        """Returns the value under `key`, or None."""

    def has(self, db: Db, key: bytes) -> bool:
        """Tells whether `key` has a value."""

    def items(self, db: Db, start: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        """Yields keys from `start` on with their values, in the order of their bytes."""

    def keys(self, db: Db, start: bytes = b"") -> Iterator[bytes]:
        """Yields keys from `start` on, in the order of their bytes, reading no value."""

    def last(self, db: Db, below: bytes) -> bytes | None:
        """Returns the greatest key less than `below`, or None; reads no value."""

    def count(self, db: Db) -> int:
        """Returns how many keys a database has."""

    def number(self) -> int:
        """Returns the number of the transaction whose state is seen; a writer's, of its own."""


class Writer(Reader, Protocol):
    """A write transaction: sees its own changes; nobody else does until it is committed."""

    def put(self, db: Db, key: bytes, value: bytes) -> None:
        """Sets the value under `key`."""

    def put_many(self, db: Db, pairs: list[tuple[bytes, bytes]]) -> None:
        """Sets many values; fastest when `pairs` are sorted."""

    def delete(self, db: Db, key: bytes) -> bool:
        """Removes `key`; tells whether it was there."""


class StoreStatistics(msgspec.Struct, frozen=True):
    """What a store holds.

    `file_bytes` is what its file takes on the disk, `used_bytes` without free pages.
    """

    file_bytes: int
    used_bytes: int
    map_bytes: int
    counts: dict[str, int]


class Store(ABC):
    """Opens transactions on the databases. Safe to use from several threads."""

    @abstractmethod
    def read(self) -> AbstractContextManager[Reader]:
        """Opens a view of the last committed state. Never blocks; keep it short."""

    @abstractmethod
    def write(self, change: Callable[[Writer], T], *, frees: bool = False) -> T:
        """Runs `change` in the write transaction and commits; durable when it returns.

        One writer at a time, in all processes; waits for its turn. An exception rolls back.
        `change` may be run more than once (the map grew in between), so it must not have
        effects outside of the transaction before its last statement.
        Raises StoreFullError when the disk is full; if it `frees` room, not before a reserve that
        is kept for that is used up.
        """

    @abstractmethod
    def turn(self) -> AbstractContextManager[None]:
        """Waits for this thread's turn to write; its first `write` within does not wait again.

        For who must not wait in the middle of something: other processes may write for long.
        """

    @abstractmethod
    def give_turn(self) -> None:
        """Gives this thread's `turn` up, if it has it: before it waits for another that writes."""

    @abstractmethod
    def transaction_id(self) -> int:
        """Returns the number of the last committed transaction.

        It grows with each; `compact` starts it anew.
        """

    @abstractmethod
    def statistics(self) -> StoreStatistics:
        """Returns sizes and counts."""

    @abstractmethod
    def trim(self) -> None:
        """Gives memory back that holds clean pages of the store's file, where there are any."""

    @abstractmethod
    def compact(self, wait: float = 0.0) -> None:
        """Gives the room that nothing uses back to the disk; this thread may not be in a `read`.

        Others read and write on meanwhile. The caller holds the lease `gc`. Waits up to `wait`
        seconds for a moment in which no other process has the store open. Raises
        CompactionRefusedError if there was none, or the store is written to again and again;
        StoreFullError if the disk has no room for a second file, and no room could be given back
        where it lies.
        """

    @abstractmethod
    def flaws(self) -> list[str]:
        """Returns what is wrong with the frame of the store's file, whatever is kept in it.

        Reads the frame only, some 5 µs for each key. Keeps nobody from writing.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the store; no transaction may be open."""


class StoreError(EngineError):
    """The store itself cannot be used. `path` is its directory."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


class NotAStoreError(StoreError):
    """There is no store at that path."""

    def __init__(self, path: str) -> None:
        super().__init__(path, f"there is no AmalgamFS store at {path}")


class StoreExistsError(StoreError):
    """There is a store, or something else, where a new one was to be made."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, f"cannot make a store at {path}: {what}")


class NewerFormatError(StoreError):
    """The store was written by a later version of the program."""

    def __init__(self, path: str, found: int, known: int) -> None:
        super().__init__(
            path, f"the store at {path} has format {found}; this program knows up to {known}"
        )
        self.found, self.known = found, known


class StorePermissionError(StoreError):
    """The user may not read or write the store."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, f"no permission to use the store at {path}: {detail}")


class StoreReadOnlyError(StoreError):
    """The disk that holds the store cannot be written; even reading makes leases there."""

    def __init__(self, path: str) -> None:
        super().__init__(path, f"the disk that holds the store at {path} is read-only")


class StoreOpenError(StoreError):
    """This process has the store open already, and can have it open once."""

    def __init__(self, path: str) -> None:
        super().__init__(path, f"the store at {path} is open in this process already")


class StorePlaceError(StorePermissionError):
    """A store cannot be made there: the user may not write in the directory `place`."""

    def __init__(self, path: str, place: str) -> None:
        StoreError.__init__(
            self, path, f"cannot make a store at {path}: you may not write in {place!r}"
        )
        self.place = place


class StoreOwnerError(StoreError):
    """The store, or `part` of it, belongs to another user, and was not said to be trusted."""

    def __init__(self, path: str, part: str, owner: str) -> None:
        what = "it" if part == path else repr(part)
        super().__init__(path, f"the store at {path} is not yours: {what} belongs to user {owner}")
        self.part, self.owner = part, owner


class StoreDamagedError(StoreError):
    """The store's file is damaged as a whole."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, f"the store at {path} is damaged: {detail}")


class StoreDiskError(StoreError):
    """The disk that holds the store did not read or write. The store is at its last state.

    For all that is known: what the disk has of it, `verify` tells.
    """

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(
            path,
            f"the disk did not read or write the file of the store at {path} ({detail}); "
            "what was stored before is kept",
        )


class StoreBusyError(StoreError):
    """Too many others use the store at this moment."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, f"the store at {path} is in use by too many at once: {detail}")


class StoreMemoryError(StoreError):
    """This process may not have as much memory or address space as the store's file needs."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, f"not enough memory to map the store at {path}: {detail}")


class StoreInternalError(StoreError):
    """The store's library was asked for what cannot be: a bug. Nothing was changed."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, f"an operation on the store at {path} failed: {detail}")


class StoreFullError(StoreError):
    """The disk that holds the store has no room; nothing was changed.

    `free_bytes` of the store's file are free for what fits in there, and can be given back.
    """

    def __init__(self, path: str, free_bytes: int = 0) -> None:
        inside = f"; {free_bytes >> 10:,} KiB of its file are free" if free_bytes >> 10 else ""
        super().__init__(path, f"no space left on the disk that holds the store at {path}{inside}")
        self.free_bytes = free_bytes


class CompactionRefusedError(StoreError):
    """The store's file cannot be made smaller now; nothing was changed."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, f"cannot compact the store at {path}: {why}")
        self.why = why
