"""The four groups of figures: what is done on each side."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator

from engine.inodes import Inode, Owner
from engine.repository import Repository
from engine.snapshots import encode_snapshot, make_snapshot
from engine.store import Db, Writer
from engine.vfs import Vfs
from scripts.bench_figures import US, Bench, Side
from scripts.bench_rivals import RIVALS, image_of, ours, theirs
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

MANY = 1000
"""How many snapshots the store holds that is mounted beside the one with a single one."""

OPERATIONS = {
    "find": "find . >/dev/null",
    "grep -rc": "grep -rc mutex_lock . | cat >/dev/null",  # to /dev/null itself it stops early
    "tar": "tar -c . | cat >/dev/null",  # to /dev/null itself it reads no file
}
SAME_TREE = (
    "find . -printf '%y %m %p %l\\n' | sort | md5sum",
    "find . -type f -print0 | sort -z | xargs -0 md5sum | md5sum",
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


# ---------------------------------------------------------------- mount


def add_snapshots(store: str, number: int) -> None:
    """Adds snapshots of the tree under the ref `tree`, told apart by their messages."""
    with Repository.open(store) as repository:
        root = repository.snapshot(repository.resolve("tree")).root

        def change(writer: Writer) -> None:
            for at in range(number):
                identifier, record = encode_snapshot(make_snapshot(root, (), f"number {at}"))
                writer.put(Db.SNAPSHOTS, identifier, record)

        repository.store.write(change)


def snapshot_in(at: str) -> str:
    """Returns the directory in which a mount shows the snapshot of the ref `tree`."""
    snapshots = os.path.join(at, "snapshots")
    return os.path.join(snapshots, os.readlink(os.path.join(snapshots, "tree")))


def session_in(store: str, snapshot: str) -> str:
    """Makes a session on the snapshot at this path and returns where the mount shows it."""
    at = os.path.dirname(os.path.dirname(snapshot))
    mountctl(store, "session", "create", "work", os.path.basename(snapshot))
    return os.path.join(at, "sessions", "work")


def next_snapshot(store: str, session: str) -> str:
    """Changes nine files of a session, commits, and returns where the mount shows the snapshot."""
    found = itertools.islice(files_below(session), 9)
    for path in found:
        exchange(path, os.O_WRONLY, b"/* %020d */" % time.monotonic_ns())
    made = mountctl(store, "commit", os.path.basename(session), "--json").output
    at = os.path.dirname(os.path.dirname(session))
    return os.path.join(at, "snapshots", json.loads(made)["snapshot"])


def files_below(at: str) -> Iterator[str]:
    """Yields the files of 4 KiB and more below a directory."""
    for directory, _, names in os.walk(at):
        for path in (os.path.join(directory, name) for name in names):
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) >= 4096:
                yield path


def pass_over(at: str) -> dict[str, float]:
    """Does find, grep and tar on a tree, warm.

    The passes that do not count come directly before: the tree of five filesystems need not fit in
    memory at once. There are two, as the kernel asks for a file's attributes again after reading.
    """
    for operation in ("grep -rc", "tar"):
        shell(OPERATIONS[operation], cwd=at, strict=True)
    return {
        f"{operation}, warm": shell(command, cwd=at, strict=True).seconds
        for operation, command in OPERATIONS.items()
    }


def measure_mount(bench: Bench) -> None:
    """Mounting, then find, grep and tar as first and as later passes, beside all others."""
    many = bench.path("store-many")
    shutil.copytree(bench.store, many)
    add_snapshots(many, MANY - 1)
    others = [name for name in bench.rivals if RIVALS[name].mount is not None]
    image = bench.path("image")
    if "squashfuse" in others:
        image_of(bench.tree, image)

    @contextlib.contextmanager
    def shown(name: str, store: str) -> Iterator[tuple[str, float]]:
        """Gives where a side shows the tree, and how long it took to mount."""
        at = bench.path("on-" + name)
        if name == "disk":
            yield bench.tree, 0.0
        elif name in others:
            with theirs(name, image if name == "squashfuse" else bench.tree, at) as seconds:
                yield at, seconds
        else:
            with ours(store, at) as seconds:
                yield snapshot_in(at), seconds

    def mount(name: str, store: str) -> dict[str, float]:
        with shown(name, store) as (at, seconds):
            listing = run("ls", at).seconds
            finding = shell(OPERATIONS["find"], cwd=at, strict=True).seconds
        return {"mount": seconds, "ls of the tree after it": listing,
                "mount, ls and first find": seconds + listing + finding}  # fmt: skip

    def first_pass(name: str) -> dict[str, float]:
        found = {}
        for operation, command in OPERATIONS.items():
            read_all(bench.store if name == US else image if name == "squashfuse" else bench.tree)
            with shown(name, bench.store) as (at, _):
                seconds = shell(command, cwd=at, strict=True).seconds
            found[f"{operation}, first pass after a mount"] = seconds
        return found

    stores = {f"{US}, {MANY:,} snapshots": many, f"{US}, 1 snapshot": bench.store}
    sides: dict[str, Side] = {
        name: functools.partial(mount, name, stores.get(name, "")) for name in (*stores, *others)
    }
    bench.compare("mount", sides, bench.runs)
    shutil.rmtree(many)

    everybody = (US, "disk", *others)
    sides = {name: functools.partial(first_pass, name) for name in everybody}
    bench.compare("mount", sides, min(bench.runs, 3))

    with contextlib.ExitStack() as stack:
        places = {name: stack.enter_context(shown(name, bench.store))[0] for name in everybody}
        for script in SAME_TREE:
            said = {shell(script, cwd=at, strict=True).output: name for name, at in places.items()}
            if len(said) > 1:
                raise CannotError(f"not the same tree: {', '.join(said.values())}: {script}")
        in_session = session_in(bench.store, places[US])
        sides = {name: functools.partial(pass_over, at) for name, at in places.items()}
        sides[f"{US}, a session"] = functools.partial(pass_over, in_session)
        bench.compare("mount", sides, bench.runs)

        def grep_elsewhere(at: str) -> dict[str, float]:
            here = next_snapshot(bench.store, in_session) if at == places[US] else at
            seconds = shell(OPERATIONS["grep -rc"], cwd=here, strict=True).seconds
            return {"grep -rc, first in a snapshot nine files away": seconds}

        sides = {name: functools.partial(grep_elsewhere, places[name]) for name in (US, "disk")}
        bench.compare("mount", sides, bench.runs)


# ---------------------------------------------------------------- build


RUN = "mountctl run"
"""A session by way of the kernel's overlayfs."""


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
        mountctl(store, "session", "rm", "build")
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
    return (PROGRAM, "--store", store, "run", "--overlay", "build", "--") if name == RUN else ()


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
    store, at, copy = bench.store, bench.path("on-commit"), bench.path("copy")
    deepest = "find . -type f -size +4k -printf '%d %P\\n' | sort -n | tail -n 1 | cut -d' ' -f2-"
    changed = shell(deepest, cwd=bench.tree).output.rstrip("\n")
    run("cp", "-a", bench.tree, copy)
    shell("git init -q && git add -A -f && git commit -q -m first && git status -s", cwd=copy)
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
            mountctl(store, "session", "rm", name)
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


GROUPS: dict[str, Callable[[Bench], None]] = {
    "store": measure_store,
    "mount": measure_mount,
    "build": measure_build,
    "commit": measure_commit,
}
