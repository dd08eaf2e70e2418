"""Graphs of snapshots without trees, and what is true of them by counting everything."""

import os
import subprocess
from pathlib import Path

from hypothesis import strategies as st

from engine import SnapshotId
from engine.storage.snapshots import Links
from engine.trees.history import History

Shape = list[tuple[int, ...]]
"""The parents of each snapshot, as numbers below its own."""


def name(number: int) -> SnapshotId:
    return SnapshotId(number.to_bytes(32, "big"))


def number(identifier: bytes) -> int:
    return int.from_bytes(identifier, "big")


@st.composite
def shapes(draw: st.DrawFn, most: int = 12, parents: int = 3, least: int = 1) -> Shape:
    """Any acyclic graph: roots, forks, merges of many parents, a parent named twice."""
    count = draw(st.integers(least, most))
    return [
        tuple(draw(st.lists(st.integers(0, n - 1), max_size=parents))) if n else ()
        for n in range(count)
    ]


def history(shape: Shape, times: list[int] | None = None, missing: set[int] | None = None):
    times = list(range(len(shape))) if times is None else times
    table = {
        name(n): Links(tuple(map(name, above)), times[n])
        for n, above in enumerate(shape)
        if n not in (missing or set())
    }
    return History(table.get)


def ancestors(shape: Shape, missing: set[int] | None = None) -> list[set[int]]:
    """Returns the ancestors of each, itself among them; a missing one hides what is above it."""
    found: list[set[int]] = []
    for n, above in enumerate(shape):
        if n in (missing or set()):
            found.append(set())
        else:
            found.append({n}.union(*(found[parent] for parent in above)))
    return found


def bases(shape: Shape, one: int, other: int, missing: set[int] | None = None) -> set[int]:
    """Returns the best common ancestors, by definition."""
    above = ancestors(shape, missing)
    common = above[one] & above[other]
    return {base for base in common if not any(base in above[c] - {c} for c in common)}


class Git:
    """A repository of git's with the same graph."""

    def __init__(self, path: Path, shape: Shape, times: list[int] | None = None) -> None:
        self.path = path
        path.mkdir()
        self("init", "--quiet", "--bare", ".")
        stream = []
        for n, above in enumerate(shape):
            when = 1_700_000_000 + (n if times is None else times[n])
            stream.append(f"commit refs/heads/c{n}\nmark :{n + 1}\n")
            stream.append(f"committer a <a@example> {when} +0000\ndata {len(str(n))}\n{n}\n")
            stream += [
                f"{'merge' if at else 'from'} :{parent + 1}\n"
                for at, parent in enumerate(dict.fromkeys(above))
            ]
            stream.append("deleteall\n\n")
        self("fast-import", "--quiet", text="".join(stream))

    def __call__(self, *words: str, text: str = "") -> list[str]:
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            ["git", "--git-dir", ".", *words],
            cwd=self.path, input=text, text=True, capture_output=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not done.stderr, done.stderr
        return done.stdout.splitlines()
