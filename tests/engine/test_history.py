"""The graph of snapshots against counting everything, and against git."""

import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Repository, SnapshotId
from engine.errors import CorruptObjectError, MissingObjectError
from engine.storage.snapshots import decode_snapshot, encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from tests.engine.graphs import Git, Shape, ancestors, bases, history, name, number, shapes


@given(shapes(), st.data())
@settings(max_examples=400, deadline=None)
def test_merge_bases_are_the_best_common_ancestors_whatever_the_clocks_say(shape, data):
    last = len(shape) - 1
    times = data.draw(st.lists(st.integers(0, 6), min_size=last + 1, max_size=last + 1))
    one, other = data.draw(st.tuples(st.integers(0, last), st.integers(0, last)))
    asked = history(shape, times)
    found = [number(each) for each in asked.merge_bases(name(one), name(other))]
    assert set(found) == bases(shape, one, other)
    assert len(set(found)) == len(found)
    assert [times[n] for n in found] == sorted((times[n] for n in found), reverse=True)
    assert asked.is_ancestor(name(one), name(other)) == (one in ancestors(shape)[other])
    assert not asked.missing
    base = asked.merge_base(name(one), name(other))
    assert base == (name(found[0]) if found else None)


@given(shapes(), st.data())
@settings(max_examples=200, deadline=None)
def test_removed_snapshots_end_the_history_and_are_told(shape, data):
    last = len(shape) - 1
    missing = data.draw(st.sets(st.integers(0, last)))
    one, other = data.draw(st.tuples(st.integers(0, last), st.integers(0, last)))
    asked = history(shape, None, missing)
    found = {number(each) for each in asked.merge_bases(name(one), name(other))}
    assert found == bases(shape, one, other, missing)
    asked = history(shape, None, missing)
    seen = {number(each) for each in asked.ancestors(name(last))}
    assert seen == ancestors(shape, missing)[last]
    expected = {parent for n in seen for parent in shape[n]} & missing
    assert set(map(number, asked.missing)) == expected | ({last} & missing)


@given(shapes(), st.data())
@settings(max_examples=200, deadline=None)
def test_each_ancestor_comes_once_and_before_its_parents(shape, data):
    last = len(shape) - 1
    times = data.draw(st.lists(st.integers(0, 6), min_size=last + 1, max_size=last + 1))
    starts = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=4))
    order = [number(each) for each in history(shape, times).ancestors(*map(name, starts))]
    assert sorted(order) == sorted(set().union(*(ancestors(shape)[n] for n in starts)))
    for at, n in enumerate(order):
        assert not set(shape[n]) & set(order[:at])
    latest = [number(each) for each in history(shape, times).latest_first(name(last))]
    assert sorted(latest) == sorted(ancestors(shape)[last])


@given(shapes())
@settings(max_examples=100, deadline=None)
def test_only_first_parents_make_a_line(shape):
    order = [
        number(each) for each in history(shape).ancestors(name(len(shape) - 1), first_only=True)
    ]
    expected = [len(shape) - 1]
    while shape[expected[-1]]:
        expected.append(shape[expected[-1]][0])
    assert order == expected


CROSSED: Shape = [(), (0,), (0,), (1, 2), (2, 1), (3,), (4,)]


def test_a_criss_cross_has_two_bases():
    assert {number(each) for each in history(CROSSED).merge_bases(name(5), name(6))} == {1, 2}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@given(shapes(most=14), st.data())
@settings(max_examples=12, deadline=None)
def test_git_agrees(tmp_path_factory: pytest.TempPathFactory, shape, data):
    count = len(shape)
    times = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    git = Git(tmp_path_factory.mktemp("git") / "repository", shape, times)
    asked = history(shape, times)
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=6)
    )
    marks = [
        line.split() for line in git("for-each-ref", "--format=%(objectname) %(refname:short)")
    ]
    numbers = {identifier: int(ref[1:]) for identifier, ref in marks}
    for one, other in [(0, count - 1), *pairs]:
        theirs = {numbers[line] for line in git("merge-base", "--all", f"c{one}", f"c{other}")}
        assert {number(each) for each in asked.merge_bases(name(one), name(other))} == theirs


# In a store.


def grow(repository: Repository, shape: Shape, start: SnapshotId) -> list[SnapshotId]:
    """Stores a graph of snapshots of one tree, all of them on `start`."""
    root = repository.snapshot(start).root

    def change(writer: Writer) -> list[SnapshotId]:
        made: list[SnapshotId] = []
        for n, above in enumerate(shape):
            parents = tuple(made[parent] for parent in above) or (start,)
            identifier, record = encode_snapshot(make_snapshot(root, parents, str(n), {"n": [n]}))
            writer.put(Db.SNAPSHOTS, identifier, record)
            made.append(identifier)
        return made

    return repository.store.write(change)


@pytest.fixture
def start(repository: Repository, tmp_path: Path) -> SnapshotId:
    (tmp_path / "tree").mkdir()
    return SnapshotId(repository.import_directory(str(tmp_path / "tree")).snapshot)


def test_a_snapshot_may_have_any_number_of_parents(repository: Repository, start: SnapshotId):
    count = 300
    *above, last = grow(repository, [*[()] * count, tuple(range(count))], start)
    assert repository.snapshot(last).parents == tuple(above)
    history = repository.history()
    assert list(history.ancestors(last))[-1] == start
    assert history.merge_base(last, above[7]) == above[7]


def test_metadata_may_be_nested_as_deeply_as_it_can_be_read(
    repository: Repository, start: SnapshotId
):
    root = repository.snapshot(start).root
    deep: object = "x"
    for _ in range(389):
        deep = [deep]
    identifier, record = encode_snapshot(make_snapshot(root, (), "", {"deep": deep}))
    assert decode_snapshot(identifier, record).metadata == {"deep": deep}
    with pytest.raises(ValueError, match="nested"):
        make_snapshot(root, (), "", {"deep": [deep]})


def test_a_removed_parent_is_told_and_the_rest_is_read(repository: Repository, start: SnapshotId):
    a, b, c = grow(repository, [(), (0,), (1,)], start)
    repository.remove_snapshot(b)
    history = repository.history()
    assert list(history.ancestors(c)) == [c]
    assert history.missing == {b}
    assert [each for each, _ in repository.log(c)] == [c]
    assert repository.history().merge_bases(a, c) == []
    with pytest.raises(MissingObjectError):
        repository.log(b)


def test_a_damaged_record_is_named(repository: Repository, start: SnapshotId):
    a, _, c = grow(repository, [(), (0,), (1,)], start)

    def change(writer: Writer) -> None:
        raw = writer.get(Db.SNAPSHOTS, a)
        assert raw is not None
        writer.put(Db.SNAPSHOTS, a, bytes(raw)[:-1] + b"\xff")

    repository.store.write(change)
    with pytest.raises(CorruptObjectError, match=a.hex()):
        list(repository.history().ancestors(c))


def test_a_long_history_costs_its_length_and_a_near_base_nothing(
    repository: Repository, start: SnapshotId
):
    count = 10_000
    line = grow(repository, [(n - 1,) if n else () for n in range(count)], start)
    asked: list[SnapshotId] = []
    history = repository.history()
    read = history._links
    history._links = lambda identifier: (asked.append(identifier), read(identifier))[1]
    assert history.merge_base(line[-1], line[-4]) == line[-4]
    assert len(set(asked)) < 10
    began = time.process_time()
    assert repository.history().merge_bases(line[-1], line[0]) == [line[0]]
    assert time.process_time() - began < 2  # 0.05 s
    assert next(repository.graph_log(repository.history(), line[-1]))[0] == line[-1]
    assert sum(1 for _ in repository.graph_log(repository.history(), line[-1])) == count + 1
