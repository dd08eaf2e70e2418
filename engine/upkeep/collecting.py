"""Garbage collection: what nothing refers to any more leaves the store, a little at a time.

Mark, then sweep in batches, while others commit and import. What makes that safe:

- Who stores objects in steps holds the lease `objects` shared from the first look whether an
  object is there to the transaction that makes something refer to it; who does both in one
  transaction needs none. A batch is one transaction under that lease held alone.
- A batch begins by looking for roots that came since the mark; they are marked before anything
  goes. So nothing is removed that anything refers to at that moment, and what comes later is
  stored anew: whoever stores an object looks in its own transaction, or under the lease,
  whether it is there.
- That an object is there says nothing of those below it, unless a root or a row of the stat
  cache leads to it. Rows lead to subtrees that nobody checks again, so the first batches remove
  the rows of nodes that will go, and so does every batch after an import; then go nodes, then
  chunks.

Killed between two batches, the store lacks some garbage, nothing else.
"""

import time
from collections.abc import Iterator
from itertools import islice

import msgspec

from engine.plain.stat_cache import ROWS_CHANGED, node_of_row
from engine.progress import Progress
from engine.storage.objects import Objects
from engine.storage.store import Db, Reader, Store, StoreFullError, Writer
from engine.upkeep.marking import Marks
from engine.upkeep.roots import Known, pinned_roots, stored_roots

BATCH_SECONDS = 0.025
"""How long a batch deletes before it commits: others wait for so long, and for the disk."""
BATCH_OBJECTS = 2048
PAUSE_SECONDS = 0.015
"""How long others get their turn between batches: who waits asks every hundredth of a second."""
_SCAN = 4096
_LATE_NODES = 256
"""How many nodes of late roots a batch marks itself; more are marked before the next one."""


class CollectReport(msgspec.Struct):
    """What a collection removed, or with a dry run would remove; bytes are as stored.

    `ended_early` says why garbage was left, if any was.
    """

    chunks: int = 0
    nodes: int = 0
    bytes: int = 0
    kept_chunks: int = 0
    kept_nodes: int = 0
    session_directories: int = 0
    rows: int = 0
    batches: int = 0
    longest_batch: float = 0.0
    ended_early: str = ""


class Collection:
    """One collection in steps: `mark`; then `prepare` and, holding `objects` alone, `remove`."""

    def __init__(self, store: Store, store_path: str, objects: Objects | None = None) -> None:
        """Gets ready; `objects` is what this process has cached of the store."""
        self._store, self._path, self._objects = store, store_path, objects
        self._marks, self._known = Marks(), Known()
        self._number = -1
        self._most = BATCH_OBJECTS
        self._rows_at: bytes | None = b""
        self._stale: list[bytes] = []
        self._batch: list[tuple[Db, bytes, int]] = []
        self._cursors: dict[Db, bytes | None] = {Db.NODES: b"", Db.CHUNKS: b""}
        self.report = CollectReport()

    def mark(self, progress: Progress | None = None) -> None:
        """Marks all that is reachable now.

        Raises CorruptObjectError or MissingObjectError when the store is damaged: what hangs
        below a node that cannot be read is unknown, so nothing may be removed.
        """
        with self._store.read() as reader:
            self._marks.add(root.node for root in stored_roots(reader, self._known))
            self._marks.add(root.node for root in pinned_roots(reader, self._path))
        self._marks.walk_all(self._store, progress)
        self._count_kept()

    def _count_kept(self) -> None:
        self.report.kept_nodes = len(self._marks.nodes)
        self.report.kept_chunks = len(self._marks.chunks)

    def survey(self) -> CollectReport:
        """Counts what is not marked."""
        report = msgspec.structs.replace(self.report)
        for db in (Db.NODES, Db.CHUNKS):
            for _, length in self._unmarked(db, b""):
                report.nodes += db is Db.NODES
                report.chunks += db is Db.CHUNKS
                report.bytes += length
        with self._store.read() as reader:
            report.rows = len(self._stale_rows(reader))
        return report

    def _unmarked(self, db: Db, start: bytes) -> Iterator[tuple[bytes, int]]:
        """Yields keys from `start` on that are not marked, and the lengths of their values."""
        marked = self._marks.nodes if db is Db.NODES else self._marks.chunks
        while True:
            with self._store.read() as reader:
                keys = list(islice(reader.keys(db, start), _SCAN))
                dead = [key for key in keys if key not in marked]
                pairs = [(key, len(reader.get(db, key) or b"")) for key in dead]
            self._store.trim()
            yield from pairs
            if len(keys) < _SCAN:
                return
            start = keys[-1] + b"\0"

    def _stale_rows(self, reader: Reader) -> list[bytes]:
        nodes = self._marks.nodes
        return [key for key, raw in reader.items(Db.IMPORTS) if node_of_row(raw) not in nodes]

    def prepare(self) -> bool:
        """Marks what came meanwhile and finds what goes next; False if there is nothing more."""
        with self._store.read() as reader:
            self._marks.add(root.node for root in stored_roots(reader, self._known))
            self._marks.add(root.node for root in pinned_roots(reader, self._path))
        self._marks.walk_all(self._store)
        with self._store.read() as reader:
            rows_at = reader.get(Db.META, ROWS_CHANGED)
            if rows_at != self._rows_at:
                self._stale = self._stale_rows(reader)
                self._rows_at = None if rows_at is None else bytes(rows_at)
        for db, start in self._cursors.items():
            if self._batch:
                break
            if start is not None:
                found = islice(self._unmarked(db, start), BATCH_OBJECTS)
                self._batch = [(db, key, length) for key, length in found]
                full = len(self._batch) == BATCH_OBJECTS
                self._cursors[db] = self._batch[-1][1] if full else None
        return bool(self._batch or self._stale)

    def remove(self) -> None:
        """Removes one batch in one transaction. The caller holds the lease on objects alone.

        Removes nothing where too much has come since `prepare`: prepare again, then.
        """
        began = time.monotonic()
        while True:
            try:
                gone = self._store.write(self._remove, frees=True)
                break
            except StoreFullError:
                # Each removal takes a few pages, which the next but one may use again.
                if self._most <= 1:
                    raise
                self._most //= 4
        self._most = min(2 * self._most, BATCH_OBJECTS)
        number, done, rows, nodes, chunks, size = gone
        self._number = number  # not before it is committed: another would get the same
        if nodes and self._objects is not None:
            self._objects.shed()
        self._stale = self._stale[rows:]
        self._batch = self._batch[done:]
        self.report.rows += rows
        self.report.nodes += nodes
        self.report.chunks += chunks
        self.report.bytes += size
        self.report.batches += 1
        self.report.longest_batch = max(self.report.longest_batch, time.monotonic() - began)
        self._count_kept()

    def _remove(self, writer: Writer) -> tuple[int, int, int, int, int, int]:
        """Returns its number, how many of the batch are done; rows, nodes, chunks, bytes gone."""
        nothing = (-1, 0, 0, 0, 0, 0)
        until = time.monotonic() + BATCH_SECONDS
        marks = self._marks
        if writer.number() != self._number + 1:  # else nobody wrote since the last batch
            marks.add(root.node for root in stored_roots(writer, self._known))
            changed = writer.get(Db.META, ROWS_CHANGED)
            if changed != self._rows_at:
                return nothing
        # Pins after the store's roots: who pins looks afterwards whether the root is there.
        marks.add(root.node for root in pinned_roots(writer, self._path))
        if marks.waiting:
            marks.walk(writer, _LATE_NODES)
            if marks.waiting:
                return nothing
        rows = done = nodes = chunks = size = 0
        for key in self._stale[: self._most]:
            if rows % 32 == 31 and time.monotonic() > until:
                break
            writer.delete(Db.IMPORTS, key)
            rows += 1
        if rows == len(self._stale):  # no node goes before the last row that leads to one
            for db, key, length in self._batch[: self._most]:
                if done % 32 == 31 and time.monotonic() > until:
                    break
                done += 1
                if key in (marks.nodes if db is Db.NODES else marks.chunks):
                    continue  # by a root that has come
                if writer.delete(db, key):
                    size += length
                    nodes += db is Db.NODES
                    chunks += db is Db.CHUNKS
        return writer.number(), done, rows, nodes, chunks, size
