"""Roots: where everything that a store keeps begins, by kind.

The one list of what keeps objects alive, for collection, verification and statistics. Snapshots,
sessions and checkouts are in the store; pins are of processes that live (see `pins`).
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engine.ids import NodeId, SnapshotId
from engine.plain.checkout_records import PREFIX, checkout_ids, decode_checkout
from engine.sessions.sessions import decode_record
from engine.storage.nodes import Entry
from engine.storage.snapshots import decode_snapshot
from engine.storage.store import Db, Reader
from engine.trees.directory import directory_id
from engine.workspaces.pins import live_pins


class Root(NamedTuple):
    """A tree that is kept: `kind` and `name` of what keeps it, its node; its entry if known."""

    kind: str
    name: str
    node: NodeId
    entry: Entry | None = None


class Known:
    """What was seen of the store's roots before, so that a second look costs their keys."""

    def __init__(self) -> None:
        self.snapshots: set[bytes] = set()
        self.records: dict[tuple[str, bytes], bytes] = {}

    def snapshot(self, key: bytes) -> bool:
        """Tells whether a snapshot is new; their records do not change."""
        if key in self.snapshots:
            return False
        self.snapshots.add(key)
        return True

    def record(self, kind: str, key: bytes, raw: memoryview) -> bool:
        """Tells whether a record is new, or is not what it was."""
        record = bytes(raw)
        if self.records.get((kind, key)) == record:
            return False
        self.records[kind, key] = record
        return True


def _snapshots(reader: Reader, known: Known) -> Iterator[Root]:
    for key in reader.keys(Db.SNAPSHOTS):
        if known.snapshot(key):
            raw = reader.get(Db.SNAPSHOTS, key) or memoryview(b"")
            root = decode_snapshot(SnapshotId(key), raw).root
            yield Root("snapshot", key.hex(), directory_id(root), root)


def _sessions(reader: Reader, known: Known) -> Iterator[Root]:
    for key, raw in reader.items(Db.SESSIONS):
        if known.record("session", key, raw):
            trees = decode_record(key, raw).trees()
            for root in trees if trees.plain != trees.shown else trees[:1]:
                yield Root("session", key.decode(), directory_id(root), root)


def _checkouts(reader: Reader, known: Known) -> Iterator[Root]:
    for identifier in checkout_ids(reader):
        raw = reader.get(Db.META, PREFIX + identifier) or memoryview(b"")
        if known.record("checkout", identifier, raw):
            record = decode_checkout(identifier, raw)
            for root in record.trees():
                yield Root("checkout", os.fsdecode(record.path), directory_id(root), root)


STORED: tuple[Callable[[Reader, Known], Iterator[Root]], ...] = (
    _snapshots,
    _sessions,
    _checkouts,
)
"""What yields the roots of each kind that stand in the store, those that `Known` has left out."""


def stored_roots(reader: Reader, known: Known | None = None) -> Iterator[Root]:
    """Yields the roots in the store that are not `known`, and makes them so.

    Raises CorruptObjectError for a damaged record.
    """
    known = Known() if known is None else known
    for of_kind in STORED:
        yield from of_kind(reader, known)


def pinned_roots(reader: Reader, store_path: str) -> Iterator[Root]:
    """Yields what open workspaces stand on. Read these after the store's roots, never before."""
    for node in sorted(live_pins(store_path)):
        if reader.has(Db.NODES, node):
            yield Root("workspace", node.hex(), node)
