"""Objects: nodes, chunks and snapshots read from a store, checked, with what is warm kept.

Every byte that leaves here was checked against its id. Decoded nodes and the chunks last
decompressed are kept in two bounded caches, so that a directory listed entry by entry is
decoded once and a file read in pieces is decompressed once. Safe to use from several threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from engine.codec import pack, read_compression, unpack
from engine.errors import CorruptObjectError, MissingObjectError
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.nodes import DirectoryNode, Node, decode, encode, node_id
from engine.snapshots import Snapshot, decode_snapshot
from engine.store import Db, Reader, Store, Writer

PutNode = Callable[[msgspec.Struct], NodeId]

NODE_CACHE_ENTRIES = 65_536
"""Decoded entries kept, about 400 bytes each."""
CHUNK_CACHE_BYTES = 8 << 20


class ObjectsStatistics(msgspec.Struct, frozen=True):
    """How full the caches are and how often they helped since the start."""

    cached_nodes: int
    cached_entries: int
    cached_chunk_bytes: int
    node_hits: int
    node_misses: int
    chunk_hits: int
    chunk_misses: int


class Pending:
    """Objects that are on their way into the store; this process sees them already.

    What was looked for here in vain is looked for in the store next, so an object leaves here
    after it came there.
    """

    __slots__ = ("chunks", "nodes", "snapshots")

    def __init__(self) -> None:
        self.nodes: dict[NodeId, bytes] = {}
        self.chunks: dict[ChunkId, bytes] = {}
        self.snapshots: dict[SnapshotId, Snapshot] = {}


class Objects:
    """Reads objects of one store, and those that are on their way into it."""

    def __init__(self, store: Store, *, strict: bool = False) -> None:
        """With `strict`, nodes that are not canonical are damaged, too."""
        self.store, self._strict = store, strict
        self.pending = Pending()
        self._lock = threading.Lock()
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()
        self._entries = 0
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._chunk_bytes = 0
        self._hits = [0, 0, 0, 0]

    def node(self, identifier: NodeId) -> Node:
        """Returns a decoded node. Raises MissingObjectError or CorruptObjectError."""
        with self._lock:
            node = self._nodes.get(identifier)
            if node is not None:
                self._nodes.move_to_end(identifier)
                self._hits[0] += 1
                return node
        coming = self.pending.nodes.get(identifier)
        if coming is not None:
            node = decode(identifier, coming, strict=self._strict)
        else:
            with self.store.read() as reader:
                raw = reader.get(Db.NODES, identifier)
                if raw is None:
                    raise MissingObjectError("node", identifier)
                node = decode(identifier, raw, strict=self._strict)
        with self._lock:
            self._hits[1] += 1
            self._keep(identifier, node)
        return node

    def keep(self, nodes: Mapping[NodeId, Node]) -> None:
        """Takes decoded nodes into the cache that are in the store now, or on their way there."""
        with self._lock:
            for identifier, node in nodes.items():
                self._keep(identifier, node)

    def _keep(self, identifier: NodeId, node: Node) -> None:
        if identifier not in self._nodes:
            self._nodes[identifier] = node
            self._entries += _weight(node)
        while self._entries > NODE_CACHE_ENTRIES and len(self._nodes) > 1:
            self._entries -= _weight(self._nodes.popitem(last=False)[1])

    def encoded(self, identifier: NodeId) -> bytes:
        """Returns the bytes of a node, checked against its id only."""
        coming = self.pending.nodes.get(identifier)
        if coming is not None:
            return coming
        with self.store.read() as reader:
            raw = reader.get(Db.NODES, identifier)
            if raw is None:
                raise MissingObjectError("node", identifier)
            data = bytes(raw)
        if node_id(data) != identifier:
            raise CorruptObjectError("node", identifier, "its bytes do not match its id")
        return data

    def chunk(self, identifier: ChunkId) -> bytes:
        """Returns a chunk's plain bytes. Raises MissingObjectError or CorruptObjectError."""
        with self._lock:
            plain = self._chunks.get(identifier)
            if plain is not None:
                self._chunks.move_to_end(identifier)
                self._hits[2] += 1
                return plain
        coming = self.pending.chunks.get(identifier)
        if coming is not None:
            return coming
        with self.store.read() as reader:
            plain = bytes(_unpacked(reader, identifier))
        with self._lock:
            self._hits[3] += 1
            if identifier not in self._chunks:
                self._chunks[identifier] = plain
                self._chunk_bytes += len(plain)
            while self._chunk_bytes > CHUNK_CACHE_BYTES and len(self._chunks) > 1:
                self._chunk_bytes -= len(self._chunks.popitem(last=False)[1])
        return plain

    @contextmanager
    def chunks(self) -> Iterator[Callable[[ChunkId], bytes | memoryview]]:
        """Gives a function that reads chunks past the cache, for streams.

        What it returns is valid inside of the `with` only; raw chunks are not copied.
        """
        coming = dict(self.pending.chunks)  # before the view, which stays as the store is now
        with self.store.read() as reader:
            yield lambda identifier: coming.get(identifier) or _unpacked(reader, identifier)

    def snapshot(self, identifier: SnapshotId) -> Snapshot:
        """Returns a snapshot record. Raises MissingObjectError or CorruptObjectError."""
        coming = self.pending.snapshots.get(identifier)
        if coming is not None:
            return coming
        with self.store.read() as reader:
            raw = reader.get(Db.SNAPSHOTS, identifier)
            if raw is None:
                raise MissingObjectError("snapshot", identifier)
            return decode_snapshot(identifier, raw)

    def shed(self) -> None:
        """Empties the caches."""
        with self._lock:
            self._nodes.clear()
            self._chunks.clear()
            self._entries = self._chunk_bytes = 0

    def statistics(self) -> ObjectsStatistics:
        """Returns the state of the caches."""
        with self._lock:
            return ObjectsStatistics(
                len(self._nodes), self._entries, self._chunk_bytes, *self._hits
            )


def _weight(node: Node) -> int:
    return len(node.entries) + 1 if isinstance(node, DirectoryNode) else 64


def _unpacked(reader: Reader, identifier: ChunkId) -> bytes | memoryview:
    raw = reader.get(Db.CHUNKS, identifier)
    if raw is None:
        raise MissingObjectError("chunk", identifier)
    return unpack(identifier, raw)


def _is_damaged(reader: Reader, identifier: ChunkId) -> bool:
    try:
        _unpacked(reader, identifier)
    except CorruptObjectError:
        return True
    return False


def node_putter(writer: Writer) -> PutNode:
    """Returns a function that stores nodes in `writer` and gives their ids."""

    def put(node: msgspec.Struct) -> NodeId:
        data = encode(node)
        identifier = node_id(data)
        if not writer.has(Db.NODES, identifier):
            writer.put(Db.NODES, identifier, data)
        return identifier

    return put


class NodeBuffer:
    """Collects encoded nodes in memory, to be stored in one transaction later."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, bytes] = {}

    def put(self, node: msgspec.Struct) -> NodeId:
        """Keeps a node and returns its id."""
        data = encode(node)
        identifier = node_id(data)
        self.nodes[identifier] = data
        return identifier

    def put_encoded(self, node: msgspec.Struct, data: bytes) -> NodeId:
        """Keeps a node that is encoded already and returns its id."""
        identifier = node_id(data)
        self.nodes[identifier] = data
        return identifier

    def put_bytes(self, data: bytes) -> NodeId:
        """Keeps a node that its caller has encoded and returns its id."""
        identifier = node_id(data)
        self.nodes[identifier] = data
        return identifier

    def flush(self, writer: Writer) -> None:
        """Stores what was collected and is not there yet, or is there but damaged."""
        pairs = sorted(self.nodes.items())
        writer.put_many(Db.NODES, [pair for pair in pairs if not _has(writer, *pair)])


def _has(reader: Reader, key: bytes, value: bytes) -> bool:
    found = reader.get(Db.NODES, key)
    return found is not None and bytes(found) == value


class ChunkSink:
    """Takes plain chunks from several threads and stores what the store lacks.

    Packs in the caller's thread; writes a transaction whenever `batch_bytes` have gathered.
    `flush` stores the rest; what was not flushed is lost with the process, and is garbage
    until something refers to it, so its owner holds the store's write lease meanwhile. With
    `check`, what the store has is read, and stored again if it is damaged.
    """

    def __init__(
        self,
        store: Store,
        *,
        check: bool = False,
        batch_bytes: int = 6 << 20,
    ):
        self._store, self._check = store, check
        with store.read() as reader:
            self._level = read_compression(reader)
        self._batch_bytes = batch_bytes
        self._lock = threading.Lock()
        self._pending: dict[ChunkId, bytes] = {}
        self._bytes = 0
        self._taken: dict[int, int] = {}
        self.stored_bytes = 0

    @property
    def taken_bytes(self) -> int:
        """How many bytes have come to `put` by now, from all threads; known chunks, too."""
        return sum(list(self._taken.values()))

    def put(self, data: bytes | memoryview) -> ChunkId:
        """Stores one chunk, soon, and returns its id."""
        identifier = ChunkId(digest(data))
        thread = threading.get_ident()  # each counts alone, and none is lost
        self._taken[thread] = self._taken.get(thread, 0) + len(data)
        if identifier in self._pending:
            return identifier
        with self._store.read() as reader:
            if reader.has(Db.CHUNKS, identifier) and not (
                self._check and _is_damaged(reader, identifier)
            ):
                return identifier
        self._keep(identifier, data)
        return identifier

    def _keep(self, identifier: ChunkId, data: bytes | memoryview) -> None:
        packed = pack(data, self._level)
        full: dict[ChunkId, bytes] | None = None
        with self._lock:
            if identifier not in self._pending:
                self._pending[identifier] = packed
                self._bytes += len(packed)
                self.stored_bytes += len(packed)
            if self._bytes > self._batch_bytes:
                full = self._take()
        if full:
            self._write(full)

    def _take(self) -> dict[ChunkId, bytes]:
        full, self._pending, self._bytes = self._pending, {}, 0
        return full

    def _write(self, chunks: dict[ChunkId, bytes]) -> None:
        pairs = sorted(chunks.items())
        self._store.write(lambda writer: writer.put_many(Db.CHUNKS, list(pairs)))
        self._store.trim()

    def flush(self) -> None:
        """Stores what has gathered; durable when it returns."""
        with self._lock:
            rest = self._take()
        if rest:
            self._write(rest)

    def flush_into(self, writer: Writer) -> None:
        """Stores what has gathered in a transaction of the caller's, with whatever else it does.

        May run again when the transaction does: nothing is forgotten.
        """
        writer.put_many(Db.CHUNKS, sorted(self._pending.items()))
