"""Marking: what is reachable from roots, each node walked once whatever number of roots share it.

What a walk reads of a node is checked against its id; nothing is decoded into entries, and
nothing kept but ids, so memory follows unique objects, about 34 bytes each.
"""

from collections.abc import Iterable

from engine.errors import MissingObjectError
from engine.progress import Progress
from engine.storage.idset import IdSet
from engine.storage.nodes import child_ids
from engine.storage.store import Db, Reader, Store

_NODES_PER_READ = 512
"""A view that stays open keeps LMDB from using freed pages again."""
_RECENT = 200_000
NODES_PER_TRIM = 1024
"""The kernel maps 64 KiB around every page that is touched."""


class Marks:
    """The nodes and chunks found so far. Between calls some may wait to be walked: `waiting`."""

    def __init__(self) -> None:
        self.nodes, self.chunks = IdSet(), IdSet()
        self._stack: list[bytes] = []
        self._recent: set[bytes] = set()  # versions of a directory have most in common

    def add(self, roots: Iterable[bytes]) -> None:
        """Takes root nodes in, to be walked by `walk`."""
        self._stack.extend(root for root in roots if self.nodes.add(root))

    @property
    def waiting(self) -> bool:
        """Tells whether there are nodes below which something may not be marked yet."""
        return bool(self._stack)

    def walk(self, reader: Reader, most: int) -> None:
        """Marks what is below up to `most` nodes.

        Raises CorruptObjectError or MissingObjectError; what is below is unknown then.
        """
        stack, nodes, chunks = self._stack, self.nodes, self.chunks
        while stack and most > 0:
            most -= 1
            identifier = stack[-1]
            raw = reader.get(Db.NODES, identifier)
            if raw is None:
                raise MissingObjectError("node", identifier)
            nodes_below, chunks_below = child_ids(identifier, raw)  # all or nothing of a node
            stack.pop()
            stack.extend(below for below in nodes_below if nodes.add(below))
            chunks_below -= self._recent
            for below in chunks_below:
                chunks.add(below)
            self._recent |= chunks_below
            if len(self._recent) > _RECENT:
                self._recent.clear()

    def walk_all(self, store: Store, progress: Progress | None = None) -> None:
        """Marks everything below the roots taken in; in many short views of the store."""
        untrimmed = 0
        while self._stack:
            with store.read() as reader:
                self.walk(reader, _NODES_PER_READ)
                total = reader.count(Db.NODES)
            untrimmed += _NODES_PER_READ
            if untrimmed >= NODES_PER_TRIM:
                untrimmed = 0
                store.trim()
            if progress is not None:
                progress(min(len(self.nodes) - len(self._stack), total), total)
        store.trim()
