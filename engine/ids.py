"""Identifiers: what names an object of the store, and how people write one.

An id is the 32-byte BLAKE3 of what it names. On the command line and in paths it is 64
lower-case hexadecimal digits, or any unique prefix of at least four. Knows nothing of stores;
any module may call it.
"""

import re
from typing import NewType

from blake3 import blake3

from engine.errors import InvalidNameError

ChunkId = NewType("ChunkId", bytes)
"""BLAKE3 of a chunk's plain bytes."""
NodeId = NewType("NodeId", bytes)
"""BLAKE3 of a node's canonical encoding."""
SnapshotId = NewType("SnapshotId", bytes)
"""BLAKE3 of a snapshot record's canonical encoding."""
InodeNo = NewType("InodeNo", int)
"""A number that the kernel knows an inode by; 1 is the root of a mount."""

ID_BYTES = 32
SHORTEST_PREFIX = 4

_FULL = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(rf"[0-9a-f]{{{SHORTEST_PREFIX},64}}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def digest(data: bytes | memoryview) -> bytes:
    """Returns the 32-byte BLAKE3 of `data`."""
    return blake3(data).digest()


def is_full_id(text: str) -> bool:
    """Tells whether `text` is a complete id in hexadecimal."""
    return _FULL.fullmatch(text) is not None


def is_id_prefix(text: str) -> bool:
    """Tells whether `text` could be the beginning of an id."""
    return _PREFIX.fullmatch(text) is not None


def short(identifier: bytes) -> str:
    """Returns the first 12 hexadecimal digits of an id, for people to read."""
    return identifier.hex()[:12]


def check_name(kind: str, name: str) -> str:
    """Returns `name` if it may name a ref or a session.

    Letters, digits and `_.+-`, not starting with a dot, at most 200, and not what could be
    taken for an id. Raises InvalidNameError.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidNameError(kind, name, "use letters, digits and _ . + -, at most 200")
    if is_full_id(name):
        raise InvalidNameError(kind, name, "64 hexadecimal digits would be taken for an id")
    return name
