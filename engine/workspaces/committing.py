"""Committing: what was made in memory gets into the store, one commit or many at a time.

A batch is all that one commit adds: chunks, nodes, a snapshot, a ref. Batches are queued, and
one thread writes all that are queued in one transaction, in their order. So what is in the
store is always the first commits up to one of them, none by half.

A durable batch is in the store, and synced, when `submit` returns; batches of several threads
that wait at the same time share one sync. Other batches are visible to this process at once
(see `objects.Pending`) and written behind: by the next durable one, by `flush`, by `close`, by
a thread of the queue's own after WRITE_BEHIND seconds, or at once where WAITING_BYTES wait.

Whether the store has an object already is asked inside of the transaction that needs it, so a
collection cannot remove it in between. Only the chunks of a large batch are stored ahead, under
the lease that keeps collections away.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

import msgspec

from engine.errors import EngineError
from engine.host.forks import Inherited, OfOneProcess
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.storage.codec import pack, read_compression
from engine.storage.nodes import DirectoryNode, IndexNode, ListNode, Node, encode
from engine.storage.objects import NodeBuffer, Objects
from engine.storage.snapshots import Snapshot, encode_snapshot
from engine.storage.store import Db, Store, Writer
from engine.workspaces.group_commit import LONGEST_POST, GroupCommit, Post
from engine.workspaces.pins import Pin

WRITE_BEHIND = 0.05
"""Seconds after which a commit that is not durable is written."""
WAITING_BYTES = 16 << 20
"""A commit is written at once where so much waits."""
LARGEST_BYTES = 64 << 20
"""Chunks that one transaction takes; more are stored ahead of it."""
PORTION_BYTES = 6 << 20
"""Chunks in one transaction that is ahead."""
_LINGER = 1.0
"""Seconds without commits after which the thread ends."""


class Batch(NodeBuffer):
    """All that one commit adds to the store."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded: dict[NodeId, Node] = {}
        self.chunks: dict[ChunkId, bytes] = {}
        self.packed: dict[ChunkId, bytes] = {}
        self.is_packed = False
        self.snapshot: Snapshot | None = None
        self.identifier = SnapshotId(b"")
        self.record = b""
        self.ref: str | None = None
        self.pins: tuple[Pin, ...] = ()
        self.durable = True
        self.settled = False
        self.error: Exception | None = None

    def put(self, node: msgspec.Struct) -> NodeId:
        return self.put_encoded(node, encode(node))

    def put_encoded(self, node: msgspec.Struct, data: bytes) -> NodeId:
        identifier = super().put_encoded(node, data)
        assert isinstance(node, DirectoryNode | IndexNode | ListNode)
        self.decoded[identifier] = node
        return identifier

    def put_chunk(self, data: bytes | memoryview) -> ChunkId:
        """Keeps a chunk and returns its id."""
        identifier = ChunkId(digest(data))
        if identifier not in self.chunks:
            self.chunks[identifier] = bytes(data)
        return identifier

    def conclude(self, snapshot: Snapshot, ref: str | None, pins: tuple[Pin, ...]) -> SnapshotId:
        """Adds the snapshot, a ref to it, and what keeps all that it stands on; returns its id."""
        self.identifier, self.record = encode_snapshot(snapshot)
        self.snapshot, self.ref, self.pins = snapshot, ref, pins
        return self.identifier

    def pack(self, store: Store) -> None:
        """Compresses the chunks that the store does not have at the moment."""
        if self.is_packed:
            return
        with store.read() as reader:
            new = [i for i in self.chunks if not reader.has(Db.CHUNKS, i)]
            level = read_compression(reader)
        self.packed = {identifier: pack(self.chunks[identifier], level) for identifier in new}
        self.is_packed = True

    def size(self) -> int:
        """Returns how many bytes are kept."""
        return sum(map(len, self.chunks.values())) + sum(map(len, self.nodes.values()))


class CommitQueue(OfOneProcess):
    """The batches of one process on their way into its store. Safe to use from several threads.

    In a child of fork() each use raises ForkedError: what waits is its parent's to write.
    """

    def __init__(
        self,
        objects: Objects,
        storing: Callable[[], AbstractContextManager[object]],
        group: GroupCommit,
    ) -> None:
        """`storing` keeps collections away while objects are stored ahead."""
        self._store: Store = objects.store
        self._objects, self._storing, self._group = objects, storing, group
        self._turn = threading.Condition()
        self._queue: list[Batch] = []
        self._bytes = 0
        self._writing = False
        self._failed = False
        self._thread: threading.Thread | None = None
        self._closing = False
        self._pid = os.getpid()
        self._owned()

    def _inherit(self) -> None:
        what = f"the repository at {self._group.store_path}"
        self._turn = cast("threading.Condition", Inherited(what, self._pid))
        self._queue, self._thread = [], None

    def submit(self, batch: Batch, *, durable: bool) -> None:
        """Commits a batch. Raises what the store raises; the batch is not in the store then."""
        size = batch.size()
        batch.is_packed = not batch.chunks
        if durable:
            batch.pack(self._store)
        with self._turn:
            batch.durable = durable or self._failed or self._bytes + size > WAITING_BYTES
            self._queue.append(batch)
            if not batch.durable:
                self._bytes += size
                self._show(batch)
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._write_behind, name="commits", daemon=True
                    )
                    self._thread.start()
                elif len(self._queue) == 1:
                    self._turn.notify_all()
        if batch.durable:
            self._settle(batch)

    def flush(self) -> None:
        """Writes what waits; durable when it returns. Raises what the store raises."""
        with self._turn:
            last = self._queue[-1] if self._queue else None
        if last is not None:
            self._settle(last)

    def close(self) -> None:
        """Writes what waits and ends the thread."""
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        try:
            self.flush()
        finally:
            self._group.close()

    def _settle(self, last: Batch) -> None:
        """Returns when `last`, which was queued, is in the store; writes all that is queued."""
        with self._turn:
            while self._writing and not last.settled:
                self._turn.wait()
            if last.settled:
                if last.error is not None:
                    raise last.error
                return
            self._writing = True
            batches = list(self._queue)
        failure: BaseException | None = None
        try:
            self._write(batches)
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._turn:
                self._writing = False
                self._conclude(batches, last, failure)
                self._turn.notify_all()

    def _conclude(self, batches: list[Batch], last: Batch, failure: BaseException | None) -> None:
        """Takes from the queue what is in the store now, or what was told that it is not."""
        self._failed = failure is not None
        left = []
        for batch in batches:
            if failure is None:
                self._objects.keep(batch.decoded, batch.nodes)
                self._hide(batch)
            elif not batch.durable:
                left.append(batch)
                continue
            elif isinstance(failure, Exception):
                batch.error = failure
            elif batch is not last:  # this thread alone was interrupted
                left.append(batch)
                continue
            batch.settled = True
            batch.pins = ()
        self._queue[: len(batches)] = left
        self._bytes = sum(batch.size() for batch in self._queue if not batch.durable)

    def _show(self, batch: Batch) -> None:
        pending = self._objects.pending
        self._objects.keep(batch.decoded, batch.nodes)
        pending.chunks.update(batch.chunks)
        pending.nodes.update(batch.nodes)
        if batch.snapshot is not None:
            pending.snapshots[batch.identifier] = batch.snapshot

    def _hide(self, batch: Batch) -> None:
        """Takes away what `_show` added, unless a later batch has added the same since."""
        pending = self._objects.pending
        for chunk, plain in batch.chunks.items():
            if pending.chunks.get(chunk) is plain:
                del pending.chunks[chunk]
        for node, data in batch.nodes.items():
            if pending.nodes.get(node) is data:
                del pending.nodes[node]
        if pending.snapshots.get(batch.identifier) is batch.snapshot:
            pending.snapshots.pop(batch.identifier, None)

    def _write(self, batches: list[Batch]) -> None:
        chunks: dict[ChunkId, bytes] = {}
        packed: dict[ChunkId, bytes] = {}
        nodes = NodeBuffer()
        for batch in batches:
            batch.pack(self._store)
            chunks |= batch.chunks
            packed |= batch.packed
            nodes.nodes |= batch.nodes

        def change(writer: Writer) -> None:
            _store_chunks(writer, sorted(chunks), chunks, packed)
            nodes.flush(writer)
            for batch in batches:
                if batch.snapshot is not None:
                    writer.put(Db.SNAPSHOTS, batch.identifier, batch.record)
                if batch.ref is not None:
                    writer.put(Db.REFS, batch.ref.encode(), batch.identifier)

        def post() -> Post | None:
            size = sum(map(len, packed.values())) + sum(map(len, nodes.nodes.values()))
            if size > LONGEST_POST or any(batch.ref is not None for batch in batches):
                return None
            found = [chunk for chunk in chunks if chunk not in packed]
            records = {b.identifier: b.record for b in batches if b.snapshot is not None}
            return Post(packed, found, nodes.nodes, records)

        if sum(map(len, packed.values())) <= LARGEST_BYTES:
            self._group.commit(change, post)
            return
        with self._storing():
            for portion in _portions(packed):
                self._store.write(partial(_store_chunks, ids=portion, plain=chunks, packed=packed))
            self._store.write(change)

    def _write_behind(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._queue or self._closing, _LINGER)
                if not self._queue or self._closing:
                    self._thread = None
                    return
                delay = _LINGER if self._failed else WRITE_BEHIND
                self._turn.wait_for(lambda: self._closing, delay)
            # The next commit, `flush` or `close` meets the error, if it stays.
            with contextlib.suppress(EngineError, OSError):
                self.flush()


def _store_chunks(
    writer: Writer,
    ids: list[ChunkId],
    plain: Mapping[ChunkId, bytes],
    packed: Mapping[ChunkId, bytes],
) -> None:
    """Stores chunks that the store lacks; one that it had when it was asked may have gone."""
    lacking = [identifier for identifier in ids if not writer.has(Db.CHUNKS, identifier)]
    level = read_compression(writer)
    writer.put_many(Db.CHUNKS, [(i, packed.get(i) or pack(plain[i], level)) for i in lacking])


def _portions(packed: Mapping[ChunkId, bytes]) -> Iterator[list[ChunkId]]:
    portion: list[ChunkId] = []
    size = 0
    for identifier in sorted(packed):
        portion.append(identifier)
        size += len(packed[identifier])
        if size > PORTION_BYTES:
            yield portion
            portion, size = [], 0
    yield portion
