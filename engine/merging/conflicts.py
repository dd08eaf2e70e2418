"""Conflicts of merges: data, with the entries of all three sides, and how JSON has them."""

from enum import Enum
from typing import Any

import msgspec

from engine.storage.nodes import Entry, Kind, encode
from engine.trees.insight import named


class ConflictKind(Enum):
    """Why something does not merge."""

    CONTENT = "content"
    ADD_ADD = "add/add"
    MODIFY_DELETE = "modify/delete"
    TYPE = "type"
    MODE = "mode"
    OWNER = "owner"
    XATTRS = "xattrs"
    RENAME_RENAME = "rename/rename"
    RENAME_DELETE = "rename/delete"


class Conflict(msgspec.Struct, frozen=True):
    """What does not merge at a path: the entries of the base and of both sides, None where none.

    `paths` are where these three are. `regions` counts the conflicts between lines.
    """

    path: bytes
    kind: ConflictKind
    base: Entry | None
    ours: Entry | None
    theirs: Entry | None
    paths: tuple[bytes, bytes, bytes]
    regions: int = 0


def conflict_fields(conflict: Conflict) -> dict[str, Any]:
    """Returns a conflict as JSON has it, in a snapshot's metadata and elsewhere.

    `entry` of a side is the canonical encoding of its entry in hexadecimal.
    """
    sides = zip(
        ("base", "ours", "theirs"),
        (conflict.base, conflict.ours, conflict.theirs),
        conflict.paths,
        strict=True,
    )
    return {
        **named("path", conflict.path),
        "kind": conflict.kind.value,
        "regions": conflict.regions,
        **{side: _side_fields(entry, path) for side, entry, path in sides},
    }


def _side_fields(entry: Entry | None, path: bytes) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        **named("path", path),
        "type": Kind(entry.kind).name.lower(),
        "mode": f"{entry.mode:04o}",
        "owner": entry.owner,
        "size": entry.size,
        "entry": encode(entry).hex(),
    }
