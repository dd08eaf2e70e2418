"""Figures: how sides are measured in turn, what is promised, how it is written down."""

import functools
import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scripts.bench_setting import (
    CannotError,
    kernel_source,
    mountctl,
    note,
    run,
    shell,
    size_of,
)

Sample = float | list[float]
Side = Callable[[], Mapping[str, Sample]]
"""Does its part once, or many times; returns seconds by the measure's name, or what else the name
ends with, one of UNITS."""

UNITS = (", MB", ", KiB")

MANY = 100
"""Of so many samples a percentile is told, of fewer the extremes."""

US = "AmalgamFS"
RUN = "mountctl run"
"""A session by way of the kernel's overlayfs."""


class Target(NamedTuple):
    """What is promised: `who` (else the first side) takes less than `limit`, or than `limit` times
    each of `sides`. Less than `enough` keeps the promise, too.
    """

    limit: float
    sides: tuple[str, ...] = ()
    who: str = ""
    enough: float = 0


_DISK = ("disk",)
_OTHERS = ("squashfuse", "bindfs", "fuse-overlayfs")
_WARM = (Target(1.05, _DISK), Target(1.0, _OTHERS))


_GROWN = [f"{US}, {many}" for many in (
    "10,000 files", "100,000 files", "1,000,000 files", "100 commits", "1,000 commits",
    "10,000 commits")]  # fmt: skip
_FLAT = tuple(Target(2.0, (f"{US}, 1,000 files", f"{US}, 1 commit"), who=who) for who in _GROWN)
"""The same, within two times, however many there are."""
_NAMES = tuple(f"{US}, {many} names" for many in ("10,000", "100,000", "1,000,000"))
_SNAPSHOTS = tuple(f"{US}, {many}" for many in (
    "10 snapshots", "100 snapshots", "1,000 snapshots", "10,000 snapshots"))  # fmt: skip
_FORKS = tuple(Target(1 / 3, who=f"{US}, {many}") for many in ("8 processes", "2 processes"))
_WORKS = (
    "a one-file test", "a test suite", "a small build", "a large build", "grep -r",
    "every file rewritten", "tar", "an editor's session", "npm ci", "a run without FUSE",
)  # fmt: skip
"""What `mountctl run --mode auto` is to take the fastest mode for, within a tenth."""
_CHUNKING = (Target(1 / 0.7, ("the slower of both",)),)


def _build(in_sessions: float, by_run: float) -> tuple[Target, ...]:
    return Target(in_sessions, _DISK), Target(by_run, _DISK, who=RUN)


TARGETS = {
    "import": (Target(1 / 3, ("git",)),),
    "import, nothing changed": (Target(1.5, ("find -ls",)),),
    "peak memory of the import, MB": (Target(400),),
    "store on the disk, MB": (Target(1.0, ("git",)),),
    "mount": (Target(0.4),),
    "grep -rc, first pass after a mount": (Target(0.8, _OTHERS),),
    "find, warm": _WARM,
    "grep -rc, warm": _WARM,
    "tar, warm": _WARM,
    "git status, warm": _WARM,
    "sources read by os.open, warm": _WARM,
    "sources read by open, warm": _WARM,
    "configure and make": _build(1.1, 1.03),
    "a Python project's tests": _build(1.1, 1.03),
    "npm ci": _build(2.0, 1.15),
    "rm -rf node_modules": _build(3.0, 1.3),
    "untar of the tree": (Target(1.5, ("fuse-overlayfs",)), Target(1.15, _DISK, who=RUN)),
    "rm -rf of it": _build(3.0, 1.3),
    "git status of it, warm": (Target(1.05, _DISK),),
    "4 GiB, first read": (Target(1 / 0.6, _DISK, enough=(4 << 30) / 1.5e9),),
    "daemon after it, MB": (Target(400),),
    "commit of one file, in the engine": (Target(0.02),),
    "the tree as a directory": (
        Target(0.5, ("git worktree add",)), Target(1.3, ("cp -a",)),
    ),
    "a large file as a directory": (Target(1.3, ("cp -a",)),),
    "switch to a snapshot ten files away, in the engine": (Target(0.02),),
    "tar of the tree, written": (Target(1.3, ("GNU tar",)),),
    "tar of the tree, read": (Target(1.3, ("GNU tar",)),),
    "a history of git": (Target(1.0, ("fast-export, fast-import",)),),
    "bundle written, each GB": (Target(1 / 0.3),),
    "bundle applied, each GB": (Target(1 / 0.3),),
    "fork": (Target(20e-6, who=US), *_FLAT),
    "write a file, commit": (Target(0.5e-3, who=US), *_FLAT),
    "write one of 50 files, commit": (Target(0.5e-3, who=US), *_FLAT),
    "write a file, commit durably": (
        Target(1.5, ("LMDB transaction",), who=US, enough=2e-3), *_FLAT,
    ),
    "open a snapshot": (Target(0.1e-3, who=US), *_FLAT),
    "restore": (Target(0.1e-3, who=US), *_FLAT),
    "diff of ten files": (Target(1e-3, who=US), *_FLAT),
    "change one of the names, commit durably": tuple(Target(5e-3, who=who) for who in _NAMES),
    "new objects for it, KiB": tuple(Target(64, who=who) for who in _NAMES),
    "written for it, KiB": tuple(Target(64, who=who) for who in _NAMES),
    "1,000 commits by 8 forks": _FORKS,
    "1,000 durable commits by 8 forks": _FORKS,
    "1,000 durable commits by 8 forks, anywhere": _FORKS,
    "gc, for 1,000 unique nodes": tuple(
        Target(2.0, _SNAPSHOTS[:1], who=who) for who in _SNAPSHOTS[1:]
    ),
    "peak memory of that gc, MB": tuple(Target(300, who=who) for who in _SNAPSHOTS),
    "peak memory of gc, MB": tuple(Target(300, who=who) for who in _SNAPSHOTS),
    "import of large files, new": _CHUNKING,
    "import of large files, in the store already": _CHUNKING,
    **dict.fromkeys(_WORKS, (Target(1.1, ("lazy", "overlay", "full"), who="auto"),)),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A measure on all sides, from one run. The first side is ours."""

    group: str
    measure: str
    samples: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Returns the median of a side's samples."""
        return statistics.median(self.samples[side])

    @property
    def first(self) -> str:
        """The side that is ours."""
        return next(iter(self.samples))

    def ratio(self, side: str, who: str = "") -> float:
        """Returns ours, or another's, through theirs, of the medians: less is better."""
        return self.median(who or self.first) / (self.median(side) or 1e-9)

    def targets(self) -> list[Target]:
        """Returns what is promised of sides that were measured."""
        return [
            target
            for target in TARGETS.get(self.measure, ())
            if (target.who or self.first) in self.samples
            and (not target.sides or set(target.sides) & set(self.samples))
        ]

    def bound(self, target: Target) -> float:
        """Returns what a promise comes to, as an amount."""
        them = [self.median(side) for side in target.sides if side in self.samples]
        return max(target.limit * min(them, default=1.0), target.enough)

    def missed(self, target: Target) -> list[str]:
        """Returns the sides that a promise is not kept for; itself if it names none."""
        who = target.who or self.first
        if self.median(who) <= target.enough:
            return []
        if not target.sides:
            return [who] if self.median(who) >= target.limit else []
        return [
            side
            for side in self.samples
            if side in target.sides and self.ratio(side, who) > target.limit
        ]

    def cells(self) -> list[str]:
        """Returns its line in a table."""
        name, unit = name_and_unit(self.measure)
        line = [name]
        for at, (side, values) in enumerate(self.samples.items()):
            line.append(amount(values, unit) + (f" **{plain(self.ratio(side))}**" if at else ""))
        return [*line, "; ".join(self._said(target, unit) for target in self.targets())]

    def _said(self, target: Target, unit: str) -> str:
        who = target.who or self.first
        missed = self.missed(target)
        if target.sides:
            present = [side for side in target.sides if side in self.samples]
            of = briefly(present[0]) if len(present) == 1 else "each other"
            limit = f"{plain(target.limit)} x {of}"
            by = ", ".join(f"{plain(self.ratio(side, who))} x {briefly(side)}" for side in missed)
        else:
            limit = amount([target.limit], unit)
            by = ""
        if target.enough:
            limit += f" or {amount([target.enough], unit)}"
        kept = "missed" + (f": {by}" if by else "") if missed else "kept"
        subject = f"{briefly(who)} " if who != self.first else ""
        return f"{subject}below {limit}: {kept}"

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> "Figure":
        """Returns what `as_json` has written."""
        return cls(written["group"], written["measure"], written["samples"])

    def as_json(self) -> dict[str, Any]:
        """Returns everything known of it."""
        ratios = {side: self.ratio(side) for side in list(self.samples)[1:]}
        targets = [
            {"who": target.who or self.first, "bound": self.bound(target),
             "missed": self.missed(target)}
            for target in self.targets()
        ]  # fmt: skip
        summary = {
            side: {"median": self.median(side), "99th percentile": most_of(values)}
            for side, values in self.samples.items()
        }
        return {"group": self.group, "measure": self.measure, "summary": summary,
                "samples": self.samples, "ratios": ratios, "targets": targets}  # fmt: skip


def name_and_unit(measure: str) -> tuple[str, str]:
    """Splits what a measure is called."""
    for end in UNITS:
        if measure.endswith(end):
            return measure.removesuffix(end), end[2:]
    return measure, "s"


def briefly(side: str) -> str:
    """Returns the name of a side without what all of ours have in common."""
    return side.removeprefix(f"{US}, ")


def most_of(values: list[float]) -> float:
    """Returns what 99 of 100 values are not above."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


def plain(ratio: float) -> str:
    """Writes a ratio with two or three digits."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}" if ratio >= 1 else f"{ratio:.2g}"


def amount(values: list[float], unit: str) -> str:
    """Writes a median with its range, `1.23 (1.20-1.31) s`, or of many `1.23 (99%: 1.30) s`."""
    middle = statistics.median(values)
    if unit == "s" and middle < 0.1:
        scale, unit = (1000, "ms") if middle >= 0.0001 else (1_000_000, "µs")
        values, middle = [value * scale for value in values], middle * scale
    places = 0 if middle >= 100 else 1 if middle >= 10 else 2
    text = f"{middle:,.{places}f}"
    if len(values) >= MANY:
        text += f" (99%: {most_of(values):,.{places}f})"
    elif len(values) > 1:
        text += f" ({min(values):,.{places}f}-{max(values):,.{places}f})"
    return f"{text} {unit}"


def tables(figures: list[Figure]) -> str:
    """Writes figures as Markdown that is also readable as it is, a table for each set of sides."""
    grouped: dict[tuple[str, ...], list[list[str]]] = {}
    for figure in figures:
        rows = grouped.setdefault((figure.group, *figure.samples), [])
        rows.append(figure.cells())
    parts = []
    for (group, *sides), rows in grouped.items():
        rows.insert(0, [group, *sides, "target"])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
        lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


@dataclass
class Bench:
    """A run: where it works, on what, how often, beside whom; and what it has found."""

    cache: str
    place: str
    given_tree: str | None
    runs: int
    rivals: list[str]
    engine_files: int = 1_000_000
    figures: list[Figure] = field(default_factory=list)

    def path(self, name: str) -> str:
        """Returns a path in the run's directory."""
        return os.path.join(self.place, name)

    def fresh(self, name: str) -> str:
        """Makes an empty directory in the run's directory, in the place of what is there."""
        shutil.rmtree(self.path(name), ignore_errors=True)
        os.mkdir(self.path(name))
        return self.path(name)

    @functools.cached_property
    def tree(self) -> str:
        """The big tree."""
        tree = os.path.realpath(self.given_tree or kernel_source(self.cache))
        if not os.path.isdir(tree):
            raise CannotError(f"not a directory: {tree}")
        _, apparent, used = size_of(tree)
        if shutil.disk_usage(self.place).free < 6 * max(apparent, used):
            raise CannotError(f"{self.place} has too little room: 6 times the tree is needed")
        return tree

    @functools.cached_property
    def store(self) -> str:
        """A store with one snapshot, of the big tree, under the ref `tree`."""
        return self.imported("store", self.tree)

    @functools.cached_property
    def copy(self) -> str:
        """A copy of the big tree in which git has committed all of it."""
        copy = self.path("copy")
        run("cp", "-a", self.tree, copy)
        shell("git init -q && git add -A -f && git commit -q -m first && git status -s", cwd=copy)
        return copy

    def imported(self, name: str, tree: str) -> str:
        """Makes a store with one snapshot, of a tree, under the ref `tree`."""
        mountctl(self.path(name), "init")
        mountctl(self.path(name), "import", tree, "--ref", "tree")
        return self.path(name)

    def compare(self, group: str, sides: dict[str, Side], runs: int) -> None:
        """Calls the sides in turn, so that whatever else the machine does meets all of them."""
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(1, runs + 1):
            for side, once in sides.items():
                os.sync()  # nobody pays for what another left to be written
                values = once()
                said = []
                for measure, value in values.items():
                    new = value if isinstance(value, list) else [value]
                    found.setdefault(measure, {}).setdefault(side, []).extend(new)
                    name, unit = name_and_unit(measure)
                    said.append(f"{name} {amount(new, unit)}")
                note(f"{group} {turn}/{runs}, {side}: {'; '.join(said)}")
        self.figures += [Figure(group, measure, samples) for measure, samples in found.items()]
