"""The group `engine`: the state engine without a mount, as a search loop uses it.

Beside git on the same tree; then the same with few and many files, and with a short and a long
history. What is measured by volume is in `bench_volume`.
"""

import contextlib
import functools
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator

import lmdb

from engine.ids import SnapshotId
from engine.repository import Repository
from scripts.bench_figures import US, Bench, Sample, Side
from scripts.bench_setting import CannotError, run, shell
from scripts.bench_trees import add_snapshot, path_of
from scripts.bench_volume import (
    FEW,
    measure_collection,
    measure_forks,
    measure_import,
    measure_names,
)

SIZES = (10_000, 100_000, 1_000_000)
"""How many files the largest tree may have."""
FEWEST = 1_000
APART = 10
"""How many files differ between the two snapshots that are compared and restored."""
OFTEN, SELDOM = 400, 100
"""How many times a turn does what waits for no disk, and what does."""
_WARM = 100


def measure_engine(bench: Bench) -> None:
    """Forks, commits, restores and diffs; what they cost as trees and histories grow; volume."""
    if bench.engine_files not in SIZES:
        raise CannotError(f"the largest tree has one of {SIZES} files")
    paths = files_below(bench.tree)
    measure_loop(bench, paths)
    measure_files(bench)
    measure_names(bench)
    measure_forks(bench, paths)
    store = fresh_store(bench, "store-history")
    measure_collection(bench, store, paths)
    measure_history(bench, store, paths)
    shutil.rmtree(store)
    measure_import(bench)


def files_below(tree: str) -> list[str]:
    """Returns the paths of the files in a directory, sorted."""
    found = []
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                found.append(os.path.relpath(path, tree))
    if len(found) < APART:
        raise CannotError(f"too few files in {tree}")
    return sorted(found)


def fresh_store(bench: Bench, name: str) -> str:
    """Makes a copy of the store of the big tree."""
    run("cp", "-a", bench.store, bench.path(name))
    return bench.path(name)


class Loop:
    """What a search loop does with one store, from one snapshot on. Samples are in seconds."""

    def __init__(
        self, repository: Repository, snapshot: SnapshotId, choose: Callable[[], str]
    ) -> None:
        """`choose` gives the path of any file of the snapshot, another one each time."""
        self._repository, self._choose = repository, choose
        self._numbers = itertools.count()
        self._workspace = repository.workspace(snapshot)
        self._start = snapshot
        few = [choose() for _ in range(FEW)]
        self._choose_again = functools.partial(random.Random(6).choice, few)
        apart: set[str] = set()
        while len(apart) < APART:
            apart.add(choose())
        for path in sorted(apart):
            self._write(path)
        self._other = self._workspace.commit().snapshot
        for _ in range(_WARM):
            self._commit(durable=False)
        repository.flush()

    def _write(self, path: str) -> None:
        self._workspace.write(path, b"/* %012d */" % next(self._numbers))

    def _commit(self, *, durable: bool, again: bool = False) -> None:
        self._write(self._choose_again() if again else self._choose())
        if not self._workspace.commit(durable=durable).changed:
            raise CannotError("a commit found nothing to commit")

    def _diff(self) -> None:
        one, other = (self._repository.snapshot(at).root for at in (self._start, self._other))
        found = sum(1 for _ in self._repository.diff(one, other))
        if found != APART:
            raise CannotError(f"a diff found {found} of {APART} files")

    def durably(self) -> dict[str, Sample]:
        """Writes a file and commits, with a sync."""
        step = functools.partial(self._commit, durable=True)
        return {"write a file, commit durably": timed(SELDOM, step)}

    def __call__(self) -> dict[str, Sample]:
        """Does everything but that, many times."""
        places = itertools.cycle((self._start, self._other))
        workspace = self._workspace.fork()
        found: dict[str, Sample] = {}
        steps: dict[str, Callable[[], object]] = {
            "fork": workspace.fork,
            "write a file, commit": functools.partial(self._commit, durable=False),
            "write one of 50 files, commit": functools.partial(
                self._commit, durable=False, again=True
            ),
            "open a snapshot": lambda: self._repository.workspace(self._start),
            "restore": lambda: workspace.restore(next(places)),
            "diff of ten files": self._diff,
        }
        for measure, step in steps.items():
            found[measure] = timed(OFTEN, step)
            self._repository.flush()
        return found


def timed(times: int, step: Callable[[], object]) -> list[float]:
    """Returns how long each of so many calls takes, in seconds."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return found


@contextlib.contextmanager
def loop(store: str, paths: list[str], snapshot: SnapshotId | None = None) -> Iterator[Loop]:
    """Opens a store; the loop starts from the ref `tree` unless it is told."""
    chosen = random.Random(1)
    with Repository.open(store) as repository:
        start = repository.resolve("tree") if snapshot is None else snapshot
        yield Loop(repository, start, lambda: chosen.choice(paths))


# ---------------------------------------------------------------- beside git


def measure_loop(bench: Bench, paths: list[str]) -> None:
    """The big tree, beside git in a copy of it, and one key in LMDB put durably."""
    store = fresh_store(bench, "store-loop")
    git = Git(bench.copy, paths) if "git" in bench.rivals else None
    with loop(store, paths) as ours, bare(bench.fresh("bare")) as put:
        sides: dict[str, Side] = {US: ours}
        durable: dict[str, Side] = {US: ours.durably, "LMDB transaction": put}
        if git is not None:
            sides["git"] = git
            durable["git"] = git.commit
        bench.compare("engine", durable, bench.runs)
        bench.compare("engine", sides, bench.runs)
    for path in (store, bench.path("bare")):
        shutil.rmtree(path)


@contextlib.contextmanager
def bare(directory: str) -> Iterator[Side]:
    """Gives a side that puts one key into an LMDB of its own, and syncs."""
    environment = lmdb.Environment(directory, map_size=1 << 30)
    numbers = itertools.count()

    def put() -> None:
        with environment.begin(write=True) as transaction:
            transaction.put(b"%032d" % next(numbers), b"value" * 20)

    with contextlib.closing(environment):
        yield lambda: {"write a file, commit durably": timed(SELDOM, put)}


class Git:
    """The same in a copy of the tree. git syncs nothing by default but what it packs."""

    _TIMES = 3

    def __init__(self, copy: str, paths: list[str]) -> None:
        self._copy, self._chosen = copy, random.Random(2)
        self._paths = paths
        self._numbers = itertools.count()
        self._start = self._head()
        for path in self._chosen.sample(paths, APART):
            self._write(path)
        shell("git commit -q -a -m ten", cwd=copy)
        self._other = self._head()

    def _head(self) -> str:
        return run("git", "rev-parse", "HEAD", cwd=self._copy).output.strip()

    def _write(self, path: str) -> None:
        with open(os.path.join(self._copy, path), "wb") as file:
            file.write(b"/* %012d */" % next(self._numbers))

    def commit(self) -> dict[str, Sample]:
        """`git commit -a` after a file was written."""
        return {"write a file, commit durably": self._commits()}

    def _commits(self) -> list[float]:
        found = []
        for _ in range(self._TIMES):
            self._write(self._chosen.choice(self._paths))
            found.append(self._seconds("commit", "-q", "-a", "-m", "one"))
        return found

    def _seconds(self, *command: str) -> float:
        return run("git", *command, cwd=self._copy).seconds

    def __call__(self) -> dict[str, Sample]:
        """`commit -a`, `reset --hard` and `diff-tree`."""
        found: dict[str, Sample] = {"write a file, commit": self._commits()}
        self._seconds("reset", "-q", "--hard", self._start)
        found["restore"] = [
            self._seconds("reset", "-q", "--hard", place)
            for place in [self._other, self._start] * self._TIMES
        ]
        found["diff of ten files"] = [
            self._seconds("diff-tree", "-r", self._start, self._other) for _ in range(self._TIMES)
        ]
        return found


# ---------------------------------------------------------------- few and many


def compare_both(bench: Bench, group: str, sides: dict[str, Loop]) -> None:
    """Measures loops in turn, by a name each."""
    bench.compare(group, {f"{US}, {name}": side for name, side in sides.items()}, bench.runs)
    bench.compare(
        group, {f"{US}, {name}": side.durably for name, side in sides.items()}, bench.runs
    )


def measure_files(bench: Bench) -> None:
    """The same in trees with few and many files, as many in a directory as directories."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for files in (FEWEST, bench.engine_files):
            directories = max(at for at in range(1, math.isqrt(files) + 1) if files % at == 0)
            each = files // directories
            store = bench.path(f"store-of-{files}")
            with Repository.create(store) as repository:
                snapshot = add_snapshot(repository, directories, each)
            stack.callback(shutil.rmtree, store)
            paths = [path_of(at, file) for at in range(directories) for file in range(each)]
            sides[f"{files:,} files"] = stack.enter_context(loop(store, paths, snapshot))
        compare_both(bench, "engine, by files", sides)


def measure_history(bench: Bench, long: str, paths: list[str]) -> None:
    """The same in a store with one commit, and in one with many, from the last one on."""
    short = fresh_store(bench, "store-short")
    count = bench.engine_files // 100
    with loop(short, paths) as one, loop(long, paths) as many:
        sides = {"1 commit": one, f"{count:,} commits": many}
        compare_both(bench, "engine, by commits", sides)
    shutil.rmtree(short)
