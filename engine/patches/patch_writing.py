"""Writing patches: changes between trees in git's format, which `git apply` and `patch` read.

Binary files are in it as git writes them with `--binary`. What the format cannot say (times,
attributes, fifos, permissions of directories, empty directories, files beyond LARGEST_BINARY)
`is_lost` tells. Modes are written with all their bits; git itself keeps of them whether a file
can be executed.
"""

import hashlib
import stat
from collections.abc import Iterator

from engine.host.hostfs import TYPE_BITS
from engine.merging.textdiff import edits, hunks, lines_of
from engine.patches.binary_patch import hunk_lines
from engine.patches.quoting import quoted
from engine.storage import content
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import Change, ChangeKind
from engine.trees.directory import walk
from engine.trees.similarity import read_text

LARGEST_BINARY = 512 << 20
"""A larger file that is no text is not in a patch."""

_CONTEXT = 3
_WINDOW = 1 << 20
_NO_BLOB = b"0" * 40


def is_lost(change: Change) -> bool:
    """Tells whether a patch leaves a change out, or a part of it."""
    entries = [entry for entry in (change.old, change.new) if entry is not None]
    kinds = {entry.kind for entry in entries}
    if Kind.FIFO in kinds:
        return True
    if change.new is not None and change.new.owner != (change.old and change.old.owner):
        return True
    if change.kind == ChangeKind.RENAMED and Kind.DIRECTORY in kinds:
        return False
    if change.kind == ChangeKind.METADATA and change.old and change.new:
        return Kind.DIRECTORY in kinds or change.old.mode == change.new.mode
    if kinds == {Kind.DIRECTORY}:
        return all(entry.totals is None or entry.totals.entries == 0 for entry in entries)
    return any(entry.kind == Kind.FILE and entry.size > LARGEST_BINARY for entry in entries)


def patch_lines(objects: Objects, change: Change) -> Iterator[bytes]:
    """Yields the lines of a patch for one change, without their ends.

    A renamed directory gives a rename for each file in it. Reads the files that changed: texts
    as a whole, others in parts.
    """
    if change.kind == ChangeKind.TYPE:
        yield from _file(objects, change.path, change.path, change.old, None)
        yield from _file(objects, change.path, change.path, None, change.new)
        return
    old_path = change.path if change.old_path is None else change.old_path
    renamed = change.new if change.old_path is not None else None
    if renamed is not None and renamed.kind == Kind.DIRECTORY:
        for path, entry in walk(objects, renamed):
            below = (old_path + b"/" + path, change.path + b"/" + path)
            if _fits(entry):
                yield from _header(*below, entry, entry)
                yield from _moved(*below, ChangeKind.RENAMED, 1.0)
        return
    yield from _file(
        objects, old_path, change.path, change.old, change.new, change.kind, change.similarity
    )


def _fits(entry: Entry | None) -> bool:
    return entry is not None and entry.kind in {Kind.FILE, Kind.SYMLINK}


def _file(
    objects: Objects,
    old_path: bytes,
    path: bytes,
    old: Entry | None,
    new: Entry | None,
    kind: ChangeKind = ChangeKind.MODIFIED,
    similarity: float | None = None,
) -> Iterator[bytes]:
    """Yields what turns one file or link into another; nothing if there is none."""
    old, new = (entry if _fits(entry) else None for entry in (old, new))
    if old is None and new is None:
        return
    same_content = old is not None and new is not None and old.content == new.content
    same_mode = old is not None and new is not None and old.mode == new.mode
    if same_content and same_mode and similarity is None:
        return
    yield from _header(old_path, path, old, new)
    if similarity is not None:
        yield from _moved(old_path, path, kind, similarity)
    if same_content:
        return
    a = quoted(b"a/" + old_path) if old else b"/dev/null"
    b = quoted(b"b/" + path) if new else b"/dev/null"
    before = read_text(objects, old)
    after = read_text(objects, new) if before is not None else None
    if before is not None and after is not None:
        yield from _text(a, b, before, after)
    elif max(entry.size for entry in (old, new) if entry is not None) > LARGEST_BINARY:
        yield b"Binary files " + a + b" and " + b + b" differ"
    else:
        yield b"index %s..%s" % (_blob(objects, old), _blob(objects, new))
        yield b"GIT binary patch"
        yield from hunk_lines(objects, old, new)
        yield from hunk_lines(objects, new, old)


def _header(old_path: bytes, path: bytes, old: Entry | None, new: Entry | None) -> Iterator[bytes]:
    # git leaves spaces unquoted here, and then does not find some names itself, nor does `patch`.
    a, b = (quoted(name, spaces=False) for name in (b"a/" + old_path, b"b/" + path))
    yield b"diff --git " + a + b" " + b
    if old is None and new is not None:
        yield b"new file mode %06o" % _mode(new)
    elif new is None and old is not None:
        yield b"deleted file mode %06o" % _mode(old)
    elif old is not None and new is not None and old.mode != new.mode:
        yield b"old mode %06o" % _mode(old)
        yield b"new mode %06o" % _mode(new)


def _moved(old_path: bytes, path: bytes, kind: ChangeKind, similarity: float) -> Iterator[bytes]:
    verb = b"copy" if kind == ChangeKind.COPIED else b"rename"
    yield b"similarity index %d%%" % int(similarity * 100)
    yield verb + b" from " + quoted(old_path)
    yield verb + b" to " + quoted(path)


def _text(a: bytes, b: bytes, before: bytes, after: bytes) -> Iterator[bytes]:
    old, new = lines_of(before), lines_of(after)
    changed = edits(old, new)
    if changed:
        # A name with spaces ends in a tab there, as git writes it for `patch`.
        yield b"--- " + a + b"\t" * (b" " in a and not a.startswith(b'"'))
        yield b"+++ " + b + b"\t" * (b" " in b and not b.startswith(b'"'))
        yield from hunks(old, new, changed, _CONTEXT)


def _blob(objects: Objects, entry: Entry | None) -> bytes:
    """Returns the id that git gives a file's content, which binary patches must name."""
    if entry is None:
        return _NO_BLOB
    blob = hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
        blob.update(entry.content)
    else:
        for at in range(0, entry.size, _WINDOW):
            blob.update(content.read(objects, entry, at, _WINDOW))
    return blob.hexdigest().encode()


def _mode(entry: Entry) -> int:
    if entry.kind == Kind.SYMLINK:
        return stat.S_IFLNK
    return TYPE_BITS[Kind(entry.kind)] | entry.mode
