"""Three-way merge of texts, line by line (diff3).

What only one side changed is taken; where both changed the same or touching lines of the base,
equal results are taken and all else is a conflict, which is cut down to the lines that differ.
Exchanging the sides exchanges what conflicts show and nothing else. (Khanna, Kunal, Pierce, "A
Formal Investigation of Diff3", 2007; conflicts are cut down as `git merge-file` does.)
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from engine.merging.textdiff import Edit, edits


class Favor(Enum):
    """Whose lines a conflict is settled with."""

    OURS = "ours"
    THEIRS = "theirs"
    UNION = "union"


class Style(Enum):
    """What a conflict shows: both sides, or the base's lines as well."""

    MERGE = "merge"
    DIFF3 = "diff3"


Sides = tuple[list[bytes], list[bytes], list[bytes]]
"""Lines of the base, of ours, of theirs."""


class Region(NamedTuple):
    """Consecutive lines of the result, or a conflict."""

    lines: list[bytes]
    conflict: Sides | None = None


class TextMerge(NamedTuple):
    """A merged text, and how many conflicts are marked in it."""

    lines: list[bytes]
    conflicts: int


_MARK = 7
"""How often the character of a conflict's mark is repeated."""


def merge_text(
    base: list[bytes],
    ours: list[bytes],
    theirs: list[bytes],
    *,
    favor: Favor | None = None,
    style: Style = Style.MERGE,
    names: tuple[bytes, bytes, bytes] = (b"base", b"ours", b"theirs"),
) -> TextMerge:
    """Merges lines with their ends. Conflicts are marked with `names`, or settled by `favor`."""
    merged: list[bytes] = []
    conflicts = 0
    for region in regions(base, ours, theirs):
        if region.conflict is None:
            merged += region.lines
            continue
        if favor in {Favor.OURS, Favor.THEIRS}:
            merged += region.conflict[1 if favor == Favor.OURS else 2]
            continue
        whole = style == Style.DIFF3 and favor is None
        for part in [region] if whole else _cut_down(region.conflict):
            if part.conflict is None:
                merged += part.lines
            elif favor == Favor.UNION:
                merged += _ended(part.conflict[1]) + part.conflict[2]
            else:
                conflicts += 1
                merged += _marked(part.conflict, style, names)
    return TextMerge(merged, conflicts)


def regions(base: list[bytes], ours: list[bytes], theirs: list[bytes]) -> Iterator[Region]:
    """Yields the whole result in regions; conflicts are not cut down."""
    at = 0
    for left, right in _groups(edits(base, ours), edits(base, theirs)):
        start = min(edit[0] for edit in left + right)
        end = max(edit[1] for edit in left + right)
        if start > at:
            yield Region(base[at:start])
        one = _changed(base, ours, left, start, end)
        other = _changed(base, theirs, right, start, end)
        if not right or one == other:
            yield Region(one)
        elif not left:
            yield Region(other)
        else:
            yield Region([], (base[start:end], one, other))
        at = end
    if at < len(base):
        yield Region(base[at:])


def _groups(ours: list[Edit], theirs: list[Edit]) -> Iterator[tuple[list[Edit], list[Edit]]]:
    """Yields edits of both sides that overlap or touch each other, together."""
    todo = sorted([(edit, 0) for edit in ours] + [(edit, 1) for edit in theirs])
    group: tuple[list[Edit], list[Edit]] = ([], [])
    end = -1
    for edit, side in todo:
        if edit[0] > end and (group[0] or group[1]):
            yield group
            group = ([], [])
        group[side].append(edit)
        end = max(end, edit[1])
    if group[0] or group[1]:
        yield group


def _changed(
    base: list[bytes], new: list[bytes], changes: list[Edit], start: int, end: int
) -> list[bytes]:
    """Returns what lines `start` to `end` of the base are after one side's edits."""
    if not changes:
        return base[start:end]
    first, last = changes[0], changes[-1]
    return new[first[2] - (first[0] - start) : last[3] + (end - last[1])]


def _cut_down(conflict: Sides) -> Iterator[Region]:
    """Yields a conflict again as the lines that both sides have, and conflicts of the others."""
    _, one, other = conflict
    at = 0
    for start, end, other_start, other_end in edits(one, other):
        if start > at:
            yield Region(one[at:start])
        yield Region([], ([], one[start:end], other[other_start:other_end]))
        at = end
    if at < len(one):
        yield Region(one[at:])


def _marked(conflict: Sides, style: Style, names: tuple[bytes, bytes, bytes]) -> list[bytes]:
    base, one, other = conflict
    returns = all(line.endswith(b"\r\n") for line in one + other if line.endswith(b"\n"))
    end = b"\r\n" if returns and one + other and b"\r\n" in (one + other)[0] else b"\n"
    marked = [b"<" * _MARK + b" " + names[1] + end, *_ended(one, end)]
    if style == Style.DIFF3:
        marked += [b"|" * _MARK + b" " + names[0] + end, *_ended(base, end)]
    return [*marked, b"=" * _MARK + end, *_ended(other, end), b">" * _MARK + b" " + names[2] + end]


def _ended(lines: list[bytes], end: bytes = b"\n") -> list[bytes]:
    """Returns lines of which the last has its end too, so that others can follow."""
    return lines if not lines or lines[-1].endswith(b"\n") else [*lines[:-1], lines[-1] + end]
