"""Which snapshot a commit of git is, and the other way round: rows of the database `imports`.

    `git<` + commit id      [root node, snapshot id, whether history below was left out]
    `git>` + snapshot id    [root node, commit id, false]

as MessagePack after four zero bytes, so that a row goes when its node goes (see `collecting`).
Losing them costs time only: the same commit gives the same snapshot again.
"""

from typing import NamedTuple

import msgspec

from engine.ids import SnapshotId
from engine.plain.stat_cache import put_rows
from engine.storage.nodes import Entry
from engine.storage.store import Db, Reader, Writer
from engine.trees.directory import directory_id

_COMMIT, _SNAPSHOT = b"git<", b"git>"
_NO_ROWS = bytes(4)


class _Row(msgspec.Struct, array_like=True):
    node: bytes
    other: bytes
    cut: bool


class KnownCommit(NamedTuple):
    """The snapshot of a commit; `cut` if not all of its history was imported."""

    snapshot: SnapshotId
    cut: bool


def snapshot_of(reader: Reader, commit: bytes) -> KnownCommit | None:
    """Returns the snapshot that a commit is, if it is still there."""
    row = _get(reader, _COMMIT + commit)
    if row is None or not reader.has(Db.SNAPSHOTS, row.other):
        return None
    return KnownCommit(SnapshotId(row.other), row.cut)


def commit_of(reader: Reader, snapshot: SnapshotId) -> bytes | None:
    """Returns the commit that a snapshot was written to."""
    row = _get(reader, _SNAPSHOT + snapshot)
    return None if row is None else row.other


def _get(reader: Reader, key: bytes) -> _Row | None:
    raw = reader.get(Db.IMPORTS, key)
    if raw is None:
        return None
    try:
        return msgspec.msgpack.decode(raw[4:], type=_Row)
    except msgspec.DecodeError:
        return None


def imported(commit: bytes, snapshot: SnapshotId, root: Entry, cut: bool) -> tuple[bytes, bytes]:
    """Returns the row that says which snapshot a commit has become."""
    return _COMMIT + commit, _encode(root, snapshot, cut)


def exported(commit: bytes, snapshot: SnapshotId, root: Entry) -> tuple[bytes, bytes]:
    """Returns the row that says which commit a snapshot has become."""
    return _SNAPSHOT + snapshot, _encode(root, commit, False)


def _encode(root: Entry, other: bytes, cut: bool) -> bytes:
    return _NO_ROWS + msgspec.msgpack.encode(_Row(directory_id(root), other, cut))


def put(writer: Writer, rows: list[tuple[bytes, bytes]]) -> None:
    """Stores rows."""
    put_rows(writer, rows)


def is_link(key: bytes) -> bool:
    """Tells whether a key of the database `imports` is one of these."""
    return key.startswith((_COMMIT, _SNAPSHOT))
