"""The groups `store`, `build` and `commit`: what is done on each side."""

import contextlib
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator

from engine.mounted.inodes import Inode
from engine.mounted.vfs import Vfs
from engine.repository import Repository
from engine.storage.nodes import Owner
from scripts.bench_figures import RUN, US, Bench, Side
from scripts.bench_rivals import RIVALS, ours, theirs
from scripts.bench_setting import (
    PROGRAM,
    ROOT,
    CannotError,
    mountctl,
    read_all,
    run,
    shell,
    size_of,
)

# ---------------------------------------------------------------- store


def measure_store(bench: Bench) -> None:
    """Import, import again, memory and size, beside git and find."""
    tree, git, store = bench.tree, bench.path("git"), bench.path("store")

    def import_it() -> dict[str, float]:
        shutil.rmtree(store, ignore_errors=True)
        mountctl(store, "init")
        read_all(tree)
        ran = mountctl(store, "import", tree, "--ref", "tree")
        return {"import": ran.seconds, "peak memory of the import, MB": ran.peak}

    def add_it() -> dict[str, float]:
        run("git", "init", "-q", "--bare", bench.fresh("git"))
        read_all(tree)
        add = 'g="git --git-dir=$1 --work-tree=."; $g add -A -f && $g commit -q -m import'
        ran = shell(add, git, cwd=tree)
        return {"import": ran.seconds, "peak memory of the import, MB": ran.peak}

    def import_again() -> dict[str, float]:
        return {"import, nothing changed": mountctl(store, "import", tree, "--ref", "tree").seconds}

    def list_it() -> dict[str, float]:
        return {"import, nothing changed": shell('find "$1" -ls >/dev/null', tree).seconds}

    def size(path: str, *first: str) -> dict[str, float]:
        if first:
            run(*first)
        _, apparent, used = size_of(path)
        return {"store on the disk, MB": used / 1e6, "store by its length, MB": apparent / 1e6}

    if "git" in bench.rivals:
        bench.compare("store", {US: import_it, "git": add_it}, bench.runs)
        gc = functools.partial(size, git, "git", "--git-dir", git, "gc", "-q")
        sizes = {US: functools.partial(size, store), "git": functools.partial(size, git)}
        bench.compare("store", {**sizes, "git after git gc": gc}, 1)
    else:
        bench.compare("store", {US: import_it}, bench.runs)
    bench.store = store
    import_again()
    bench.compare("store", {US: import_again, "find -ls": list_it}, bench.runs)


# ---------------------------------------------------------------- build


def build(at: str, *by: str) -> dict[str, float]:
    """Builds XZ Utils and runs its tests; `by` are the words before each command."""
    configure = run(*by, "./configure", "--disable-nls", "--disable-static", cwd=at).seconds
    make = run(*by, "make", f"-j{os.cpu_count()}", cwd=at).seconds
    check = run(*by, "make", "check", cwd=at).seconds
    return {"configure": configure, "make": make, "configure and make": configure + make,
            "make check": check}  # fmt: skip


def small_things(at: str) -> dict[str, float]:
    """Creates, reads, and removes 1,000 files of 4 KiB."""
    paths = [os.path.join(at, f"small-file-{number}") for number in range(1000)]
    steps: dict[str, Callable[[str], object]] = {
        "create 1,000 files": lambda path: exchange(path, os.O_WRONLY | os.O_CREAT, b"x" * 4096),
        "read 1,000 files": lambda path: exchange(path, os.O_RDONLY),
        "remove 1,000 files": os.unlink,
    }
    found = {}
    for name, step in steps.items():
        started = time.perf_counter()
        for path in paths:
            step(path)
        found[name] = time.perf_counter() - started
    return found


def exchange(path: str, flags: int, data: bytes = b"") -> None:
    """Opens a file, writes `data` at its beginning, or reads if there is none, and closes it."""
    fd = os.open(path, flags)
    try:
        os.pwrite(fd, data, 0) if data else os.read(fd, 65536)
    finally:
        os.close(fd)


@contextlib.contextmanager
def writable(bench: Bench, name: str, store: str, source: str, at: str) -> Iterator[str]:
    """Gives a fresh tree to write in: a session, a copy, or something mounted on a copy.

    The store has `source` under the ref `tree` and is mounted on `at`.
    """
    if name in {US, RUN}:
        mountctl(store, "session", "create", "build", "tree")
        yield os.path.join(at, "sessions", "build")
        mountctl(store, "session", "rm", "build", "--force")
        return
    copy = bench.fresh("copy-for-" + name)
    run("cp", "-a", source + "/.", copy)
    if name == "disk":
        yield copy
    else:
        written = bench.fresh("written-by-" + name)
        with theirs(name, copy, bench.path("on-" + name), written):
            yield bench.path("on-" + name)


def words_before(name: str, store: str) -> tuple[str, ...]:
    """Returns what stands before a command in the tree that `writable` gives."""
    return (
        (PROGRAM, "--store", store, "run", "--mode", "overlay", "build", "--")
        if name == RUN
        else ()
    )


def measure_build(bench: Bench) -> None:
    """A C project built and tested in a session, on the disk and on others, and small things."""
    source, at = bench.path("source"), bench.path("on-build")
    run(os.path.join(ROOT, "scripts", "fetch-source"), "xz-utils", source)
    store = bench.imported("store-build", source)
    writers = [name for name in bench.rivals if RIVALS[name].writes]

    def side(name: str, work: Callable[..., dict[str, float]]) -> dict[str, float]:
        with writable(bench, name, store, source, at) as tree:
            return work(tree, *words_before(name, store))

    everybody = (US, "disk", *writers)
    with ours(store, at):
        for work, names in ((build, (US, RUN, *everybody[1:])), (small_things, everybody)):
            sides: dict[str, Side] = {name: functools.partial(side, name, work) for name in names}
            bench.compare("build", sides, bench.runs)


# ---------------------------------------------------------------- commit


def measure_commit(bench: Bench) -> None:
    """A commit after one file of the big tree has changed, and writable copies, beside git."""
    if "git" not in bench.rivals:
        raise CannotError("git is needed")
    store, at, copy = bench.store, bench.path("on-commit"), bench.copy
    deepest = "find . -type f -size +4k -printf '%d %P\\n' | sort -n | tail -n 1 | cut -d' ' -f2-"
    changed = shell(deepest, cwd=bench.tree).output.rstrip("\n")
    for name in ("engine", "mounted"):
        mountctl(store, "session", "create", name, "tree")
    texts = (b"/* %09d */" % number for number in itertools.count())

    def commit_in_engine(repository: Repository, vfs: Vfs) -> float:
        inode: Inode | None = vfs.session("engine").overlay.root
        for name in os.fsencode(changed).split(b"/"):
            inode = inode.lookup(name) if inode else None
        if inode:
            inode.write(0, next(texts))
        vfs.drop_session("engine")
        started = time.perf_counter()
        report = repository.commit("engine", message="one file")
        seconds = time.perf_counter() - started
        if not report.changed:
            raise CannotError("a commit in the engine found nothing to commit")
        return seconds

    def commit_ours(repository: Repository, vfs: Vfs) -> dict[str, float]:
        in_engine = commit_in_engine(repository, vfs)
        exchange(os.path.join(at, "sessions", "mounted", changed), os.O_WRONLY, next(texts))
        by_command = mountctl(store, "commit", "mounted", "-m", "one file").seconds
        return {"commit of one file, in the engine": in_engine,
                "commit of one file, mountctl": by_command}  # fmt: skip

    def commit_git() -> dict[str, float]:
        exchange(os.path.join(copy, changed), os.O_WRONLY, next(texts))
        seconds = run("git", "commit", "-q", "-a", "-m", "one file", cwd=copy).seconds
        return {"commit of one file, in the engine": seconds,
                "commit of one file, mountctl": seconds}  # fmt: skip

    def copy_ours() -> dict[str, float]:
        new = mountctl(store, "session", "create", "new", "tree").seconds
        fork = mountctl(store, "session", "fork", "mounted", "fork").seconds
        for name in ("new", "fork"):
            mountctl(store, "session", "rm", name, "--force")
        return {"a writable copy of the tree": new, "a fork of a session": fork}

    def copy_git() -> dict[str, float]:
        worktree = bench.path("worktree")
        seconds = run("git", "worktree", "add", "-q", "--detach", worktree, cwd=copy).seconds
        shutil.rmtree(worktree)
        run("git", "worktree", "prune", cwd=copy)
        return {"a writable copy of the tree": seconds, "a fork of a session": seconds}

    with ours(store, at), Repository.open(store) as repository:
        vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
        with contextlib.closing(vfs):
            commit = functools.partial(commit_ours, repository, vfs)
            commit()  # the first one reads the tree's nodes
            bench.compare("commit", {US: commit, "git commit -a": commit_git}, 2 * bench.runs)
        bench.compare("commit", {US: copy_ours, "git worktree add": copy_git}, min(bench.runs, 3))
