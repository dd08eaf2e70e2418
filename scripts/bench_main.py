"""Measures AmalgamFS beside others, all sides in turn in the same run.

Prints tables and writes every sample as JSON. Leaves nothing mounted, running or on the disk
but what was fetched, which is kept for the next run.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from typing import Any, NoReturn

from scripts.bench_checkout import measure_checkout
from scripts.bench_driver import measure_driver
from scripts.bench_engine import SIZES, measure_engine
from scripts.bench_figures import Bench, Figure, tables
from scripts.bench_groups import measure_build, measure_commit, measure_store
from scripts.bench_modes import measure_modes
from scripts.bench_mount import measure_mount
from scripts.bench_plot import draw
from scripts.bench_projects import measure_projects
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

GROUPS = {
    "store": measure_store,
    "mount": measure_mount,
    "build": measure_build,
    "projects": measure_projects,
    "commit": measure_commit,
    "checkout": measure_checkout,
    "driver": measure_driver,
    "engine": measure_engine,
    "modes": measure_modes,
}

DOCUMENT = os.path.join(ROOT, "docs", "benchmarks.md")
PICTURE = "![every figure as a ratio to ext4 or to the best of the others](benchmarks.svg)"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns what was asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "group",
        nargs="?",
        choices=[*GROUPS, "all", "plot"],
        default="all",
        help="or plot: what is in FILE is not measured, but written again",
    )
    parser.add_argument("files", nargs="*", metavar="FILE",
                        help="the JSON for plot; the last that has a figure counts")  # fmt: skip
    parser.add_argument("--tree", metavar="DIR", help="else Debian's source of Linux, fetched once")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each side (5)")
    parser.add_argument("--engine-files", type=int, choices=SIZES, default=SIZES[-1], metavar="N",
                        help="the largest tree of engine, and its directory's names; a hundredth "
                        "of it the longest history: one of %(choices)s; with fewer than the last, "
                        "checkout has a hundredth of its file, history and bundle")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="else build/bench.json")
    parser.add_argument("--rivals", metavar="NAME,...", default=",".join(RIVALS),
                        help="which to measure beside (%(default)s), or none")  # fmt: skip
    parser.add_argument("--update-docs", action="store_true", help="and write docs/benchmarks.*")
    parser.add_argument("--cache", required=True, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rivals = [] if options.rivals == "none" else options.rivals.split(",")
    if (options.group == "plot") != bool(options.files):
        parser.error("plot needs the JSON of a run, and only plot")
    options.json = os.path.abspath(
        options.json or next(iter(options.files), os.path.join(ROOT, "build", "bench.json"))
    )
    if unknown := set(options.rivals) - set(RIVALS):
        parser.error(f"unknown rivals: {', '.join(unknown)}")
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    return options


def stop(number: int, _: object) -> NoReturn:
    """Ends the program by way of every `finally`; a second signal changes nothing."""
    ignore_signals()
    raise SystemExit(128 + number)


def measure(options: argparse.Namespace, place: str) -> tuple[dict[str, Any], int]:
    """Runs the groups; returns what is in the JSON, written after each, and 1 if one failed."""
    status = 0
    result: dict[str, Any] = {}
    versions, left_out = prepare(options.rivals, place)
    facts = {**machine(place), **versions}
    if os.getloadavg()[0] > 0.5:
        note(f"the machine is busy, the figures will be noisy: load {os.getloadavg()[0]:.1f}")
    bench = Bench(
        options.cache, place, options.tree, options.runs, list(versions), options.engine_files
    )
    for group in GROUPS if options.group == "all" else [options.group]:
        try:
            GROUPS[group](bench)
        except CannotError as error:
            note(f"{group}: {error}")
            left_out.append(f"{group}: {str(error).splitlines()[0]}")
            status = 1
        if "tree" in vars(bench) and "tree" not in facts:
            entries, apparent, _ = size_of(bench.tree)
            name = os.path.basename(bench.tree)
            facts["tree"] = f"{name}, {entries:,} entries, {apparent / 1e6:,.0f} MB"
        figures = [figure.as_json() for figure in bench.figures]
        result = {"facts": facts, "left_out": left_out, "figures": figures}
        os.makedirs(os.path.dirname(options.json), exist_ok=True)
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return result, status


def joined(files: list[str]) -> dict[str, Any]:
    """Returns what runs have found, facts of the first, each figure of the last that has it."""
    result: dict[str, Any] = {"facts": {}, "left_out": []}
    figures: dict[tuple[str, ...], Any] = {}
    for path in files:
        with open(path, encoding="utf-8") as file:
            read = json.load(file)
        result["facts"] = {**read["facts"], **result["facts"]}
        result["left_out"] += read["left_out"]
        for figure in read["figures"]:
            figures[figure["group"], figure["measure"], *figure["samples"]] = figure
    return {**result, "figures": list(figures.values())}


def page(result: dict[str, Any]) -> str:
    """Returns what is printed of a run, and written into the page."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in result["facts"].items())]
    parts.append(tables([Figure.from_json(figure) for figure in result["figures"]]))
    if result["left_out"]:
        parts.append("Left out:\n\n" + "\n".join(f"- {why}" for why in result["left_out"]))
    return "\n\n".join(part for part in parts if part)


def publish(result: dict[str, Any], picture: str, update_docs: bool) -> None:
    """Prints the tables, draws the picture, and puts both into the docs. Raises CannotError."""
    text = page(result)
    print(text)
    draw(result["facts"], [Figure.from_json(figure) for figure in result["figures"]], picture)
    note(f"the picture is {picture}")
    if update_docs:
        shutil.copyfile(picture, DOCUMENT.removesuffix(".md") + ".svg")
        with open(DOCUMENT, encoding="utf-8") as file:
            before, _, rest = file.read().partition(BEGIN)
        with open(DOCUMENT, "w", encoding="utf-8") as file:
            file.write(f"{before}{BEGIN}\n{PICTURE}\n\n{text}\n{END}{rest.partition(END)[2]}")


def main(arguments: list[str]) -> int:
    """Runs the program; returns its exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    picture = os.path.splitext(options.json)[0] + ".svg"
    try:
        if options.group == "plot":
            publish(joined(options.files), picture, options.update_docs)
            return 0
        with workplace(options.cache) as place:
            result, status = measure(options, place)
        note(f"every sample is in {options.json}")
        publish(result, picture, options.update_docs)
    except (CannotError, OSError) as error:
        note(str(error))
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
