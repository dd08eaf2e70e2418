"""The names in a store, for somebody who is still typing one.

Looks into a store without opening it for use: see `lmdb_store.look`. What is found is what may be
typed: a name that no command would have made is left out, because it goes to a shell.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError, InvalidNameError
from engine.ids import SnapshotId, check_name
from engine.storage.lmdb_store import look
from engine.storage.snapshots import Snapshot, decode_snapshot
from engine.storage.store import Db, Reader


class Names:
    """One view of a store's names."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def refs(self) -> list[tuple[str, SnapshotId]]:
        """Returns all refs and what they name, by name."""
        return [
            (name, SnapshotId(bytes(raw)))
            for key, raw in self._reader.items(Db.REFS)
            if (name := _name(key))
        ]

    def sessions(self) -> list[str]:
        """Returns all sessions by name."""
        return [name for key in self._reader.keys(Db.SESSIONS) if (name := _name(key))]

    def episodes(self) -> list[str]:
        """Returns all episodes by name; costs nothing per step."""
        found = []
        begin = b"\x01"  # behind the held snapshots
        while (key := next(self._reader.keys(Db.EPISODES, begin), None)) is not None:
            raw = key.partition(b"\0")[0]
            if name := _name(raw):
                found.append(name)
            begin = raw + b"\x01"
        return found

    def snapshots(self, digits: str, most: int) -> list[SnapshotId]:
        """Returns the first `most` snapshots whose ids begin with these hexadecimal digits."""
        found: list[SnapshotId] = []
        start = bytes.fromhex(digits + "0" * (len(digits) % 2))
        for key in self._reader.keys(Db.SNAPSHOTS, start):
            if len(found) == most or not key.hex().startswith(digits):
                break
            found.append(SnapshotId(key))
        return found

    def record(self, identifier: SnapshotId) -> Snapshot | None:
        """Returns a snapshot's record; None if it is not there or damaged."""
        raw = self._reader.get(Db.SNAPSHOTS, identifier)
        try:
            return None if raw is None else decode_snapshot(identifier, raw)
        except EngineError:
            return None


@contextmanager
def look_up(path: str, *, trusted: bool = False) -> Iterator[Names]:
    """Gives the names in the store at `path`. Raises what `lmdb_store.look` raises."""
    with look(path, trusted=trusted) as reader:
        yield Names(reader)


def _name(key: bytes) -> str:
    """Returns a name, or nothing if it is none that a command makes."""
    try:
        return check_name("name", key.decode("ascii"))
    except (InvalidNameError, UnicodeDecodeError):
        return ""
