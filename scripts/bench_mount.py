"""The group `mount`: mounting, first passes and warm ones, beside all others."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine.repository import Repository
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from scripts.bench_figures import US, Bench, Side
from scripts.bench_groups import exchange
from scripts.bench_rivals import RIVALS, ours, theirs
from scripts.bench_setting import CannotError, mountctl, read_all, run, shell

MANY = 1000
"""How many snapshots the store holds that is mounted beside the one with a single one."""

OPERATIONS = {
    "find": "find . >/dev/null",
    "grep -rc": "grep -rc mutex_lock . | cat >/dev/null",  # to /dev/null itself it stops early
    "tar": "tar -c . | cat >/dev/null",  # to /dev/null itself it reads no file
}
_SOURCES = """
import os
for at, _, names in os.walk("."):
    for name in names:
        if name.endswith((".c", ".py")):
            %s
"""
"""Finds and reads all sources, as a compiler of many of them does."""
SOURCES = {
    "sources read by os.open": _SOURCES
    % """
            fd = os.open(os.path.join(at, name), os.O_RDONLY)
            while os.read(fd, 1 << 20):
                pass
            os.close(fd)""",
    # Python's own open() asks what it has opened whether it is a terminal: an ioctl each.
    "sources read by open": _SOURCES
    % """
            with open(os.path.join(at, name), "rb") as file:
                file.read()""",
}
# Without "." itself: it is the one thing that restic makes up.
SAME_TREE = (
    "find . -mindepth 1 -printf '%y %m %p %l\\n' | sort | md5sum",
    "find . -type f -print0 | sort -z | xargs -0 md5sum | md5sum",
)


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


@dataclass(frozen=True)
class Index:
    """What git knows of a tree, once for all who show it, and an index of each one's own."""

    directory: str

    @classmethod
    def of(cls, tree: str, directory: str) -> "Index":
        """Makes it in a new directory."""
        run("git", "init", "-q", "--bare", directory)
        add = 'g="git --git-dir=$1 --work-tree=."; $g add -A -f && $g commit -q -m all'
        shell(add, directory, cwd=tree)
        return cls(directory)

    def status(self, name: str, at: str) -> float:
        """Has git compare a tree with its index; returns what that took once it is known."""
        own = os.path.join(self.directory, "index-of-" + name.replace(" ", "-"))
        command = 'GIT_INDEX_FILE=$2 git --git-dir="$1" --work-tree=. status --porcelain'
        if not os.path.exists(own):
            shutil.copy(os.path.join(self.directory, "index"), own)
            shell(command, self.directory, own, cwd=at)
        ran = shell(command, self.directory, own, cwd=at, strict=True)
        if ran.output:
            raise CannotError(f"git finds changes in {name}: {ran.output[:200]}")
        return ran.seconds


def pass_over(name: str, at: str, index: Index | None) -> dict[str, float]:
    """Does find, grep and tar on a tree, reads its sources, and asks git, all of it warm.

    The passes that do not count come directly before: the tree of six filesystems need not fit in
    memory at once. There are two, as the kernel asks for a file's attributes again after reading.
    """
    for operation in ("grep -rc", "tar"):
        shell(OPERATIONS[operation], cwd=at, strict=True)
    found = {
        f"{operation}, warm": shell(command, cwd=at, strict=True).seconds
        for operation, command in OPERATIONS.items()
    }
    for operation, program in SOURCES.items():
        ran = run(sys.executable, "-I", "-S", "-c", program, cwd=at, strict=True)
        found[f"{operation}, warm"] = ran.seconds
    if index is not None:
        found["git status, warm"] = index.status(name, at)
    return found


def measure_mount(bench: Bench) -> None:
    """Mounting, then find, grep and tar as first and as later passes, beside all others."""
    many = bench.path("store-many")
    shutil.copytree(bench.store, many)
    add_snapshots(many, MANY - 1)
    others = [name for name in bench.rivals if RIVALS[name].mount is not None]
    packed = {}
    for name in others:
        if pack := RIVALS[name].pack:
            packed[name] = bench.path("packed-" + name)
            pack(bench.tree, packed[name])

    @contextlib.contextmanager
    def shown(name: str, store: str) -> Iterator[tuple[str, float]]:
        """Gives where a side shows the tree, and how long it took to mount."""
        at = bench.path("on-" + name)
        if name == "disk":
            yield bench.tree, 0.0
        elif name in others:
            with theirs(name, packed.get(name, bench.tree), at) as seconds:
                yield os.path.join(at, RIVALS[name].shows), seconds
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
            read_all(bench.store if name == US else packed.get(name, bench.tree))
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
        index = Index.of(bench.tree, bench.path("index")) if "git" in bench.rivals else None
        everywhere = {**places, f"{US}, a session": in_session}
        sides = {
            name: functools.partial(pass_over, name, at, index) for name, at in everywhere.items()
        }
        bench.compare("mount", sides, bench.runs)

        def grep_elsewhere(at: str) -> dict[str, float]:
            here = next_snapshot(bench.store, in_session) if at == places[US] else at
            seconds = shell(OPERATIONS["grep -rc"], cwd=here, strict=True).seconds
            return {"grep -rc, first in a snapshot nine files away": seconds}

        sides = {name: functools.partial(grep_elsewhere, places[name]) for name in (US, "disk")}
        bench.compare("mount", sides, bench.runs)
