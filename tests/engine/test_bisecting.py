"""The first bad snapshot, found by bisection and by testing everything."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.episodes.bisecting import BisectRefusedError, Verdict, bisect
from tests.engine.graphs import Shape, ancestors, history, name, number, shapes


def run(shape: Shape, good: int, bad: int, verdicts: dict[int, Verdict], **options):
    asked: list[int] = []

    def test(candidate):
        asked.append(number(candidate))
        return verdicts[asked[-1]]

    result = bisect(history(shape), name(good), name(bad), test, **options)
    assert [number(each) for each, _ in result.tested] == asked
    assert len(set(asked)) == len(asked)
    return result, asked


@given(shapes(least=2, most=16), st.data())
@settings(max_examples=400, deadline=None)
def test_it_finds_what_testing_everything_finds(shape, data):
    above = ancestors(shape)
    last = len(shape) - 1
    broken = data.draw(st.sets(st.integers(1, last), min_size=1, max_size=2))
    skipped = data.draw(st.sets(st.integers(0, last), max_size=5))
    is_bad = [bool(above[n] & broken) for n in range(last + 1)]
    good = data.draw(st.sampled_from([n for n in range(last + 1) if not is_bad[n]]))
    bad = data.draw(st.sampled_from([n for n in range(last + 1) if is_bad[n]]))
    verdicts = {
        n: Verdict.SKIP if n in skipped else Verdict.BAD if is_bad[n] else Verdict.GOOD
        for n in range(last + 1)
    }
    first = {n for n in above[bad] if is_bad[n] and not any(is_bad[p] for p in shape[n])}
    result, asked = run(shape, good, bad, verdicts)
    assert set(asked) <= above[bad]
    if result.first_bad is not None:
        assert number(result.first_bad) in first
        assert result.candidates == (result.first_bad,)
    else:
        # Of what is left, only the last is known: all others cannot be tested.
        left = {number(each) for each in result.candidates}
        assert left & first
        assert len(left - skipped) <= 1
        assert len(left) > 1
    if not skipped:
        assert result.first_bad is not None


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_a_line_takes_its_logarithm(length, data):
    shape: Shape = [(), *((n,) for n in range(length))]
    broken = data.draw(st.integers(1, length))
    verdicts = {n: Verdict.BAD if n >= broken else Verdict.GOOD for n in range(length + 1)}
    result, asked = run(shape, 0, length, verdicts)
    assert result.first_bad == name(broken)
    assert len(asked) <= math.ceil(math.log2(length)) + 1


def test_a_long_history_of_merges_is_weighed_quickly():
    shape: Shape = [(), (0,), (0,)]
    while len(shape) < 6000:
        last = len(shape) - 1
        shape.append((last, last - 2))
    verdicts = {n: Verdict.BAD if n >= 4321 else Verdict.GOOD for n in range(len(shape))}
    result, asked = run(shape, 0, len(shape) - 1, verdicts)
    assert result.first_bad == name(4321)
    assert len(asked) <= 14


def test_many_skips_in_a_row_are_left_behind():
    length = 1000
    shape: Shape = [(), *((n,) for n in range(length))]
    verdicts = {n: Verdict.BAD if n >= 900 else Verdict.GOOD for n in range(length + 1)}
    verdicts.update(dict.fromkeys(range(450, 551), Verdict.SKIP))
    result, asked = run(shape, 0, length, verdicts)
    assert result.first_bad == name(900)
    assert sum(verdicts[n] is Verdict.SKIP for n in asked) < 10


def test_what_was_merged_is_left_out_with_first_parents_only():
    shape: Shape = [(), (0,), (1,), (0,), (3,), (2, 4), (5,)]
    verdicts = {n: Verdict.BAD if n in {3, 4, 5, 6} else Verdict.GOOD for n in range(7)}
    assert run(shape, 0, 6, verdicts)[0].first_bad == name(3)
    result, asked = run(shape, 0, 6, verdicts, first_parent=True)
    assert result.first_bad == name(5)
    assert not {3, 4} & set(asked)


def test_where_good_and_bad_parted_is_tested_first():
    shape: Shape = [(), (0,), (1,), (1,), (3,)]
    verdicts = dict.fromkeys(range(5), Verdict.GOOD)
    result, asked = run(shape, 2, 4, verdicts)
    assert asked[0] == 1
    assert result.first_bad == name(4)
    with pytest.raises(BisectRefusedError, match="repaired"):
        run(shape, 2, 4, {**verdicts, 1: Verdict.BAD})


def test_wrong_ends_are_refused():
    shape: Shape = [(), (0,), (1,)]
    with pytest.raises(BisectRefusedError, match="wrong way round"):
        run(shape, 2, 0, {})
    with pytest.raises(BisectRefusedError, match="the same"):
        run(shape, 1, 1, {})
    with pytest.raises(BisectRefusedError, match="not in the store"):
        run(shape, 1, 9, {})


def test_a_removed_snapshot_is_told():
    shape: Shape = [(), (0,), (1,), (2,), (3,)]
    asked = history(shape, missing={2})
    result = bisect(asked, name(0), name(4), lambda _: Verdict.BAD)
    assert result.first_bad == name(3)
    assert result.missing == (name(2),)
