"""Sets of ids: millions of them in memory, about 34 bytes each; a set of Python takes 120.

An id is the BLAKE3 of something, so its first two bytes spread ids evenly over 65,536 buckets;
a bucket is the rest of its ids one after the other, searched by the C library. Exact: whole ids
are compared. Not safe to use from several threads while one adds.
"""

from collections.abc import Iterable

from engine.ids import ID_BYTES

_REST = ID_BYTES - 2


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


def _find(bucket: bytearray, rest: bytes) -> bool:
    at = bucket.find(rest)
    while at > 0 and at % _REST:  # across two ids
        at = bucket.find(rest, at + 1)
    return at >= 0
