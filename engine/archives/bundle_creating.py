"""Making a bundle: snapshots of a store, and all they are made of that the receiver lacks.

First the trees are walked: what the receiver has is marked, the rest put in order, each object
after all that it names. Then the objects are written as the store keeps them, each checked
against its id. The same store gives the same bytes. The caller keeps garbage collection away.
"""

from collections.abc import Iterator, Sequence
from typing import IO

import msgspec

from engine.archives.bundles import (
    CHUNK,
    MOST_SNAPSHOT_BYTES,
    NODE,
    SNAPSHOT,
    VERSION,
    BundleTooLargeError,
    BundleWriter,
    Counts,
    Manifest,
)
from engine.errors import MissingObjectError
from engine.ids import ChunkId, NodeId, SnapshotId
from engine.progress import Progress, unheard
from engine.storage.codec import unpack
from engine.storage.nodes import DirectoryNode, IndexNode, Kind, Node
from engine.storage.objects import Objects
from engine.storage.owners import count_owners
from engine.storage.store import Db
from engine.trees.directory import directory_id

Named = tuple[int, bytes]
"""CHUNK or NODE, and the id."""


class BundleReport(msgspec.Struct, frozen=True):
    """What a bundle carries. `bytes` is its length."""

    snapshots: tuple[bytes, ...]
    have: tuple[bytes, ...]
    refs: dict[str, bytes]
    chunks: int
    nodes: int
    bytes: int


def children(node: Node) -> Iterator[Named]:
    """Yields what a node names, in its order: chunks and nodes."""
    if isinstance(node, IndexNode):
        for page in node.pages:
            yield NODE, page.node
        return
    if not isinstance(node, DirectoryNode):
        refs = node.refs
        yield from ((NODE if ref.level else CHUNK, ref.id) for ref in refs if ref.id is not None)
        return
    for entry in node.entries:
        if isinstance(entry.content, tuple):
            for ref in entry.content:
                if ref.id is not None:
                    yield NODE if ref.level else CHUNK, ref.id
        elif entry.kind == Kind.DIRECTORY:
            yield NODE, entry.content


def below(objects: Objects, root: NodeId, seen: set[bytes]) -> Iterator[Named]:
    """Yields all that a tree is made of and that is not in `seen`, what is named first.

    Adds it to `seen`. Raises MissingObjectError and CorruptObjectError; chunks are not read.
    """
    if root in seen:
        return
    seen.add(root)
    stack = [(root, children(objects.node(root)))]
    while stack:
        identifier, rest = stack[-1]
        named = next(rest, None)
        if named is None:
            stack.pop()
            yield NODE, identifier
        elif named[1] not in seen:
            seen.add(named[1])
            if named[0] == CHUNK:
                yield named
            else:
                node = NodeId(named[1])
                stack.append((node, children(objects.node(node))))


def create_bundle(
    objects: Objects,
    out: IO[bytes],
    snapshots: Sequence[SnapshotId],
    *,
    have: Sequence[SnapshotId] = (),
    refs: dict[str, SnapshotId] | None = None,
    progress: Progress | None = None,
) -> BundleReport:
    """Writes `snapshots` to a stream, without what the trees of `have` are made of.

    Both are in the store; of `refs`, those that name one of
    them go along. Memory holds the ids of all objects
    involved, about 150 bytes each. Raises MissingObjectError and CorruptObjectError (what was
    written by then is no bundle), BundleTooLargeError, OSError of the stream.
    """
    tell = progress or unheard
    base = sorted(set(have))
    wanted = sorted(set(snapshots) - set(base))
    records = {each: objects.snapshot(each) for each in [*base, *wanted]}
    seen: set[bytes] = set()
    for each in base:
        for _ in below(objects, directory_id(records[each].root), seen):
            pass
    order: list[Named] = []
    for each in wanted:
        order.extend(below(objects, directory_id(records[each].root), seen))
        tell(0, len(order))
    owners = any(count_owners(records[each].root) for each in wanted)
    del seen, records
    chunks = sum(kind == CHUNK for kind, _ in order)
    counts = Counts(chunks, len(order) - chunks, len(wanted))
    names = tuple(sorted((name, target) for name, target in (refs or {}).items()
                         if target in {*wanted, *base}))  # fmt: skip
    version = VERSION if owners else 1
    writer = BundleWriter(out, Manifest(version, tuple(wanted), tuple(base), names, counts))
    for done, (kind, identifier) in enumerate(order):
        if kind == NODE:
            writer.add(NODE, identifier, objects.encoded(NodeId(identifier)))
        else:
            _add_chunk(objects, writer, ChunkId(identifier))
        if not done & 63:
            tell(done, counts.objects, writer.bytes)
    size = 0
    for each in wanted:
        with objects.store.read() as reader:
            raw = reader.get(Db.SNAPSHOTS, each)
            if raw is None:
                raise MissingObjectError("snapshot", each)  # removed since
            record = bytes(raw)
        size += len(record)
        if size > MOST_SNAPSHOT_BYTES:
            raise BundleTooLargeError("list of snapshots", size)
        writer.add(SNAPSHOT, each, record)
    writer.end()
    return BundleReport(
        tuple(wanted), tuple(base), dict(names), counts.chunks, counts.nodes, writer.bytes
    )


def _add_chunk(objects: Objects, writer: BundleWriter, identifier: ChunkId) -> None:
    with objects.store.read() as reader:
        raw = reader.get(Db.CHUNKS, identifier)
        if raw is None:
            raise MissingObjectError("chunk", identifier)
        unpack(identifier, raw)
        value = bytes(raw)  # a pipe that nobody reads must not hold the view open
    writer.add(CHUNK, identifier, value)
