"""A graph drawn in characters, one node a line, the way `git log --graph` looks.

Nodes come one by one, each before all those it points to. A column is a line that waits for its
node; a node takes the column that waits for it, or a new one at the right, and its targets take
its place. Lines that wait for the same node are joined and what is right of a gap moves left,
one column per row. Draws as it goes and keeps the columns only. Colours are numbers; what they
look like is decided elsewhere.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from mountctl.output import Output

Node = TypeVar("Node", bound=Hashable)

Cells = list[tuple[str, int | None]]
"""Characters of a row with the colours of their lines."""

_GAP: tuple[str, int | None] = (" ", None)


class _Line(NamedTuple, Generic[Node]):
    waits_for: Node
    colour: int


class Graph(Generic[Node]):
    """What was drawn so far, as far as it matters to what follows."""

    def __init__(self) -> None:
        self._lines: list[_Line[Node]] = []
        self._colours = 0

    def draw(
        self, node: Node, targets: Sequence[Node], mark: str = "*"
    ) -> tuple[list[Cells], Cells, list[Cells]]:
        """Returns the rows before a node, its own, which text may follow, and those after it.

        `targets` are what it points to, each once, all of them still to come.
        """
        lines = self._lines
        at = next((n for n, line in enumerate(lines) if line.waits_for == node), len(lines))
        if at == len(lines):
            lines.append(self._line(node))
        right = lines[at + 1 :]
        extra = max(0, len(targets) - 2)  # columns that one row of slanted lines has no room for
        before = [self._slanted(at, shift, right) for shift in range(extra)] if right else []
        below = [
            _Line(target, lines[at].colour) if n == 0 else self._line(target)
            for n, target in enumerate(targets)
        ]
        own = [cell for line in lines[:at] for cell in (("|", line.colour), _GAP)]
        own.append((mark, lines[at].colour))
        if extra:
            for n in range(extra):
                colour = below[n + 2].colour
                own += [("-", colour), ("." if n == extra - 1 else "-", colour)]
        own += [cell for line in right for cell in (_GAP, ("|", line.colour))]
        after: list[Cells] = []
        if len(targets) > 1:
            row = {2 * n: ("|", line.colour) for n, line in enumerate(lines[:at])}
            row[2 * at] = ("|", below[0].colour)
            for n, line in enumerate(below[1:]):
                row[2 * (at + n) + 1] = ("\\", line.colour)
            for n, line in enumerate(right):
                row[2 * (at + extra + n + 1) + 1] = ("\\", line.colour)
            after.append(_row(row))
        lines[at : at + 1] = below
        after.extend(self._collapse(gap=at if not targets else None))
        return before, own, after

    def continuation(self) -> Cells:
        """Returns a row in which every line goes straight down."""
        return _row({2 * n: ("|", line.colour) for n, line in enumerate(self._lines)})

    def _line(self, node: Node) -> "_Line[Node]":
        self._colours += 1
        return _Line(node, self._colours - 1)

    def _slanted(self, at: int, shift: int, right: "list[_Line[Node]]") -> Cells:
        """Returns a row that moves what is right of a column one further to the right."""
        row = {2 * n: ("|", line.colour) for n, line in enumerate(self._lines[: at + 1])}
        for n, line in enumerate(right):
            row[2 * (at + 1 + n + shift) + 1] = ("\\", line.colour)
        return _row(row)

    def _collapse(self, gap: int | None) -> Iterator[Cells]:
        """Joins lines that wait for one node and closes gaps; yields the rows that show it."""
        places: dict[Node, int] = {}
        kept: list[_Line[Node]] = []
        moves: list[tuple[int, int, int]] = []
        for n, line in enumerate(self._lines):
            if line.waits_for not in places:
                places[line.waits_for] = len(kept)
                kept.append(line)
            start = n if gap is None or n < gap else n + 1
            moves.append((start, places[line.waits_for], line.colour))
        self._lines = kept
        far = [start - end for start, end, _ in moves if start != end]
        if len(far) == 1 and far[0] > 2:
            yield _far(moves)
            moves = [(min(start, end + 1), end, colour) for start, end, colour in moves]
            far = [1]
        for step in range(1, max(far, default=0) + 1):
            row: dict[int, tuple[str, int]] = {}
            for start, end, colour in moves:
                if start - end >= step:
                    row[2 * (start - step) + 1] = ("/", colour)
                else:
                    row.setdefault(2 * end, ("|", colour))
            yield _row(row)


def _far(moves: list[tuple[int, int, int]]) -> Cells:
    """Returns the row in which one line goes far to the left, through the others."""
    row: dict[int, tuple[str, int]] = {}
    for start, end, colour in moves:
        if start == end:
            row.setdefault(2 * end, ("|", colour))
        else:
            row[2 * start - 1] = ("/", colour)
            row |= {2 * n + 1: ("_", colour) for n in range(end + 1, start - 1)}
    return _row(row)


def _row(cells: dict[int, tuple[str, int]]) -> Cells:
    row: Cells = [_GAP] * (max(cells, default=-1) + 1)
    for place, cell in cells.items():
        row[place] = cell
    return row


_PALETTE = ("red", "green", "yellow", "blue", "magenta", "cyan")


def styled(output: Output, row: Cells) -> str:
    """Returns a row as text, its lines in colours where there are colours."""
    text = "".join(
        character if colour is None else output.style(character, _PALETTE[colour % len(_PALETTE)])
        for character, colour in row
    )
    return text.rstrip()


def show_node(
    output: Output,
    graph: "Graph[Node]",
    node: Node,
    targets: Sequence[Node],
    text: str,
    mark: str = "*",
) -> None:
    """Writes a node with its text, and the rows before and after it."""
    before, own, after = graph.draw(node, targets, mark)
    for row in before:
        output.line(styled(output, row))
    output.line(f"{styled(output, own)} {text}")
    for row in after:
        output.line(styled(output, row))
