"""Scores: what a suite found on a side, which failures are known, how it is written down.

Used by the other posix modules only.
"""

import fnmatch
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scripts.bench_setting import ROOT
from scripts.posix_setting import SIDES

NOT_RUN = "not run"
KNOWN = os.path.join(ROOT, "scripts", "posix_known.toml")


class Failure(NamedTuple):
    """A test that failed, by the name that its suite gives it, and what was said of it."""

    test: str
    said: str = ""


class Known(NamedTuple):
    """A failure that has a reason. `test` is a pattern; `sides` are where it may happen."""

    suite: str
    test: str
    sides: tuple[str, ...]
    reason: str


@dataclass
class Score:
    """What one suite found on one side. `cannot` says why it did not run, else is empty."""

    suite: str
    side: str
    total: int = 0
    unit: str = "tests"
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    cannot: str = ""
    seconds: float = 0.0
    short: bool = False
    version: str = ""
    when: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "failures": [failure._asdict() for failure in self.failures]}

    @classmethod
    def of_json(cls, made: dict[str, Any]) -> "Score":
        failures = [Failure(**failure) for failure in made["failures"]]
        return cls(**{**made, "failures": failures})

    def cell(self) -> str:
        if self.cannot:
            return NOT_RUN
        failed = f"{len(self.failures):,} of {self.total:,}"
        return f"**{failed} fail**" if self.failures else failed


def read_known() -> list[Known]:
    """Reads the failures that are known."""
    with open(KNOWN, "rb") as file:
        entries = tomllib.load(file).get("known", [])
    return [
        Known(e["suite"], e["test"], tuple(e.get("in", SIDES)), " ".join(e["reason"].split()))
        for e in entries
    ]


def reason(known: Iterable[Known], score: Score, failure: Failure) -> str:
    """Returns why a failure is known, or nothing."""
    for one in known:
        here = one.suite == score.suite and score.side in one.sides
        if here and fnmatch.fnmatchcase(failure.test, one.test):
            return one.reason
    return ""


def new_failures(known: list[Known], scores: list[Score]) -> list[tuple[Score, Failure]]:
    """Returns the failures that are not known."""
    return [(s, f) for s in scores for f in s.failures if not reason(known, s, f)]


def table(titles: dict[str, str], known: list[Known], scores: list[Score]) -> str:
    """Returns all scores as a table, and below it every failure and everything left out."""
    sides = [side for side in SIDES if any(score.side == side for score in scores)]
    found = {(score.suite, score.side): score for score in scores}
    lines = [
        f"| suite | {' | '.join(sides)} |",
        "|---|" + "---|" * len(sides),
    ]
    for suite, title in titles.items():
        row = [found.get((suite, side)) for side in sides]
        ran = [score for score in row if score is not None]
        if ran:
            kind = ran[0].unit + (", the short form" if any(score.short for score in ran) else "")
            cells = [score.cell() if score is not None else NOT_RUN for score in row]
            version = next((f" {score.version}" for score in ran if score.version), "")
            lines.append(f"| {title}{version}, {kind} | {' | '.join(cells)} |")
    parts = ["\n".join(lines)]
    failed = [
        f"| {score.suite} | {score.side} | `{failure.test}` | "
        f"{_cell(reason(known, score, failure) or 'NOT KNOWN: ' + failure.said)} |"
        for score in scores
        for failure in score.failures
    ]
    if failed:
        parts.append(
            "What failed:\n\n| suite | in | test | because |\n|---|---|---|---|\n"
            + "\n".join(failed)
        )
    out = [
        f"- {score.suite} in {score.side}: {what}"
        for score in scores
        for what in ([score.cannot] if score.cannot else score.left_out)
    ]
    if out:
        parts.append("Left out:\n\n" + "\n".join(_grouped(out)))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]


def _grouped(lines: list[str]) -> list[str]:
    """Returns lines that differ in the side alone as one."""
    sides: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        who, _, what = line.partition(": ")
        suite, _, side = who.removeprefix("- ").partition(" in ")
        sides.setdefault((suite, what), []).append(side)
    return [f"- {suite} ({', '.join(where)}): {what}" for (suite, what), where in sides.items()]
