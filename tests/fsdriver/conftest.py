"""Mounts as tests use them: always the kernel's, never a stand-in.

Nothing here is skipped where FUSE is missing: it fails. A mount ends with its test, whatever
becomes of that.
"""

import contextlib
import functools
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository
from engine.host.leases import is_held
from engine.ids import SnapshotId
from fsdriver import launch, messages
from fsdriver.client import Client, find_daemon
from fsdriver.mountpoint import check, is_dead, our_mount, unmount
from tests.engine.trees import age, clone, noise

ROOT = Path(__file__).parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

PLAIN = bool(os.environ.get("AMALGAMFS_TEST_PLAIN"))
"""Whether the mounts are plain: without the channel, pyfuse3 on the device."""

PATIENCE = 60.0
"""Seconds after which something that is to happen soon did not happen, on the busiest machine."""

TRIES = 6


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits for something that no descriptor tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def with_luck(test: Callable[..., None]) -> Callable[..., None]:
    """Tries a test of what the kernel keeps up to `TRIES` times, for it need not keep anything.

    It drops pages when memory is short, and some machines' kernels those that nobody has used for
    a second, as what was read ahead (DAMON's reclaim).
    """

    @functools.wraps(test)
    def again(*arguments: object, **more: object) -> None:
        for _ in range(TRIES - 1):
            with contextlib.suppress(AssertionError):
                return test(*arguments, **more)
        return test(*arguments, **more)

    return again


class Mount:
    """A store and where it is mounted."""

    def __init__(self, home: Path) -> None:
        self.store, self.path = home / "store", home / "mnt"
        self.pid = 0
        self.path.mkdir(exist_ok=True)

    @property
    def sessions(self) -> Path:
        return self.path / "sessions"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @contextlib.contextmanager
    def repository(self) -> Iterator[Repository]:
        """The store, opened beside the daemon, as another process would."""
        with Repository.open(str(self.store)) as repository:
            yield repository

    def start(
        self, *, allow_other: bool = False, plain: bool = PLAIN, suid: bool = False,
        dev: bool = False,
    ) -> None:  # fmt: skip
        place = check(str(self.path), str(self.store))
        self.pid = launch.launch(
            str(self.store), place, allow_other=allow_other, suid=suid, dev=dev, plain=plain
        )

    def client(self, seconds: float = PATIENCE) -> Client:
        client = find_daemon(str(self.store), seconds)
        assert client is not None, "no daemon serves the store"
        return client

    def ask(self, request: messages.AnyRequest, seconds: float = PATIENCE) -> messages.AnyReply:
        with self.client(seconds) as client:
            return client.ask(request)

    def commit(self, session: str, ref: str | None = None, seconds: float = PATIENCE) -> SnapshotId:
        reply = self.ask(messages.Commit(session, "", ref), seconds)
        assert isinstance(reply, messages.Committed)
        return SnapshotId(bytes.fromhex(reply.snapshot))

    def statistics(self) -> dict[str, dict[str, int]]:
        reply = self.ask(messages.GetStatistics())
        assert isinstance(reply, messages.Statistics)
        return reply.groups

    def create(self, session: str, snapshot: SnapshotId) -> Path:
        with self.repository() as repository:
            repository.sessions.create(session, (None, None, snapshot))
        return self.sessions / session

    def wait_for_end(self) -> None:
        """Waits until the daemon is no more, and collects it if it is our child."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(self.pid)
                gone = select.select([handle], [], [], PATIENCE)[0]
                os.close(handle)
                assert gone, f"the daemon goes on; mounted for {self.mounted_for()}"
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0
        assert launch.wait_until_ended(str(self.store), PATIENCE)

    def mounted_for(self) -> list[str]:
        """Returns the processes that have the mount, also in a mount namespace of their own."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f" {self.path} ".encode() in (process / "mountinfo").read_bytes():
                    found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        return found

    def stop(self) -> None:
        """Unmounts as `mountctl umount` does, which a busy mount refuses."""
        self.ask(messages.Shutdown())
        self.wait_for_end()
        assert our_mount(str(self.path)) is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait_for_end()
        assert is_dead(str(self.path))

    def clear(self) -> None:
        """Leaves nothing behind, whatever state it is in."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait_for_end()
        while our_mount(str(self.path)) is not None:
            unmount(str(self.path), lazy=True)

    def log(self) -> str:
        return (self.store / "log" / "mount.log").read_text()


def left_behind(mount: Mount) -> list[str]:
    """Returns what a daemon that has ended must not leave."""
    found = [str(path) for path in (mount.store / "locks").iterdir() if path.is_socket()]
    if our_mount(str(mount.path)) is not None:
        found.append("the mount")
    if is_held(str(mount.store), "mount"):
        found.append("the lease")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(mount.store) in process.read_bytes().split(b"\0"):
                found.append(f"process {process.parent.name}")
    return found


def until_forgotten(mount: Mount) -> None:
    """Waits until removed files take no room any more.

    The kernel tells of requests before it tells what it has forgotten, when there is both.
    """
    until(lambda: mount.statistics()["vfs"]["orphans"] == 0)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def descriptors(mount: Mount) -> int:
    return len(os.listdir(f"/proc/{mount.pid}/fd"))


def resident(mount: Mount) -> int:
    """Returns how many bytes of memory the daemon has of its own."""
    for line in Path(f"/proc/{mount.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the daemon is gone")


def make_tree(root: Path) -> None:
    """Makes a directory with everything in it that a snapshot can hold."""
    for directory in ["src/lib/deep", "docs", "empty", "locked"]:
        (root / directory).mkdir(parents=True)
    (root / "README").write_bytes(b"read me\n")
    (root / "src/main.c").write_bytes(b"int main(void) { return 0; }\n" * 50)
    (root / "src/lib/big").write_bytes(noise(3_000_000, 1))
    (root / "src/lib/deep/text").write_bytes(b"the same line again\n" * 20_000)
    (root / "src/lib/zero").write_bytes(b"")
    with (root / "src/lib/sparse").open("wb") as file:
        file.seek(5_000_000)
        file.write(b"end")
    os.link(root / "README", root / "docs/linked")
    os.link(root / "README", root / "src/lib/deep/linked")
    (root / "docs/link").symlink_to("../README")
    (root / "docs/dangling").symlink_to("nowhere/at/all")
    os.mkfifo(root / "docs/fifo")
    (root / "src/tool.sh").write_bytes(b"#!/bin/sh\necho it runs\n")
    (root / "src/tool.sh").chmod(0o755)
    (root / "locked/secret").write_bytes(b"hidden")
    (root / "locked/secret").chmod(0o000 if os.geteuid() == 0 else 0o400)
    (root / "locked/read-only").write_bytes(b"fixed")
    (root / "locked/read-only").chmod(0o444)
    for name in [b"\xff\xfe not utf-8", b"new\nline", b"x" * 255, "ünïcode".encode(), b" ", b"-rf"]:
        Path(os.fsdecode(os.fsencode(root / "docs") + b"/" + name)).write_bytes(name)
    os.setxattr(root / "README", b"user.note", b"\x00\xff")
    os.setxattr(root / "src", b"user.on-directory", b"yes")
    (root / "docs").chmod(0o2750)
    (root / "empty").chmod(0o1777)
    (root / "locked").chmod(0o555 if os.geteuid() == 0 else 0o755)
    age(root)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the shared store was imported from; nobody changes it."""
    root = tmp_path_factory.mktemp("tree") / "tree"
    root.mkdir()
    make_tree(root)
    return root


@pytest.fixture(scope="session")
def shared(
    request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mount, SnapshotId]]:
    """One mount for all tests that leave it as it was, and the snapshot of `tree` in it."""
    mount = Mount(tmp_path_factory.mktemp("shared"))
    with Repository.create(str(mount.store)) as repository:
        snapshot = SnapshotId(repository.import_directory(str(tree), ref="main").snapshot)
    try:
        mount.start()
        yield mount, snapshot
        if not request.session.testsfailed:  # a failed one may have left files open
            mount.stop()
    finally:
        mount.clear()


@pytest.fixture
def mount(shared: tuple[Mount, SnapshotId]) -> Mount:
    """The shared mount."""
    return shared[0]


@pytest.fixture
def snapshot(shared: tuple[Mount, SnapshotId]) -> SnapshotId:
    """The snapshot of `tree`, called main."""
    return shared[1]


@pytest.fixture
def session(shared: tuple[Mount, SnapshotId], request: pytest.FixtureRequest) -> Iterator[Path]:
    """A new session on `tree` in the shared mount, gone with its test."""
    mount, snapshot = shared
    name = f"s{abs(hash(request.node.nodeid)):x}"
    yield mount.create(name, snapshot)
    mount.ask(messages.Remove(name, force=True))
    assert "level=error" not in mount.log(), "the daemon's log tells of an error"


@pytest.fixture(params=["disk", "session"])
def at(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Path:
    """A copy of `tree` to work in: what is right on the disk is right in a session."""
    if request.param == "session":
        place: Path = request.getfixturevalue("session")
        return place
    clone(tree, tmp_path / "disk")
    return tmp_path / "disk"


@pytest.fixture
def own(tmp_path: Path, tree: Path) -> Iterator[Mount]:
    """A store of the test's own with `tree` as main and a session s on it; not mounted."""
    mount = Mount(tmp_path)
    with Repository.create(str(mount.store)) as repository:
        found = repository.import_directory(str(tree), ref="main").snapshot
        repository.sessions.create("s", (None, None, SnapshotId(found)))
    try:
        yield mount
    finally:
        mount.clear()
