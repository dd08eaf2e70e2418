import random
import time

from hypothesis import given
from hypothesis import strategies as st

from engine.merging.textdiff import edits, hunks

lines = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"}\n", b"\n"]), max_size=40)


def apply(old: list[bytes], new: list[bytes]) -> list[bytes]:
    result: list[bytes] = []
    at = 0
    for start, end, new_start, new_end in edits(old, new):
        assert start >= at
        assert end > start or new_end > new_start
        result += old[at:start]
        assert len(result) == new_start
        result += new[new_start:new_end]
        at = end
    return result + old[at:]


@given(lines, lines)
def test_the_edits_turn_one_text_into_the_other(old, new):
    assert apply(old, new) == new


@given(lines)
def test_equal_texts_have_no_edits(text):
    assert edits(text, list(text)) == []


def test_unique_lines_hold_the_texts_together():
    old = [b"one {\n", b"  x\n", b"}\n", b"\n", b"two {\n", b"  x\n", b"}\n"]
    new = [*old[:4], b"new {\n", b"  x\n", b"}\n", b"\n", *old[4:]]
    assert edits(old, new) == [(4, 4, 4, 8)]


def test_large_texts_are_quick():
    old = [b"line %d\n" % (n % 70_000) for n in range(100_000)]
    new = [line for n, line in enumerate(old) if n % 7]
    started = time.process_time()
    assert apply(old, new) == new
    noise = [b"x%d\n" % (n * n % 97) for n in range(30_000)]
    assert apply(noise, noise[::-1]) == noise[::-1]
    assert time.process_time() - started < 20


def longest_common(old, new):
    row = [0] * (len(new) + 1)
    for line in old:
        above, row = row, [0]
        for at, other in enumerate(new):
            row.append(above[at] + 1 if line == other else max(above[at + 1], row[at]))
    return row[-1]


doubled = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n"]), max_size=8).map(lambda t: t + t)


@given(doubled, doubled)
def test_without_unique_lines_the_fewest_are_changed(old, new):
    """Myers' algorithm alone. (Trimming may leave a line that occurs once: patience then.)"""
    changed = sum(a_end - a + b_end - b for a, a_end, b, b_end in edits(old, new))
    fewest = len(old) + len(new) - 2 * longest_common(old, new)
    assert fewest <= changed <= fewest + 4


def test_texts_of_few_different_lines_are_not_replaced_as_a_whole():
    chance = random.Random(1)
    old = [b"%d\n" % chance.randrange(50) for _ in range(10_000)]
    new = list(old)
    for _ in range(100):
        new[chance.randrange(len(new))] = b"new\n"
    assert sum(a_end - a for a, a_end, _, _ in edits(old, new)) <= 100


def test_of_equal_lines_the_last_are_the_changed_ones():
    assert edits([b"x\n"] * 3, [b"x\n"] * 5) == [(3, 3, 3, 5)]
    assert edits([b"{\n", b"}\n"], [b"{\n", b"}\n", b"{\n", b"}\n"]) == [(2, 2, 2, 4)]


def test_hunks_are_unified():
    old = [b"%d\n" % n for n in range(20)]
    new = [*old[:2], b"two\n", *old[3:17], b"end"]
    assert list(hunks(old, new, edits(old, new), 3)) == [
        b"@@ -1,6 +1,6 @@", b" 0", b" 1", b"-2", b"+two", b" 3", b" 4", b" 5",
        b"@@ -15,6 +15,4 @@", b" 14", b" 15", b" 16", b"-17", b"-18", b"-19",
        b"+end", b"\\ No newline at end of file",
    ]  # fmt: skip
    assert list(hunks([], [b"x\n"], edits([], [b"x\n"]), 3)) == [b"@@ -0,0 +1 @@", b"+x"]
