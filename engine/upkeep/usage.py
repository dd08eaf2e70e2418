"""Usage: how many bytes trees have, how many are unique, and how many the disk holds for them.

    logical   what the files of the trees add up to, each as often as it is there; holes count
    unique    the plain bytes of the distinct chunks
    stored    what their packed form takes, and that of the nodes

A tree's own is what nothing else needs: what would go with it. Every object is claimed by the
first root that reaches it and becomes shared when a second one does, at most once each, so the
cost follows unique objects, whatever number of snapshots there is.
"""

from collections.abc import Iterable

import msgspec

from engine.errors import MissingObjectError
from engine.progress import Progress
from engine.storage.idset import IdMap, IdSet
from engine.storage.nodes import references
from engine.storage.store import Db, Reader, Store
from engine.upkeep.marking import NODES_PER_TRIM
from engine.upkeep.roots import pinned_roots, stored_roots

_SHARED = 0xFFFFFFFF


class Bytes(msgspec.Struct):
    """Sums over distinct objects."""

    chunks: int = 0
    unique: int = 0
    nodes: int = 0
    stored: int = 0

    def count(self, times: int, is_node: bool, plain: int, stored: int) -> None:
        """Adds an object `times` times: 1 or -1."""
        if is_node:
            self.nodes += times
        else:
            self.chunks += times
            self.unique += times * plain
        self.stored += times * stored


class TreeUsage(msgspec.Struct):
    """One root. `all` is what it reaches, None unless it was asked for."""

    kind: str
    name: str
    logical: int
    entries: int
    own: Bytes
    all: Bytes | None = None


class Usage(msgspec.Struct):
    """A store. `total` is what roots reach, `shared` what more than one does."""

    logical: int
    total: Bytes
    shared: Bytes
    unreferenced: int
    file_bytes: int
    free_bytes: int
    trees: list[TreeUsage]


def measure(
    store: Store,
    store_path: str,
    wanted: Iterable[bytes] = (),
    progress: Progress | None = None,
) -> Usage:
    """Counts what the store holds; `wanted` are snapshots of which all is counted, not only own.

    Raises CorruptObjectError for what cannot be read.
    """
    with store.read() as reader:
        roots = [*stored_roots(reader), *pinned_roots(reader, store_path)]
        claims = _Claims(store, reader, progress)
        trees: list[TreeUsage] = []
        chosen = {identifier.hex() for identifier in wanted}
        logical = 0
        for root in roots:
            if root.kind == "session" and trees and trees[-1].name == root.name:
                claims.claim(root.node, len(trees) - 1)  # the same tree without its owners
                continue
            claims.own.append(Bytes())
            claims.claim(root.node, len(trees))
            tree = TreeUsage(root.kind, root.name, 0, 0, claims.own[-1])
            if root.entry is not None:
                tree.logical = root.entry.size
                tree.entries = root.entry.totals.entries if root.entry.totals else 0
                logical += tree.logical
            if root.kind == "snapshot" and root.name in chosen:
                tree.all = claims.reach(root.node)
            trees.append(tree)
        objects_there = reader.count(Db.NODES) + reader.count(Db.CHUNKS)
    facts = store.statistics()
    store.trim()
    return Usage(
        logical, claims.total, claims.shared,
        objects_there - claims.total.nodes - claims.total.chunks,
        facts.file_bytes, max(0, facts.file_bytes - facts.used_bytes), trees,
    )  # fmt: skip


class _Claims:
    """Who needs which object: one root's number, or several."""

    def __init__(self, store: Store, reader: Reader, progress: Progress | None) -> None:
        self._store, self._reader, self._progress = store, reader, progress
        self._nodes, self._chunks = IdMap(), IdMap()
        self._read = 0
        self.own: list[Bytes] = []
        self.total, self.shared = Bytes(), Bytes()

    def claim(self, root: bytes, number: int) -> None:
        stack = [root] if self._take(self._nodes, root, True, number, 0) else []
        while stack:
            for _, below, is_node, length in self._open(stack.pop()):
                table = self._nodes if is_node else self._chunks
                if self._take(table, below, is_node, number, length) and is_node:
                    stack.append(below)

    def _take(self, table: IdMap, key: bytes, is_node: bool, number: int, plain: int) -> bool:
        """Notes that a root needs an object; tells whether those below are to be noted as well."""
        before = table.get(key)
        if before in {number, _SHARED}:
            return False
        stored = self._stored(Db.NODES if is_node else Db.CHUNKS, key)
        if before is None:
            table.set(key, number)
            self.own[number].count(1, is_node, plain, stored)
            self.total.count(1, is_node, plain, stored)
        else:
            table.set(key, _SHARED)
            self.own[before].count(-1, is_node, plain, stored)
            self.shared.count(1, is_node, plain, stored)
        return True

    def reach(self, root: bytes) -> Bytes:
        """Counts everything that one root needs."""
        found, seen, stack = Bytes(), IdSet([root]), [root]
        found.count(1, True, 0, self._stored(Db.NODES, root))
        while stack:
            for _, below, is_node, length in self._open(stack.pop()):
                if seen.add(below):
                    stored = self._stored(Db.NODES if is_node else Db.CHUNKS, below)
                    found.count(1, is_node, length, stored)
                    if is_node:
                        stack.append(below)
        return found

    def _open(self, node: bytes) -> list[tuple[bytes, bytes, bool, int]]:
        return list(references(node, self._get(Db.NODES, node)))

    def _stored(self, db: Db, key: bytes) -> int:
        return len(self._get(db, key))

    def _get(self, db: Db, key: bytes) -> memoryview:
        self._read += 1
        if self._read % NODES_PER_TRIM == 0:
            self._store.trim()
            if self._progress is not None:
                self._progress(self._read, None)
        raw = self._reader.get(db, key)
        if raw is None:
            raise MissingObjectError("node" if db is Db.NODES else "chunk", key)
        return raw
