"""The group `checkout`: what leaves a store, and comes into it: directories, archives, commits."""

import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator

from engine.repository import Repository
from scripts.bench_driver import BIG, make_big_file
from scripts.bench_engine import APART, files_below, fresh_store
from scripts.bench_figures import US, Bench, Sample, Side
from scripts.bench_setting import (
    ENVIRONMENT,
    PROGRAM,
    CannotError,
    mountctl,
    note,
    read_all,
    run,
    shell,
)
from scripts.bench_volume import MANY_FILES

COMMITS, FILES_IN_COMMITS, CHANGED = 5_000, 400, 4
"""The history that is imported: how long, of how many files, how many changed by a commit."""
NOISE, NOISE_FILES = 1 << 30, 16
"""How many bytes a bundle carries, in how many files."""
SMALL = 100
"""What the large things are divided by where `engine_files` are not many."""
SWITCHES = 20
"""How many times a turn switches in the engine; and git, which starts each time, a tenth of it."""


def measure_checkout(bench: Bench) -> None:
    """Directories of the big tree and of a large file, switches, archives, commits, bundles."""
    if "git" not in bench.rivals:
        raise CannotError("git is needed")
    small = 1 if bench.engine_files >= MANY_FILES else SMALL
    measure_directory(bench)
    measure_large_file(bench, BIG // small)
    measure_switch(bench)
    measure_archives(bench)
    measure_history(bench, COMMITS // small)
    measure_bundles(bench, NOISE // small)


def remove(path: str) -> None:
    """Removes what a turn has made; it is there, or was not measured."""
    if not os.path.exists(path):
        raise CannotError(f"nothing was made at {path}")
    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


# ---------------------------------------------------------------- directories


def measure_directory(bench: Bench) -> None:
    """All of the big tree as a new directory, from what is in the page cache."""
    store, git, target = bench.store, os.path.join(bench.copy, ".git"), bench.path("out")
    measure = "the tree as a directory"

    def check_out() -> dict[str, float]:
        read_all(store)
        ran = mountctl(store, "checkout", "tree", target)
        remove(target)
        return {measure: ran.seconds, "peak memory of that, MB": ran.peak}

    def add_worktree() -> dict[str, float]:
        read_all(git)
        ran = run("git", "worktree", "add", "-q", "--detach", target, cwd=bench.copy)
        remove(target)
        run("git", "worktree", "prune", cwd=bench.copy)
        return {measure: ran.seconds, "peak memory of that, MB": ran.peak}

    def copy() -> dict[str, float]:
        read_all(bench.tree)
        seconds = run("cp", "-a", bench.tree, target).seconds
        remove(target)
        return {measure: seconds}

    sides: dict[str, Side] = {US: check_out, "git worktree add": add_worktree, "cp -a": copy}
    bench.compare("checkout", sides, bench.runs)


def measure_large_file(bench: Bench, size: int) -> None:
    """A large file, half of whose chunks are compressed, from what is in the page cache."""
    source, target = bench.fresh("large"), bench.path("out")
    note(f"making a file of {size / 2**20:,.0f} MiB")
    make_big_file(bench, os.path.join(source, "file"), size)
    store = bench.imported("store-large", source)

    def check_out() -> dict[str, float]:
        read_all(store)
        seconds = mountctl(store, "checkout", "tree", target).seconds
        remove(target)
        return {"a large file as a directory": seconds}

    def copy() -> dict[str, float]:
        read_all(source)
        seconds = run("cp", "-a", source, target).seconds
        remove(target)
        return {"a large file as a directory": seconds}

    bench.compare("checkout", {US: check_out, "cp -a": copy}, bench.runs)
    for path in (source, store):
        remove(path)


# ---------------------------------------------------------------- switches


def measure_switch(bench: Bench) -> None:
    """A directory of the big tree goes to and fro between two snapshots ten files apart."""
    store, target, copy = fresh_store(bench, "store-switch"), bench.path("switched"), bench.copy
    chosen = random.Random(4).sample(files_below(bench.tree), APART)
    measure = "switch to a snapshot ten files away"
    with Repository.open(store) as repository:
        first = repository.resolve("tree")
        workspace = repository.workspace(first)
        for path in chosen:
            workspace.write(path, b"/* another */")
        second = workspace.commit(ref="second").snapshot
        if second is None:
            raise CannotError("a commit made no snapshot")
        roots = [repository.snapshot(each).root for each in (first, second)]
        repository.check_out(roots[0], target, snapshot=first)
        places = itertools.cycle([(roots[1], second), (roots[0], first)])

        def in_engine() -> dict[str, Sample]:
            found = []
            for _ in range(SWITCHES):
                root, snapshot = next(places)
                started = time.perf_counter()
                report = repository.checkouts.switch(target, root, snapshot=snapshot)
                found.append(time.perf_counter() - started)
                if report.written != APART:
                    raise CannotError(f"a switch wrote {report.written} of {APART} files")
            return {f"{measure}, in the engine": found, f"{measure}, mountctl": by_command()}

        def by_command() -> list[float]:
            return [
                mountctl(store, "checkout", "--switch", name, target).seconds
                for name in ("second", "tree") * (SWITCHES // 20)
            ]

        for path in chosen:
            with open(os.path.join(copy, path), "wb") as file:
                file.write(b"/* another */")
        shell("git branch ten-before && git commit -q -a -m ten && git branch ten-after", cwd=copy)

        def in_git() -> dict[str, Sample]:
            found: list[float] = [
                run("git", "checkout", "-q", name, cwd=copy).seconds
                for name in ("ten-before", "ten-after") * (SWITCHES // 20)
            ]
            return {f"{measure}, in the engine": found, f"{measure}, mountctl": found}

        bench.compare("checkout", {US: in_engine, "git checkout": in_git}, bench.runs)
    for path in (store, target):
        remove(path)


# ---------------------------------------------------------------- archives


def measure_archives(bench: Bench) -> None:
    """The big tree as a tar archive, and from one."""
    store, archive, there = bench.store, bench.path("tree.tar"), bench.path("unpacked")
    new = bench.path("store-of-tar")

    def ours() -> dict[str, float]:
        read_all(store)
        out = mountctl(store, "export", "tree", "--tar", archive).seconds
        mountctl(new, "init")
        into = mountctl(new, "import", "--tar", archive, "--ref", "tree").seconds
        remove(new)
        remove(archive)
        return {"tar of the tree, written": out, "tar of the tree, read": into}

    def theirs() -> dict[str, float]:
        read_all(bench.tree)
        out = run("tar", "-cf", archive, "-C", bench.tree, ".").seconds
        os.mkdir(there)
        into = run("tar", "-xf", archive, "-C", there).seconds
        remove(there)
        remove(archive)
        return {"tar of the tree, written": out, "tar of the tree, read": into}

    bench.compare("checkout", {US: ours, "GNU tar": theirs}, bench.runs)


# ---------------------------------------------------------------- commits of git


def commands(commits: int) -> Iterator[bytes]:
    """Yields what `git fast-import` makes a history of: text files, some changed by each commit."""
    chosen = random.Random(5)
    words = [b"%x" % chosen.getrandbits(24) for _ in range(2_000)]

    def text() -> bytes:
        return b"\n".join(b" ".join(chosen.choices(words, k=8)) for _ in range(100)) + b"\n"

    for number in range(commits):
        yield b"commit refs/heads/main\nmark :%d\n" % (number + 1)
        yield b"committer bench <bench@localhost> %d +0000\n" % (1_700_000_000 + number * 60)
        yield b"data 6\ncommit\n"
        names = range(FILES_IN_COMMITS)
        for name in names if not number else chosen.sample(names, CHANGED):
            data = text()
            yield b"M 100644 inline part-%02d/deep/file-%03d\n" % (name % 20, name)
            yield b"data %d\n%s\n" % (len(data), data)
        yield b"\n"


def measure_history(bench: Bench, commits: int) -> None:
    """A history of git into an empty store; out of git and into git again."""
    source, store, copy = bench.fresh("history"), bench.path("store-history"), bench.path("again")
    run("git", "init", "-q", "--bare", "-b", "main", source)
    with subprocess.Popen(
        ["git", "fast-import", "--quiet"], cwd=source, env=ENVIRONMENT, stdin=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        child.stdin.writelines(commands(commits))
    if child.returncode:
        raise CannotError("git fast-import failed")
    count = run("git", "rev-list", "--count", "main", cwd=source).output.strip()
    if count != str(commits):
        raise CannotError(f"git has made {count} commits of {commits}")

    def ours() -> dict[str, float]:
        read_all(source)
        mountctl(store, "init")
        ran = mountctl(store, "git", "import", source)
        remove(store)
        return {"a history of git": ran.seconds, "peak memory of the history, MB": ran.peak}

    def theirs() -> dict[str, float]:
        read_all(source)
        run("git", "init", "-q", "--bare", "-b", "main", copy)
        again = 'git fast-export --all | git -C "$1" fast-import --quiet'
        seconds = shell(again, copy, cwd=source).seconds
        remove(copy)
        return {"a history of git": seconds}

    bench.compare("checkout", {US: ours, "fast-export, fast-import": theirs}, bench.runs)
    remove(source)


# ---------------------------------------------------------------- bundles


def measure_bundles(bench: Bench, size: int) -> None:
    """A bundle of noise, which nothing compresses, written and applied on one core."""
    source, store, new = bench.fresh("noise"), bench.path("store-noise"), bench.path("store-new")
    bundle, copy = bench.path("noise.flpkg"), bench.path("noise.copy")
    for number in range(NOISE_FILES):
        with open(os.path.join(source, f"file-{number}"), "wb") as file:
            file.write(random.Random(number).randbytes(size // NOISE_FILES))
    bench.imported("store-noise", source)
    remove(source)
    core = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
    gigabytes = size / 1e9
    written, applied = "bundle written, each GB", "bundle applied, each GB"

    def ours() -> dict[str, float]:
        read_all(store)
        out = run(*core, PROGRAM, "--store", store, "bundle", "create", bundle, "tree").seconds
        mountctl(new, "init")
        into = run(*core, PROGRAM, "--store", new, "bundle", "apply", bundle).seconds
        remove(new)
        return {written: out / gigabytes, applied: into / gigabytes}

    def theirs() -> dict[str, float]:
        seconds = run(*core, "cp", bundle, copy).seconds / gigabytes
        remove(copy)
        return {written: seconds, applied: seconds}

    bench.compare("checkout", {US: ours, "cp": theirs}, bench.runs)
    for path in (bundle, store):
        remove(path)
