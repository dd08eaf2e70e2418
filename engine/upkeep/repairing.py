"""Repair: what is damaged is taken from where the same bytes still are.

An object is known by its id, so wherever it comes from it is right or refused: from another
store by id, or from a directory that is read, cut and packed as an import does. What no tree
needs and is damaged goes. What stays damaged stays named.
"""

from collections.abc import Callable, Iterator, Sequence

import msgspec

from engine.episodes.steps import is_sealed
from engine.errors import CorruptObjectError
from engine.ids import ID_BYTES, ChunkId, NodeId, SnapshotId, digest
from engine.plain.checkout_records import forget
from engine.plain.importing import read_directory
from engine.progress import Progress
from engine.sessions.sessions import decode_record
from engine.storage.codec import own_id, unpack
from engine.storage.nodes import decode, encode, node_id
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.snapshots import decode_snapshot
from engine.storage.store import Db, Store, Writer
from engine.upkeep.verifying import Damage, VerifyReport

DATABASES = {"chunk": Db.CHUNKS, "node": Db.NODES, "snapshot": Db.SNAPSHOTS}
_BATCH_BYTES = 4 << 20
_BITS_OF_AN_ID = 64
"""Bits that a damaged key may differ in from what it was. Ids of two objects differ in some 128."""

Wanted = dict[Db, set[bytes]]
Source = Callable[[Wanted], int]
"""Stores what it has of what is wanted, and returns how many objects that were."""


class RepairReport(msgspec.Struct):
    """What a repair did; `left` is what the store is like afterwards."""

    repaired: int
    dropped: int
    left: VerifyReport


def wanted_of(damage: list[Damage]) -> Wanted:
    """Returns the objects that would have to be had to put damage right."""
    wanted: Wanted = {db: set() for db in DATABASES.values()}
    for item in damage:
        if item.kind in DATABASES:
            wanted[DATABASES[item.kind]].add(item.identifier)
    return wanted


def check_object(db: Db, key: bytes, raw: memoryview) -> None:
    """Raises CorruptObjectError if a value is not what its key promises."""
    if db is Db.CHUNKS:
        unpack(ChunkId(key), raw)
    elif db is Db.NODES:
        decode(NodeId(key), raw)
    else:
        decode_snapshot(SnapshotId(key), raw)


def right_key(db: Db, key: bytes, raw: memoryview) -> bytes | None:
    """Returns the id of a whole object that stands under a key with flipped bits, else None.

    An object whose own bytes are damaged has another id as well, but one that is far from its key.
    """
    own = own_id(raw) if db is Db.CHUNKS else digest(raw)
    if own is None or own == key or len(key) != ID_BYTES:
        return None
    bits = int.from_bytes(own, "big") ^ int.from_bytes(key, "big")
    if bits.bit_count() > _BITS_OF_AN_ID:
        return None
    try:
        check_object(db, own, raw)
    except CorruptObjectError:
        return None
    return own


def put_back(store: Store, damage: list[Damage]) -> int:
    """Puts whole objects that stand under a damaged key under their own id; returns how many."""

    def change(writer: Writer) -> int:
        moved = 0
        for db, keys in wanted_of(damage).items():
            for key in sorted(keys):
                raw = writer.get(db, key)
                own = right_key(db, key, raw) if raw is not None else None
                if raw is not None and own is not None:
                    value = bytes(raw)
                    writer.delete(db, key)
                    writer.put(db, own, value)
                    moved += 1
        return moved

    return store.write(change)


def from_store(store: Store, other: Store) -> Source:
    """Returns a source that is another store. What is damaged there is not taken."""

    def take(wanted: Wanted) -> int:
        taken = 0
        for pairs in _batches(other, wanted):

            def write(writer: Writer, pairs: list[tuple[Db, bytes, bytes]] = pairs) -> None:
                for db, key, value in pairs:
                    writer.put(db, key, value)

            store.write(write)
            taken += len(pairs)
        return taken

    return take


def _batches(other: Store, wanted: Wanted) -> Iterator[list[tuple[Db, bytes, bytes]]]:
    batch: list[tuple[Db, bytes, bytes]] = []
    size = 0
    for db, keys in wanted.items():
        for key in sorted(keys):
            with other.read() as reader:
                raw = reader.get(db, key)
                try:
                    if raw is None:
                        continue
                    check_object(db, key, raw)
                except CorruptObjectError:
                    continue
                batch.append((db, key, bytes(raw)))
            size += len(batch[-1][2])
            if size > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def restore_refs(store: Store, other: Store) -> int:
    """Sets refs that name no snapshot to what another store has of them; returns how many."""
    with store.read() as ours, other.read() as theirs:

        def is_right(raw: memoryview | None) -> bool:
            return raw is not None and len(raw) == ID_BYTES and ours.has(Db.SNAPSHOTS, bytes(raw))

        wrong = [key for key, raw in ours.items(Db.REFS) if not is_right(raw)]
        found = [(key, theirs.get(Db.REFS, key)) for key in wrong]
        pairs = [(key, bytes(raw)) for key, raw in found if raw is not None and is_right(raw)]

    def change(writer: Writer) -> None:
        for key, raw in pairs:
            writer.put(Db.REFS, key, raw)

    if pairs:
        store.write(change)
    return len(pairs)


def restore_records(store: Store, other: Store) -> int:
    """Takes records of episodes and sessions from another store for damaged ones; returns how many.

    A record is taken under the same key if it is whole.
    """
    with store.read() as ours, other.read() as theirs:
        pairs: list[tuple[Db, bytes, bytes]] = []
        for db, is_whole in ((Db.EPISODES, _is_whole_row), (Db.SESSIONS, _is_whole_session)):
            wrong = [key for key, raw in ours.items(db) if not is_whole(key, raw)]
            found = [(key, theirs.get(db, key)) for key in wrong]
            pairs += [
                (db, key, bytes(raw))
                for key, raw in found
                if raw is not None and is_whole(key, raw)
            ]

    def change(writer: Writer) -> None:
        for db, key, value in pairs:
            writer.put(db, key, value)

    if pairs:
        store.write(change)
    return len(pairs)


def _is_whole_row(key: bytes, raw: memoryview) -> bool:
    return not len(raw) or is_sealed(key, raw)  # those of indexes are empty


def _is_whole_session(key: bytes, raw: memoryview) -> bool:
    try:
        decode_record(key, raw)
    except CorruptObjectError:
        return False
    return True


def from_directory(
    store: Store, objects: Objects, path: str, store_path: str, progress: Progress | None = None
) -> Source:
    """Returns a source that is a directory: all of a tree, or any files of it.

    It gives chunks by the files' contents, and the nodes of the folders that are as they were.
    Raises ImportSourceError, SourceChangedError when it is asked.
    """

    def take(wanted: Wanted) -> int:
        sink = _WantedChunks(store, wanted[Db.CHUNKS])
        nodes = _WantedNodes(wanted[Db.NODES])
        read_directory(
            store, objects, path, sink=sink, nodes=nodes, store_path=store_path, progress=progress
        )
        store.write(nodes.flush)
        return len(sink.found) + len(nodes.nodes)

    return take


class _WantedChunks(ChunkSink):
    def __init__(self, store: Store, wanted: set[bytes]) -> None:
        super().__init__(store)
        self._wanted = wanted
        self.found: set[bytes] = set()

    def put_hashed(self, chunks: Sequence[tuple[ChunkId, bytes | memoryview]]) -> None:
        for identifier, data in chunks:
            if identifier in self._wanted and identifier not in self.found:
                self.found.add(identifier)
                self._keep(identifier, data)


class _WantedNodes(NodeBuffer):
    def __init__(self, wanted: set[bytes]) -> None:
        super().__init__()
        self._wanted = wanted

    def put(self, node: msgspec.Struct) -> NodeId:
        data = encode(node)
        identifier = node_id(data)
        if identifier in self._wanted:
            self.nodes[identifier] = data
        return identifier


def drop_unneeded(store: Store, damage: list[Damage]) -> int:
    """Removes damaged objects, rows and records of checkouts that no tree needs; returns how many.

    The caller holds the lease on objects alone. What was put right meanwhile stays.
    """

    def change(writer: Writer) -> int:
        dropped = 0
        for item in damage:
            if item.where:
                continue
            if item.kind == "checkout":
                forget(writer, item.identifier)
                dropped += 1
            elif item.kind == "row":
                dropped += writer.delete(Db.IMPORTS, item.identifier)
            elif item.kind in {"chunk", "node"}:
                raw = writer.get(DATABASES[item.kind], item.identifier)
                try:
                    check_object(DATABASES[item.kind], item.identifier, raw or memoryview(b""))
                except CorruptObjectError:
                    dropped += writer.delete(DATABASES[item.kind], item.identifier)
        return dropped

    return store.write(change)
