"""The group `modes`: whether `mountctl run --mode auto` takes the fastest mode.

Ten kinds of work, each on a snapshot of what it is made for. auto runs first, knowing nothing but
the tree; then it and each mode in turn. The first of these turns knows one run, the next all.
"""

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

from scripts.bench_figures import Bench, Side
from scripts.bench_projects import LOCK, NPM, REQUIREMENTS, npm_cache, python_project
from scripts.bench_rivals import get, ours
from scripts.bench_setting import PROGRAM, ROOT, CannotError, mountctl, note, run

MODES = ("lazy", "overlay", "full")
AUTO = "auto"

REWRITE = "find . -type f -exec sed -i 's/the/teh/' {} +"
EDITOR = """
import os, sys, time
sources = sorted(
    os.path.join(folder, name) for folder, _, names in os.walk("src") for name in names
    if name.endswith((".c", ".h"))
)
for number, path in enumerate(sources[:60]):
    text = open(path, "rb").read()
    if number % 10 == 0:
        with open(path + "~", "wb") as file:
            file.write(text + b"/* edited */\\n")
        os.replace(path + "~", path)
    os.listdir(os.path.dirname(path))
    time.sleep(0.005)
"""
"""Looks at sixty files, one after the other, and saves six, each under a temporary name first."""

SMALL_PROJECT = 20
"""How many C files the small build has."""


class Work(NamedTuple):
    """One kind of work: its name, the tree that it is done on, the command."""

    name: str
    tree: str
    command: tuple[str, ...]
    has_fuse: bool = True


def measure_modes(bench: Bench) -> None:
    """Each kind of work by auto and by each mode."""
    taken = []
    costs = ""
    for number, work in enumerate(_works(bench)):
        store, at = bench.imported(f"store-modes-{number}", work.tree), bench.path("on-modes")
        if not costs:
            note("calibrating")
            mountctl(store, "doctor", "--calibrate", "-q")
            costs = os.path.join(bench.path("."), "costs")
            shutil.copy(os.path.join(store, "costs"), costs)
        else:
            shutil.copy(costs, os.path.join(store, "costs"))
        if work.has_fuse:
            with ours(store, at):
                taken.append(_measure(bench, work, store))
        else:
            taken.append(_measure(bench, work, store))
        shutil.rmtree(store)
    right = sum(taken)
    note(f"auto was as fast as the fastest mode, within a tenth, in {right} of {len(taken)}")


def _measure(bench: Bench, work: Work, store: str) -> bool:
    """Measures one kind; tells whether auto was about as fast as the fastest."""
    words = [PROGRAM, "--store", store, "-q", "run", "tree", "--mode"]
    without = () if work.has_fuse else ("unshare", "-m", "sh", "-c", _HIDDEN, "sh")

    def side(mode: str, name: str) -> dict[str, float]:
        return {name: run(*without, *words, mode, "--", *work.command).seconds}

    first: dict[str, Side] = {AUTO: functools.partial(side, AUTO, f"{work.name}, never run before")}
    bench.compare("modes", first, 1)
    modes = MODES if work.has_fuse else ("full",)
    sides: dict[str, Side] = {
        mode: functools.partial(side, mode, work.name) for mode in (AUTO, *modes)
    }
    bench.compare("modes", sides, bench.runs)
    figure = next(each for each in bench.figures[::-1] if each.measure == work.name)
    fastest = min(modes, key=figure.median)
    note(f"modes, {work.name}: {fastest} is the fastest; auto {figure.ratio(fastest):.2f} of it")
    return figure.ratio(fastest) <= 1.1


_HIDDEN = 'mount --bind /dev/null /dev/fuse && exec "$@"'


def _works(bench: Bench) -> Iterator[Work]:
    if os.geteuid() != 0:
        raise CannotError("only root can hide /dev/fuse, for a run without it")
    python, archive = python_project(bench.cache)
    project = bench.fresh("python-for-modes")
    run("tar", "-xf", archive, "-C", project, "--strip-components=1", "--no-same-owner")
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    yield Work("a one-file test", project, (*tests, "tests/test_util.py"))
    yield Work("a test suite", project, tests)
    xz = bench.path("xz-for-modes")
    run(os.path.join(ROOT, "scripts", "fetch-source"), "xz-utils", xz)
    small = bench.fresh("small-for-modes")
    _write_project(small)
    yield Work("a small build", small, ("make", "-s"))
    make = f"./configure -q --disable-nls --disable-static && make -s -j{os.cpu_count()}"
    yield Work("a large build", xz, ("sh", "-c", make))
    tree = os.path.join(bench.tree, "drivers", "net")
    part = tree if os.path.isdir(tree) else bench.tree
    yield Work("grep -r", part, ("sh", "-c", "grep -rc static . >/dev/null"))
    yield Work("every file rewritten", xz, ("sh", "-c", REWRITE))
    yield Work("tar", part, ("sh", "-c", "tar -cf - . | cat >/dev/null"))
    yield Work("an editor's session", xz, (sys.executable, "-c", EDITOR))
    get({"npm": "npm"})
    packages = bench.fresh("npm-for-modes")
    for name in LOCK:
        shutil.copy(os.path.join(REQUIREMENTS, "npm", name), packages)
    cache = npm_cache(bench.cache)
    yield Work("npm ci", packages, (*NPM, "--offline", "--cache", cache))
    yield Work("a run without FUSE", xz, ("sh", "-c", "grep -rc the src >/dev/null"), False)


def _write_project(folder: str) -> None:
    names = [f"part{number}" for number in range(SMALL_PROJECT)]
    for number, name in enumerate(names):
        with open(os.path.join(folder, f"{name}.c"), "w", encoding="ascii") as file:
            file.write(f'#include <stdio.h>\nvoid {name}(void) {{ puts("{number}"); }}\n')
    with open(os.path.join(folder, "main.c"), "w", encoding="ascii") as file:
        calls = "".join(f"{name}(); " for name in names)
        file.write("".join(f"void {name}(void);\n" for name in names))
        file.write(f"int main(void) {{ {calls}return 0; }}\n")
    objects = " ".join(f"{name}.o" for name in ["main", *names])
    with open(os.path.join(folder, "Makefile"), "w", encoding="ascii") as file:
        file.write(f"all: {objects}\n\t$(CC) -o all {objects}\n")
