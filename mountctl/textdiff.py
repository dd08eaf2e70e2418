"""Line differences between two texts, fast on large ones.

Patience diff (Bram Cohen): lines that occur once on both sides, in the longest order that both
share, hold the texts together; what lies between them is cut again, and what has no such line
is left to difflib while that is quick, else replaced as a whole.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher

Edit = tuple[int, int, int, int]
"""Lines from, to of the old text that lines from, to of the new one replace."""

_QUICK = 1 << 20
"""Pairs of lines that difflib may have to compare."""


def edits(old: list[bytes], new: list[bytes]) -> list[Edit]:
    """Returns what to replace in `old` to get `new`, in order, touching ones joined."""
    found: list[Edit] = []
    todo = [(0, len(old), 0, len(new))]
    while todo:
        a, a_end, b, b_end = todo.pop()
        while a < a_end and b < b_end and old[a] == new[b]:
            a, b = a + 1, b + 1
        while a < a_end and b < b_end and old[a_end - 1] == new[b_end - 1]:
            a_end, b_end = a_end - 1, b_end - 1
        if a == a_end or b == b_end:
            _append(found, a, a_end, b, b_end)
            continue
        anchors = _anchors(old, new, a, a_end, b, b_end)
        if anchors:
            parts = []
            for at_old, at_new in anchors:
                parts.append((a, at_old, b, at_new))
                a, b = at_old + 1, at_new + 1
            parts.append((a, a_end, b, b_end))
            todo += reversed(parts)
        elif (a_end - a) * (b_end - b) <= _QUICK:
            matcher = SequenceMatcher(None, old[a:a_end], new[b:b_end])
            for tag, i, i_end, j, j_end in matcher.get_opcodes():
                if tag != "equal":
                    _append(found, a + i, a + i_end, b + j, b + j_end)
        else:
            _append(found, a, a_end, b, b_end)
    return found


def _append(found: list[Edit], a: int, a_end: int, b: int, b_end: int) -> None:
    if found and found[-1][1] == a and found[-1][3] == b:
        found[-1] = (found[-1][0], a_end, found[-1][2], b_end)
    elif a < a_end or b < b_end:
        found.append((a, a_end, b, b_end))


def _anchors(
    old: list[bytes], new: list[bytes], a: int, a_end: int, b: int, b_end: int
) -> list[tuple[int, int]]:
    """Returns the pairs of lines that occur once on each side and keep their order."""
    once_old = {line for line, n in Counter(old[a:a_end]).items() if n == 1}
    once_new = {line for line, n in Counter(new[b:b_end]).items() if n == 1}
    both = once_old & once_new
    if not both:
        return []
    place = {new[j]: j for j in range(b, b_end) if new[j] in both}
    pairs = [(i, place[old[i]]) for i in range(a, a_end) if old[i] in both]
    # The longest increasing run of places in the new text: piles as in the game.
    tops: list[int] = []
    ends: list[int] = []
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        pile = bisect_left(tops, j)
        if pile == len(tops):
            tops.append(j)
            ends.append(number)
        else:
            tops[pile], ends[pile] = j, number
        before.append(ends[pile - 1] if pile else -1)
    run = []
    number = ends[-1]
    while number >= 0:
        run.append(pairs[number])
        number = before[number]
    return run[::-1]


def hunks(old: list[bytes], new: list[bytes], changed: list[Edit], context: int) -> Iterator[bytes]:
    """Yields the lines of a unified diff, without their ends, from its first `@@` on."""
    for group in _groups(changed, 2 * context):
        first, last = group[0], group[-1]
        a, b = max(first[0] - context, 0), max(first[2] - context, 0)
        a_end, b_end = min(last[1] + context, len(old)), min(last[3] + context, len(new))
        yield b"@@ -%s +%s @@" % (_range(a, a_end), _range(b, b_end))
        at = a
        for start, end, new_start, new_end in group:
            yield from _lines(b" ", old[at:start])
            yield from _lines(b"-", old[start:end])
            yield from _lines(b"+", new[new_start:new_end])
            at = end
        yield from _lines(b" ", old[at:a_end])


def _groups(changed: list[Edit], gap: int) -> Iterator[list[Edit]]:
    group: list[Edit] = []
    for edit in changed:
        if group and edit[0] - group[-1][1] > gap:
            yield group
            group = []
        group.append(edit)
    if group:
        yield group


def _range(start: int, end: int) -> bytes:
    if end - start == 1:
        return b"%d" % (start + 1)
    return b"%d,%d" % (start + (end > start), end - start)


def _lines(sign: bytes, lines: list[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line.endswith(b"\n"):
            yield sign + line[:-1]
        else:
            yield sign + line
            yield b"\\ No newline at end of file"
