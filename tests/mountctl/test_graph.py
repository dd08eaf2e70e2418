"""Graphs in characters: as git draws them, and such that a program can read them back."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings

from mountctl.graph import Cells, Graph
from tests.engine.graphs import Git, Shape, history, name, number, shapes


def order_of(shape: Shape) -> list[int]:
    heads = [n for n in range(len(shape)) if not any(n in above for above in shape)]
    return [number(each) for each in history(shape).ancestors(*map(name, heads))]


def draw(shape: Shape, order: Sequence[int]) -> list[tuple[Cells, int | None]]:
    graph: Graph[int] = Graph()
    rows: list[tuple[Cells, int | None]] = []
    for n in order:
        before, own, after = graph.draw(n, list(dict.fromkeys(shape[n])))
        rows += [*((row, None) for row in before), (own, n), *((row, None) for row in after)]
    assert graph.continuation() == []
    return rows


def text(rows: list[tuple[Cells, int | None]]) -> str:
    lines = []
    for row, n in rows:
        line = "".join(character for character, _ in row)
        lines.append((line if n is None else f"{line} {n}").rstrip())
    return "\n".join(lines)


LIKE_GIT: list[Shape] = [
    [(), (0,), (1,)],
    [(), (0,), (0,)],
    [(), (0,), (0,), (1, 2)],
    [(), (), (0, 1)],
    [(), (), ()],
    [(), (0,), (1,), (2,), (3,), (2,), (1,), (0,)],
    [(), (0,), (0,), (0,), (0,), (0,)],
    [(), (0,), (1,), (0,), (1,), (3, 2), (4,), (5, 6), (2,), (7, 8)],
    [(), (), (), (), (0, 1, 2, 3)],
]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("shape", LIKE_GIT, ids=str)
def test_it_looks_as_git_draws_it(tmp_path: Path, shape: Shape):
    lines = Git(tmp_path / "git", shape)("log", "--graph", "--format=%s", "--all")
    theirs = []
    for line in lines:
        head, _, digits = line.rstrip().rpartition(" ")
        theirs.append(f"{head.rstrip()} {digits}" if digits.isdigit() else line.rstrip())
    assert text(draw(shape, order_of(shape))).splitlines() == theirs


GOLDEN: dict[str, tuple[Shape, str]] = {
    "octopus": (
        [(), (0,), (0,), (0,), (1, 2, 3)],
        """
*-. 4
|\\ \\
| | * 3
| * | 2
| |/
* | 1
|/
* 0""",
    ),
    "octopus beside another line": (
        [(), (0,), (0,), (0,), (1, 2, 3), (0,), (4, 5)],
        """
* 6
|\\
| * 5
|  \\
*-. | 4
|\\ \\ \\
| | * | 3
| | |/
| * | 2
| |/
* | 1
|/
* 0""",
    ),
    "a line from far away": (
        [(), (0,), (1,), (2,), (2,), (1,), (0,), (3, 0)],
        """
* 7
|\\
* | 3
| | * 6
| |/
| | * 5
| | | * 4
| |_|/
|/| |
* | | 2
| |/
|/|
* | 1
|/
* 0""",
    ),
}


@given(shapes(most=14, parents=5))
@settings(max_examples=400, deadline=None)
def test_the_lines_lead_from_each_node_to_its_parents(shape: Shape):
    order = order_of(shape)
    rows = draw(shape, order)
    assert [n for _, n in rows if n is not None] == order
    assert read_back(rows) == {n: set(above) for n, above in enumerate(shape)}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden(kind: str):
    shape, golden = GOLDEN[kind]
    assert text(draw(shape, order_of(shape))) == golden.strip("\n")


def test_a_line_of_nodes_needs_one_column_however_long():
    shape: Shape = [(), *((n,) for n in range(2000))]
    assert {len(row) for row, _ in draw(shape, order_of(shape))} == {1}


def test_a_thousand_leaves_need_two_columns():
    shape: Shape = [(), *((0,) for _ in range(1000))]
    assert max(len(row) for row, _ in draw(shape, order_of(shape))) == 3


DOWN = {"|": 0, "/": -1, "\\": 1, "*": 0, "-": 0, ".": 0}
"""Where the lower end of a character is."""
UP = {"|": 0, "/": 1, "\\": -1, "*": 0}
"""Where the upper end is."""


def read_back(rows: list[tuple[Cells, int | None]]) -> dict[int, set[int]]:
    """Follows the lines, each by its colour, and returns where they lead."""
    found: dict[int, set[int]] = {}
    lines: dict[int, tuple[int, str, set[int]]] = {}  # place, character, whence
    above = -1  # the last node
    for row, node in rows:
        here: dict[int, tuple[int, str]] = {}
        for place, (character, colour) in enumerate(row):
            assert character in " *|/\\_-."
            assert (colour is None) == (character == " ")
            if colour is not None and character != "_":
                assert (
                    colour not in here
                    or here[colour][1] == character == "-"
                    or (character == "." and here[colour][1] == "-")
                )
                here[colour] = (place, character)
        for colour in [colour for colour in lines if colour not in here]:
            place, character, whence = lines.pop(colour)
            if character == "*":
                continue  # a root
            assert character == "/"
            joined = [c for c, (p, k, _) in lines.items() if p + DOWN[k] == place - 1]
            lines[joined[0]][2].update(whence)
        if node is not None:
            found[node] = set()
            (mine,) = [colour for colour, (_, character) in here.items() if character == "*"]
        for colour, (place, character) in here.items():
            whence = {node if character in "-." and node is not None else above}
            if colour in lines:
                before, was, whence = lines[colour]
                slip = place + UP[character] - before - DOWN[was]
                far = slip < 0 and was == character == "/"  # after a row with `_`
                assert slip == 0 or far, (colour, was, before, character, place)
            if character != "*":
                lines[colour] = (place, character, whence)
        if node is not None:
            if mine in lines:
                for each in lines[mine][2]:
                    found[each].add(node)
            lines[mine] = (here[mine][0], "*", {node})
            above = node
    assert all(character == "*" for _, character, _ in lines.values())
    return found
