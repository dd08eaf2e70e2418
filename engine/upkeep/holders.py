"""Holders: what keeps an object alive, each with one path that leads to the object.

A walk from every root, each node once: what does not lead to the object is remembered as such
for all roots, so the cost follows unique nodes.
"""

from collections.abc import Iterator

import msgspec

from engine.episodes.trajectories import holders_of
from engine.errors import AmbiguousIdError, CorruptObjectError, MissingObjectError, NotFoundError
from engine.ids import SnapshotId, is_id_prefix
from engine.sessions.sessions import decode_record
from engine.storage.content import pieces
from engine.storage.idset import IdSet
from engine.storage.nodes import DEEPEST, TALLEST, Entry, Kind, references
from engine.storage.objects import Objects
from engine.storage.store import Db, Reader, Store
from engine.trees.directory import directory_id, find
from engine.upkeep.marking import NODES_PER_TRIM
from engine.upkeep.roots import pinned_roots, stored_roots

_KINDS = {Db.SNAPSHOTS: "snapshot", Db.NODES: "node", Db.CHUNKS: "chunk"}


class Target(msgspec.Struct, frozen=True):
    """An object of the store. `kind` is snapshot, node or chunk."""

    kind: str
    identifier: bytes


class Holder(msgspec.Struct, frozen=True):
    """What keeps an object: its `kind` and `name`, and a path in its tree, if it has one."""

    kind: str
    name: str
    path: bytes = b""


def find_object(reader: Reader, prefix: str) -> Target:
    """Returns the object whose id begins so. Raises NotFoundError, AmbiguousIdError."""
    if not is_id_prefix(prefix):
        raise NotFoundError("object", prefix)
    found = []
    start = bytes.fromhex(prefix + "0" * (len(prefix) % 2))
    for db, kind in _KINDS.items():
        for key in reader.keys(db, start):
            if not key.hex().startswith(prefix):
                break
            found.append(Target(kind, key))
            if len(found) > 100:
                break
    if not found:
        raise NotFoundError("object", prefix)
    if len(found) > 1:
        raise AmbiguousIdError(prefix, [target.identifier.hex() for target in found])
    return found[0]


def object_at(objects: Objects, root: Entry, path: bytes) -> Target:
    """Returns the object that a path needs first: a directory's node, a file's first piece.

    Of what has none of its own, the directory's that it is in. Raises NotFoundError.
    """
    entry = find(objects, root, path)
    if entry is None:
        raise NotFoundError("path", path.decode(errors="replace"))
    if entry.kind == Kind.DIRECTORY:
        return Target("node", directory_id(entry))
    first = next((ref for ref in pieces(objects, entry) if ref.id is not None), None)
    if first is not None and first.id is not None:
        return Target("chunk", first.id)
    return object_at(objects, root, path.rpartition(b"/")[0])


def holders(store: Store, store_path: str, target: Target) -> Iterator[Holder]:
    """Yields what keeps an object: refs, snapshots, sessions, episodes' steps, open workspaces.

    Raises CorruptObjectError where a node on the way cannot be read.
    """
    with store.read() as reader:
        refs: dict[bytes, list[str]] = {}
        for key, raw in reader.items(Db.REFS):
            refs.setdefault(bytes(raw), []).append(key.decode(errors="replace"))
        if target.kind == "snapshot":
            yield from (Holder("ref", name) for name in refs.get(target.identifier, []))
            for key, raw in reader.items(Db.SESSIONS):
                session = decode_record(key, raw)
                if target.identifier in {session.parent, *(layer for _, layer in session.layers)}:
                    yield Holder("session", session.name)
            for words in holders_of(reader, SnapshotId(target.identifier)):
                yield Holder("episode", words)
            return
        search = _Search(store, reader, target.identifier)
        last: tuple[str, str] | None = None
        for root in stored_roots(reader):
            path = search.path(root.node)
            if path is None or (root.kind, root.name) == last:  # a session has up to two
                continue
            last = root.kind, root.name
            if root.kind == "snapshot":
                for name in refs.get(bytes.fromhex(root.name), []):
                    yield Holder("ref", name, path)
                for words in holders_of(reader, SnapshotId(bytes.fromhex(root.name))):
                    yield Holder("episode", words, path)
            yield Holder(root.kind, root.name, path)
        for root in pinned_roots(reader, store_path):
            path = search.path(root.node)
            if path is not None:
                yield Holder(root.kind, root.name, path)
    store.trim()


class _Search:
    """Finds the way from nodes to one object."""

    def __init__(self, store: Store, reader: Reader, wanted: bytes) -> None:
        self._store, self._reader, self._wanted = store, reader, wanted
        self._untrimmed = 0
        self._without = IdSet()
        self._ways: dict[bytes, bytes] = {}

    def path(self, node: bytes, depth: int = 0) -> bytes | None:
        """Returns the path from a node to what is wanted; None if it does not lead there."""
        if node == self._wanted:
            return b""
        if depth > DEEPEST + 2 * TALLEST:  # directories, and the pages and lists of the last
            raise CorruptObjectError("node", node, "the tree is too deep")
        if node in self._ways:
            return self._ways[node]
        if node in self._without:
            return None
        self._untrimmed += 1
        if self._untrimmed % NODES_PER_TRIM == 0:
            self._store.trim()
        raw = self._reader.get(Db.NODES, node)
        if raw is None:
            raise MissingObjectError("node", node)
        for name, below, is_node, _ in references(node, raw):
            if is_node:
                way = self.path(below, depth + 1)
            else:
                way = b"" if below == self._wanted else None
            if way is not None:
                whole = name + b"/" + way if name and way else name or way
                self._ways[node] = whole
                return whole
        self._without.add(node)
        return None
