"""Many programs at once, many files at once; and afterwards the daemon is what it was before.

AMALGAMFS_EXAMPLES makes the numbers larger.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.mounted.overlay import OPEN_FILES
from fsdriver import messages
from tests.engine.trees import of_directory
from tests.fsdriver.conftest import Mount, descriptors, drop_caches, resident, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.access("/proc/sys/vm/drop_caches", os.W_OK), reason="only root can empty the caches"
    ),
]

MANY = bool(os.environ.get("AMALGAMFS_EXAMPLES"))
SECONDS = 20 if MANY else 3
FILES = 100_000 if MANY else 20_000
OPENERS = FILES // 5_000
"""Programs that open them: a program may have fewer open than all."""
PROCESSES, THREADS = 16, 4
MEMORY = (96 if MANY else 48) << 20
"""What the daemon's memory may have grown by: Python frees a mebibyte when all in it is free."""


class Start:
    """What the daemon holds before a load, with caches as empty as they get."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        os.listdir(mount.sessions / "s" / "src")  # held from now on
        drop_caches()
        self.vfs, self.descriptors = mount.statistics()["vfs"], descriptors(mount)
        self.resident = resident(mount)

    def is_back(self) -> bool:
        drop_caches()
        now = self.mount.statistics()["vfs"]
        return (
            now["inodes"] <= self.vfs["inodes"] + 4
            and now["orphans"] == self.vfs["orphans"]
            and now["sessions"] <= self.vfs["sessions"]
            and now["open_files"] <= self.vfs["open_files"] + 2
            and descriptors(self.mount) <= self.descriptors + 6
        )

    def check(self) -> None:
        """Waits until all is as it was."""
        try:
            until(self.is_back)
        except AssertionError as error:
            now = self.mount.statistics()["vfs"], descriptors(self.mount)
            error.add_note(f"{now}, where it was {(self.vfs, self.descriptors)}")
            raise
        self.mount.ask(messages.Shed())
        assert resident(self.mount) - self.resident < MEMORY


CLIENT = """
import itertools, json, os, sys, threading, time
roots, process, threads, seconds = sys.argv[1].split(":"), int(sys.argv[2]), int(sys.argv[3]), 0
deadline = time.monotonic() + float(sys.argv[4])
failures, lines = [], {}

def client(number):
    root = roots[number % len(roots)]
    home, shared = f"{root}/client{number}", f"{root}/shared"
    os.mkdir(home)
    names = ["src/main.c", "src/lib/deep/text"]
    base = {name: open(f"{root}/{name}", "rb").read() for name in names}
    log = os.open(f"{root}/log", os.O_WRONLY | os.O_APPEND)
    written = 0
    for turn in itertools.count():
        if time.monotonic() > deadline:
            break
        data = b"%d %d " % (number, turn) * 2000
        with open(f"{home}/new", "wb") as file:
            file.write(data)
        os.rename(f"{home}/new", f"{home}/{turn % 7}")
        with open(f"{home}/{turn % 7}", "rb") as file:
            assert file.read() == data, "another file's bytes"
        for name, bytes_ in base.items():
            with open(f"{root}/{name}", "rb") as file:
                assert file.read() == bytes_, name
        assert os.write(log, b"%05d %05d\\n" % (number, turn)) == 12
        written += 1
        mine, place = f"{shared}/{number}-{turn}", f"{shared}/{turn % 50}"
        os.close(os.open(mine, os.O_CREAT | os.O_EXCL))
        os.rename(mine, place)  # over what others put there
        try:
            os.rename(place, f"{home}/taken")
        except FileNotFoundError:
            pass
        names = os.listdir(shared)
        assert len(names) == len(set(names)), "a name twice"
        file = open(f"{home}/gone", "w+b", buffering=0)
        os.unlink(f"{home}/gone")
        file.write(data)
        assert os.pread(file.fileno(), len(data), 0) == data
        file.close()
    os.close(log)
    lines[number] = written

def run(number):
    try:
        client(number)
    except BaseException as error:
        failures.append(f"client {number}: {error!r}")

running = [threading.Thread(target=run, args=(process * threads + n,)) for n in range(threads)]
[thread.start() for thread in running]
[thread.join() for thread in running]
print(json.dumps({"failures": failures, "lines": lines}))
"""


@pytest.mark.parametrize("count", [1, 4])
def test_many_programs_at_once(own, count):
    own.start()
    with own.repository() as repository:
        main = repository.resolve("main")
    names = ["s", *(f"n{number}" for number in range(1, count))]
    roots = [own.sessions / "s", *(own.create(name, main) for name in names[1:])]
    for root in roots:
        (root / "shared").mkdir()
        (root / "log").touch()
        own.commit(root.name)
    start = Start(own)
    where = ":".join(map(str, roots))
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, where, str(number), str(THREADS), str(SECONDS)],
            stdout=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]
    commits = []
    while any(client.poll() is None for client in clients):
        commits += [own.commit(name, seconds=60) for name in names]
    answers = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    assert [failure for answer in answers for failure in answer["failures"]] == []
    written = {int(n): count for answer in answers for n, count in answer["lines"].items()}
    assert len(written) == PROCESSES * THREADS
    for at, root in enumerate(roots):
        lines = (root / "log").read_bytes().splitlines()
        expected = [
            b"%05d %05d" % (number, turn)
            for number, turns in written.items()
            if number % len(roots) == at
            for turn in range(turns)
        ]
        assert sorted(lines) == sorted(expected)
        last = own.commit(root.name)
        assert of_directory(own.snapshots / last.hex()) == of_directory(root)
    for found in {*commits[:3], *commits[-3:]}:
        log = (own.snapshots / found.hex() / "log").read_bytes()
        assert len(log) % 12 == 0
    for root in roots:
        for path in [*root.glob("client*"), root / "shared"]:
            shutil.rmtree(path)
        os.truncate(root / "log", 0)
        own.commit(root.name)
    start.check()
    with own.repository() as repository:
        assert not repository.verify().damage
    assert "level=error" not in own.log()
    own.stop()


OPENER = """
import os, resource, sys
root, first, last, make = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "make"
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
files = []
for number in range(first, last):
    path = f"{root}/{number % 100}/{number}"
    files.append(os.open(path, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY))
    if make:
        os.write(files[-1], b"%d" % number)
print("open", flush=True)
sys.stdin.readline()
for number, fd in zip(range(first, last), files):
    assert os.pread(fd, 20, 0) == b"%d" % number
    if make and number % 100 == 7:
        os.pwrite(fd, b"late", 20)  # copies it up again
"""


@contextlib.contextmanager
def open_all(root: Path, how: str) -> Iterator[None]:
    """Has all the files open in other programs, which read them in the end."""
    pipe, each = subprocess.PIPE, FILES // OPENERS
    with contextlib.ExitStack() as stack:
        openers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", OPENER, root, str(first), str(first + each), how],
                    stdin=pipe, stdout=pipe,
                )
            )
            for first in range(0, FILES, each)
        ]  # fmt: skip
        try:
            for opener in openers:
                assert opener.stdout is not None
                assert opener.stdout.readline() == b"open\n"
            yield
        finally:
            for opener in openers:
                assert opener.stdin is not None
                opener.stdin.close()  # and so they go on
    assert [opener.returncode for opener in openers] == [0] * OPENERS


@pytest.mark.timeout(900 if MANY else 300)
def test_many_files_open_at_once(own):
    own.start()
    session = own.sessions / "s"
    (session / "README").read_bytes()
    start = Start(own)
    for number in range(100):
        (session / f"many/{number}").mkdir(parents=True)
    with open_all(session / "many", "make"):
        busy = own.statistics()["vfs"]
        assert busy["inodes"] > FILES
        assert busy["open_files"] <= OPEN_FILES
        assert descriptors(own) <= start.descriptors + OPEN_FILES + 6
        found = own.commit("s", seconds=120)
        with open_all(own.snapshots / found.hex() / "many", "look"):
            (session / "many").rename(session / "moved")
            assert own.statistics()["vfs"]["inodes"] > 2 * FILES
    assert (session / "moved/7/107").read_bytes() == b"107".ljust(20, b"\0") + b"late"
    own.commit("s")
    with own.repository() as repository:
        main = repository.resolve("main")
    own.ask(messages.Reset("s", main.hex(), force=True))
    start.check()
    own.stop()


def test_many_removed_files_open_at_once(own):
    """Each takes a descriptor of the daemon's, for as long as it is open."""
    own.start()
    session, count = own.sessions / "s", 1000
    start = Start(own)
    files = []
    for number in range(count):
        files.append(os.open(session / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        os.write(files[-1], b"%d" % number)
        (session / "file").unlink()
    assert own.statistics()["vfs"]["orphans"] == count
    own.commit("s")
    for number, fd in enumerate(files):
        assert os.pread(fd, 20, 0) == b"%d" % number
        os.close(fd)
    start.check()
    own.stop()


def test_sessions_that_many_programs_make_and_remove(own):
    own.start()
    with own.repository() as repository:
        main = repository.resolve("main")
    start = Start(own)
    for turn in range(5):
        names = [f"t{turn}-{number}" for number in range(12)]
        roots = [own.create(name, main) for name in names]
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT, ":".join(map(str, roots)), "0", "12", "0"],
            stdout=subprocess.PIPE,
        ) as client:
            client.communicate(timeout=120)
        for root in roots:
            (root / "src").rename(root / "moved")
            own.ask(messages.Fork(root.name, root.name + "-fork"))
        for name in names:
            own.ask(messages.Remove(name, force=True))
            own.ask(messages.Remove(name + "-fork", force=True))
    assert os.listdir(own.sessions) == ["s"]
    start.check()
    own.stop()
