"""Applying a bundle: what it carries comes into the store, checked while it streams in.

Every object is checked against its id, and every node against what it names: that is there
already, from the bundle or in the store, and is what the node says of it (kind, level, length,
sums, order of pages). Objects are stored in batches as they come. At the end the subtrees that
the bundle names and does not carry, because the receiver has them, are walked in the store.
Snapshots and refs come into the store together, in the last transaction, after the bundle's end
was checked: a bundle that is damaged, cut short or forged leaves nothing that can be seen. What
it stored stays until a collection, so applying it again goes on where it ended. The caller keeps
garbage collection away meanwhile.
"""

import os
from collections import OrderedDict
from typing import IO, NamedTuple

import msgspec

from engine.archives.bundle_creating import below
from engine.archives.bundles import (
    CHUNK,
    MOST_SNAPSHOT_BYTES,
    NODE,
    BundleFormatError,
    BundleReader,
    Record,
)
from engine.errors import CorruptObjectError, EngineError, MissingObjectError
from engine.host.set_id import SET_ID
from engine.ids import ChunkId, NodeId, SnapshotId
from engine.progress import Progress, unheard
from engine.storage.chunking import LARGEST_CHUNK
from engine.storage.codec import plain_length, unpack
from engine.storage.nodes import (
    DEEPEST,
    DirectoryNode,
    Entry,
    IndexNode,
    Kind,
    ListNode,
    Node,
    Ref,
    Totals,
    decode,
)
from engine.storage.objects import Objects
from engine.storage.snapshots import Snapshot, decode_snapshot
from engine.storage.store import Db, Reader, Store, Writer
from engine.trees.directory import directory_id, sums

BATCH_BYTES, BATCH_OBJECTS = 16 << 20, 16384
"""What is in memory at most before it is stored."""
FACTS = 4 * BATCH_OBJECTS
"""How many nodes' facts are kept; those of others are read again."""


class BundleBaseError(EngineError):
    """A bundle builds on snapshots that the store does not have: `missing`."""

    def __init__(self, missing: tuple[bytes, ...]) -> None:
        ids = ", ".join(each.hex() for each in missing[:4]) + (" …" if len(missing) > 4 else "")
        super().__init__(f"the bundle builds on snapshots that are not in the store: {ids}")
        self.missing = missing


class BundleSetIdError(EngineError):
    """A bundle has a file with set-id bits, which nobody has asked for: `path` is its name.

    A bundle's nodes are what their ids say, so the bits cannot be dropped.
    """

    def __init__(self, name: bytes) -> None:
        super().__init__(f"the bundle has a file with set-id bits, {os.fsdecode(name)!r}")
        self.path = name


class ApplyReport(msgspec.Struct):
    """What applying a bundle did.

    `new_snapshots` were not there before. `refs` were made or stood so already; `kept_refs` name
    another snapshot here and were left, with what the bundle has for them.
    """

    snapshots: tuple[bytes, ...]
    new_snapshots: tuple[bytes, ...] = ()
    refs: dict[str, bytes] = {}
    kept_refs: dict[str, bytes] = {}
    new_chunks: int = 0
    new_nodes: int = 0
    known_objects: int = 0
    new_bytes: int = 0
    bytes: int = 0


class _Facts(NamedTuple):
    """What others may say of a node: a directory, or page of one, if `entries` is not None."""

    level: int
    size: int
    totals: Totals | None
    entries: int | None
    first: bytes = b""
    last: bytes = b""


def apply_bundle(
    store: Store,
    objects: Objects,
    stream: IO[bytes],
    *,
    take_refs: bool = True,
    move_refs: bool = False,
    set_id: bool = False,
    progress: Progress | None = None,
) -> ApplyReport:
    """Stores what a bundle carries and makes its snapshots visible; durable when it returns.

    With `take_refs`, refs that are not there are made; `move_refs` also moves those that name
    another snapshot. Memory holds a batch, the ids of the nodes that came, and those of what the
    bundle builds on. Raises BundleBaseError, a BundleFormatError, StoreFullError, and unless
    `set_id` BundleSetIdError for a file with such a bit that the store does not have yet: then
    there is no new snapshot and no ref has changed.
    """
    reader = BundleReader(stream)
    manifest = reader.manifest
    with store.read() as view:
        missing = tuple(each for each in manifest.have if not view.has(Db.SNAPSHOTS, each))
    if missing:
        raise BundleBaseError(missing)
    job = _Apply(store, objects, manifest.snapshots, set_id)
    tell = progress or unheard
    for record in reader:
        try:
            job.take(record)
        except CorruptObjectError as error:
            raise BundleFormatError(record.offset, str(error)) from error
        if not reader.done & 63:
            tell(reader.done, reader.total, reader.offset)
    try:
        job.check_outside()
    except CorruptObjectError as error:
        raise BundleFormatError(
            reader.offset, f"what it builds on is not whole: {error}"
        ) from error
    unsent = set(manifest.snapshots) - job.snapshots.keys()
    if unsent:
        raise BundleFormatError(reader.offset, f"snapshot {min(unsent).hex()} is not in it")
    job.report.bytes = reader.offset

    def finish(writer: Writer) -> ApplyReport:
        missing = tuple(each for each in manifest.have if not writer.has(Db.SNAPSHOTS, each))
        if missing:  # removed meanwhile; a collection could take what the new ones stand on
            raise BundleBaseError(missing)
        report = msgspec.structs.replace(job.report, refs={}, kept_refs={})
        new = [each for each in job.snapshots if not writer.has(Db.SNAPSHOTS, each)]
        job.save(writer)
        for each in new:
            writer.put(Db.SNAPSHOTS, each, job.snapshots[SnapshotId(each)])
        report.new_snapshots = tuple(new)
        for name, target in manifest.refs if take_refs else ():
            found = writer.get(Db.REFS, name.encode())
            if found is None or move_refs:
                writer.put(Db.REFS, name.encode(), target)
            elif bytes(found) != target:
                report.kept_refs[name] = target
                continue
            report.refs[name] = target
        return report

    return store.write(finish)


class _Apply:
    def __init__(
        self, store: Store, objects: Objects, expected: tuple[bytes, ...], set_id: bool
    ) -> None:
        self.refused_bits = 0 if set_id else SET_ID
        self.store, self.objects = store, objects
        self.expected = set(expected)
        self.report = ApplyReport(expected)
        self.snapshots: dict[SnapshotId, bytes] = {}
        self.snapshot_bytes = 0
        self.chunks: dict[bytes, bytes] = {}
        self.nodes: dict[bytes, bytes] = {}
        self.bytes = 0
        self.facts: OrderedDict[bytes, _Facts] = OrderedDict()
        self.fits: dict[bytes, int] = {}
        self.carried: set[bytes] = set()
        self.outside: set[bytes] = set()

    def take(self, record: Record) -> None:
        """Checks an object and keeps it, to be stored soon. Raises CorruptObjectError."""
        if record.kind == CHUNK:
            self.take_chunk(ChunkId(record.identifier), record.value)
        elif record.kind == NODE:
            self.take_node(NodeId(record.identifier), bytes(record.value))
        else:
            self.take_snapshot(SnapshotId(record.identifier), bytes(record.value))
        if self.bytes >= BATCH_BYTES or len(self.chunks) + len(self.nodes) >= BATCH_OBJECTS:
            self.flush()

    def take_chunk(self, identifier: ChunkId, value: memoryview) -> None:
        if self.knows(Db.CHUNKS, self.chunks, identifier):
            return
        plain = unpack(identifier, value)
        if not 1 <= len(plain) <= LARGEST_CHUNK:
            raise CorruptObjectError("chunk", identifier, f"it has {len(plain):,} bytes")
        self.chunks[identifier] = bytes(value)
        self.report.new_chunks += 1
        self.count(len(value))

    def take_node(self, identifier: NodeId, value: bytes) -> None:
        node = decode(identifier, value)
        with self.store.read() as reader:
            facts = self.check(reader, identifier, node)
        self.remember(identifier, facts)
        self.carried.add(identifier)
        if self.knows(Db.NODES, self.nodes, identifier):
            return
        if isinstance(node, DirectoryNode):
            for entry in node.entries:
                if entry.mode & self.refused_bits and entry.kind == Kind.FILE:
                    raise BundleSetIdError(entry.name)
        self.nodes[identifier] = value
        self.report.new_nodes += 1
        self.count(len(value))

    def take_snapshot(self, identifier: SnapshotId, value: bytes) -> None:
        if identifier not in self.expected:
            raise CorruptObjectError("snapshot", identifier, "the manifest does not name it")
        if identifier in self.snapshots:
            raise CorruptObjectError("snapshot", identifier, "it came before")
        self.snapshot_bytes += len(value)
        if self.snapshot_bytes > MOST_SNAPSHOT_BYTES:
            raise CorruptObjectError("snapshot", identifier, "too many bytes of snapshots")
        snapshot = decode_snapshot(identifier, value)
        self.flush()  # what is walked now must be in the store
        with self.store.read() as reader:
            self.check_directory(reader, identifier, snapshot.root)
        self.check_depth(identifier, snapshot)
        self.snapshots[identifier] = value

    def knows(self, db: Db, waiting: dict[bytes, bytes], identifier: bytes) -> bool:
        known = identifier in waiting
        if not known:
            with self.store.read() as reader:
                known = reader.has(db, identifier)
        self.report.known_objects += known
        return known

    def count(self, size: int) -> None:
        self.bytes += size
        self.report.new_bytes += size

    def flush(self) -> None:
        """Stores what has gathered; durable when it returns."""
        if self.chunks or self.nodes:
            self.store.write(self.save)
            self.chunks, self.nodes, self.bytes = {}, {}, 0
            self.store.trim()

    def save(self, writer: Writer) -> None:
        writer.put_many(Db.CHUNKS, sorted(self.chunks.items()))
        writer.put_many(Db.NODES, sorted(self.nodes.items()))

    # What a node says of those that it names.

    def check(self, reader: Reader, identifier: bytes, node: Node) -> _Facts:
        """Returns a node's facts, all that it names being there and as it says."""
        if isinstance(node, ListNode):
            self.check_refs(reader, identifier, node.refs)
            return _facts_alone(node)
        if isinstance(node, IndexNode):
            return self.check_pages(reader, identifier, node)
        for entry in node.entries:
            if entry.kind == Kind.DIRECTORY:
                self.check_directory(reader, identifier, entry)
            elif isinstance(entry.content, tuple):
                self.check_refs(reader, identifier, entry.content)
        return _facts_alone(node)

    def check_directory(self, reader: Reader, above: bytes, entry: Entry) -> None:
        facts = self.facts_of(reader, above, directory_id(entry))
        if facts.entries is None:
            raise CorruptObjectError("node", directory_id(entry), "it is not a directory")
        if (facts.size, facts.totals) != (entry.size, entry.totals):
            raise CorruptObjectError(
                "node", above, f"what it says of the sums of {entry.name!r} is not so"
            )

    def check_pages(self, reader: Reader, identifier: bytes, node: IndexNode) -> _Facts:
        size = below = links = owners = 0
        first = floor = b""
        for page in node.pages:
            facts = self.facts_of(reader, identifier, NodeId(page.node))
            if (facts.entries, facts.last, facts.level) != (
                page.entries, page.last, node.level - 1
            ) or facts.first <= floor or facts.totals is None:  # fmt: skip
                raise CorruptObjectError("node", page.node, "it is not the page of its index")
            first, floor = first or facts.first, facts.last
            size += facts.size
            below += facts.totals.entries
            links += facts.totals.links
            owners += facts.totals.owners
        entries = sum(page.entries for page in node.pages)
        return _Facts(node.level, size, Totals(below, links, owners), entries, first, floor)

    def check_refs(self, reader: Reader, above: bytes, refs: tuple[Ref, ...]) -> None:
        for ref in refs:
            if ref.id is None:
                continue
            if ref.level:
                facts = self.facts_of(reader, above, NodeId(ref.id))
                right = facts.entries is None and facts.level == ref.level
                right = right and facts.size == ref.length
            else:
                value = self.chunks.get(ref.id) or reader.get(Db.CHUNKS, ref.id)
                if value is None:
                    raise _unknown(above, "chunk", ref.id)
                right = plain_length(value) == ref.length
            if not right:
                raise CorruptObjectError("node", above, f"{ref.id.hex()} is not what it says")

    def facts_of(self, reader: Reader, above: bytes, identifier: NodeId) -> _Facts:
        """Returns the facts of a node that came before, or is in the store.

        Of one in the store only the pages of a directory are looked at, for its sums are in these;
        `check_outside` walks it in the end.
        """
        if identifier not in self.carried:
            self.outside.add(identifier)
        facts = self.facts.get(identifier)
        if facts is None:
            raw = self.nodes.get(identifier) or reader.get(Db.NODES, identifier)
            if raw is None:
                raise _unknown(above, "node", identifier)
            node = decode(identifier, raw)
            if isinstance(node, IndexNode):
                facts = self.check_pages(reader, identifier, node)
            else:
                facts = _facts_alone(node)
        self.remember(identifier, facts)
        return facts

    def check_outside(self) -> None:
        """Walks what the bundle names and does not carry: all of it must be in the store.

        That a node is there says nothing of those below it: a collection may have removed some.
        """
        self.flush()
        seen: set[bytes] = set()
        for node in sorted(self.outside):
            for kind, identifier in below(self.objects, NodeId(node), seen):
                if kind == CHUNK:
                    with self.store.read() as reader:
                        if not reader.has(Db.CHUNKS, identifier):
                            raise MissingObjectError("chunk", identifier)

    def remember(self, identifier: bytes, facts: _Facts) -> None:
        self.facts[identifier] = facts
        self.facts.move_to_end(identifier)
        if len(self.facts) > FACTS:
            self.facts.popitem(last=False)

    def check_depth(self, identifier: SnapshotId, snapshot: Snapshot) -> None:
        """Raises CorruptObjectError for a tree of more than DEEPEST directories in each other.

        A directory cannot be deeper than it has entries, so few are opened.
        """
        stack = [(snapshot.root, DEEPEST)]
        while stack:
            directory, room = stack.pop()
            node = directory_id(directory)
            if self.fits.get(node, DEEPEST + 1) <= room:
                continue
            if room < 0:
                raise CorruptObjectError("snapshot", identifier, "the tree is too deep")
            self.fits[node] = room
            pages = [node]
            while pages:
                found = self.objects.node(pages.pop())
                if isinstance(found, IndexNode):
                    pages += [NodeId(page.node) for page in found.pages]
                elif isinstance(found, DirectoryNode):
                    stack += [
                        (entry, room - 1)
                        for entry in found.entries
                        if entry.totals is not None and entry.totals.entries >= room
                    ]


def _facts_alone(node: DirectoryNode | ListNode) -> _Facts:
    if isinstance(node, ListNode):
        return _Facts(node.refs[0].level + 1, sum(ref.length for ref in node.refs), None, None)
    size, totals = sums(node.entries)
    if not node.entries:
        return _Facts(0, size, totals, 0)
    first, last = node.entries[0].name, node.entries[-1].name
    return _Facts(0, size, totals, len(node.entries), first, last)


def _unknown(above: bytes, kind: str, identifier: bytes) -> CorruptObjectError:
    return CorruptObjectError(
        "node", above, f"the {kind} {identifier.hex()} that it names is not there before it"
    )
