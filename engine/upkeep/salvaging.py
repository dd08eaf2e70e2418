"""Salvage: a store whose file LMDB cannot be trusted with, examined, and made anew from its pages.

LMDB would end the process at some damage, so nothing here hands it the damaged file. What the
pages still hold goes to a new file, which takes the old one's place by a rename:

1. The leases `gc`, then `store` held alone: no other process has the file open.
2. The new file is written in `db/new`, and is durable.
3. The old file gets a second name, `db/damaged/data.mdb`.
4. The new file takes its first name.

Killed before step 4, the damaged file is still in its place, and the next repair begins anew.
Objects that are not what their id promises are left out: `verify` names them then, and a second
store or a directory can give them.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing

import msgspec

from engine.errors import CorruptObjectError
from engine.host.leases import acquire
from engine.ids import ID_BYTES
from engine.progress import Progress
from engine.sessions.sessions import decode_record, may_be_uid
from engine.storage.lmdb_store import FORMAT, LmdbStore
from engine.storage.page_store import PageStore
from engine.storage.store import Db, NewerFormatError, Store, Writer
from engine.storage.structure import check
from engine.upkeep.repairing import DATABASES, check_object, right_key
from engine.upkeep.verifying import Damage, VerifyReport, verify

STORE_WAIT = 5.0
"""Seconds that a salvage waits for other processes to close the store."""
_LOOKS = 4
_BATCH_BYTES = 4 << 20
_OBJECTS = tuple(DATABASES.values())
_NAMED = (Db.REFS, Db.SESSIONS, Db.EPISODES, Db.META)
"""Databases whose values no id vouches for, and that nothing else in the store has."""
_MADE_ANEW = {*_OBJECTS, Db.IMPORTS}
"""What nobody need be told of here: `verify` names objects, and a cache fills again."""

Pair = tuple[Db, bytes, bytes]


class Salvage(msgspec.Struct):
    """What was wrong, what could not be read, and where the damaged file is now.

    `lost` counts entries by database after what `taken` counts came from the other store; `older`
    counts those that are as they were one transaction before, maybe removed since. `uppers` are
    the directories of sessions whose records are lost.
    """

    flaws: list[str]
    kept: str
    lost: dict[str, int] = {}
    taken: dict[str, int] = {}
    older: dict[str, int] = {}
    uppers: list[str] = []


def examine(path: str) -> list[str]:
    """Returns what is wrong with the frame of a store's file, without opening the store.

    Others may write meanwhile: it is looked at again until it held still. While it never does, it
    is in use, and `Store.flaws` can tell. Raises OSError, FileNotFoundError if there is no store.
    """
    fd = os.open(os.path.join(path, "db", "data.mdb"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not os.fstat(fd).st_size:
            return []
        for _ in range(_LOOKS):
            found = check(fd)
            if not found.flaws:
                return []
            again = check(fd)
            if again == found:
                return [str(flaw) for flaw in found.flaws]
        return []
    finally:
        os.close(fd)


def verify_pages(path: str, flaws: list[str], progress: Progress | None = None) -> VerifyReport:
    """Checks all objects of a store that `examine` found flaws in, as far as pages can be read.

    Raises OSError.
    """
    with closing(PageStore(path)) as store:
        report = verify(store, progress)
        lost = [
            Damage("", b"", f"{count} or more entries of {db.value!r} cannot be read", "page")
            for db, count in store.lost.items()
        ]
    frame = [Damage("", b"", f"in the store's file: {flaw}", "page") for flaw in flaws]
    report.damage = [*frame, *lost, *report.damage]
    return report


def salvage(path: str, flaws: list[str], other: str | None) -> Salvage:
    """Makes the store's file anew from what its pages hold. `other` is a store, for names.

    Raises LeaseHeldError while another process has the store open, StoreFullError, OSError, and
    what opening `other` raises.
    """
    what = "repairing"
    home = os.path.join(path, "db", "new")
    damaged = os.path.join(path, "db", "damaged")
    report = Salvage(flaws, os.path.join(damaged, "data.mdb"))
    with acquire(path, "gc", what=what), acquire(path, "store", wait=STORE_WAIT, what=what):
        shutil.rmtree(home, ignore_errors=True)
        try:
            with closing(PageStore(path)) as old, closing(LmdbStore(home, create=True)) as new:
                _check_format(old)
                _fill(new, _pairs(old))
                report.lost = _lost(old)
                report.older = {
                    db.value: n for db, n in old.older_entries.items() if n and db in _NAMED
                }
                lost = [db for db in _NAMED if db.value in report.lost]
                if other is not None and lost:
                    _take_names(new, other, lost, report)
                report.uppers = _keep_uppers(path, new, damaged) if Db.SESSIONS in lost else []
            os.makedirs(damaged, mode=0o700, exist_ok=True)
            data = os.path.join(path, "db", "data.mdb")
            if os.path.lexists(report.kept):
                os.unlink(report.kept)
            os.link(data, report.kept)
            os.rename(os.path.join(home, "db", "data.mdb"), data)
            for directory in (damaged, os.path.dirname(data)):
                _sync(directory)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    return report


def _check_format(old: PageStore) -> None:
    """Raises NewerFormatError for a file that may hold what this program does not know of."""
    with old.read() as reader:
        raw = reader.get(Db.META, b"format")
    found = bytes(raw) if raw is not None else b""
    if found.isdigit() and int(found) > FORMAT:
        raise NewerFormatError(old.path, int(found), FORMAT)


def _lost(old: PageStore) -> dict[str, int]:
    lost = {db.value: count for db, count in old.lost.items() if db not in _MADE_ANEW}
    with old.read() as reader:
        if Db.META in old.lost and not reader.has(Db.META, b"format"):
            lost[Db.META.value] -= 1  # the new file has it
    return {name: count for name, count in lost.items() if count}


def _fill(store: Store, pairs: Iterator[Pair]) -> None:
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[2])
        if size > _BATCH_BYTES:
            _put(store, batch)
            batch, size = [], 0
    _put(store, batch)


def _put(store: Store, pairs: list[Pair]) -> None:
    def change(writer: Writer) -> None:
        for db, key, value in pairs:
            writer.put(db, key, value)

    store.write(change)


def _pairs(old: PageStore) -> Iterator[Pair]:
    """Yields what the damaged file holds, without objects that are not what their ids promise."""
    for db in Db:
        with old.read() as reader:
            for key, raw in reader.items(db):
                if db in _OBJECTS:
                    yield from _object(db, key, raw)
                elif db is not Db.META or key != b"format" or bytes(raw).isdigit():
                    yield db, key, bytes(raw)
    if any(db in old.lost for db in _OBJECTS):
        for key, value in old.orphans():
            yield from _anywhere(old, key, value)


def _object(db: Db, key: bytes, raw: memoryview) -> Iterator[Pair]:
    """Yields an object under its id; under the right one if its key was damaged."""
    try:
        check_object(db, key, raw)
    except CorruptObjectError:
        own = right_key(db, key, raw)
        if own is None:
            return
        key = own
    yield db, key, bytes(raw)


def _anywhere(old: PageStore, key: bytes, value: bytes) -> Iterator[Pair]:
    """Yields an object that some leaf of the file holds, if no tree led to it."""
    for db in _OBJECTS:
        with old.read() as reader:
            if not reader.has(db, key) and _fits(db, key, memoryview(value)):
                yield db, key, value
                return


def _fits(db: Db, key: bytes, raw: memoryview) -> bool:
    if len(key) != ID_BYTES:
        return False
    try:
        check_object(db, key, raw)
    except CorruptObjectError:
        return False
    return True


def _take_names(new: LmdbStore, other: str, lost: list[Db], report: Salvage) -> None:
    """Takes what the other store, which the caller trusts, has of names that cannot be read."""
    with closing(LmdbStore(os.path.abspath(other), trusted=True)) as store:
        for db in lost:
            with store.read() as theirs, new.read() as ours:
                pairs = [
                    (db, key, bytes(raw)) for key, raw in theirs.items(db) if not ours.has(db, key)
                ]
            if pairs:
                _put(new, pairs)
                report.taken[db.value] = len(pairs)
                left = report.lost[db.value] - len(pairs)
                report.lost[db.value] = max(0, left)
    report.lost = {name: count for name, count in report.lost.items() if count}


def _keep_uppers(path: str, new: Store, damaged: str) -> list[str]:
    """Moves what sessions without a record wrote to where no collection removes it."""
    with new.read() as reader:
        records = list(reader.items(Db.SESSIONS))
        known = set()
        for key, raw in records:
            try:
                known.add(decode_record(key, raw).uid)
            except CorruptObjectError:
                return []  # nothing is removed while a record is damaged
    sessions = os.path.join(path, "sessions")
    moved = []
    for uid in sorted(set(os.listdir(sessions)) - known):
        if not may_be_uid(uid):
            continue
        os.makedirs(os.path.join(damaged, "sessions"), mode=0o700, exist_ok=True)
        target = os.path.join(damaged, "sessions", uid)
        if not os.path.lexists(target):
            os.rename(os.path.join(sessions, uid), target)
            moved.append(target)
    return moved


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
