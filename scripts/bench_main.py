"""Measures AmalgamFS beside others, all sides in turn in the same run.

Prints tables and writes every sample as JSON. Leaves nothing mounted, running or on the disk
but the big tree, which is kept for the next run.
"""

import argparse
import json
import os
import signal
import sys
from typing import NoReturn

from scripts import bench_groups
from scripts.bench_driver import measure_driver
from scripts.bench_figures import Bench, tables
from scripts.bench_rivals import RIVALS, prepare
from scripts.bench_setting import (
    ROOT,
    CannotError,
    ignore_signals,
    machine,
    note,
    size_of,
    workplace,
)

GROUPS = {**bench_groups.GROUPS, "driver": measure_driver}

DOCUMENT = os.path.join(ROOT, "docs", "benchmarks.md")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns what was asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("group", nargs="?", choices=[*GROUPS, "all"], default="all")
    parser.add_argument("--tree", metavar="DIR", help="else Debian's source of Linux, fetched once")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each side (5)")
    parser.add_argument("--json", metavar="FILE", help="else build/bench.json")
    parser.add_argument("--rivals", metavar="NAME,...", default=",".join(RIVALS),
                        help="which to measure beside (%(default)s), or none")  # fmt: skip
    parser.add_argument("--update-docs", action="store_true", help="and write docs/benchmarks.md")
    parser.add_argument("--cache", required=True, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rivals = [] if options.rivals == "none" else options.rivals.split(",")
    options.json = os.path.abspath(options.json or os.path.join(ROOT, "build", "bench.json"))
    if unknown := set(options.rivals) - set(RIVALS):
        parser.error(f"unknown rivals: {', '.join(unknown)}")
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    return options


def stop(number: int, _: object) -> NoReturn:
    """Ends the program by way of every `finally`; a second signal changes nothing."""
    ignore_signals()
    raise SystemExit(128 + number)


def measure(
    options: argparse.Namespace, place: str
) -> tuple[dict[str, str], Bench, list[str], int]:
    """Runs the groups; returns facts, figures, what was left out, and 1 if a group failed."""
    status = 0
    versions, left_out = prepare(options.rivals, place)
    facts = {**machine(place), **versions}
    if os.getloadavg()[0] > 0.5:
        note(f"the machine is busy, the figures will be noisy: load {os.getloadavg()[0]:.1f}")
    bench = Bench(options.cache, place, options.tree, options.runs, list(versions))
    for group in GROUPS if options.group == "all" else [options.group]:
        try:
            GROUPS[group](bench)
        except CannotError as error:
            note(f"{group}: {error}")
            left_out.append(f"{group}: {str(error).splitlines()[0]}")
            status = 1
    if "tree" in vars(bench):
        entries, apparent, _ = size_of(bench.tree)
        name = os.path.basename(bench.tree)
        facts["tree"] = f"{name}, {entries:,} entries, {apparent / 1e6:,.0f} MB"
    return facts, bench, left_out, status


def main(arguments: list[str]) -> int:
    """Runs the program; returns its exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        with workplace(options.cache) as place:
            facts, bench, left_out, status = measure(options, place)
    except CannotError as error:
        note(str(error))
        return 1
    parts = ["\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(tables(bench.figures))
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {reason}" for reason in left_out))
    text = "\n\n".join(part for part in parts if part)
    print(text)
    os.makedirs(os.path.dirname(options.json), exist_ok=True)
    figures = [figure.as_json() for figure in bench.figures]
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump({"facts": facts, "left_out": left_out, "figures": figures}, file, indent=1)
    note(f"every sample is in {options.json}")
    if options.update_docs:
        with open(DOCUMENT, encoding="utf-8") as file:
            before, _, rest = file.read().partition(BEGIN)
        with open(DOCUMENT, "w", encoding="utf-8") as file:
            file.write(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
