"""InsightDiff: what differs between two trees with its sizes, lines and bytes, for reviewers.

Made of a diff with renames. Bytes are counted by chunk ids, without reading a chunk; lines are
counted by comparing the texts, where asked for. `as_json` gives what docs/reference/
insight-diff.md describes.
"""

import base64
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import msgspec

from engine.merging.textdiff import edits, lines_of
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import Change, ChangeKind, diff
from engine.trees.renames import diff_with_renames
from engine.trees.similarity import LARGEST_TEXT, looks_binary, read_text, shared_bytes

MOST_ENTRIES = 4_000_000
"""An insight of more entries than this is refused unless the caller allows it."""

FORMAT = 1
"""The version of the JSON; grows when what a field says changes."""


class InsightEntry(msgspec.Struct, frozen=True):
    """One path that differs.

    `type` is that of what is there now, or of what was removed. Sizes are in bytes, of a
    directory the sum of its files; 0 where there is nothing. `bytes_shared` lie in chunks that
    both sides have, `bytes_changed` are the larger size less these. Lines are None for binary
    files, for texts that are too large to compare, and where they were not asked for;
    `is_binary` is None where nobody looked. `metadata` names the attributes that differ: mode,
    owner, mtime, xattrs, link.
    """

    path: bytes
    kind: ChangeKind
    type: str
    old_type: str | None
    old_path: bytes | None
    similarity: float | None
    old_size: int
    new_size: int
    old_mode: int | None
    new_mode: int | None
    metadata: tuple[str, ...]
    entries: int
    """How many entries are in a renamed directory, which stands for them."""
    bytes_shared: int
    bytes_changed: int
    lines_added: int | None
    lines_removed: int | None
    is_binary: bool | None


class Counts(msgspec.Struct):
    """How much differs among some files. `files` counts no directories."""

    files: int = 0
    lines_added: int = 0
    lines_removed: int = 0
    bytes_changed: int = 0


class Summary(msgspec.Struct):
    """How much differs in all, by kind of change, directory at the top, and name's extension."""

    all: Counts
    kinds: dict[ChangeKind, int]
    directories: dict[bytes, Counts]
    extensions: dict[bytes, Counts]


class InsightDiff(msgspec.Struct):
    """What differs. `renames_limited`: too many files to look for all renames among them."""

    entries: list[InsightEntry]
    summary: Summary
    renames_limited: bool


class LineCounts(msgspec.Struct, frozen=True):
    """Lines that a change adds and removes, None where lines mean nothing; is it binary.

    Nobody looked whether it is (None) if the content is the same on both sides.
    """

    added: int | None
    removed: int | None
    is_binary: bool | None


class InsightOptions(TypedDict, total=False):
    """What `insight` takes besides the trees."""

    renames: bool
    copies: bool
    lines: bool
    limit: int | None


def insight(
    objects: Objects,
    old_root: Entry,
    new_root: Entry,
    *,
    renames: bool = True,
    copies: bool = False,
    lines: bool = True,
    limit: int | None = MOST_ENTRIES,
) -> InsightDiff:
    """Returns what differs between two trees.

    Reads files only to count `lines`, and to compare removed files with added ones. Raises
    DiffTooLargeError beyond `limit` entries, and what reading nodes and chunks raises.
    """
    limited = False
    changes: Iterable[Change]
    if renames or copies:
        renamed = diff_with_renames(objects, old_root, new_root, copies=copies, limit=limit)
        changes, limited = renamed.changes, renamed.limited
    else:
        changes = diff(objects, old_root, new_root, limit=limit)
    entries = list(insight_entries(objects, changes, lines=lines))
    return InsightDiff(entries, summarize(entries), limited)


def insight_entries(
    objects: Objects, changes: Iterable[Change], *, lines: bool = True
) -> Iterator[InsightEntry]:
    """Yields an entry for each change, as they come."""
    for change in changes:
        yield _entry(objects, change, lines)


def _entry(objects: Objects, change: Change, lines: bool) -> InsightEntry:
    old, new = change.old, change.new
    present = new or old
    assert present is not None
    shared = 0
    if old is not None and new is not None and old.kind == new.kind == Kind.FILE:
        shared = shared_bytes(objects, old, new)
    elif old is not None and new is not None and old.content == new.content:
        shared = new.size
    sizes = [_size(change, entry) for entry in (old, new)]
    counts = count_lines(objects, change) if lines else None
    below = change.kind == ChangeKind.RENAMED and new is not None and new.totals is not None
    return InsightEntry(
        path=change.path,
        kind=change.kind,
        type=_type(present),
        old_type=_type(old) if change.kind == ChangeKind.TYPE and old is not None else None,
        old_path=change.old_path,
        similarity=change.similarity,
        old_size=sizes[0],
        new_size=sizes[1],
        old_mode=None if old is None else old.mode,
        new_mode=None if new is None else new.mode,
        metadata=changed_attributes(old, new),
        entries=new.totals.entries if below and new is not None and new.totals is not None else 0,
        bytes_shared=shared,
        bytes_changed=max(sizes) - min(shared, *sizes),
        lines_added=counts.added if counts is not None else None,
        lines_removed=counts.removed if counts is not None else None,
        is_binary=counts.is_binary if counts is not None else None,
    )


def _type(entry: Entry) -> str:
    return Kind(entry.kind).name.lower()


def _size(change: Change, entry: Entry | None) -> int:
    """Returns a side's size; of a directory only where it stands for what is in it."""
    if entry is None or (entry.kind == Kind.DIRECTORY and change.kind != ChangeKind.RENAMED):
        return 0
    return entry.size


def changed_attributes(old: Entry | None, new: Entry | None) -> tuple[str, ...]:
    """Returns which attributes differ between two entries that are both there."""
    if old is None or new is None:
        return ()
    pairs = {
        "mode": (old.mode, new.mode),
        "owner": (old.owner, new.owner),
        "mtime": (old.mtime_ns, new.mtime_ns),
        "xattrs": (old.xattrs, new.xattrs),
        "link": (old.link, new.link),
    }
    return tuple(name for name, (before, after) in pairs.items() if before != after)


def count_lines(objects: Objects, change: Change) -> LineCounts:
    """Returns how many lines a change of a file adds and removes, and whether it is binary."""
    old, new = change.old, change.new
    if old is not None and new is not None and old.content == new.content:
        return LineCounts(0, 0, None)
    if change.kind == ChangeKind.TYPE:
        parts = [_count(objects, old, None), _count(objects, None, new)]
    else:
        parts = [_count(objects, old, new)]
    added = removed = 0
    for part in parts:
        if part.added is None or part.removed is None:
            return part
        added, removed = added + part.added, removed + part.removed
    return LineCounts(added, removed, False)


def _count(objects: Objects, old: Entry | None, new: Entry | None) -> LineCounts:
    before = read_text(objects, old)
    after = read_text(objects, new) if before is not None else None
    if before is None or after is None:
        files = [entry for entry in (old, new) if entry is not None and entry.kind == Kind.FILE]
        return LineCounts(None, None, any(_is_binary(objects, entry) for entry in files))
    if not before or not after:
        return LineCounts(_number(after), _number(before), False)
    added = removed = 0
    for start, end, new_start, new_end in edits(lines_of(before), lines_of(after)):
        removed += end - start
        added += new_end - new_start
    return LineCounts(added, removed, False)


def _number(data: bytes) -> int:
    return data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def _is_binary(objects: Objects, entry: Entry) -> bool:
    """Tells it of a file that has no lines; of one too large to be read, by its beginning."""
    small = entry.size <= LARGEST_TEXT
    return looks_binary(objects, entry) or (small and read_text(objects, entry) is None)


def summarize(entries: Iterable[InsightEntry]) -> Summary:
    """Adds entries up."""
    summary = Summary(Counts(), {}, {}, {})
    for entry in entries:
        summary.kinds[entry.kind] = summary.kinds.get(entry.kind, 0) + 1
        if entry.type == "directory" and entry.old_type is None:
            continue
        top, _, below = entry.path.partition(b"/")
        name = entry.path.rpartition(b"/")[2]
        groups = [
            summary.all,
            summary.directories.setdefault(top if below else b"", Counts()),
            summary.extensions.setdefault(os.path.splitext(name)[1], Counts()),
        ]
        for counts in groups:
            counts.files += 1
            counts.lines_added += entry.lines_added or 0
            counts.lines_removed += entry.lines_removed or 0
            counts.bytes_changed += entry.bytes_changed
    return summary


def as_json(result: InsightDiff) -> dict[str, Any]:
    """Returns an InsightDiff as JSON has it."""
    summary = result.summary
    return {
        "format": FORMAT,
        "entries": [entry_as_json(entry) for entry in result.entries],
        "summary": {
            **msgspec.to_builtins(summary.all),
            "kinds": {kind.value: number for kind, number in sorted_kinds(summary.kinds)},
            "directories": _counted("path", summary.directories),
            "extensions": _counted("extension", summary.extensions),
        },
        "renames_limited": result.renames_limited,
    }


def sorted_kinds(kinds: dict[ChangeKind, int]) -> list[tuple[ChangeKind, int]]:
    """Returns the kinds of change with their numbers, always in one order."""
    return [(kind, kinds[kind]) for kind in ChangeKind if kind in kinds]


def _counted(label: str, groups: dict[bytes, Counts]) -> list[dict[str, Any]]:
    return [
        {**named(label, name), **msgspec.to_builtins(counts)}
        for name, counts in sorted(groups.items())
    ]


def entry_as_json(entry: InsightEntry) -> dict[str, Any]:
    """Returns an entry as JSON has it: modes in octal, names as `named` gives them."""
    fields: dict[str, Any] = {**named("path", entry.path), "kind": entry.kind.value}
    fields["old_path"] = None
    if entry.old_path is not None:
        fields.update(named("old_path", entry.old_path))
    skipped = {"path", "kind", "old_path"}
    for name in entry.__struct_fields__:
        if name not in skipped:
            fields[name] = getattr(entry, name)
    for side in ("old_mode", "new_mode"):
        mode = fields[side]
        fields[side] = None if mode is None else f"{mode:04o}"
    fields["metadata"] = list(entry.metadata)
    return fields


def named(label: str, name: bytes) -> dict[str, str]:
    """Returns a name for JSON: as text, and in base64 as `LABEL_bytes` if it is not UTF-8."""
    try:
        return {label: name.decode()}
    except UnicodeDecodeError:
        return {
            label: name.decode("utf-8", "backslashreplace"),
            f"{label}_bytes": base64.b64encode(name).decode(),
        }
