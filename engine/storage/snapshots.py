"""Snapshot records: an immutable root with its history.

A record is one canonical CBOR array stored under the BLAKE3 of its bytes:

    [1, root, [parent id, ...], time, message, metadata]

`root` is an entry (see nodes) of kind directory with an empty name, so the root's own mode,
mtime and attributes are kept; `time` is in ns since 1970; `metadata` is a map from text to any
JSON value, keys in canonical order (shorter first, then by bytes). Decoding is strict.
"""

import math
import time
from typing import Any, NamedTuple

import cbor2
import msgspec

from engine.errors import CorruptObjectError
from engine.ids import ID_BYTES, SnapshotId, digest
from engine.storage.nodes import Entry, Kind, check_entry, encode

DEEPEST_JSON = 390
"""Lists and objects inside each other; cbor2 reads records that are 400 deep."""

_VERSION = 1


class Links(NamedTuple):
    """What a record says of its place in history: its parents' ids and its time (ns)."""

    parents: tuple[SnapshotId, ...]
    time_ns: int


class Snapshot(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A tree at one moment, with its parents, time (ns), message and metadata."""

    version: int
    root: Entry
    parents: tuple[bytes, ...]
    time_ns: int
    message: str
    metadata: dict[str, Any]


def make_snapshot(
    root: Entry,
    parents: tuple[SnapshotId, ...] = (),
    message: str = "",
    metadata: dict[str, Any] | None = None,
    *,
    time_ns: int | None = None,
) -> Snapshot:
    """Makes a record, of the present time unless another is given.

    The root keeps everything but its name. Raises ValueError for metadata that is no JSON.
    """
    check_json(metadata or {}, "metadata")
    return Snapshot(
        _VERSION,
        msgspec.structs.replace(root, name=b""),
        parents,
        time.time_ns() if time_ns is None else time_ns,
        plain_json(message),
        plain_json(metadata or {}),
    )


def plain_json(value: Any) -> Any:
    """Returns a value whose text CBOR can carry: what comes from paths need not be UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {plain_json(key): plain_json(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(below) for below in value]
    return value


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises ValueError for what JSON cannot say or is nested too deeply; names the place."""
    if isinstance(value, dict | list | tuple) and depth == DEEPEST_JSON:
        raise ValueError(f"{where[:60]}… is nested more than {DEEPEST_JSON} deep")
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, which is no text")
            check_json(below, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for at, below in enumerate(value):
            check_json(below, f"{where}[{at}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON lacks")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where} is of the type {type(value).__name__}, which JSON lacks")


def encode_snapshot(snapshot: Snapshot) -> tuple[SnapshotId, bytes]:
    """Returns the id and the canonical bytes of a record."""
    data = encode(snapshot)
    return SnapshotId(digest(data)), data


def decode_snapshot(identifier: SnapshotId, data: bytes | memoryview) -> Snapshot:
    """Returns the record, checked against its id and every rule; CorruptObjectError otherwise."""
    data = bytes(data)
    if digest(data) != identifier:
        raise CorruptObjectError("snapshot", identifier, "its bytes do not match its id")
    try:
        snapshot = msgspec.convert(cbor2.loads(data), Snapshot)
        if encode(snapshot) != data or snapshot.version != _VERSION:
            raise ValueError("its encoding is not canonical, or of another version")
        root = snapshot.root
        if root.name or root.kind != Kind.DIRECTORY:
            raise ValueError("its root is not a directory")
        check_entry(root)
        if any(len(parent) != ID_BYTES for parent in snapshot.parents):
            raise ValueError("a parent without an id")
        check_json(snapshot.metadata, "metadata")
    except (ValueError, TypeError, RecursionError, OverflowError, cbor2.CBORError) as error:
        raise CorruptObjectError("snapshot", identifier, str(error)) from error
    return snapshot


def decode_links(identifier: SnapshotId, data: bytes | memoryview) -> Links:
    """Returns parents and time of a record, checked against its id alone.

    For walks through a long history: a third of what `decode_snapshot` takes, because bytes that
    match their id are those that were encoded. Raises CorruptObjectError.
    """
    data = bytes(data)
    if digest(data) != identifier:
        raise CorruptObjectError("snapshot", identifier, "its bytes do not match its id")
    try:
        _, _, parents, time_ns, _, _ = cbor2.loads(data)
        return Links(tuple(map(SnapshotId, parents)), int(time_ns))
    except (ValueError, TypeError, RecursionError, cbor2.CBORError) as error:
        raise CorruptObjectError("snapshot", identifier, str(error)) from error
