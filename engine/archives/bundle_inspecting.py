"""Looking into a bundle without a store: what it says of itself, and whether it is sound.

Every object is checked against its id and its format, not against what it names: that may be
in the receiver's store.
"""

from typing import IO

import msgspec

from engine.archives.bundles import (
    CHUNK,
    MOST_SNAPSHOT_BYTES,
    NODE,
    BundleFormatError,
    BundleReader,
    Manifest,
)
from engine.errors import CorruptObjectError
from engine.ids import ChunkId, NodeId, SnapshotId
from engine.progress import Progress, unheard
from engine.storage.codec import unpack
from engine.storage.nodes import decode
from engine.storage.snapshots import Snapshot, decode_snapshot


class Inspection(msgspec.Struct):
    """What a bundle carries: its manifest, its snapshots' records, its length."""

    manifest: Manifest
    snapshots: dict[SnapshotId, Snapshot]
    bytes: int


def inspect_bundle(stream: IO[bytes], progress: Progress | None = None) -> Inspection:
    """Reads a bundle to its end. Raises a BundleFormatError."""
    reader = BundleReader(stream)
    tell = progress or unheard
    snapshots: dict[SnapshotId, Snapshot] = {}
    size = 0
    for record in reader:
        try:
            if record.kind == CHUNK:
                unpack(ChunkId(record.identifier), record.value)
            elif record.kind == NODE:
                decode(NodeId(record.identifier), record.value)
            else:
                size += len(record.value)
                if size > MOST_SNAPSHOT_BYTES:
                    raise BundleFormatError(record.offset, "too many bytes of snapshots")
                identifier = SnapshotId(record.identifier)
                snapshots[identifier] = decode_snapshot(identifier, record.value)
        except CorruptObjectError as error:
            raise BundleFormatError(record.offset, str(error)) from error
        tell(reader.done, reader.total, reader.offset)
    return Inspection(reader.manifest, snapshots, reader.offset)
