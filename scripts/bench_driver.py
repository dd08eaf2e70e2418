"""The group `driver`: large files, many files, memory."""

import contextlib
import functools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator

from engine.repository import Repository
from fsdriver.client import find_daemon
from fsdriver.messages import GetStatistics, Statistics
from scripts.bench_figures import RUN, US, Bench, Side
from scripts.bench_groups import words_before, writable
from scripts.bench_mount import snapshot_in
from scripts.bench_rivals import RIVALS, ours, theirs
from scripts.bench_setting import CannotError, mountctl, note, run, shell
from scripts.bench_trees import add_snapshot

BIG = 4 << 30
PIECE = 64 << 20
READS = 20_000
"""How many single pages are read, anywhere in the big file."""
DIRECTORIES, FILES_EACH = 1_000, 1_000


def measure_driver(bench: Bench) -> None:
    """A large file, an archive unpacked and removed, git, and memory with a million files."""
    measure_big_file(bench)
    measure_many_files(bench)
    measure_memory(bench)


# ---------------------------------------------------------------- one large file


def make_big_file(bench: Bench, path: str, size: int = BIG) -> None:
    """Writes noise and source code by turns, so that half of the chunks are compressed."""
    piece = min(PIECE, size // 2)
    source = subprocess.Popen(
        ["tar", "-c", "."], cwd=bench.tree, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert source.stdout is not None
    with source, open(path, "wb") as file:
        for number in range(size // piece):
            text = source.stdout.read(piece) if number % 2 else b""
            file.write(text or random.Random(number).randbytes(piece))
        source.kill()


def measure_big_file(bench: Bench) -> None:
    """`cat` of it as the first thing after a mount, pages of it, and both again."""
    folder = bench.fresh("big")
    note("making a file of 4 GiB")
    make_big_file(bench, os.path.join(folder, "file"))
    store = bench.imported("store-big", folder)
    others = [name for name in bench.rivals if name in {"bindfs", "fuse-overlayfs"}]

    @contextlib.contextmanager
    def shown(name: str) -> Iterator[str]:
        at = bench.path("on-big-" + name)
        if name == "disk":
            yield folder
        elif name == US:
            with ours(store, at):
                yield snapshot_in(at)
        else:
            with theirs(name, folder, at):
                yield at

    def side(name: str) -> dict[str, float]:
        shell('cat "$1" >/dev/null', os.path.join(folder, "file"))
        if name == US:
            shell('cat "$1"/db/data.mdb >/dev/null', store)
        found = {}
        with shown(name) as at:
            path = os.path.join(at, "file")
            # To a pipe: what goes to /dev/null is not copied.
            copy = 'dd if="$1" bs=1M status=none | dd of=/dev/null bs=1M status=none'
            found["4 GiB, first read"] = shell(copy, path).seconds
            found["4 GiB, read again"] = shell(copy, path).seconds
        with shown(name) as at:
            for measure in ("single pages, first", "single pages, again"):
                found[f"{READS:,} {measure}"] = read_pages(os.path.join(at, "file"))
        return found

    sides: dict[str, Side] = {n: functools.partial(side, n) for n in (US, "disk", *others)}
    bench.compare("driver", sides, min(bench.runs, 3))
    shutil.rmtree(store)
    shutil.rmtree(folder)


def read_pages(path: str) -> float:
    """Reads pages anywhere in a file, one at a time; the same ones each time."""
    chosen = random.Random(1)
    places = [chosen.randrange(BIG // 4096) * 4096 for _ in range(READS)]
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        started = time.perf_counter()
        for place in places:
            os.pread(fd, 4096, place)
        return time.perf_counter() - started
    finally:
        os.close(fd)


# ---------------------------------------------------------------- many files


def measure_many_files(bench: Bench) -> None:
    """The big tree from an archive into an empty one, `git status` there, all of it removed."""
    archive, empty, at = bench.path("tree.tar"), bench.fresh("empty"), bench.path("on-many")
    run("tar", "-cf", archive, "-C", bench.tree, ".")
    run("touch", os.path.join(empty, "nothing"))
    store = bench.imported("store-empty", empty)
    writers = [name for name in bench.rivals if name == "fuse-overlayfs" and RIVALS[name].writes]

    def work(name: str) -> dict[str, float]:
        with writable(bench, name, store, empty, at) as tree:
            by = words_before(name, store)

            def step(*command: str) -> float:
                return run(*by, *command, cwd=tree).seconds

            found = {"untar of the tree": step("tar", "-xf", archive, "-C", ".")}
            if "git" in bench.rivals and name != RUN:
                step("git", "init", "-q")
                step("git", "add", "-A", "-f")
                step("git", "status", "--porcelain")
                found["git status of it, warm"] = step("git", "status", "--porcelain")
                step("rm", "-rf", ".git")
            found["rm -rf of it"] = step("sh", "-c", "rm -rf ./*")
            return found

    with ours(store, at):
        sides: dict[str, Side] = {
            name: functools.partial(work, name) for name in (US, RUN, "disk", *writers)
        }
        bench.compare("driver", sides, min(bench.runs, 3))
    shutil.rmtree(store)
    os.unlink(archive)


# ---------------------------------------------------------------- memory


def measure_memory(bench: Bench) -> None:
    """What the daemon has resident after a million files were listed, and once they are forgotten.

    The store's map counts as resident, too, where it was touched.
    """
    store, at = bench.path("store-wide"), bench.path("on-wide")
    mountctl(store, "init")
    with Repository.open(store) as repository:
        identifier = add_snapshot(repository, DIRECTORIES, FILES_EACH).hex()

    def resident() -> float:
        client = find_daemon(store, 10.0)
        if client is None:
            raise CannotError("the daemon is gone")
        with client:
            reply = client.ask(GetStatistics())
        assert isinstance(reply, Statistics)
        return reply.groups["process"]["resident"] / 1e6

    def side() -> dict[str, float]:
        with ours(store, at):
            before = resident()
            ran = shell("find . -size +1 | wc -l", cwd=os.path.join(at, "snapshots", identifier))
            listed = resident()
            found = {
                "find over 1,000,000 files": ran.seconds,
                "daemon before, MB": before,
                "daemon after it, MB": listed,
            }
            drop = "/proc/sys/vm/drop_caches"
            if os.access(drop, os.W_OK):
                with open(drop, "w", encoding="ascii") as file:
                    file.write("2")
                time.sleep(3)
                found["daemon once they are forgotten, MB"] = resident()
            return found

    bench.compare("driver", {US: side}, 1)
    shutil.rmtree(store)
