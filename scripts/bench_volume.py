"""The group `engine` by volume: many names, many forks at once, many snapshots, many bytes."""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from blake3 import blake3

from engine.ids import SnapshotId
from engine.repository import Repository
from engine.storage.chunking import cut
from engine.storage.store import Db, Writer
from engine.trees.directory import Directory, directory_id
from scripts.bench_figures import US, Bench, Sample, Side
from scripts.bench_setting import CannotError, note, shell
from scripts.bench_trees import add_snapshot, path_of

FORKS = 8
FEW = 50
"""How many files are written again and again, where not any in the tree."""
SECONDS = 2.0
"""How long forks commit, in each turn; a tenth of it where there are not many files."""
GIVEN_UP = 300.0
"""Seconds after which a child is taken to be stuck."""
IMPORTED = 4
IMPORTED_BYTES = 128 << 20
"""How many files are imported, and how large each is; a tenth where there are not many files."""
MANY_FILES = 1_000_000

# ---------------------------------------------------------------- many names


def measure_names(bench: Bench) -> None:
    """One name of a large directory changed: how long, and what of it is new on the disk."""
    count = bench.engine_files
    store = bench.path("store-names")
    with Repository.create(store) as repository:
        snapshot = add_snapshot(repository, 1, count)
        workspace = repository.workspace(snapshot)
        chosen, numbers = random.Random(3), itertools.count()

        def change() -> float:
            path = path_of(0, chosen.randrange(count))
            started = time.perf_counter()
            workspace.write(path, b"%012d" % next(numbers))
            workspace.commit()
            return time.perf_counter() - started

        def side() -> dict[str, Sample]:
            seconds, new, written = [], [], []
            for _ in range(20):
                before, told = nodes_of(repository, workspace.snapshot), bytes_written()
                seconds.append(change())
                written.append((bytes_written() - told) / 1024)
                after = nodes_of(repository, workspace.snapshot)
                nodes = sum(len(repository.objects.encoded(node)) for node in after - before)
                new.append((nodes + record_bytes(repository, workspace.snapshot)) / 1024)
            found: dict[str, Sample] = {
                "change one of the names, commit durably": seconds,
                "new objects for it, KiB": new,
            }
            return found | ({"written for it, KiB": written} if any(written) else {})

        change()
        bench.compare("engine, by names", {f"{US}, {count:,} names": side}, bench.runs)
    shutil.rmtree(store)


def record_bytes(repository: Repository, snapshot: SnapshotId | None) -> int:
    """Returns the length of a snapshot's record."""
    with repository.store.read() as reader:
        return len(reader.get(Db.SNAPSHOTS, snapshot or b"") or b"")


def nodes_of(repository: Repository, snapshot: SnapshotId | None) -> set[Any]:
    """Returns the nodes of a snapshot of one directory in the root."""
    if snapshot is None:
        raise CannotError("there is no snapshot")
    root = Directory(repository.objects, directory_id(repository.snapshot(snapshot).root))
    return set(root.page_ids()).union(
        *(Directory(repository.objects, directory_id(entry)).page_ids() for entry in root)
    )


def bytes_written() -> int:
    """Returns what this process has given to the system to write; 0 where nobody tells.

    Not `write_bytes`: it counts whole folios, up to megabytes for a page in one.
    """
    with contextlib.suppress(OSError), open("/proc/self/io", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "wchar":
                return int(value)
    return 0


# ---------------------------------------------------------------- children


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `bench_child`; kills it if it is still there at the end."""
    command = [sys.executable, "-P", "-m", "scripts.bench_child", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        process_group=0,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def told(process: subprocess.Popen[str], given: str = "") -> dict[str, float]:
    """Returns what a child found. Raises CannotError."""
    try:
        out, err = process.communicate(given, timeout=GIVEN_UP)
    except subprocess.TimeoutExpired:
        raise CannotError(f"process {process.pid} does not end") from None
    if process.returncode:
        raise CannotError(f"a child ended with {process.returncode}: {err.strip()}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


# ---------------------------------------------------------------- many forks


def measure_forks(bench: Bench, paths: list[str]) -> None:
    """Forks that commit to one store at the same time, from threads and from processes."""
    store = bench.path("store-forks")
    shutil.copytree(bench.store, store)
    chosen = random.Random(4)
    lists = {"": chosen.sample(paths, min(FEW, len(paths))), ", anywhere": paths}
    for name, some in lists.items():
        with open(bench.path(f"paths{name}"), "w", encoding="utf-8") as file:
            json.dump(some, file)

    seconds = SECONDS if bench.engine_files >= MANY_FILES else SECONDS / 10

    def side(processes: int) -> dict[str, Sample]:
        def took(mode: str, where: str = "") -> float:
            return 1000 / rate(store, bench.path(f"paths{where}"), processes, mode, seconds)

        return {
            "1,000 commits by 8 forks": took("behind"),
            "1,000 durable commits by 8 forks": took("durable"),
            "1,000 durable commits by 8 forks, anywhere": took("durable", ", anywhere"),
        }

    sides: dict[str, Side] = {
        f"{US}, {count} processes": functools.partial(side, count) for count in (FORKS, 2)
    }
    bench.compare("engine, by forks", sides, bench.runs)
    shutil.rmtree(store)
    for name in lists:
        os.unlink(bench.path(f"paths{name}"))


def rate(store: str, paths: str, processes: int, mode: str, seconds: float) -> float:
    """Returns how many commits a second so many processes make, FORKS forks between them."""
    each = str(FORKS // processes)
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(child("commit", store, paths, each, mode, str(seconds)))
            for _ in range(processes)
        ]
        for process in children:
            assert process.stdout is not None
            if not process.stdout.readline():
                told(process)
        for process in children:  # all have opened the store
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [told(process) for process in children]
    took = max(one["ended"] for one in found) - min(one["began"] for one in found)
    return sum(one["commits"] for one in found) / took


# ---------------------------------------------------------------- many snapshots


def measure_collection(bench: Bench, store: str, paths: list[str]) -> None:
    """Collections after few and many commits of one file each, then after half of them went.

    The store is left with as many snapshots as there may be.
    """
    most = bench.engine_files // 100
    counts: list[int] = [
        count for count in (10, 100, 1_000, 10_000) if count in {10, most // 10, most}
    ]
    stores: dict[int, str] = {count: bench.path(f"store-of-{count}") for count in counts}
    chosen = random.Random(5)
    with Repository.open(store) as repository:
        workspace = repository.workspace("tree")
        for number in range(2, most + 1):
            workspace.write(chosen.choice(paths), b"/* %012d */" % number)
            workspace.commit(durable=False)
            if number in stores:
                repository.flush()
                shutil.copytree(store, stores[number])
        repository.flush()
        assert workspace.snapshot is not None
        repository.set_ref("tree", workspace.snapshot)

    def side(store: str) -> dict[str, Sample]:
        with child("collect", store) as process:
            found = told(process)
        return {
            "gc": found["seconds"],
            "gc, for 1,000 unique nodes": found["seconds"] / found["kept"] * 1000,
            "peak memory of gc, MB": found["peak"],
        }

    sides: dict[str, Side] = {
        f"{US}, {count:,} snapshots": functools.partial(side, place)
        for count, place in stores.items()
    }
    bench.compare("engine, by snapshots", sides, min(bench.runs, 3))
    forget_half(stores[most])
    half: dict[str, Side] = {f"{US}, {most:,} snapshots": functools.partial(side, stores[most])}
    half = {name: functools.partial(renamed, once) for name, once in half.items()}
    bench.compare("engine, by snapshots", half, 1)
    for place in stores.values():
        shutil.rmtree(place)


def renamed(once: Side) -> dict[str, Sample]:
    """Measures a collection that removes something."""
    found = once()
    return {"gc after half of them went": found["gc"],
            "peak memory of that gc, MB": found["peak memory of gc, MB"]}  # fmt: skip


def forget_half(store: str) -> None:
    """Removes every other snapshot that no ref names, at once."""
    with Repository.open(store) as repository:
        kept = set(repository.refs().values())
        gone = [at for at in repository.snapshots()[::2] if at not in kept]

        def change(writer: Writer) -> None:
            for identifier in gone:
                writer.delete(Db.SNAPSHOTS, identifier)

        repository.store.write(change)


# ---------------------------------------------------------------- many bytes


def measure_import(bench: Bench) -> None:
    """Large files of noise, beside the hash and the chunker alone on one core, and the disk."""
    source = bench.fresh("large")
    size = IMPORTED_BYTES if bench.engine_files >= MANY_FILES else IMPORTED_BYTES // 10
    note(f"making {IMPORTED} files of {size >> 20} MiB")
    files = [os.path.join(source, f"file-{number}") for number in range(IMPORTED)]
    for number, path in enumerate(files):
        with open(path, "wb") as file:
            file.write(random.Random(number).randbytes(size))
    new, known = "import of large files, new", "import of large files, in the store already"

    def import_it() -> dict[str, Sample]:
        shutil.rmtree(bench.path("store-large"), ignore_errors=True)
        found: dict[str, Sample] = {}
        with Repository.create(bench.path("store-large")) as repository:
            for measure in (new, known):
                place = bench.path("large, " + measure)  # nothing is known of files there
                os.rename(source, place)
                started = time.perf_counter()
                repository.import_directory(place)
                found[measure] = time.perf_counter() - started
                os.rename(place, source)
        return found

    def alone() -> dict[str, float]:
        found = {"BLAKE3": 0.0, "FastCDC": 0.0}
        for path in files:
            with open(path, "rb") as file:
                data = file.read()
            started = time.perf_counter()
            blake3(data).digest()
            hashed = time.perf_counter()
            sum(1 for _ in cut(data, True))
            found["BLAKE3"] += hashed - started
            found["FastCDC"] += time.perf_counter() - hashed
        return found

    last: dict[str, float] = {}

    def slower() -> dict[str, Sample]:
        last.update(alone())
        return dict.fromkeys((new, known), max(last.values()))

    def one(name: str) -> dict[str, Sample]:
        return dict.fromkeys((new, known), last[name])

    def copy() -> dict[str, Sample]:
        script = 'rm -f "$1"; cat "$2"/* | dd of="$1" bs=1M conv=fsync status=none'
        return {new: shell(script, bench.path("large-copy"), source).seconds}

    sides: dict[str, Side] = {
        US: import_it,
        "the slower of both": slower,
        "BLAKE3": functools.partial(one, "BLAKE3"),
        "FastCDC": functools.partial(one, "FastCDC"),
        "dd conv=fsync": copy,
    }
    bench.compare("engine, by bytes", sides, bench.runs)
    for path in ("store-large", "large"):
        shutil.rmtree(bench.path(path))
    os.unlink(bench.path("large-copy"))
