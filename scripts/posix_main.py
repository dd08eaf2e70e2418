"""Runs test suites that others wrote in a mount, and prints a table of their scores.

Each runs in a fresh session of a fresh store. Those that Debian packages are installed with apt;
the others are named by a path. Without SUITE, all that can run. Run as root for all of it:
pjdfstest and unionmount-testsuite want that. Leaves nothing mounted, running or on the disk.

The exit status is 0 if nothing failed but what scripts/posix_known.toml gives a reason for, 1 if
something did, 3 if a suite that was asked for by its name or its path cannot run here.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from scripts import posix_checkouts, posix_packaged
from scripts.bench_setting import ROOT, CannotError, ignore_signals, machine, note
from scripts.posix_scores import Failure, Score, new_failures, read_known, table
from scripts.posix_setting import SIDES, Place, adopt, place_on, run_directory

DOCUMENT = os.path.join(ROOT, "docs", "posix.md")
BEGIN, END = "<!-- posix:begin -->", "<!-- posix:end -->"
OVERLAY_REFUSED = 4
"""What `mountctl run --mode overlay` exits with where the kernel shows it no overlayfs."""


class Suite(NamedTuple):
    """A suite. `prepare` returns its version or raises CannotError; `path` says what it needs."""

    title: str
    prepare: Callable[..., str]
    run: Callable[[Place, Any], Score]
    path: str = ""


SUITES = {
    "pjdfstest": Suite(
        "pjdfstest", posix_checkouts.prepare_pjdfstest, posix_checkouts.pjdfstest, "DIR"
    ),
    "unionmount": Suite(
        "unionmount-testsuite", posix_checkouts.prepare_unionmount, posix_checkouts.unionmount,
        "DIR",
    ),
    "test_syscalls": Suite(
        "libfuse's test_syscalls, also with `-u`", posix_checkouts.prepare_program,
        posix_checkouts.test_syscalls, "PROGRAM",
    ),
    "fsx": Suite("fsx", posix_checkouts.prepare_program, posix_checkouts.fsx, "PROGRAM"),
    "cpython": Suite(
        "CPython's own tests", posix_packaged.prepare_cpython, posix_packaged.cpython
    ),
    "stress-ng": Suite("stress-ng", posix_packaged.prepare_stress_ng, posix_packaged.stress_ng),
    "fio": Suite("fio", posix_packaged.prepare_fio, posix_packaged.fio),
    "dbench": Suite("dbench", posix_packaged.prepare_dbench, posix_packaged.dbench),
    "bonnie++": Suite("bonnie++", posix_packaged.prepare_bonnie, posix_packaged.bonnie),
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns what was asked for."""
    parser = argparse.ArgumentParser(
        prog="scripts/posix", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("suite", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--in", dest="sides", default="sessions", metavar="SIDE,...",
                        help=f"where: {', '.join(SIDES)} (%(default)s)")  # fmt: skip
    for name, suite in SUITES.items():
        if suite.path:
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar=suite.path,
                                type=os.path.abspath, help=f"built, for {name}")  # fmt: skip
    parser.add_argument("--short", action="store_true", help="a minute of it")
    parser.add_argument("--json", metavar="FILE",
                        help="else build/posix.json, or with --short none; scores that it has of "
                        "earlier runs stay, and are in the table")  # fmt: skip
    parser.add_argument("--update-docs", action="store_true", help="and write docs/posix.md")
    options = parser.parse_args(arguments)
    options.sides = options.sides.split(",")
    if options.json or not options.short:
        options.json = os.path.abspath(options.json or os.path.join(ROOT, "build", "posix.json"))
    if unknown := (set(options.suite) - set(SUITES)) | (set(options.sides) - set(SIDES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    paths = vars(options)
    for name in options.suite:
        if SUITES[name].path and not paths[name]:
            parser.error(f"{name} needs --{name.replace('_', '-')} {SUITES[name].path}")
    if not options.suite:
        options.suite = [n for n, suite in SUITES.items() if not suite.path or paths[n]]
        options.asked = [n for n in SUITES if paths.get(n)]
    else:
        options.asked = options.suite
    return options


def stop(number: int, _: object) -> NoReturn:
    """Ends the program by way of every `finally`; a second signal changes nothing."""
    ignore_signals()
    raise SystemExit(128 + number)


def score_of(name: str, side: str, base: str, path: str | None, *, short: bool) -> Score:
    """Runs one suite on one side."""
    note(f"{name} in {side}")
    began = time.monotonic()
    with place_on(side, base, short=short) as (place, wrong):
        ready = place.say("true")
        if ready.status == OVERLAY_REFUSED:
            score = Score(name, side, cannot=" ".join(ready.output.split()))
        else:
            score = SUITES[name].run(place, path)
    score.failures += [Failure("the mount", what) for what in wrong]
    score.seconds = round(time.monotonic() - began, 1)
    score.short = short
    score.when = time.strftime("%Y-%m-%d")
    note(f"{name} in {side}: {score.cell()}, {score.seconds:.0f} s")
    for failure in score.failures:
        note(f"{name} in {side}: failed: {failure.test}: {failure.said[:300]}")
    return score


def measure(options: argparse.Namespace, base: str) -> Iterator[Score]:
    """Runs all that was asked for."""
    for name in options.suite:
        path = vars(options).get(name)
        try:
            version = SUITES[name].prepare(*([path] if SUITES[name].path else []))
        except CannotError as error:
            note(f"{name}: left out: {error}")
            yield from (Score(name, side, cannot=str(error)) for side in options.sides)
            continue
        for side in options.sides:
            score = score_of(name, side, base, path, short=options.short)
            score.version = version
            yield score


def keep(file: str, facts: dict[str, str], scores: list[Score]) -> list[Score]:
    """Writes the scores to a file; returns all that are in it now."""
    scores = with_kept(file, scores)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w", encoding="utf-8") as to:
        json.dump({"facts": facts, "scores": [s.as_json() for s in scores]}, to, indent=1)
    return scores


def with_kept(file: str, scores: list[Score]) -> list[Score]:
    """Returns the scores with those of earlier runs for what did not run now."""
    found = {}
    if os.path.exists(file):
        with open(file, encoding="utf-8") as old:
            found = {(s["suite"], s["side"]): Score.of_json(s) for s in json.load(old)["scores"]}
    found.update({(s.suite, s.side): s for s in scores})
    return [found[suite, side] for suite in SUITES for side in SIDES if (suite, side) in found]


def write_document(text: str) -> None:
    """Puts the table into its page."""
    with open(DOCUMENT, encoding="utf-8") as file:
        before, _, rest = file.read().partition(BEGIN)
    with open(DOCUMENT, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main(arguments: list[str]) -> int:
    """Runs the program; returns its exit status."""
    options = parse(arguments)
    known = read_known()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    adopt()
    scores: list[Score] = []
    kept = scores
    try:
        with run_directory() as base:
            facts = machine(base)
            for score in measure(options, base):
                scores.append(score)
                if options.json:
                    kept = keep(options.json, facts, scores)
    except CannotError as error:
        note(str(error))
        return 1
    new = new_failures(known, scores)
    unable = [score for score in scores if score.cannot and score.suite in options.asked]
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text += "\n\n" + table({n: suite.title for n, suite in SUITES.items()}, known, kept)
    print(text)
    if options.update_docs:
        write_document(text)
    if new:
        note(f"failures that scripts/posix_known.toml does not know: {len(new)}")
    for score in unable:
        note(f"did not run: {score.suite}: {score.cannot}")
    return 1 if new else 3 if unable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
