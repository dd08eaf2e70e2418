"""Objects: nodes, chunks and snapshots read from a store, checked, with what is warm kept.

Every byte that leaves here was checked against its id. Decoded nodes and the chunks last
decompressed are kept in two bounded caches, so that a directory listed entry by entry is
decoded once and a file read in pieces is decompressed once. Safe to use from several threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from engine.errors import CorruptObjectError, MissingObjectError
from engine.host.forks import OfOneProcess
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.storage.codec import pack, read_compression, unpack
from engine.storage.nodes import DirectoryNode, IndexNode, Node, decode, encode, node_id
from engine.storage.snapshots import Snapshot, decode_snapshot
from engine.storage.store import Db, Reader, Store, Writer

PutNode = Callable[[msgspec.Struct], NodeId]

NODE_CACHE_ENTRIES = 65_536
"""Entries kept, decoded and as they are stored, about 450 bytes each; a page of an index or a piece
of a long file is half of one."""
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


class Objects(OfOneProcess):
    """Reads objects of one store, and those that are on their way into it.

    In a child of fork() it has nothing in memory, so that all of it asks the store, which refuses.
    """

    def __init__(self, store: Store, *, strict: bool = False) -> None:
        """With `strict`, nodes that are not canonical are damaged, too."""
        self.store, self._strict = store, strict
        self.pending = Pending()
        self._lock = threading.Lock()
        self._nodes: OrderedDict[bytes, tuple[Node, bytes]] = OrderedDict()
        self._entries = 0
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._chunk_bytes = 0
        self._hits = [0, 0, 0, 0]
        self._owned()

    def _inherit(self) -> None:
        self._lock = threading.Lock()
        self.pending = Pending()
        self._nodes, self._chunks = OrderedDict(), OrderedDict()
        self._entries = self._chunk_bytes = 0

    def node(self, identifier: NodeId) -> Node:
        """Returns a decoded node. Raises MissingObjectError or CorruptObjectError."""
        # Without the lock: what goes meanwhile is a KeyError, and only a miss.
        try:
            kept = self._nodes[identifier]
            self._nodes.move_to_end(identifier)
            self._hits[0] += 1
            return kept[0]
        except KeyError:
            pass
        data = self._encoded(identifier)
        node = decode(identifier, data, strict=self._strict)
        with self._lock:
            self._hits[1] += 1
            self._keep(identifier, node, data)
        return node

    def _encoded(self, identifier: NodeId) -> bytes:
        """Returns the bytes of a node, unchecked."""
        coming = self.pending.nodes.get(identifier)
        if coming is not None:
            return coming
        with self.store.read() as reader:
            raw = reader.get(Db.NODES, identifier)
            if raw is None:
                raise MissingObjectError("node", identifier)
            return bytes(raw)

    def keep(self, decoded: Mapping[NodeId, Node], encoded: Mapping[NodeId, bytes]) -> None:
        """Takes decoded nodes into the cache that are in the store now, or on their way there."""
        with self._lock:
            for identifier, node in decoded.items():
                self._keep(identifier, node, encoded[identifier])

    def _keep(self, identifier: NodeId, node: Node, data: bytes) -> None:
        if identifier not in self._nodes:
            self._nodes[identifier] = node, data
            self._entries += _weight(node)
        while self._entries > NODE_CACHE_ENTRIES and len(self._nodes) > 1:
            self._entries -= _weight(self._nodes.popitem(last=False)[1][0])

    def encoded(self, identifier: NodeId) -> bytes:
        """Returns the bytes of a node, checked against its id only."""
        kept = self._nodes.get(identifier)
        if kept is not None:
            return kept[1]
        data = self._encoded(identifier)
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
    if isinstance(node, DirectoryNode):
        return len(node.entries) + 1
    return len(node.pages if isinstance(node, IndexNode) else node.refs) // 2 + 1


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

    def __init__(self, nodes: dict[NodeId, bytes] | None = None) -> None:
        self.nodes: dict[NodeId, bytes] = {} if nodes is None else nodes

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

    Packs in the caller's thread. Whenever `batch_bytes` have gathered, a thread of its own writes
    them in a transaction while the next gather; who brings more than that waits, and is told if
    it failed. `flush` stores the rest; what was not flushed is lost with the process, and is
    garbage until something refers to it, so its owner holds the store's write lease meanwhile.
    With `check`, what the store has is read, and stored again if it is damaged.
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
        self._turn = threading.Lock()
        self._writing: dict[ChunkId, bytes] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self.stored_bytes = 0
        self._windows: list[bytearray] = []

    @property
    def taken_bytes(self) -> int:
        """How many bytes have come to `put` by now, from all threads; known chunks, too."""
        return sum(list(self._taken.values()))

    def put(self, data: bytes | memoryview) -> ChunkId:
        """Stores one chunk, soon, and returns its id."""
        identifier = ChunkId(digest(data))
        self.put_hashed([(identifier, data)])
        return identifier

    def put_hashed(self, chunks: Sequence[tuple[ChunkId, bytes | memoryview]]) -> None:
        """Stores chunks, soon, whose ids their caller has found out."""
        thread = threading.get_ident()  # each counts alone, and none is lost
        size = sum(len(data) for _, data in chunks)
        self._taken[thread] = self._taken.get(thread, 0) + size
        coming, writing = self._pending, self._writing
        chunks = [one for one in chunks if one[0] not in coming and one[0] not in writing]
        if not chunks:
            return
        with self._store.read() as reader:
            lacking = [
                (identifier, data)
                for identifier, data in chunks
                if not reader.has(Db.CHUNKS, identifier)
                or (self._check and _is_damaged(reader, identifier))
            ]
        for identifier, data in lacking:
            self._keep(identifier, data)

    def window(self, size: int) -> bytearray:
        """Returns a buffer of `size` bytes to read into, one that was used before if there is."""
        try:
            return self._windows.pop()
        except IndexError:
            return bytearray(size)

    def put_window(self, window: bytearray, chunks: Sequence[tuple[ChunkId, memoryview]]) -> None:
        """Stores chunks of a window, soon, and takes the window back."""
        self.put_hashed(chunks)
        self._windows.append(window)

    def _keep(self, identifier: ChunkId, data: bytes | memoryview) -> None:
        packed = pack(data, self._level)
        with self._lock:
            if identifier not in self._pending and identifier not in self._writing:
                self._pending[identifier] = packed
                self._bytes += len(packed)
                self.stored_bytes += len(packed)
            if self._bytes <= self._batch_bytes:
                return
        with self._turn:
            self._begin()

    def _begin(self) -> None:
        """Gives what has gathered to the writing thread once it has written what it had."""
        self._store.give_turn()
        if self._written is not None:
            self._written.result()
        with self._lock:
            if self._bytes <= self._batch_bytes:
                return  # another thread was here first
            chunks = self._take()
        if self._thread is None:
            # The C library gives the memory of every batch back and asks for it again, which
            # takes as long as to write it, unless a larger block was freed once (up to 32 MiB:
            # M_TRIM_THRESHOLD in mallopt(3)).
            bytearray(min(2 * self._batch_bytes, 24 << 20))
            self._thread = ThreadPoolExecutor(1, "chunks")
        self._written = self._thread.submit(self._write, chunks)

    def _take(self) -> dict[ChunkId, bytes]:
        # In this order nobody misses a chunk who looks into both without the lock.
        self._writing = self._pending
        self._pending, self._bytes = {}, 0
        return self._writing

    def _write(self, chunks: dict[ChunkId, bytes]) -> None:
        pairs = sorted(chunks.items())
        self._store.write(lambda writer: writer.put_many(Db.CHUNKS, list(pairs)))
        self._store.trim()

    def flush(self) -> None:
        """Stores what has gathered; durable when it returns."""
        with self._turn:
            if self._written is not None:
                self._written.result()
            with self._lock:
                rest = self._take()
            if rest:
                self._write(rest)
            self._writing = {}

    def flush_into(self, writer: Writer) -> None:
        """Stores what has gathered in a transaction of the caller's, with whatever else it does.

        May run again when the transaction does: nothing is forgotten. What is being written is
        stored with it, for its own transaction waits for the caller's.
        """
        writer.put_many(Db.CHUNKS, sorted((self._writing | self._pending).items()))
