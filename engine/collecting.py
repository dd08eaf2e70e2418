"""Garbage collection: what nothing refers to any more leaves the store.

Roots are every snapshot, and every session's base tree with its parent and layers. Marking
walks each node once, whatever number of snapshots share it. The sweep is one write
transaction that first marks what came since, so a commit is either before it, and kept, or
after it. Who stores objects in steps, before something refers to them, holds the lease
`objects` shared; the sweep holds it alone.
"""

import msgspec

from engine.checkout_records import records
from engine.content import chunk_ids
from engine.directory import Directory, directory_id
from engine.errors import CorruptObjectError
from engine.ids import SnapshotId
from engine.nodes import DEEPEST, Entry, Kind
from engine.objects import Objects
from engine.sessions import decode_record
from engine.snapshots import decode_snapshot
from engine.stat_cache import split_folder
from engine.store import Db, Reader, Store, Writer


class CollectReport(msgspec.Struct):
    """What a collection removed, or with a dry run would remove."""

    chunks: int = 0
    nodes: int = 0
    bytes: int = 0
    kept_chunks: int = 0
    kept_nodes: int = 0
    session_directories: int = 0


class _Marks:
    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.nodes: set[bytes] = set()
        self.chunks: set[bytes] = set()
        self.snapshots: set[bytes] = set()
        self.sessions: set[bytes] = set()

    def roots(self, reader: Reader) -> list[Entry]:
        """Returns the roots that were not marked before."""
        roots = []
        for key, raw in reader.items(Db.SNAPSHOTS):
            if key not in self.snapshots:
                self.snapshots.add(key)
                roots.append(decode_snapshot(SnapshotId(key), raw).root)
        for key, raw in reader.items(Db.SESSIONS):
            roots.append(decode_record(key, raw).root)
        for _, record in records(reader):
            roots += [root for root in (record.root, record.towards) if root is not None]
        return roots

    def mark(self, entry: Entry, depth: int = 0) -> None:
        identifier = directory_id(entry)
        if identifier in self.nodes:
            return
        if depth > DEEPEST:
            raise CorruptObjectError("node", identifier, "the tree is too deep")
        directory = Directory(self.objects, identifier)
        for below in directory:
            if below.kind == Kind.DIRECTORY:
                self.mark(below, depth + 1)
            elif below.kind == Kind.FILE:
                self.chunks.update(chunk_ids(self.objects, below, self.nodes))
        self.nodes.update(directory.page_ids())  # last: a marked node has all below it marked


def collect(store: Store, objects: Objects, *, dry_run: bool) -> CollectReport:
    """Removes what is unreachable. The caller holds the lease on objects alone.

    Raises CorruptObjectError or MissingObjectError, and removes nothing, when the store is
    damaged: what hangs below a node that cannot be read is unknown.
    """
    marks = _Marks(objects)
    with store.read() as reader:
        roots = marks.roots(reader)
    for root in roots:
        marks.mark(root)

    if dry_run:
        with store.read() as reader:
            return _survey(reader, marks)[0]

    objects.shed()
    while True:
        # Marks what came since, outside of the write; then once more inside, where usually
        # nothing is left to mark. Reading in the write sees the state before it.
        with store.read() as reader:
            late = marks.roots(reader)
        for root in late:
            marks.mark(root)
        report = store.write(lambda writer: _sweep(writer, marks))
        if report is not None:
            objects.shed()
            return report


def _sweep(writer: Writer, marks: _Marks) -> CollectReport | None:
    """Removes the unmarked; None if a root has come that is not marked yet."""
    if any(directory_id(root) not in marks.nodes for root in marks.roots(writer)):
        marks.snapshots.clear()
        return None
    report, nodes, chunks = _survey(writer, marks)
    for key in nodes:
        writer.delete(Db.NODES, key)
    for key in chunks:
        writer.delete(Db.CHUNKS, key)
    stale = [key for key, raw in writer.items(Db.IMPORTS) if _node_of(raw) not in marks.nodes]
    for key in stale:
        writer.delete(Db.IMPORTS, key)
    return report


def _node_of(raw: memoryview) -> bytes:
    """Returns the node that a value of the stat cache stands for."""
    try:
        return split_folder(raw)[1].node
    except msgspec.DecodeError:
        return b""


def _survey(reader: Reader, marks: _Marks) -> tuple[CollectReport, list[bytes], list[bytes]]:
    report = CollectReport(kept_chunks=len(marks.chunks), kept_nodes=len(marks.nodes))
    nodes, chunks = [], []
    for key, raw in reader.items(Db.NODES):
        if key not in marks.nodes:
            nodes.append(key)
            report.bytes += len(raw)
    for key, raw in reader.items(Db.CHUNKS):
        if key not in marks.chunks:
            chunks.append(key)
            report.bytes += len(raw)
    report.nodes, report.chunks = len(nodes), len(chunks)
    return report, nodes, chunks
