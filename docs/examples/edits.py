"""Edits of Python source: another operator or number, arguments swapped, a condition negated.

Each may be a mistake, or the repair of one. Used by repair.py; knows of no store.
"""

import ast
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

INSTEAD = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",),
    "!=": ("==",), "is": ("is not",), "is not": ("is",), "in": ("not in",), "not in": ("in",),
    "+": ("-",), "-": ("+",), "*": ("//",), "//": ("*",), "and": ("or",), "or": ("and",),
}  # fmt: skip
OPERATOR = re.compile(rb"is\s+not|not\s+in|and|or|is|in|[<>=!]=|//|[<>+*-]")


@dataclass(frozen=True)
class Edit:
    """Other bytes in the place of some of a source file's."""

    path: str
    line: int
    function: str
    start: int
    end: int
    old: bytes
    new: bytes

    def __str__(self) -> str:
        place = f"{os.path.basename(self.path)}:{self.line} {self.function}"
        return f"{place}: {flat(self.old)} -> {flat(self.new)}"

    def make(self, source: bytes) -> bytes:
        return source[: self.start] + self.new + source[self.end :]


def flat(source: bytes) -> str:
    return b" ".join(source.split()).decode()


@functools.cache
def edits_of(path: str, source: bytes) -> list[Edit]:
    """Returns the edits that may be tried in a file."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def begin(node: ast.expr) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    def text(node: ast.expr) -> bytes:
        return source[begin(node) : end(node)]

    def changes(node: ast.AST) -> Iterator[tuple[int, int, bytes]]:
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.BoolOp):
            operands = node.values
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            for value in (node.value + 1, node.value - 1):
                yield begin(node), end(node), str(value).encode()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield begin(node), end(node), text(node.operand)
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            if not isinstance(node.test, ast.Compare | ast.UnaryOp):
                yield begin(node.test), end(node.test), b"not (" + text(node.test) + b")"
        elif isinstance(node, ast.Call):
            for one, two in pairwise(node.args):
                between = source[end(one) : begin(two)]
                yield begin(one), end(two), text(two) + between + text(one)
        for left, right in pairwise(operands):
            if found := OPERATOR.search(source, end(left), begin(right)):
                for new in INSTEAD.get(found[0].decode(), ()):
                    yield found.start(), found.end(), new.encode()

    def walk(node: ast.AST, function: str) -> Iterator[Edit]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from walk(child, child.name)
                continue
            if isinstance(child, ast.JoinedStr):
                continue  # before Python 3.12, what is in one has no place of its own
            for start, stop, new in changes(child) if function else ():
                line = source.count(b"\n", 0, start) + 1
                yield Edit(path, line, function, start, stop, source[start:stop], new)
            yield from walk(child, function)

    return list(walk(ast.parse(source), ""))
