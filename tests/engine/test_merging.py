"""Merging of trees: its laws, what merging path by path gives, and what it costs."""

from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.merging.merge_moves
import engine.trees.directory
from engine.errors import CorruptObjectError
from engine.merging.conflicts import ConflictKind
from engine.merging.merging import MergeResult, merge
from engine.merging.text_merging import Favor, Style
from engine.storage.nodes import Entry, Kind, Totals
from engine.trees.diffing import DiffTooLargeError
from engine.trees.directory import directory_entry, directory_id, find, walk
from engine.trees.links import number_groups
from engine.trees.renames import pair_files
from scripts.merge_cases import make_case
from scripts.merges_main import differences
from tests.engine.plants import EMPTY_DIRECTORY, Garden, Leaf, Plant, link
from tests.engine.trees import Tree, noise, of_entry

names = st.sampled_from([b"a", b"b", b"c", b"d", b"a-"])
contents = st.sampled_from([b"", b"1\n", b"2\n", b"1\n2\n", b"1\n2\n3\n4\n5\n", b"1\n2\n3\n4\nx\n",
                            b"y\n2\n3\n4\n5\n", b"\0binary", b"\0other"])  # fmt: skip
leaves = st.one_of(
    st.tuples(contents, st.sampled_from([0o644, 0o755]), st.just(Kind.FILE),
              st.integers(1, 3)).map(lambda fields: Leaf(*fields)),
    st.sampled_from([link(b"x"), link(b"y"), EMPTY_DIRECTORY]),
)  # fmt: skip


def rooted(plant: Plant) -> Plant:
    files = set(plant)
    return {
        path: leaf
        for path, leaf in plant.items()
        if not any(other != path and path.startswith(other + b"/") for other in files)
    }


plants = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map(b"/".join), leaves, max_size=8
).map(rooted)


@st.composite
def sides(draw: st.DrawFn) -> tuple[Plant, Plant, Plant]:
    """A tree and two that came from it."""
    base = draw(plants)
    results = [base]
    for _ in range(2):
        changes = draw(st.dictionaries(st.sampled_from([*base, b"new"]), leaves, max_size=3))
        gone = draw(st.sets(st.sampled_from([*base, b"new"]), max_size=2))
        new = {path: leaf for path, leaf in {**base, **changes}.items() if path not in gone}
        results.append(rooted({**new, **draw(plants)} if draw(st.booleans()) else new))
    return results[0], results[1], results[2]


def merged(garden: Garden, *roots: Entry, **options: Any) -> MergeResult:
    garden.save()
    result = merge(garden.objects, garden.nodes, garden.sink.put, *roots, **options)
    garden.save()
    if result.root is not None:
        of_entry(garden.objects, result.root)  # checks sums and counts
    return result


many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@given(sides())
@many
def test_laws(plants):
    garden = Garden()
    base, ours, theirs = map(garden.plant, plants)
    assert merged(garden, base, ours, ours).root == ours
    assert merged(garden, base, base, theirs).root == theirs
    assert merged(garden, base, ours, base).root == ours


@given(sides(), st.booleans(), st.booleans())
@many
def test_exchanging_the_sides_changes_nothing_but_their_order(plants, small_pages, renames):
    with pytest.MonkeyPatch.context() as patch:
        if small_pages:
            patch.setattr(engine.trees.directory, "PAGED_FROM", 2)
            patch.setattr(
                engine.trees.directory, "_ends_page", lambda name, level: name[0] % 2 > level
            )
        garden = Garden()
        base, ours, theirs = map(garden.plant, plants)
        one = merged(garden, base, ours, theirs, renames=renames)
        other = merged(garden, base, theirs, ours, renames=renames)
        assert one.root == other.root
        assert [(c.path, c.kind, c.base, c.ours, c.theirs) for c in one.conflicts] == [
            (c.path, c.kind, c.base, c.theirs, c.ours) for c in other.conflicts
        ]
        for favor, swapped in ((Favor.OURS, Favor.THEIRS), (Favor.THEIRS, Favor.OURS)):
            one = merged(garden, base, ours, theirs, favor=favor, renames=renames)
            other = merged(garden, base, theirs, ours, favor=swapped, renames=renames)
            assert one.conflicts == other.conflicts == []
            assert one.root is not None
            assert other.root is not None
            assert garden.harvest(one.root) == garden.harvest(other.root)


def naive(base: Plant, ours: Plant, theirs: Plant) -> Plant | None:
    """Merges path by path what a path alone decides; None if any is in question."""
    result: Plant = {}
    for path in base.keys() | ours.keys() | theirs.keys():
        before, mine, other = base.get(path), ours.get(path), theirs.get(path)
        if other in {mine, before}:
            found = mine
        elif before == mine:
            found = other
        else:
            return None
        if found is not None:
            result[path] = found
    above = {path[:at] for path in result for at in range(len(path)) if path[at : at + 1] == b"/"}
    files = {path for path, leaf in result.items() if leaf.kind != Kind.DIRECTORY}
    if above & files:
        return None
    return {path: leaf for path, leaf in result.items() if path not in above}


@given(sides())
@many
def test_a_merge_is_what_merging_every_path_gives(plants):
    expected = naive(*plants)
    if expected is None:
        return
    garden = Garden()
    result = merged(garden, *map(garden.plant, plants), renames=False)
    if result.root is None:
        kinds = {conflict.kind for conflict in result.conflicts}
        assert kinds <= {ConflictKind.TYPE, ConflictKind.MODIFY_DELETE}
        return
    found = garden.harvest(result.root)
    # A directory that gets empty is one by itself, or goes with its last file.
    for path in found.keys() ^ expected.keys():
        assert {**found, **expected}[path].kind == Kind.DIRECTORY
    files = {path: leaf for path, leaf in found.items() if leaf.kind != Kind.DIRECTORY}
    assert files == {p: leaf for p, leaf in expected.items() if leaf.kind != Kind.DIRECTORY}


@given(sides())
@many
def test_written_conflicts_keep_all_that_was_there(plants):
    garden = Garden()
    base, ours, theirs = map(garden.plant, plants)
    result = merged(garden, base, ours, theirs, write_conflicts=True)
    assert result.root is not None
    plain = merged(garden, base, ours, theirs)
    assert plain.conflicts == result.conflicts
    assert (plain.root is None) == bool(plain.conflicts)
    for conflict in result.conflicts:
        for side, root in enumerate((base, ours, theirs)):
            entry = (conflict.base, conflict.ours, conflict.theirs)[side]
            assert find(garden.objects, root, conflict.paths[side]) == entry or (
                entry is not None and entry.name != conflict.paths[side].rpartition(b"/")[2]
            )


# One by one.

LINES = b"".join(b"%d\n" % n for n in range(1, 10))


def three(
    base: Plant, ours: Plant, theirs: Plant, **options: Any
) -> tuple[Plant | None, list[tuple[bytes, str]], Garden]:
    garden = Garden()
    result = merged(garden, *map(garden.plant, (base, ours, theirs)), **options)
    conflicts = [(conflict.path, conflict.kind.value) for conflict in result.conflicts]
    return None if result.root is None else garden.harvest(result.root), conflicts, garden


def test_texts_merge_by_lines():
    base = {b"f": Leaf(LINES, mtime_ns=1)}
    ours = {b"f": Leaf(LINES.replace(b"1\n", b"one\n"), mtime_ns=5)}
    theirs = {b"f": Leaf(LINES.replace(b"9\n", b"nine\n"), 0o755, mtime_ns=4)}
    found, conflicts, _ = three(base, ours, theirs)
    assert conflicts == []
    both = LINES.replace(b"1\n", b"one\n").replace(b"9\n", b"nine\n")
    assert found == {b"f": Leaf(both, 0o755, mtime_ns=5)}


def test_conflicts_are_marked():
    base, ours, theirs = (
        {b"f": Leaf(LINES.replace(b"5\n", new))} for new in (b"5\n", b"x\n", b"y\n")
    )
    assert three(base, ours, theirs)[:2] == (None, [(b"f", "content")])
    found, _, _ = three(base, ours, theirs, write_conflicts=True, style=Style.DIFF3,
                        names=(b"old", b"main", b"work"))  # fmt: skip
    marked = b"<<<<<<< main\nx\n||||||| old\n5\n=======\ny\n>>>>>>> work\n"
    assert found == {b"f": Leaf(LINES.replace(b"5\n", marked))}
    union, _, _ = three(base, ours, theirs, favor=Favor.UNION)
    assert union == {b"f": Leaf(LINES.replace(b"5\n", b"x\ny\n"))}


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "kind", "written"),
    [
        ({}, {b"f": Leaf(b"x\n")}, {b"f": Leaf(b"y\n")}, "add/add",
         {b"f": Leaf(b"<<<<<<< ours\nx\n=======\ny\n>>>>>>> theirs\n")}),
        ({b"f": Leaf(b"x")}, {}, {b"f": Leaf(b"y")}, "modify/delete", {b"f": Leaf(b"y")}),
        ({b"f": Leaf(b"x")}, {b"f": Leaf(b"y")}, {}, "modify/delete", {b"f": Leaf(b"y")}),
        ({b"f": Leaf(b"x")}, {b"f": link(b"y")}, {b"f": Leaf(b"y")}, "type",
         {b"f": link(b"y"), b"f~theirs": Leaf(b"y")}),
        ({b"f": Leaf(b"x")}, {b"f/in": Leaf(b"y")}, {b"f": Leaf(b"y")}, "type",
         {b"f/in": Leaf(b"y"), b"f~theirs": Leaf(b"y")}),
        ({b"f/in": Leaf(b"x")}, {b"f": Leaf(b"y")}, {b"f/in": Leaf(b"y")}, "type",
         {b"f": Leaf(b"y"), b"f~theirs/in": Leaf(b"y")}),
        ({b"f": link(b"x")}, {b"f": link(b"y")}, {b"f": link(b"z")}, "content",
         {b"f": link(b"y"), b"f~theirs": link(b"z")}),
        ({b"f": Leaf(b"\0")}, {b"f": Leaf(b"\0y"), b"f~theirs": Leaf()}, {b"f": Leaf(b"\0z")},
         "content", {b"f": Leaf(b"\0y"), b"f~theirs": Leaf(), b"f~theirs2": Leaf(b"\0z")}),
        ({b"f": Leaf(b"x", 0o644)}, {b"f": Leaf(b"x", 0o755)}, {b"f": Leaf(b"x", 0o600)}, "mode",
         {b"f": Leaf(b"x", 0o755)}),
    ],
)  # fmt: skip
def test_kinds_of_conflicts(base, ours, theirs, kind, written):
    assert three(base, ours, theirs)[:2] == (None, [(b"f", kind)])
    assert three(base, ours, theirs, write_conflicts=True)[:2] == (written, [(b"f", kind)])
    assert three(base, ours, theirs, favor=Favor.OURS)[:2] == (ours, [])
    assert three(base, ours, theirs, favor=Favor.THEIRS)[0] == {
        **theirs, **{path: leaf for path, leaf in ours.items() if path == b"f~theirs"}
    }  # fmt: skip


def test_a_removed_directory_stays_for_what_the_other_side_added():
    base = {b"d/old": Leaf(b"x"), b"d/e/old": Leaf(b"y")}
    theirs = {**base, b"d/e/new": Leaf(b"z")}
    assert three(base, {}, theirs)[:2] == ({b"d/e/new": Leaf(b"z")}, [])
    assert three(base, theirs, {})[:2] == ({b"d/e/new": Leaf(b"z")}, [])
    assert three(base, {}, base)[0] == {}


# Renames.

BODY = b"".join(b"line %d of the text\n" % n for n in range(40))


@pytest.mark.parametrize("edited_too", [False, True])
@pytest.mark.parametrize("target", [b"to", b"new/deep/to", b"dir/to"])
def test_a_moved_file_gets_what_the_other_side_changed(edited_too, target):
    moved = BODY.replace(b"line 3 ", b"LINE 3 ") if edited_too else BODY
    changed = BODY.replace(b"line 30 ", b"LINE 30 ")
    base = {b"from/f": Leaf(BODY), b"dir/other": Leaf(b"x")}
    mover = {target: Leaf(moved), b"dir/other": Leaf(b"x")}
    editor = {b"from/f": Leaf(changed), b"dir/other": Leaf(b"y"), b"from/more": Leaf(b"z")}
    both = moved.replace(b"line 30 ", b"LINE 30 ")
    expected = {target: Leaf(both), b"dir/other": Leaf(b"y"), b"from/more": Leaf(b"z")}
    assert three(base, mover, editor)[:2] == (expected, [])
    assert three(base, editor, mover)[:2] == (expected, [])
    assert three(base, editor, mover, renames=False)[1] == [(b"from/f", "modify/delete")]


def test_a_moved_directory():
    base = {b"d/%d" % n: Leaf(b"%d\n" % n + BODY) for n in range(5)}
    ours = {path.replace(b"d/", b"e/sub/"): leaf for path, leaf in base.items()}
    theirs = {**base, b"d/3": Leaf(b"3\n" + BODY + b"more\n"), b"d/new": Leaf(b"new")}
    found, conflicts, _ = three(base, ours, theirs)
    assert conflicts == []
    assert found == {**ours, b"e/sub/3": theirs[b"d/3"], b"d/new": Leaf(b"new")}


def test_a_conflict_in_a_moved_file_names_where_it_was():
    base, ours = {b"f": Leaf(BODY)}, {b"g": Leaf(BODY.replace(b"line 3 ", b"ours "))}
    theirs = {b"f": Leaf(BODY.replace(b"line 3 ", b"theirs "))}
    garden = Garden()
    result = merged(garden, *map(garden.plant, (base, ours, theirs)))
    (conflict,) = result.conflicts
    assert (conflict.path, conflict.kind) == (b"g", ConflictKind.CONTENT)
    assert conflict.paths == (b"f", b"g", b"f")


def test_a_file_that_both_moved():
    base = {b"f": Leaf(BODY), b"k": Leaf(b"k")}
    ours = {b"g": Leaf(BODY + b"ours\n"), b"k": Leaf(b"k")}
    same = {b"g": Leaf(b"theirs\n" + BODY), b"k": Leaf(b"k")}
    found, conflicts, _ = three(base, ours, same)
    assert (found, conflicts) == (
        {b"g": Leaf(b"theirs\n" + BODY + b"ours\n"), b"k": Leaf(b"k")}, []
    )  # fmt: skip
    other = {b"h": Leaf(b"theirs\n" + BODY), b"k": Leaf(b"k")}
    assert three(base, ours, other)[1] == [(b"f", "rename/rename")]
    assert three(base, ours, {b"k": Leaf(b"k")})[1] == [(b"f", "rename/delete")]
    both = {b"g": Leaf(b"theirs\n" + BODY + b"ours\n"), b"k": Leaf(b"k")}
    assert three(base, ours, other, favor=Favor.OURS)[0] == both
    assert three(base, ours, {b"k": Leaf(b"k")}, favor=Favor.OURS)[0] == ours
    assert three(base, ours, {b"k": Leaf(b"k")}, favor=Favor.THEIRS)[0] == {b"k": Leaf(b"k")}


def test_a_directory_that_both_moved_to_two_places():
    base = {b"d/a": Leaf(BODY), b"k": Leaf(b"k")}
    ours = {b"e/a": Leaf(BODY + b"ours\n"), b"k": Leaf(b"k")}
    theirs = {b"f/a": Leaf(b"theirs\n" + BODY), b"k": Leaf(b"k")}
    assert three(base, ours, theirs)[:2] == (None, [(b"d/a", "rename/rename")])
    garden = Garden()
    (conflict,) = merged(garden, *map(garden.plant, (base, ours, theirs))).conflicts
    assert conflict.paths == (b"d/a", b"e/a", b"f/a")
    assert three(base, ours, theirs, write_conflicts=True)[0] == {**ours, **theirs}
    both = Leaf(b"theirs\n" + BODY + b"ours\n")
    assert three(base, ours, theirs, favor=Favor.THEIRS)[0] == {b"f/a": both, b"k": Leaf(b"k")}


def test_a_directory_that_one_moved_and_one_removed():
    base = {b"d/in/a": Leaf(BODY), b"k": Leaf(b"k")}
    moved = {b"e/a": Leaf(BODY + b"more\n"), b"k": Leaf(b"k")}
    gone = {b"k": Leaf(b"k")}
    assert three(base, moved, gone)[:2] == (None, [(b"d/in/a", "rename/delete")])
    assert three(base, gone, moved)[:2] == (None, [(b"d/in/a", "rename/delete")])


def test_a_file_that_both_took_out_of_a_directory_which_is_the_same_again():
    base = {b"d/a": Leaf(BODY), b"d/stays": Leaf(b"k")}
    ours = {b"d/stays": Leaf(b"k"), b"e/a": Leaf(BODY + b"ours\n")}
    assert three(base, ours, {b"d/stays": Leaf(b"k")})[1] == [(b"d/a", "rename/delete")]
    theirs = {b"d/stays": Leaf(b"k"), b"f/a": Leaf(BODY)}
    assert three(base, ours, theirs)[1] == [(b"d/a", "rename/rename")]


def test_a_file_follows_where_a_directory_took_its_place():
    base, changed = {b"f": Leaf(BODY)}, {b"f": Leaf(BODY + b"more\n")}
    inside = {b"f/in/a": Leaf(b"top\n" + BODY)}
    both = {b"f/in/a": Leaf(b"top\n" + BODY + b"more\n")}
    assert three(base, inside, changed)[:2] == (both, [])
    assert three(base, changed, inside)[:2] == (both, [])
    assert three(base, inside, {b"g": Leaf(BODY)})[1] == [(b"f", "rename/rename")]


def test_a_directory_follows_where_a_file_took_its_place():
    base = {b"d/a": Leaf(BODY), b"d/b": Leaf(b"b")}
    changed = {b"d/a": Leaf(BODY + b"more\n"), b"d/b": Leaf(b"b")}
    a_file = {b"d": Leaf(b"file"), b"e/a": Leaf(BODY)}
    both = {b"d": Leaf(b"file"), b"e/a": Leaf(BODY + b"more\n")}
    assert three(base, a_file, changed)[:2] == (both, [])
    assert three(base, changed, a_file)[:2] == (both, [])
    added = {**changed, b"d/new": Leaf(b"new")}
    assert three(base, a_file, added)[1] == [(b"d", "type")]


@pytest.mark.parametrize(
    ("base", "ours", "expected"),
    [
        ({b"f": Leaf(b"x")}, {b"f/in": Leaf(b"y")}, {b"f/in": Leaf(b"y")}),
        ({b"f/in": Leaf(b"x")}, {b"f": Leaf(b"y")}, {b"f": Leaf(b"y")}),
    ],
)
def test_what_took_the_place_of_something_that_the_other_side_removed(base, ours, expected):
    assert three(base, ours, {})[:2] == (expected, [])
    assert three(base, {}, ours)[:2] == (expected, [])


def test_a_mode_is_not_lost_where_the_other_side_made_a_link():
    base, ours = {b"f": Leaf(b"x")}, {b"f": link(b"y")}
    assert three(base, ours, {b"f": Leaf(b"x", 0o755)})[1] == [(b"f", "type")]
    assert three(base, ours, {b"f": Leaf(b"x", mtime_ns=9)})[0] == ours


def test_too_many_moved_files_are_told_of(monkeypatch):
    few = partial(pair_files, most_compared=1)
    monkeypatch.setattr(engine.merging.merge_moves, "pair_files", few)
    base = {b"d/%d" % n: Leaf(b"%d\n" % n + BODY) for n in range(2)}
    ours = {b"e/%d" % n: Leaf(b"%d\n" % n + BODY + b"more\n") for n in range(2)}
    theirs = {path: Leaf(b"top\n" + leaf.data) for path, leaf in base.items()}
    garden = Garden()
    assert merged(garden, *map(garden.plant, (base, ours, theirs))).renames_limited


# Beside git.


def test_random_histories_merge_as_git_has_them():
    cases = [make_case(seed) for seed in [*range(40), 146, 187, *range(1100, 1118)]]
    found = differences(cases)
    undecided = {seed: name for seed, name in found.items() if name.startswith("?")}
    assert undecided == {}, {s: make_case(s).log for s in undecided}
    assert sum(not name for name in found.values()) > 48


def test_exchanging_the_sides_of_moved_directories():
    for seed in range(20):
        case = make_case(seed)
        garden = Garden()
        base, ours, theirs = map(garden.plant, (case.base, case.ours, case.theirs))
        one, other = merged(garden, base, ours, theirs), merged(garden, base, theirs, ours)
        assert [(c.path, c.kind, c.base, c.ours, c.theirs) for c in one.conflicts] == [
            (c.path, c.kind, c.base, c.theirs, c.ours) for c in other.conflicts
        ]
        for favor, swapped in ((Favor.OURS, Favor.THEIRS), (Favor.THEIRS, Favor.OURS)):
            one = merged(garden, base, ours, theirs, favor=favor)
            other = merged(garden, base, theirs, ours, favor=swapped)
            assert one.conflicts == other.conflicts == []
            assert one.root is not None
            assert other.root is not None
            assert garden.harvest(one.root) == garden.harvest(other.root)


# Attributes and links.


def test_attributes_merge_by_name():
    garden = Garden()

    def tree(**attributes: bytes) -> Entry:
        file = garden.entry(b"f", Leaf(b"x"))
        pairs = tuple(sorted((name.encode(), value) for name, value in attributes.items()))
        file = msgspec.structs.replace(file, xattrs=pairs)
        return directory_entry(garden.nodes.put, [file], name=b"", mode=0o755, mtime_ns=1,
                               xattrs=pairs)  # fmt: skip

    base, ours, theirs = tree(a=b"1", b=b"1", c=b"1"), tree(a=b"2", b=b"1"), tree(a=b"1", c=b"1")
    garden.save()
    result = merged(garden, base, ours, theirs)
    assert result.root is not None
    assert result.root.xattrs == ((b"a", b"2"),)
    (file,) = [entry for _, entry in walk(garden.objects, result.root)]
    assert file.xattrs == ((b"a", b"2"),)
    other = tree(a=b"3", b=b"1", c=b"1")
    garden.save()
    kinds = [c.kind for c in merged(garden, base, ours, other).conflicts]
    assert kinds == [ConflictKind.XATTRS] * 2


def linked_tree(garden: Garden, files: Plant, *groups: list[bytes]) -> Entry:
    """Plants a flat tree in which the names of a group share a file."""
    entries = {name: garden.entry(name, leaf) for name, leaf in files.items()}
    members = [[(name, entries[name]) for name in sorted(group)] for group in groups]
    entries.update(number_groups(sorted(members, key=lambda group: group[0][0])))
    ordered = [entries[name] for name in sorted(entries)]
    return directory_entry(garden.nodes.put, ordered, name=b"", mode=0o755, mtime_ns=1)


def groups_of(garden: Garden, root: Entry | None) -> set[tuple[bytes, ...]]:
    assert root is not None
    tree: Tree = of_entry(garden.objects, root)  # which checks that the counts are right
    return {seen.names for seen in tree.values() if seen.names}


def test_links_stay_right():
    garden = Garden()
    files = {name: Leaf(b"same") for name in (b"a", b"b", b"c", b"d")}
    base = linked_tree(garden, files, [b"a", b"b"])
    ours = linked_tree(garden, files, [b"a", b"b", b"c"])
    garden.save()
    # One side links, the other changes something else.
    theirs = linked_tree(garden, {**files, b"d": Leaf(b"new")}, [b"a", b"b"])
    assert groups_of(garden, merged(garden, base, ours, theirs).root) == {(b"a", b"b", b"c")}
    # The other links another name to the same file.
    theirs = linked_tree(garden, files, [b"a", b"b", b"d"])
    assert groups_of(garden, merged(garden, base, ours, theirs).root) == {(b"a", b"b", b"c", b"d")}
    # The other changes the file that ours links to: the added name keeps the old content.
    theirs = linked_tree(garden, {**files, b"a": Leaf(b"new"), b"b": Leaf(b"new")}, [b"a", b"b"])
    result = merged(garden, base, ours, theirs).root
    assert groups_of(garden, result) == {(b"a", b"b")}
    # Both change it, in different lines.
    text = b"1\n2\n3\n4\n5\n"
    base, ours, theirs = (
        linked_tree(garden, {b"a": Leaf(data), b"b": Leaf(data)}, [b"a", b"b"])
        for data in (text, text.replace(b"1", b"one"), text.replace(b"5", b"five"))
    )
    garden.save()
    result = merged(garden, base, ours, theirs).root
    assert groups_of(garden, result) == {(b"a", b"b")}
    assert result is not None
    assert garden.harvest(result)[b"b"].data == b"one\n2\n3\n4\nfive\n"
    # The other removes a name.
    files = {name: Leaf(b"same") for name in (b"a", b"b", b"c")}
    base = linked_tree(garden, files, [b"a", b"b", b"c"])
    ours, theirs = (
        linked_tree(
            garden, {n: files[n] for n in files if n != gone}, [n for n in files if n != gone]
        )
        for gone in (b"a", b"b")
    )
    garden.save()
    assert groups_of(garden, merged(garden, base, ours, theirs).root) == set()


# Cost.


def test_different_files_merge_without_reading_one():
    garden = Garden()
    base = {b"d%d/f%02d" % (n // 50, n): Leaf(noise(300, n)) for n in range(5_000)}
    sides = []
    for start in (0, 2_500):
        new = dict(base)
        for n in range(start, start + 500, 50):
            new[b"d%d/f%02d" % (n // 50, n)] = Leaf(noise(300, -n - 1))
        sides.append(garden.plant(new))
    root = garden.plant(base)
    garden.objects.shed()
    before = garden.objects.statistics()
    nodes = len(garden.nodes.nodes)
    result = merge(garden.objects, garden.nodes, garden.sink.put, root, *sides)
    after = garden.objects.statistics()
    assert after.chunk_misses + after.chunk_hits == before.chunk_misses + before.chunk_hits
    assert after.node_misses - before.node_misses <= 3 + 2
    assert len(garden.nodes.nodes) - nodes <= 2
    assert result.conflicts == []
    garden.save()
    assert result.root is not None
    found = garden.harvest(result.root)
    assert sum(found[path] != leaf for path, leaf in base.items()) == 20


def test_forged_trees_that_share_children_end():
    """Each directory has the one below twice: 2^40 paths, whatever they promise."""
    garden = Garden()

    def tower(leaf: bytes, promised: int | None) -> Entry:
        below = garden.entry(b"leaf", Leaf(leaf))
        node = directory_entry(garden.nodes.put, [below], name=b"", mode=0o755, mtime_ns=1)
        for _ in range(40):
            pair = [msgspec.structs.replace(node, name=name) for name in (b"a", b"b")]
            node = directory_entry(garden.nodes.put, pair, name=b"", mode=0o755, mtime_ns=1)
            if promised is not None:
                node = msgspec.structs.replace(node, totals=Totals(promised, 0))
        return node

    for promised, error in ((None, DiffTooLargeError), (100, CorruptObjectError)):
        base, ours, theirs = (tower(leaf, promised) for leaf in (b"1\n", b"2\n", b"3\n"))
        garden.save()
        with pytest.raises(error):
            merge(garden.objects, garden.nodes, garden.sink.put, base, ours, theirs, limit=10_000)
        assert directory_id(base) != directory_id(ours)
