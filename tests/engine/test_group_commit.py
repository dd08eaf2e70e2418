"""Group commit: what several processes commit at once is one transaction, and none is lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from engine import Repository
from engine.ids import ChunkId, SnapshotId, digest
from engine.storage.lmdb_store import LmdbStore
from engine.storage.nodes import directory_node, encode, node_id
from engine.storage.store import Db, StoreFullError, Writer
from engine.workspaces.group_commit import LONGEST_POST, POST_AT, GroupCommit, Post, _Mine, _Other
from tests.conftest import ROOT

EMPTY = encode(directory_node(()))


def post(*, lacking: list[ChunkId] | None = None, chunk: bytes = b"chunk", number: int = 1) -> Post:
    return Post(
        {ChunkId(digest(chunk)): b"\0" + chunk},
        lacking or [],
        {node_id(EMPTY): EMPTY},
        {SnapshotId(digest(b"snapshot %d" % number)): b"record %d" % number},
    )


def nothing(writer: Writer) -> None:
    """Makes a transaction of its own that changes nothing."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(str(tmp_path / "store"), create=True)
    yield store
    store.close()


@pytest.fixture
def make(store: LmdbStore) -> Iterator[Callable[[], GroupCommit]]:
    """Makes what several processes would have."""
    made: list[GroupCommit] = []

    def make() -> GroupCommit:
        made.append(GroupCommit(store, store.path))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert files(store) == ["turn"]


def files(store: LmdbStore) -> list[str]:
    return sorted(os.listdir(Path(store.path, "locks/commits")))


def count(store: LmdbStore, db: Db) -> int:
    with store.read() as reader:
        return reader.count(db)


def waiting(store: LmdbStore, posts: int) -> None:
    """Returns when so many have posted and wait."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = 0
        for name in files(store):
            if name != "turn" and not name.endswith(".wake") and name + ".wake" in files(store):
                other = _Other(store.path, name)
                found += other.is_waiting()
                other.close()
        if found == posts:
            return
        time.sleep(0.001)
    raise AssertionError(f"{found} of {posts} wait")


class Followers:
    """Threads that commit, as other processes would, and what became of it."""

    def __init__(self, groups: list[GroupCommit], posts: list[Post | None]) -> None:
        self.own = 0
        self.errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._commit, args=pair)
            for pair in zip(groups, posts, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _commit(self, group: GroupCommit, post: Post | None) -> None:
        def change(writer: Writer) -> None:
            self.own += 1
            if post is not None:
                assert post.store(writer)

        try:
            group.commit(change, lambda: post)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.errors.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


def test_who_has_the_turn_takes_the_others_along(store: LmdbStore, make: Callable[[], GroupCommit]):
    first, others = make(), [make() for _ in range(5)]
    assert first._take(wait=False)
    followers = Followers(others, [post(number=n, chunk=b"%d" % n) for n in range(5)])
    waiting(store, 5)
    before = store.transaction_id()
    first._lead(lambda writer: writer.put(Db.META, b"mine", b"x"))
    followers.join()
    assert followers.own == 0
    assert followers.errors == []
    assert count(store, Db.SNAPSHOTS) == count(store, Db.CHUNKS) == 5
    assert count(store, Db.NODES) == 1
    assert store.transaction_id() == before + 1
    with store.read() as reader:
        assert reader.has(Db.META, b"mine")


def test_nobody_waits_who_is_alone(store: LmdbStore, make: Callable[[], GroupCommit]):
    def never() -> Post | None:
        raise AssertionError("was asked for")

    make().commit(nothing, never)
    assert files(store) == ["turn"]


@pytest.mark.parametrize("given", [None, post(chunk=random.Random(1).randbytes(LONGEST_POST))])
def test_what_cannot_be_posted_waits_for_a_turn(
    store: LmdbStore, make: Callable[[], GroupCommit], given: Post | None
):
    first, other = make(), make()
    assert first._take(wait=False)
    followers = Followers([other], [given])
    time.sleep(0.05)
    first._lead(nothing)
    followers.join()
    assert followers.own == 1
    assert followers.errors == []


def test_a_post_that_needs_what_has_gone_is_left_to_its_process(
    store: LmdbStore, make: Callable[[], GroupCommit]
):
    first, other = make(), make()
    gone = ChunkId(digest(b"gone"))
    assert first._take(wait=False)
    own: list[int] = []
    thread = threading.Thread(
        target=lambda: other.commit(lambda _: own.append(1), lambda: post(lacking=[gone]))
    )
    thread.start()
    waiting(store, 1)
    first._lead(nothing)
    thread.join(120)
    assert own == [1]
    assert count(store, Db.SNAPSHOTS) == 0


def test_one_that_fails_is_not_stored_later(store: LmdbStore, make: Callable[[], GroupCommit]):
    first, other = make(), make()
    assert first._take(wait=False)

    def full(_: Writer) -> None:
        raise StoreFullError(store.path)

    errors: list[Exception] = []

    def commit() -> None:
        try:
            other.commit(full, lambda: post(lacking=[ChunkId(digest(b"gone"))]))
        except StoreFullError as error:
            errors.append(error)

    thread = threading.Thread(target=commit)
    thread.start()
    waiting(store, 1)
    first._lead(nothing)
    thread.join(120)
    assert len(errors) == 1
    waiting(store, 0)


def test_others_do_not_fill_the_disk_for_who_has_the_turn(
    store: LmdbStore, make: Callable[[], GroupCommit], monkeypatch: pytest.MonkeyPatch
):
    first, other = make(), make()
    assert first._take(wait=False)
    followers = Followers([other], [post()])
    waiting(store, 1)
    monkeypatch.setattr(Post, "store", too_much)
    first._lead(lambda writer: writer.put(Db.META, b"mine", b"x"))
    followers.join()
    with store.read() as reader:
        assert reader.has(Db.META, b"mine")
    assert [type(error) for error in followers.errors] == [StoreFullError]


def too_much(post: Post, writer: Writer) -> bool:
    """Stands in for a disk that has room for little more."""
    writer.put(Db.SNAPSHOTS, b"half", b"of it")
    raise StoreFullError("")


@pytest.mark.parametrize("at", [8, 16, 20, POST_AT, POST_AT + 10])
def test_a_post_that_is_torn_is_not_taken(
    store: LmdbStore, make: Callable[[], GroupCommit], at: int
):
    first, mine = make(), mine_of(store, make)
    mine.post(msgpack(post()))
    os.pwrite(mine._fd, bytes([os.pread(mine._fd, 1, at)[0] ^ 1]), at)
    first.commit(nothing, lambda: None)
    assert count(store, Db.SNAPSHOTS) == 0
    mine.close()


def test_a_post_of_a_dead_process_is_not_taken_but_removed(
    store: LmdbStore, make: Callable[[], GroupCommit]
):
    first, mine = make(), mine_of(store, make)
    mine.post(msgpack(post()))
    os.close(mine._fd)
    os.close(mine._fifo)
    first.commit(nothing, lambda: None)
    assert count(store, Db.SNAPSHOTS) == 0
    assert files(store) == ["turn"]


def test_what_a_process_left_as_it_came_is_removed(
    store: LmdbStore, make: Callable[[], GroupCommit]
):
    first = make()
    first.commit(nothing, lambda: None)
    Path(store.path, "locks/commits/0123456789abcdef").touch()
    first.commit(nothing, lambda: None)
    assert files(store) == ["turn"]


def mine_of(store: LmdbStore, make: Callable[[], GroupCommit]) -> _Mine:
    make().commit(nothing, lambda: None)  # makes the directory
    return _Mine(store.path)


def msgpack(post: Post) -> bytes:
    return msgspec.msgpack.encode(post)


# ---------------------------------------------------------------- processes

CHILD = """
import os, random, signal, sys
from engine import Repository

path, name, commits, dies = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
chance = random.Random(name)
with Repository.open(path) as repository:
    write = repository.store.write
    def deadly(change):
        def inside(writer):
            result = change(writer)
            if dies == "inside" and left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        result = write(inside)
        if dies == "after" and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    repository.store.write = deadly
    workspace = repository.workspace("start")
    left = commits
    print("ready", flush=True)
    sys.stdin.readline()
    while True:
        left -= left > 0
        if not left and not dies:
            break
        data = chance.randbytes(chance.choice((20, 200, 20_000)))
        workspace.write(f"{name}/{chance.randrange(40)}", data, parents=True)
        print(workspace.commit(ref=f"{name}" if chance.random() < 0.05 else None).snapshot.hex(),
              flush=True)
"""


def start(path: Path, name: str, commits: int, dies: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), name, str(commits), dies],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def test_all_that_processes_were_told_is_there_with_a_collector_about(tmp_path: Path):
    path = tmp_path / "store"
    with Repository.create(str(path)) as repository:
        workspace = repository.workspace()
        workspace.write("a", b"a")
        repository.set_ref("start", workspace.commit().snapshot)
    each = 60
    ends = {"0": "", "1": "", "2": "", "3": "inside", "4": "after"}
    children = [start(path, name, each if not end else 20, end) for name, end in ends.items()]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    with Repository.open(str(path)) as repository:
        while any(child.poll() is None for child in children):
            repository.collect()
            time.sleep(0.02)
    told: list[str] = []
    for child, end in zip(children, ends.values(), strict=True):
        out, _ = child.communicate(timeout=120)
        assert child.returncode == (-signal.SIGKILL if end else 0)
        lines = out.split()
        assert len(lines) >= (19 if end else each - 1)
        told += [line for line in lines if len(line) == 64]
    with Repository.open(str(path)) as repository:
        there = {snapshot.hex() for snapshot in repository.snapshots()}
        assert set(told) <= there
        assert repository.verify().damage == []
        repository.workspace("start").commit(parents=())
    left = [name for name in os.listdir(path / "locks/commits") if name != "turn"]
    assert left == [], "what the killed have left is removed by the next one that commits"


def test_who_waits_for_a_process_that_is_killed_commits_by_itself(
    store: LmdbStore, make: Callable[[], GroupCommit]
):
    script = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    make().commit(nothing, lambda: None)
    turn = str(Path(store.path, "locks/commits/turn"))
    with subprocess.Popen([sys.executable, "-c", script, turn], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        followers = Followers([make()], [post()])
        waiting(store, 1)
        holder.kill()
    followers.join()
    assert followers.own == 1
    assert count(store, Db.SNAPSHOTS) == 1
