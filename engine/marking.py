"""Marking: what is reachable from roots, each node walked once whatever number of roots share it.

What a walk reads of a node is checked against its id; nothing is decoded into entries, and
nothing kept but ids, so memory follows unique objects, about 34 bytes each.
"""

from collections.abc import Callable, Iterable

from engine.errors import MissingObjectError
from engine.idset import IdSet
from engine.nodes import references
from engine.store import Db, Reader, Store

Progress = Callable[[int, int | None], None]

_NODES_PER_READ = 512
"""A view that stays open keeps LMDB from using freed pages again."""
_BYTES_PER_TRIM = 16 << 20


class Marks:
    """The nodes and chunks found so far. Between calls some may wait to be walked: `waiting`."""

    def __init__(self) -> None:
        self.nodes, self.chunks = IdSet(), IdSet()
        self._stack: list[bytes] = []

    def add(self, roots: Iterable[bytes]) -> None:
        """Takes root nodes in, to be walked by `walk`."""
        self._stack.extend(root for root in roots if self.nodes.add(root))

    @property
    def waiting(self) -> bool:
        """Tells whether there are nodes below which something may not be marked yet."""
        return bool(self._stack)

    def walk(self, reader: Reader, most: int) -> int:
        """Marks what is below up to `most` nodes; returns how many bytes were read.

        Raises CorruptObjectError or MissingObjectError; what is below is unknown then.
        """
        stack, nodes, chunks, read = self._stack, self.nodes, self.chunks, 0
        while stack and most > 0:
            most -= 1
            identifier = stack[-1]
            raw = reader.get(Db.NODES, identifier)
            if raw is None:
                raise MissingObjectError("node", identifier)
            read += len(raw)
            found = list(references(identifier, raw))  # all or nothing of a node
            stack.pop()
            for _, below, is_node in found:
                if not is_node:
                    chunks.add(below)
                elif nodes.add(below):
                    stack.append(below)
        return read

    def walk_all(self, store: Store, progress: Progress | None = None) -> None:
        """Marks everything below the roots taken in; in many short views of the store."""
        read = 0
        while self._stack:
            with store.read() as reader:
                read += self.walk(reader, _NODES_PER_READ)
                total = reader.count(Db.NODES)
            if read > _BYTES_PER_TRIM:
                read = 0
                store.trim()
            if progress is not None:
                progress(min(len(self.nodes) - len(self._stack), total), total)
