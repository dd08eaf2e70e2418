"""A killed daemon's mount fails, also where one of its threads waits inside of the kernel."""

import contextlib
import ctypes
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdriver.mountpoint import our_mount, unmount
from tests.fsdriver.conftest import PATIENCE, PLAIN, Mount, until

pytestmark = pytest.mark.fuse

_MNT_FORCE = 1

SERVER = '''
"""A filesystem of one file that answers what comes before a READ, and that not: instead a thread
of it gives the kernel the page that the READ is about, and waits for it inside of the kernel."""
import os, select, signal, struct, sys, threading, time
from fsdriver import protocol
from fsdriver.device import Access, mount
from fsdriver.guard import Guard

where, taken, late = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "late"
ATTR = "6Q10I"
FILE = (2, 4096, 8, 0, 0, 0, 0, 0, 0, 0o100644, 1, os.getuid(), os.getgid(), 0, 4096, 0)
ROOT = (1, 0, 0, 0, 0, 0, 0, 0, 0, 0o040755, 2, os.getuid(), os.getgid(), 0, 4096, 0)
HOUR = 3600

guard = Guard()
device = mount(where, source="test", access=Access())
inbox = guard.protect(device, protocol.LARGEST_IO + protocol.HEADROOM)
while not late and "poll" not in open(f"/proc/{guard._process.pid}/wchan").read():
    time.sleep(0.01)
if late:
    os.kill(guard._process.pid, signal.SIGSTOP)

def answer(unique, body=b"", error=0):
    os.write(device, protocol.OUT.pack(protocol.OUT.size + len(body), -error, unique) + body)

def store():
    size = protocol.STORE_HEAD.size + 4096
    head = protocol.STORE_HEAD.pack(size, protocol.STORE, 0, 2, 0, 4096, 0)
    os.write(device, head + bytes(4096))

while True:
    os.readv(device, [inbox])
    _, opcode, unique, node, *_ = protocol.IN.unpack_from(inbox)
    name = protocol.NAMES.get(opcode)
    if name == "INIT":
        answer(unique, protocol.INIT_OUT.pack(7, 31, 0, 0, 8, 8, 1 << 16, 1, 0, 0) + bytes(32))
    elif name == "LOOKUP" and bytes(inbox[protocol.BODY_AT:][:6]) == b"other\\0":
        break
    elif name == "LOOKUP":
        head = struct.pack("=QQQQII", 2, 1, HOUR, HOUR, 0, 0)
        answer(unique, head + struct.pack("=" + ATTR, *FILE))
    elif name == "GETATTR":
        body = struct.pack("=QII", HOUR, 0, 0)
        answer(unique, body + struct.pack("=" + ATTR, *(ROOT if node == 1 else FILE)))
    elif name == "OPEN":
        answer(unique, struct.pack("=QII", 0, 0, 0))
        if not taken:
            select.select([device], [], [])  # the READ has come, and is left there
            break
    elif name == "READ":
        print("taken", flush=True)
        if taken == 1:
            break
    elif name not in ("FORGET", "BATCH_FORGET", "INTERRUPT"):
        answer(unique, error=38)
threading.Thread(target=store).start()
threading.Event().wait()
'''


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Where a server of a test mounts."""
    where = tmp_path / "mnt"
    where.mkdir()
    yield where
    if our_mount(str(where)) is not None:
        unmount(str(where), lazy=True)


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            yield it
        finally:
            it.kill()


def waits_in_the_kernel(pid: int) -> bool:
    """Tells whether a thread of a process waits where no signal wakes it."""
    states = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
        states.append(stat.rpartition(")")[2].split()[0])
    return "D" in states


def has_died(pid: int) -> bool:
    """Tells whether the first thread of a process is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "Z"


def resends() -> bool:
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= (6, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="what hangs can only be freed by root")
@pytest.mark.parametrize(
    "taken",
    [
        pytest.param(0, id="request waits"),
        pytest.param(1, id="request at hand"),
        pytest.param(
            2,
            id="another at hand",
            marks=pytest.mark.skipif(not resends(), reason="before Linux 6.9"),
        ),
    ],
)
@pytest.mark.parametrize("start", ["early", "late"])
def test_a_thread_in_the_kernel_does_not_keep_a_killed_server(mountpoint, taken, start):
    file = str(mountpoint / "file")
    with contextlib.ExitStack() as stack:
        command = (sys.executable, "-c", SERVER, str(mountpoint), str(taken), start)
        server = stack.enter_context(started(*command))
        until(lambda: our_mount(str(mountpoint)) is not None)
        clients = [stack.enter_context(started("cat", file))]
        if taken == 2:  # a request after the one that has the page
            assert server.stdout is not None
            assert server.stdout.readline() == "taken\n"
            clients.append(stack.enter_context(started("cat", str(mountpoint / "other"))))
        try:
            until(lambda: waits_in_the_kernel(server.pid))
            guard = guard_of(server.pid)
            server.kill()
            if start == "late":  # the guard has only just begun when it dies
                until(lambda: has_died(server.pid))
                os.kill(guard, signal.SIGCONT)
            for client in clients:
                assert client.wait(PATIENCE) == 1
            assert server.wait(PATIENCE) == -signal.SIGKILL
        finally:  # what hangs is freed
            ctypes.CDLL(None).umount2(os.fsencode(mountpoint), _MNT_FORCE)


@pytest.mark.skipif(PLAIN, reason="nothing is read ahead, and pyfuse3 has the device")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_mount_that_ends_while_it_reads_ahead_fails(own: Mount, tmp_path: Path, end: int):
    root = tmp_path / "many"
    for folder in range(20):
        (root / str(folder)).mkdir(parents=True)
        for number in range(50):
            (root / str(folder) / str(number)).write_bytes(random.randbytes(20_000))
    with own.repository() as repository:
        snapshot = repository.import_directory(str(root)).snapshot
    for turn in range(4):
        own.start()
        shown = own.snapshots / snapshot.hex()
        folders = [str(shown / str(folder)) for folder in range(turn * 5, turn * 5 + 5)]
        readers = [
            subprocess.Popen(["grep", "-r", "x y z", folder], stderr=subprocess.DEVNULL)
            for folder in folders
        ]
        until(lambda: own.statistics()["ahead"]["given"] > 10)
        os.kill(own.pid, end)
        own.wait_for_end()
        for reader in readers:
            assert reader.wait(PATIENCE) in {1, 2}
        own.clear()
    with own.repository() as repository:
        assert not repository.verify().damage


def test_a_guard_that_is_killed_is_replaced(own: Mount):
    if PLAIN:
        pytest.skip("there is none")
    own.start()
    first = guard_of(own.pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: guard_of(own.pid) not in {0, first})
    second = guard_of(own.pid)
    assert (own.snapshots / "main/README").read_bytes() == b"read me\n"
    own.stop()
    until(lambda: not Path(f"/proc/{second}").exists())


def guard_of(pid: int) -> int:
    """Returns the process id of a daemon's guard, or 0."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if b"fsdriver.guard" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return 0
