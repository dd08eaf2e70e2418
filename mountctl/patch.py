"""Patches: changes between trees in git's format, which `git apply` and `patch` read.

What that format cannot say (times, attributes, fifos, permissions of directories, empty
directories) is counted, so that the caller can tell.
"""

import stat
from collections.abc import Iterator
from typing import NamedTuple

from engine import content
from engine.diffing import Change, ChangeKind
from engine.hostfs import TYPE_BITS
from engine.nodes import Entry, Kind
from engine.objects import Objects
from mountctl.text import quoted
from mountctl.textdiff import edits, hunks

LARGEST_TEXT = 32 << 20
"""A larger file is not compared line by line."""

_CONTEXT = 3
_SNIFFED = 8000
"""A file with a zero byte among its first 8,000 is binary: git's rule."""


class LineCounts(NamedTuple):
    """How many lines a change adds and removes; both None where lines mean nothing."""

    added: int | None
    removed: int | None


Sides = tuple[Entry | None, Entry | None]


def _sides(change: Change) -> list[Sides]:
    """Returns the (old, new) pairs of files that a patch has for a change."""
    pairs = [(change.old, change.new)]
    if change.kind == ChangeKind.TYPE:
        pairs = [(change.old, None), (None, change.new)]
    return [pair for pair in pairs if any(_fits(entry) for entry in pair)]


def _fits(entry: Entry | None) -> bool:
    return entry is not None and entry.kind in {Kind.FILE, Kind.SYMLINK}


def is_lost(change: Change) -> bool:
    """Tells whether a patch leaves a change out, or a part of it."""
    kinds = {entry.kind for entry in (change.old, change.new) if entry is not None}
    if Kind.FIFO in kinds:
        return True
    if change.kind == ChangeKind.METADATA and change.old and change.new:
        return Kind.DIRECTORY in kinds or change.old.mode == change.new.mode
    entry = change.new or change.old
    if entry is not None and kinds == {Kind.DIRECTORY}:
        return entry.totals is None or entry.totals.entries == 0
    return False


def _text(objects: Objects, entry: Entry | None) -> list[bytes] | None:
    """Returns the lines of a file with their ends, or None for a binary one."""
    if entry is None:
        return []
    if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
        return [entry.content]
    if entry.size > LARGEST_TEXT:
        return None
    if b"\0" in content.read(objects, entry, 0, _SNIFFED):
        return None
    lines = content.read(objects, entry, 0, entry.size).split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]


def count_lines(objects: Objects, change: Change) -> LineCounts:
    """Returns how many lines a change adds and removes."""
    added = removed = 0
    for old, new in _sides(change):
        before, after = _text(objects, old), _text(objects, new)
        if before is None or after is None:
            return LineCounts(None, None)
        for start, end, new_start, new_end in edits(before, after):
            removed += end - start
            added += new_end - new_start
    return LineCounts(added, removed)


def patch_lines(objects: Objects, change: Change) -> Iterator[bytes]:
    """Yields the lines of a patch for one change, without their ends."""
    for old, new in _sides(change):
        if old is None or new is None or old.mode != new.mode or old.content != new.content:
            yield from _patch(objects, change.path, old, new)


def _patch(objects: Objects, path: bytes, old: Entry | None, new: Entry | None) -> Iterator[bytes]:
    a, b = _name(b"a/" + path), _name(b"b/" + path)
    yield b"diff --git " + a + b" " + b
    if old is None and new is not None:
        yield b"new file mode %06o" % _mode(new)
    elif new is None and old is not None:
        yield b"deleted file mode %06o" % _mode(old)
    elif old is not None and new is not None and old.mode != new.mode:
        yield b"old mode %06o" % _mode(old)
        yield b"new mode %06o" % _mode(new)
    before, after = _text(objects, old), _text(objects, new)
    a, b = a if old else b"/dev/null", b if new else b"/dev/null"
    if before is None or after is None:
        if old is None or new is None or old.content != new.content:
            yield b"Binary files " + a + b" and " + b + b" differ"
        return
    changed = edits(before, after)
    if changed:
        # A name with spaces ends in a tab there, as git writes it for `patch`.
        yield b"--- " + a + b"\t" * (b" " in a and not a.startswith(b'"'))
        yield b"+++ " + b + b"\t" * (b" " in b and not b.startswith(b'"'))
        yield from hunks(before, after, changed, _CONTEXT)


def _name(path: bytes) -> bytes:
    return quoted(path).encode("utf-8", "surrogateescape")


def _mode(entry: Entry) -> int:
    if entry.kind == Kind.SYMLINK:
        return stat.S_IFLNK
    return TYPE_BITS[Kind(entry.kind)] | entry.mode
