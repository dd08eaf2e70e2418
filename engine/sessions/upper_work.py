"""What was done to a session since a moment, as its upper and its base tell it.

For judging what a command costs: it counts, it does not compare. What came and went again
leaves no trace.
"""

import os
import stat

import msgspec

from engine.sessions.upper import Upper
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import ChangeKind, diff
from engine.trees.directory import Directory, directory_id


class UpperWork(msgspec.Struct):
    """Entries that are new, files of the base that were changed, names of it that are gone."""

    made: int = 0
    rewritten: int = 0
    removed: int = 0
    written: int = 0
    """Bytes in both."""


def work_since(objects: Objects, upper: Upper, base: Entry, since_ns: int) -> UpperWork:
    """Counts what has changed in an upper since `since_ns`. Somebody may be writing it.

    Raises OSError.
    """
    work = UpperWork()
    _count(objects, upper, b"", base, since_ns, work)
    return work


def _count(
    objects: Objects, upper: Upper, path: bytes, base: Entry | None, since_ns: int, work: UpperWork
) -> None:
    below_base = None if base is None else Directory(objects, directory_id(base))
    for name, status in upper.scan(path):
        below = path + b"/" + name if path else name
        entry = None if below_base is None else below_base.get(name)
        if status is None:
            work.removed += _is_new(os.lstat(upper.at(below)), since_ns)
            continue
        if stat.S_ISDIR(status.st_mode):
            if entry is not None and (entry.kind != Kind.DIRECTORY or upper.is_opaque(below)):
                entry = None
            _count(objects, upper, below, entry, since_ns, work)
        if not _is_new(status, since_ns) or (entry is not None and stat.S_ISDIR(status.st_mode)):
            continue
        if entry is None:
            work.made += 1
        else:
            work.rewritten += 1
        if stat.S_ISREG(status.st_mode):
            work.written += status.st_size


def _is_new(status: os.stat_result, since_ns: int) -> bool:
    return status.st_ctime_ns >= since_ns


def work_between(objects: Objects, old: Entry, new: Entry) -> UpperWork:
    """Counts likewise what differs between two trees."""
    work = UpperWork()
    for change in diff(objects, old, new):
        if change.kind == ChangeKind.REMOVED:
            work.removed += 1
            continue
        if change.kind == ChangeKind.ADDED:
            work.made += 1
        else:
            work.rewritten += 1
        if change.new is not None and change.new.kind == Kind.FILE:
            work.written += change.new.size
    return work
