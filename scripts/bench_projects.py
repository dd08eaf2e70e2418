"""The group `projects`: a Python project's own tests, and the installation of npm packages."""

import contextlib
import functools
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

from scripts.bench_figures import RUN, US, Bench, Side
from scripts.bench_groups import words_before, writable
from scripts.bench_rivals import get, ours
from scripts.bench_setting import ROOT, CannotError, note, run

REQUIREMENTS = os.path.join(ROOT, "scripts", "requirements")
LOCK = ("package.json", "package-lock.json")
NPM = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--logs-max=0",
       "--no-update-notifier")  # fmt: skip

TIMED = """
step() { start=$(date +%s%N); "$@" >/dev/null; echo $((($(date +%s%N) - start) / 1000)); }
step "$@"
step rm -rf node_modules
"""
"""Prints the microseconds of each step. One shell for both, as the start of `mountctl run` is
longer than what is to be measured."""


def measure_projects(bench: Bench) -> None:
    """Each on what is made for it; what one of them lacks does not keep the other back."""
    failed = []
    for measure in (measure_tests, measure_npm):
        try:
            measure(bench)
        except CannotError as error:
            note(str(error))
            failed.append(str(error).splitlines()[0])
    if failed:
        raise CannotError("; ".join(failed))


def compare(
    bench: Bench, name: str, source: str, work: Callable[[str, tuple[str, ...]], dict[str, float]]
) -> None:
    """Has the work done in a session, by `mountctl run`, on the disk, and in fuse-overlayfs.

    It is given the tree and the words that stand before a command.
    """
    store, at = bench.imported("store-" + name, source), bench.path("on-" + name)
    others = [rival for rival in bench.rivals if rival == "fuse-overlayfs"]

    def side(side: str) -> dict[str, float]:
        with writable(bench, side, store, source, at) as tree:
            return work(tree, words_before(side, store))

    with ours(store, at):
        sides: dict[str, Side] = {
            name: functools.partial(side, name) for name in (US, RUN, "disk", *others)
        }
        bench.compare("projects", sides, bench.runs)
    shutil.rmtree(store)


# ---------------------------------------------------------------- Python


def measure_tests(bench: Bench) -> None:
    """The tests of Pygments, as they are in its source distribution, in a fresh tree each time."""
    python, archive = python_project(bench.cache)
    source = bench.fresh("python-source")
    run("tar", "-xf", archive, "-C", source, "--strip-components=1", "--no-same-owner")

    def work(tree: str, by: tuple[str, ...]) -> dict[str, float]:
        ran = run(*by, python, "-m", "pytest", "-q", cwd=tree)
        if " passed" not in ran.output:
            raise CannotError(f"no test of Pygments passed: {ran.output[-200:]}")
        return {"a Python project's tests": ran.seconds}

    compare(bench, "tests", source, work)


def python_project(cache: str) -> tuple[str, str]:
    """Returns the interpreter that has what the tests need, and the source distribution.

    Both are pinned by hash in scripts/requirements, and kept.
    """
    folder = os.path.join(os.path.realpath(cache), "python-project")
    pins = [os.path.join(REQUIREMENTS, name) for name in ("bench.txt", "bench-source.txt")]
    with kept(folder, *pins) as missing:
        python = os.path.join(folder, "venv", "bin", "python")
        if missing:
            note("fetching Pygments and what its tests need")
            run(sys.executable, "-m", "venv", os.path.join(folder, "venv"))
            pip = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
            run(python, *pip, "install", "--require-hashes", "-r", pins[0], fetches=True)
            # Our own pip: it reads the metadata, and has what builds it.
            run(sys.executable, *pip, "download", "--require-hashes", "--no-deps", "--no-binary",
                ":all:", "--no-build-isolation", "-d", folder, "-r", pins[1],
                fetches=True)  # fmt: skip
        return python, glob.glob(os.path.join(folder, "*.tar.gz"))[0]


# ---------------------------------------------------------------- npm


def measure_npm(bench: Bench) -> None:
    """`npm ci` of 410 packages from a cache that has them all, and what it made removed again."""
    get({"npm": "npm"})
    cache = npm_cache(bench.cache)
    source = bench.fresh("npm-source")
    for name in LOCK:
        shutil.copy(os.path.join(REQUIREMENTS, "npm", name), source)

    def work(tree: str, by: tuple[str, ...]) -> dict[str, float]:
        command = (*by, "sh", "-ec", TIMED, "sh", *NPM, "--offline", "--cache", cache)
        installed, removed = run(*command, cwd=tree).output.split()
        return {"npm ci": int(installed) / 1e6, "rm -rf node_modules": int(removed) / 1e6}

    compare(bench, "npm", source, work)


def npm_cache(cache: str) -> str:
    """Returns a cache of npm's in which all packages of the lock file are, kept."""
    folder = os.path.join(os.path.realpath(cache), "npm-cache")
    files = [os.path.join(REQUIREMENTS, "npm", name) for name in LOCK]
    with (
        kept(folder, *files) as missing,
        tempfile.TemporaryDirectory(dir=cache, prefix="fetch.") as scratch,
    ):
        if missing:
            note("fetching npm packages")
            for file in files:
                shutil.copy(file, scratch)
            run(*NPM, "--cache", folder, cwd=scratch, fetches=True)
    return folder


@contextlib.contextmanager
def kept(folder: str, *made_from: str) -> Iterator[bool]:
    """Tells whether a directory in the cache must be filled, it being empty then.

    It is when it was made from other files, or with another Python, or its making failed.
    """
    stamp = os.path.join(folder, "stamp")
    state = hashlib.sha256(sys.version.encode())
    for path in made_from:
        with open(path, "rb") as file:
            state.update(file.read())
    try:
        with open(stamp, encoding="ascii") as file:
            current = file.read() == state.hexdigest()
    except FileNotFoundError:
        current = False
    if not current:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    yield not current
    with open(stamp, "w", encoding="ascii") as file:
        file.write(state.hexdigest())
