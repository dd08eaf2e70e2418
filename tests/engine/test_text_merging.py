"""Merging of texts: its laws, and what `git merge-file` says of the same texts."""

import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.merging.text_merging import Favor, Style, TextMerge, merge_text
from engine.merging.textdiff import lines_of

Lines = list[bytes]
texts = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"}\n", b"\n"]), max_size=25)


@st.composite
def ended(draw: st.DrawFn) -> Lines:
    """A text whose last line may lack its end."""
    lines = draw(texts)
    return [*lines, b"end"] if draw(st.booleans()) else lines


@given(ended(), ended())
def test_what_one_side_changed_is_taken(base, new):
    for merged in (merge_text(base, new, base), merge_text(base, base, new)):
        assert merged == TextMerge(new, 0)
    assert merge_text(base, new, new) == TextMerge(new, 0)


@given(ended(), ended(), ended())
@settings(max_examples=400, derandomize=True, database=None, deadline=None)
def test_exchanging_the_sides_exchanges_the_sides_of_conflicts(base, ours, theirs):
    one, other = merge_text(base, ours, theirs), merge_text(base, theirs, ours)
    if one.conflicts == 0:
        assert other == one
    style = Style.DIFF3  # not cut down: where two sides are equal may be seen in two ways
    one = merge_text(base, ours, theirs, style=style)
    other = merge_text(base, theirs, ours, style=style)
    assert one.conflicts == other.conflicts


@given(ended(), ended(), ended())
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_a_favored_side_settles_everything(base, ours, theirs):
    for favor in Favor:
        assert merge_text(base, ours, theirs, favor=favor).conflicts == 0
    one = merge_text(base, ours, theirs, favor=Favor.OURS)
    assert one == merge_text(base, theirs, ours, favor=Favor.THEIRS)


def changed(lines: Lines, chance: random.Random, vocabulary: Lines) -> Lines:
    lines = list(lines)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(lines) + 1)
        what = chance.randrange(3)
        if what == 0:
            lines.insert(at, chance.choice(vocabulary))
        elif at < len(lines):
            lines[at : at + 1] = [] if what == 1 else [chance.choice(vocabulary)]
    return lines


def git_merges(folder: Path, texts: tuple[Lines, Lines, Lines], *words: str) -> tuple[bytes, bool]:
    names = ["base", "ours", "theirs"]
    for name, lines in zip(names, texts, strict=True):
        (folder / name).write_bytes(b"".join(lines))
    command = ["git", "merge-file", "-p", *words, "-L", "ours", "-L", "base", "-L", "theirs"]
    done = subprocess.run(
        [*command, "ours", "base", "theirs"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode < 128, done.stderr
    return done.stdout, done.returncode == 0


@pytest.mark.parametrize(("lines", "share"), [(300, 1.0), (8, 0.98), (3, 0.96)])
def test_git_merges_alike(tmp_path, lines, share):
    """Always where most lines occur once; where few do, git may see another edit in the same."""
    same = 0
    vocabulary = [b"%d\n" % n for n in range(lines)]
    for seed in range(300):
        chance = random.Random(seed)
        base = [chance.choice(vocabulary) for _ in range(chance.choice([4, 12, 40]))]
        ours, theirs = (changed(base, chance, vocabulary) for _ in range(2))
        git, clean = git_merges(tmp_path, (base, ours, theirs))
        merged = merge_text(base, ours, theirs)
        same += clean == (merged.conflicts == 0) and (not clean or b"".join(merged.lines) == git)
    assert same / 300 >= share


@pytest.mark.parametrize("words", [(), ("--diff3",), ("--ours",), ("--theirs",), ("--union",)])
def test_git_marks_alike(tmp_path, words):
    style = Style.DIFF3 if "--diff3" in words else Style.MERGE
    favor = next((favor for favor in Favor if f"--{favor.value}" in words), None)
    cases = [
        ([b"1\n", b"2\n", b"3\n"], [b"1\n", b"x\n", b"3\n"], [b"1\n", b"y\n", b"3\n"]),
        ([b"1\n", b"2"], [b"1\n", b"x"], [b"1\n", b"y\n", b"z"]),
        ([b"1\r\n", b"2\r\n"], [b"1\r\n", b"x\r\n"], [b"1\r\n", b"y\r\n"]),
        ([], [b"a\n", b"b\n", b"c\n"], [b"a\n", b"x\n", b"y\n", b"z\n", b"w\n", b"c\n"]),
        ([b"1\n", b"2\n"], [], [b"1\n", b"2\n", b"3\n"]),
    ]
    for case in cases:
        merged = merge_text(*case, style=style, favor=favor)
        assert b"".join(merged.lines) == git_merges(tmp_path, case, *words)[0]


def test_touching_changes_conflict():
    base = lines_of(b"1\n2\n3\n4\n")
    apart = merge_text(base, lines_of(b"x\n2\n3\n4\n"), lines_of(b"1\n2\ny\n4\n"))
    assert apart == TextMerge(lines_of(b"x\n2\ny\n4\n"), 0)
    assert merge_text(base, lines_of(b"x\n2\n3\n4\n"), lines_of(b"1\ny\n3\n4\n")).conflicts == 1
