"""Line differences between two texts, fast on large ones.

Patience diff (Bram Cohen): lines that occur once on both sides, in the longest order that both
share, hold the texts together; what lies between them is cut again. What has no such line is
compared by Myers' algorithm in linear space ("An O(ND) Difference Algorithm and Its Variations",
Algorithmica 1986), which finds the fewest changed lines; where that would take too long, as in
noise, it goes on from the farthest point it has reached, and at last replaces as a whole.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

Edit = tuple[int, int, int, int]
"""Lines from, to of the old text that lines from, to of the new one replace."""

_FARTHEST = 256
"""Changed lines, on each side, that Myers' algorithm goes through before it takes what it has."""
_MOST_STEPS = 3_000_000
"""What one comparison may cost in all: some two seconds."""


def lines_of(data: bytes) -> list[bytes]:
    """Returns the lines of a text with their ends; only a newline ends one, as in git."""
    lines = data.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


def edits(old: Sequence[bytes], new: Sequence[bytes]) -> list[Edit]:
    """Returns what to replace in `old` to get `new`, in order, touching ones joined."""
    numbers: dict[bytes, int] = {}
    one = [numbers.setdefault(line, len(numbers)) for line in old]
    other = [numbers.setdefault(line, len(numbers)) for line in new]
    return _compacted(one, other, _Comparison(one, other).edits())


class _Comparison:
    """Two texts as numbers of their lines, and what of the permitted steps is left."""

    def __init__(self, old: list[int], new: list[int]) -> None:
        self.old, self.new = old, new
        self.steps = _MOST_STEPS

    def edits(self) -> list[Edit]:
        old, new = self.old, self.new
        found: list[Edit] = []
        todo = [(0, len(old), 0, len(new), True)]
        while todo:
            a, a_end, b, b_end, with_anchors = todo.pop()
            while a < a_end and b < b_end and old[a] == new[b]:
                a, b = a + 1, b + 1
            while a < a_end and b < b_end and old[a_end - 1] == new[b_end - 1]:
                a_end, b_end = a_end - 1, b_end - 1
            if a == a_end or b == b_end:
                _append(found, a, a_end, b, b_end)
                continue
            anchors = _anchors(old, new, a, a_end, b, b_end) if with_anchors else []
            if anchors:
                parts = []
                for at_old, at_new in anchors:
                    parts.append((a, at_old, b, at_new, True))
                    a, b = at_old + 1, at_new + 1
                parts.append((a, a_end, b, b_end, True))
                todo += reversed(parts)
                continue
            split = self._middle(a, a_end, b, b_end)
            if split is None:
                _append(found, a, a_end, b, b_end)
            else:
                x, y = split
                todo += [(x, a_end, y, b_end, False), (a, x, b, y, False)]
        return found

    def _middle(self, a: int, a_end: int, b: int, b_end: int) -> tuple[int, int] | None:
        """Returns a point that a shortest way from (a, b) to (a_end, b_end) goes through.

        Both ends of the way differ in their lines. None: replace all of it.
        """
        old, new = self.old, self.new
        n, m = a_end - a, b_end - b
        if n == 1 or m == 1:
            return self._single(a, a_end, b, b_end)
        delta = n - m
        odd = delta % 2
        size = 2 * min((n + m + 1) // 2, _FARTHEST) + 3
        forward, backward = [0] * size, [0] * size
        # forward[k] is how far along `old` diagonal k = x - y is reached; backward likewise
        # from the end. A negative k counts from the list's end.
        for d in range(min((n + m + 1) // 2, _FARTHEST) + 1):
            self.steps -= 2 * d + 2
            if self.steps < 0:
                return None
            for k in range(-d, d + 1, 2):
                down = k == -d or (k != d and forward[k - 1] < forward[k + 1])
                x = forward[k + 1] if down else forward[k - 1] + 1
                y = x - k
                if y < 0 or x > n:
                    forward[k] = x
                    continue
                while x < n and y < m and old[a + x] == new[b + y]:
                    x, y = x + 1, y + 1
                forward[k] = x
                if odd and abs(delta - k) < d and x + backward[delta - k] >= n and y <= m:
                    return a + x, b + y
            for k in range(-d, d + 1, 2):
                down = k == -d or (k != d and backward[k - 1] < backward[k + 1])
                x = backward[k + 1] if down else backward[k - 1] + 1
                y = x - k
                if y < 0 or x > n:
                    backward[k] = x
                    continue
                while x < n and y < m and old[a_end - 1 - x] == new[b_end - 1 - y]:
                    x, y = x + 1, y + 1
                backward[k] = x
                if not odd and abs(delta - k) <= d and x + forward[delta - k] >= n and y <= m:
                    return a_end - x, b_end - y
        return self._farthest(forward, a, n, b, m)

    def _single(self, a: int, a_end: int, b: int, b_end: int) -> tuple[int, int] | None:
        """Answers `_middle` where one side is a single line: the other has it, or not."""
        if a_end - a == 1:
            for at in range(b, b_end):
                if self.new[at] == self.old[a]:
                    return a, at
        else:
            for at in range(a, a_end):
                if self.old[at] == self.new[b]:
                    return at, b
        return None

    def _farthest(
        self, forward: list[int], a: int, n: int, b: int, m: int
    ) -> tuple[int, int] | None:
        best = (0, 0, 0)
        for k in range(-_FARTHEST, _FARTHEST + 1):
            x = forward[k]
            y = x - k
            if 0 <= y <= m and x <= n:
                best = max(best, (x + y, x, y))
        _, x, y = best
        return (a + x, b + y) if 0 < x + y < n + m else None


class _Side:
    """One text of a comparison: its lines, and which of them have no partner in the other."""

    def __init__(self, lines: list[int], changed: list[tuple[int, int]]) -> None:
        self.lines = lines
        self.flags = bytearray(len(lines) + 1)  # the last is never set: runs end before it
        for start, end in changed:
            self.flags[start:end] = b"\1" * (end - start)

    def run_end(self, at: int) -> int:
        """Returns where the run of changed lines that may begin at `at` ends."""
        end = self.flags.find(0, at)
        return len(self.lines) if end < 0 else end

    def run_start(self, at: int) -> int:
        """Returns where the run of changed lines that ends before `at` begins."""
        return self.flags.rfind(0, 0, at) + 1

    def skip(self, at: int, unchanged: int) -> int:
        """Returns the line after so many unchanged lines from `at` on, which begins a run."""
        while unchanged:
            at = self.run_end(at)
            run = self.flags.find(1, at)
            step = unchanged if run < 0 else min(unchanged, run - at)
            at += step
            unchanged -= step
        return at


def _compacted(old: list[int], new: list[int], found: list[Edit]) -> list[Edit]:
    """Moves each run of changed lines down as far as it goes, or to one of the other side.

    Where equal lines follow each other, many edits say the same: this picks one of them, the
    one that git picks too.
    """
    one = _Side(old, [(a, a_end) for a, a_end, _, _ in found])
    other = _Side(new, [(b, b_end) for _, _, b, b_end in found])
    _move_runs(one, other)
    _move_runs(other, one)
    result: list[Edit] = []
    a = b = 0
    while True:
        run, other_run = one.flags.find(1, a), other.flags.find(1, b)
        steps = [at - start for at, start in ((run, a), (other_run, b)) if at >= 0]
        if not steps:
            return result
        a, b = a + min(steps), b + min(steps)
        a_end, b_end = one.run_end(a), other.run_end(b)
        result.append((a, a_end, b, b_end))
        a, b = a_end, b_end


def _move_runs(side: _Side, other: _Side) -> None:
    flags, lines = side.flags, side.lines
    start = end = facing = 0  # `facing` begins the run of the other side that faces ours
    while (run := flags.find(1, end)) >= 0:
        facing = other.skip(facing, run - end)
        start, end = run, side.run_end(run)
        while True:
            length = end - start
            while start and lines[start - 1] == lines[end - 1]:
                start, end = start - 1, end - 1
                flags[start], flags[end] = 1, 0
                start = side.run_start(start)
                facing = other.run_start(facing - 1)
            earliest, matching = end, -1
            if other.flags[facing]:
                matching = end
            while end < len(lines) and lines[start] == lines[end]:
                flags[start], flags[end] = 0, 1
                start, end = start + 1, side.run_end(end + 1)
                facing = other.run_end(facing) + 1
                if other.flags[facing]:
                    matching = end
            if length == end - start:
                break
        if end != earliest and matching >= 0:
            while not other.flags[facing]:
                start, end = start - 1, end - 1
                flags[start], flags[end] = 1, 0
                facing = other.run_start(facing - 1)


def _append(found: list[Edit], a: int, a_end: int, b: int, b_end: int) -> None:
    if found and found[-1][1] == a and found[-1][3] == b:
        found[-1] = (found[-1][0], a_end, found[-1][2], b_end)
    elif a < a_end or b < b_end:
        found.append((a, a_end, b, b_end))


def _anchors(
    old: list[int], new: list[int], a: int, a_end: int, b: int, b_end: int
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
