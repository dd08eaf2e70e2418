"""What a child of fork() may do with what its parent has open: nothing, and no harm either."""

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from engine import NodeId, Repository, SnapshotId
from engine.errors import EngineError, NotFoundError
from engine.host.forks import ForkedError
from engine.host.leases import acquire, is_held
from engine.mounted.overlay_directory import open_overlay
from engine.storage import chunking, content
from engine.storage.lmdb_store import LmdbStore
from engine.storage.nodes import Owner
from engine.storage.store import CompactionRefusedError, Db
from engine.trees.directory import directory_id
from engine.workspaces.pins import live_pins
from tests.conftest import PATIENCE, ROOT
from tests.engine.forking import in_child

# That a process with threads forks, since Python 3.12; other tests may have left some.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

COMPACT = "import sys; from engine import Repository; Repository.open(sys.argv[1]).compact(0)"


def elsewhere(program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def slots(repository: Repository) -> str:
    """Returns LMDB's table of readers."""
    store = repository.store
    assert isinstance(store, LmdbStore)
    return store._env.readers()


def files(path: str) -> list[str]:
    return sorted(str(each) for each in Path(path, "locks").rglob("*"))


def test_a_child_that_closes_its_copy_takes_no_commit_from_its_parent(repository: Repository):
    workspace = repository.workspace()
    workspace.write("a", "a")
    workspace.commit("before", ref="main")
    in_child(repository.close)
    done = elsewhere(COMPACT, repository.path)
    assert CompactionRefusedError.__name__ in done.stderr  # the parent has the file open still
    workspace.write("a", "b")
    made = workspace.commit("after", ref="main")
    repository.close()
    with Repository.open(repository.path) as again:
        assert again.resolve("main") == made.snapshot


def test_a_child_does_not_end_a_lease(tmp_path: Path):
    with acquire(str(tmp_path), "mount", what="a test") as lease:
        assert in_child(lease.release) is None
        assert is_held(str(tmp_path), "mount")
        uses: list[Callable[[], object]] = [
            lease.describe, lease.fileno, lease.downgrade, lease.hand_on, lambda: lease.upgrade(0)
        ]  # fmt: skip
        for use in uses:
            error = in_child(use)
            assert isinstance(error, ForkedError)
            assert error.pid == os.getpid()
        assert is_held(str(tmp_path), "mount")
    assert not is_held(str(tmp_path), "mount")


HOLD_AND_FORK = """
import os, signal, sys
from engine.host.leases import acquire
lease = acquire(sys.argv[1], "mount")
if os.fork() == 0:
    print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""


def test_a_child_does_not_hold_its_dead_parents_lease(tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert is_held(str(tmp_path), "mount")
        parent.kill()
        parent.wait(PATIENCE)
        assert not is_held(str(tmp_path), "mount")
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


USES: dict[str, Callable[[Repository, SnapshotId], object]] = {
    "reading names": lambda repository, first: repository.refs(),
    "finding a snapshot": lambda repository, first: repository.resolve("main"),
    "reading a snapshot": lambda repository, first: repository.snapshot(first),
    "reading a known object": lambda repository, first: repository.objects.node(
        directory_id(repository.objects.snapshot(first).root)
    ),
    "opening a workspace": lambda repository, first: repository.workspace(first),
    "setting a ref": lambda repository, first: repository.set_ref("other", first),
    "making a session": lambda repository, first: repository.sessions.create(
        "t", (None, None, first)
    ),
    "holding a session": lambda repository, first: repository.sessions.hold("s", "a test"),
    "collecting": lambda repository, first: repository.collect(),
    "compacting": lambda repository, first: repository.compact(),
    "verifying": lambda repository, first: repository.verify(),
    "flushing": lambda repository, first: repository.flush(),
    "importing": lambda repository, first: repository.import_directory(str(ROOT / "docs")),
    "pinning": lambda repository, first: repository.pins.pin(NodeId(bytes(32))),
    "counting": lambda repository, first: repository.store.statistics(),
    "asking for the state": lambda repository, first: repository.store.transaction_id(),
    "writing": lambda repository, first: repository.store.write(lambda writer: None),
    "episodes": lambda repository, first: list(repository.episodes.all()),
}


@pytest.mark.parametrize("use", USES)
def test_a_child_is_told_at_once(repository: Repository, first: SnapshotId, session: str, use: str):
    repository.set_ref("main", first)
    repository.objects.node(directory_id(repository.snapshot(first).root))
    before, table = files(repository.path), slots(repository)
    error = in_child(lambda: USES[use](repository, first))
    assert isinstance(error, ForkedError), error
    assert error.pid == os.getpid()
    assert (files(repository.path), slots(repository)) == (before, table)


def test_a_child_that_has_an_open_view_frees_nothing(repository: Repository, first: SnapshotId):
    with repository.store.read() as reader:
        table = slots(repository)

        def leave() -> object:
            try:
                return reader.get(Db.SNAPSHOTS, first)
            finally:
                repository.close()

        assert isinstance(in_child(leave), ForkedError)
        assert slots(repository) == table
    view = repository.store.read()
    reader = view.__enter__()
    table = slots(repository)
    assert in_child(lambda: view.__exit__(None, None, None)) is None
    assert slots(repository) == table
    assert reader.has(Db.SNAPSHOTS, first)
    view.__exit__(None, None, None)


def test_a_fork_within_a_transaction_commits_once(repository: Repository, first: SnapshotId):
    here = os.getpid()
    ours, theirs = os.pipe()
    try:
        child = repository.store.write(lambda writer: os.fork())
    except ForkedError:
        assert os.getpid() != here
        os.write(theirs, b"refused")
        os._exit(0)
    if child == 0:
        os._exit(1)
    os.waitpid(child, 0)
    os.close(theirs)
    assert os.read(ours, 100) == b"refused"
    os.close(ours)
    repository.set_ref("later", first)
    assert not repository.verify().damage


def test_a_child_opens_its_own(repository: Repository, first: SnapshotId):
    def own() -> object:
        with Repository.open(repository.path) as mine:
            mine.set_ref("child", first)
            repository.close()  # the inherited one, which must not end this one's locks
            mine.set_ref("again", first)
            return mine.resolve("child")

    assert in_child(own) == first
    assert repository.resolve("again") == first


def test_a_child_opens_its_own_whatever_other_threads_were_at(
    repository: Repository, first: SnapshotId
):
    entered, end = threading.Barrier(3), threading.Event()

    def read() -> None:
        with repository.store.read():
            entered.wait(PATIENCE)
            end.wait(PATIENCE)

    def write() -> None:
        repository.store.write(lambda writer: (entered.wait(PATIENCE), end.wait(PATIENCE)))

    threads = [threading.Thread(target=each) for each in (read, write)]
    for thread in threads:
        thread.start()
    entered.wait(PATIENCE)
    try:

        def own() -> object:
            refused = None
            try:
                repository.set_ref("x", first)
            except ForkedError as error:
                refused = error
            with Repository.open(repository.path) as mine:
                return refused is not None and mine.has_snapshot(first)

        assert in_child(own, meanwhile=end.set) is True
    finally:
        end.set()
        for thread in threads:
            thread.join(PATIENCE)


def test_a_child_leaves_pins_and_posts(repository: Repository, first: SnapshotId):
    workspace = repository.workspace(first)
    workspace.write("new", "new", parents=True)
    workspace.commit("second")
    before, pins = files(repository.path), live_pins(repository.path)
    assert pins

    def drop() -> None:
        nonlocal workspace
        del workspace
        repository.pins.close()
        repository._end()
        repository.close()

    in_child(drop)
    assert isinstance(in_child(repository.pins.tidy), ForkedError)
    assert (files(repository.path), live_pins(repository.path)) == (before, pins)


EXIT_IN_CHILD = """
import os, sys
from engine import Repository
repository = Repository.open(sys.argv[1])
workspace = repository.workspace()
workspace.write("a", "a")
workspace.commit("durable")
workspace.write("a", "b")
made = workspace.commit("waits", durable=False)
before = sorted(os.listdir(sys.argv[1] + "/locks/pins"))
child = os.fork()
if child == 0:
    sys.exit(0)  # with all that an interpreter's end does
assert os.waitpid(child, 0)[1] == 0
assert sorted(os.listdir(sys.argv[1] + "/locks/pins")) == before
print(made.snapshot.hex())
"""


def test_a_child_that_ends_as_programs_do_frees_nothing(repository: Repository):
    done = elsewhere(EXIT_IN_CHILD, repository.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert repository.has_snapshot(SnapshotId(bytes.fromhex(done.stdout.strip())))


def test_a_held_session_stays_its_parents(repository: Repository, session: str):
    with repository.sessions.hold(session, "a test") as held:
        freeze = held.freeze()
        freeze.prepare()
        assert in_child(held.release) is None
        for use in (held.clean, held.reset, held.freeze, held.upper, held.take_back,
                    lambda: held.fold(freeze), lambda: held.commit(freeze),
                    lambda: repository._sessions.remove(held)):  # fmt: skip
            assert isinstance(in_child(use), ForkedError)
        assert is_held(repository.path, f"session-{held.session.uid}")
        assert Path(os.fsdecode(held.upper().root)).is_dir()
    assert repository.sessions.get(session) == held.session


def test_a_view_of_a_session_is_closed_in_a_child(repository: Repository, session: str):
    owner = Owner(os.getuid(), os.getgid())
    with repository.sessions.hold(session, "a test") as held:
        view = open_overlay(repository.objects, held.upper(), held.session.root, b"key", owner)
        file = view.root.create(b"new", 0o644, owner)
        file.write(0, b"parent")
        for use in (lambda: file.write(0, b"child"), lambda: view.root.create(b"c", 0o644, owner)):
            assert isinstance(in_child(use), (EngineError, OSError))
        assert in_child(view.close) is None
        file.write(6, b"'s")
        assert file.read(0, 100) == b"parent's"
        view.close()
    assert repository.commit(session).changed


def test_a_checkout_is_not_removed_by_a_child_of_its_callback(
    repository: Repository, first: SnapshotId, tmp_path: Path
):
    here = os.getpid()
    told: list[int] = []

    def progress(done: int, total: int | None, size: int = 0) -> None:
        if not told and os.getpid() == here:
            told.append(done)
            child = os.fork()
            if child == 0:
                raise KeyboardInterrupt
            os.waitpid(child, 0)

    try:
        repository.check_out(
            repository.snapshot(first).root, str(tmp_path / "copy"), progress=progress
        )
    finally:
        if os.getpid() != here:
            os._exit(0)
    assert told
    copied = repository.import_directory(str(tmp_path / "copy")).root
    assert list(repository.diff(repository.snapshot(first).root, copied)) == []


# Other processes' own.


def count(path: str) -> int:
    """What a worker does: it opens the store itself."""
    with Repository.open(path) as repository:
        return len(repository.snapshots())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_the_store_themselves(repository: Repository, first: SnapshotId, method: str):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) as pool:
        assert list(pool.map(count, [repository.path] * 4)) == [1] * 4
    with context.Pool(1) as pool:
        assert set(pool.map(count, [repository.path] * 4)) == {1}


def test_what_belongs_to_a_process_says_so_when_it_is_pickled(repository: Repository, session: str):
    workspace = repository.workspace()
    with repository.sessions.hold(session, "a test") as held:
        for each in (repository, repository.store, workspace, held, held.lease):
            with pytest.raises(TypeError, match=r"cannot be pickled or copied; .* store's path"):
                pickle.dumps(each)
            with pytest.raises(TypeError, match="cannot be pickled"):
                copy.copy(each)
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(TypeError):
        pool.map(repr, [repository])


def fail(path: str) -> None:
    with Repository.open(path) as repository:
        repository.resolve("nothing")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_error_of_a_worker_arrives(repository: Repository, method: str):
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool, pytest.raises(NotFoundError) as caught:
        pool.map(fail, [repository.path])
    assert caught.value.name == "nothing"


def test_values_cross_to_other_processes(repository: Repository, session: str, first: SnapshotId):
    record = repository.sessions.get(session)
    values = [first, record, record.root, repository.snapshot(first), repository.collect()]
    assert pickle.loads(pickle.dumps(values)) == values


def test_a_workspace_in_a_child_has_what_is_in_memory(repository: Repository, first: SnapshotId):
    workspace = repository.workspace(first)
    workspace.write("new", "new")

    def in_memory() -> tuple[str, bool]:
        workspace.write("new", "newer")
        return workspace.read_text("new"), workspace.is_changed()

    assert in_child(in_memory) == ("newer", True)
    for use in (
        workspace.commit,
        lambda: workspace.commit(durable=False),
        lambda: workspace.restore(first),
        lambda: workspace.diff(first),
        lambda: list(workspace.walk()),
    ):
        error = in_child(use)
        assert isinstance(error, ForkedError), error
    assert workspace.read_text("new") == "new"
    workspace.commit("the parent's")


def test_a_child_waits_for_no_lock_that_another_thread_held(tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/large").write_bytes(os.urandom(1 << 20))
    locked, end = threading.Event(), threading.Event()

    def hold() -> None:
        with content._cutting, chunking._importing:
            locked.set()
            end.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(PATIENCE)

    def own() -> int:
        with Repository.create(str(tmp_path / "store")) as repository:
            chunking._chunker.cache_clear()
            return repository.import_directory(str(tmp_path / "tree")).report.read_bytes

    try:
        assert in_child(own) == 1 << 20
    finally:
        end.set()
        thread.join(PATIENCE)
