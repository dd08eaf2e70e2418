"""Sets and maps of ids: millions of them in memory, about 34 bytes each; a set of Python takes 120.

An id is the BLAKE3 of something, so its first two bytes spread ids evenly over 65,536 buckets;
a bucket is the rest of its ids one after the other, searched by the C library. Exact: whole ids
are compared. Not safe to use from several threads while one adds.
"""

from collections.abc import Iterable

from engine.ids import ID_BYTES

_REST = ID_BYTES - 2
_RECORD = _REST + 4


class IdSet:
    """A set of 32-byte ids that only grows."""

    __slots__ = ("_buckets", "_count")

    def __init__(self, identifiers: Iterable[bytes] = ()) -> None:
        self._buckets: list[bytearray | None] = [None] * 65_536
        self._count = 0
        for identifier in identifiers:
            self.add(identifier)

    def add(self, identifier: bytes) -> bool:
        """Puts an id in; tells whether it is new. Raises ValueError for what is no id."""
        if len(identifier) != ID_BYTES:
            raise ValueError(f"an id of {len(identifier)} bytes")
        at = identifier[0] << 8 | identifier[1]
        bucket = self._buckets[at]
        rest = identifier[2:]
        if bucket is None:
            self._buckets[at] = bytearray(rest)
        elif _find(bucket, rest):
            return False
        else:
            bucket += rest
        self._count += 1
        return True

    def __contains__(self, identifier: bytes) -> bool:
        if len(identifier) != ID_BYTES:
            return False
        bucket = self._buckets[identifier[0] << 8 | identifier[1]]
        return bucket is not None and _find(bucket, identifier[2:])

    def __len__(self) -> int:
        return self._count


class IdMap:
    """Numbers of 0 to 2**32 - 1 by 32-byte id; 4 bytes more each than a set."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * 65_536

    def get(self, identifier: bytes) -> int | None:
        """Returns the number of an id, or None."""
        bucket = self._buckets[identifier[0] << 8 | identifier[1]]
        if bucket is None:
            return None
        at = _at(bucket, identifier[2:], _RECORD)
        return None if at < 0 else int.from_bytes(bucket[at + _REST : at + _RECORD], "little")

    def set(self, identifier: bytes, number: int) -> None:
        """Gives an id its number."""
        slot = identifier[0] << 8 | identifier[1]
        bucket = self._buckets[slot]
        if bucket is None:
            bucket = self._buckets[slot] = bytearray()
        at = _at(bucket, identifier[2:], _RECORD)
        if at < 0:
            bucket += identifier[2:] + number.to_bytes(4, "little")
        else:
            bucket[at + _REST : at + _RECORD] = number.to_bytes(4, "little")


def _find(bucket: bytearray, rest: bytes) -> bool:
    return _at(bucket, rest, _REST) >= 0


def _at(bucket: bytearray, rest: bytes, width: int) -> int:
    at = bucket.find(rest)
    while at > 0 and at % width:  # across two of them
        at = bucket.find(rest, at + 1)
    return at
