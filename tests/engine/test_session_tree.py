"""The full tree of a session: made, worked in, taken in; and killed at any moment."""

import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import engine.sessions.sessions
from engine import Repository, SnapshotId
from engine.host.leases import LeaseHeldError
from engine.mounted.vfs import Vfs
from engine.sessions.freezing import Freeze, TooDeepError
from engine.sessions.session_tree import SessionTree
from engine.storage.nodes import DEEPEST, Owner
from engine.storage.store import StoreFullError
from tests.engine.killing import KILLER, Killed
from tests.engine.test_killed import settled
from tests.engine.trees import Tree, noise, of_directory, of_entry


def tree(repository: Repository, name: str = "@s") -> Tree:
    with repository.tree(name) as root:
        return settled(of_entry(repository.objects, root))


def work_in(
    repository: Repository, work: Callable[[Path], object], name: str = "s"
) -> tuple[tuple[str, ...], Tree]:
    """Makes the session's full tree, works in it and takes it in; returns what it was then."""
    with repository.sessions.hold(name, "testing") as held:
        full = SessionTree(repository.store, repository.objects, held)
        with repository.storing():
            full.make()
        work(Path(full.path))
        seen = settled(of_directory(full.path))
        with repository.storing():
            warnings = full.take_in()
        assert sorted(os.listdir(os.path.dirname(full.path))) == [
            f"upper.{held.session.generation}", "work",
        ]  # fmt: skip
    return warnings, seen


def change(path: Path) -> None:
    """Does something of each kind."""
    (path / "new").write_bytes(noise(300_000))
    (path / "a" / "b").write_bytes(b"rewritten")
    (path / "a" / "c").unlink()
    (path / "a" / "sub" / "d").chmod(0o4711)
    subprocess.run(["rm", "-rf", path / "a" / "sub" / "deep"], check=True)
    (path / "b" / "made").mkdir(mode=0o750)
    os.link(path / "new", path / "b" / "made" / "linked")
    os.symlink("../new", path / "b" / "made" / "symlink")
    os.mkfifo(path / "fifo-made", 0o620)
    os.setxattr(path / "a" / "b", b"user.note", b"kept")
    os.truncate(path / "a" / "b", 1 << 20)


def test_what_is_done_in_it_is_what_the_session_has(
    repository: Repository, session: str, first: SnapshotId
):
    before = tree(repository)
    assert work_in(repository, lambda path: None) == ((), before)
    assert tree(repository) == before
    warnings, seen = work_in(repository, change)
    assert (warnings, tree(repository)) == ((), seen)
    assert seen != before
    assert repository.resolve("@s") == first  # not committed
    report = repository.commit("s")
    assert report.changed
    assert tree(repository, report.snapshot.hex()) == seen
    assert work_in(repository, lambda path: (path / "new").unlink())[1] == tree(repository)


def test_it_begins_with_what_the_session_changed(repository: Repository, session: str):
    with repository.sessions.hold("s", "writing") as held:
        (Path(os.fsdecode(held.upper().root)) / "mine").write_bytes(b"mine")
    before = tree(repository)
    assert b"mine" in before
    assert work_in(repository, lambda path: (path / "theirs").write_bytes(b""))[1] == {
        **before, **{path: seen for path, seen in tree(repository).items() if path == b"theirs"},
    }  # fmt: skip


def test_only_what_was_changed_is_read_again(
    repository: Repository, session: str, monkeypatch: pytest.MonkeyPatch
):
    read: list[bytes] = []
    real = Freeze._read

    def spying(freeze: Freeze, path: bytes) -> object:
        read.append(path)
        return real(freeze, path)

    monkeypatch.setattr(Freeze, "_read", spying)

    def work(path: Path) -> None:
        (path / "a" / "b").write_bytes(b"x")
        (path / "a" / "c").chmod(0o600)
        (path / "c").read_bytes()

    work_in(repository, work)
    assert sorted(set(read)) == [b"a/b", b"a/c"]


def test_what_was_read_is_known(repository: Repository, session: str):
    with repository.sessions.hold("s", "testing") as held:
        full = SessionTree(repository.store, repository.objects, held)
        with repository.storing():
            full.make()
        path = Path(full.path)
        if os.statvfs(path).f_flag & os.ST_NOATIME:
            pytest.skip("the disk does not note what is read")
        assert full.reads().files == 0
        size = len((path / "a" / "b").read_bytes())
        (path / "new").write_bytes(b"x")
        (path / "new").read_bytes()
        assert (full.reads().files, full.reads().bytes) == (1, size)


def test_sockets_do_not_outlive_it_and_those_of_the_session_do(
    repository: Repository, session: str
):
    def bind(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))

    with repository.sessions.hold("s", "writing") as held:
        upper = Path(os.fsdecode(held.upper().root))
        folder = os.open(upper, os.O_PATH)
        bind(Path(f"/proc/self/fd/{folder}/before"))
        os.close(folder)

    def work(path: Path) -> None:
        assert not (path / "before").exists()
        folder = os.open(path, os.O_PATH)
        bind(Path(f"/proc/self/fd/{folder}/during"))
        os.close(folder)

    with repository.sessions.hold("s", "testing") as held, repository.storing():
        full = SessionTree(repository.store, repository.objects, held)
        full.make()
        work(Path(full.path))
        warnings = full.take_in()
    assert warnings == ("left out 'during': it is a socket",)
    with repository.sessions.hold("s", "looking") as held:
        assert os.listdir(os.fsdecode(held.upper().root)) == ["before"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("redirect", b"/a"), ("opaque", b"x"), ("whiteout", b"y"), ("amalgam.mode", b"nonsense")],
)
def test_attributes_of_the_uppers_format_mean_nothing_in_it(
    repository: Repository, session: str, name: str, value: bytes
):
    def work(path: Path) -> None:
        (path / "b" / "empty").write_bytes(b"")
        for where in (path / "b", path / "b" / "empty", path / "a" / "b"):
            os.setxattr(where, f"user.overlay.{name}", value)

    _, seen = work_in(repository, work)
    found = tree(repository)
    if name in {"opaque", "whiteout"}:
        found.setdefault(b"b/empty", seen[b"b/empty"])  # a whiteout, if somebody makes one
    assert found == seen


@pytest.mark.parametrize("unreadable", [0o000, 0o200, 0o444])
def test_permissions_that_lock_their_owner_out(
    repository: Repository, session: str, unreadable: int
):
    def work(path: Path) -> None:
        (path / "locked").write_bytes(b"secret")
        (path / "folder").mkdir()
        (path / "folder" / "inside").write_bytes(b"inside")
        for name in ("locked", "folder/inside", "folder"):
            (path / name).chmod(unreadable)

    with repository.sessions.hold("s", "testing") as held:
        full = SessionTree(repository.store, repository.objects, held)
        with repository.storing():
            full.make()
            work(Path(full.path))
            full.take_in()
    found = tree(repository)
    assert {found[name].mode for name in (b"locked", b"folder", b"folder/inside")} == {unreadable}
    assert found[b"folder/inside"].data == b"inside"


# Killed.


@pytest.fixture
def left(repository: Repository, session: str) -> Tree:
    """What a session's tree had in which its holder was killed while a command worked there."""
    held = repository.sessions.hold("s", "testing")
    full = SessionTree(repository.store, repository.objects, held)
    with repository.storing():
        full.make()
    change(Path(full.path))
    seen = settled(of_directory(full.path))
    held.lease.release()
    return seen


def test_the_next_holder_takes_it_in(repository: Repository, left: Tree):
    assert tree(repository) == left
    assert tree(repository) == left


def test_after_the_machine_was_started_anew_the_session_is_as_it_was(
    repository: Repository, left: Tree, first: SnapshotId, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.sessions.sessions, "this_boot", lambda: b"another")
    assert tree(repository) == tree(repository, first.hex())
    assert len(os.listdir(os.path.join(repository.path, "sessions"))) == 1


def test_a_full_disk_keeps_it_for_later(
    repository: Repository, left: Tree, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise StoreFullError(repository.path)

    with monkeypatch.context() as patched:
        patched.setattr(repository.store, "write", full)
        with pytest.raises(StoreFullError), repository.tree("@s"):
            pass
    assert tree(repository) == left


def test_what_cannot_be_a_tree_is_given_up_by_a_reset(repository: Repository, session: str):
    def dig(path: Path) -> None:
        fd = os.open(path, os.O_PATH)
        for _ in range(DEEPEST + 2):
            os.mkdir("deep", dir_fd=fd)
            below = os.open("deep", os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)

    before = tree(repository)
    with repository.sessions.hold("s", "testing") as held, repository.storing():
        full = SessionTree(repository.store, repository.objects, held)
        full.make()
        dig(Path(full.path))
        with pytest.raises(TooDeepError):
            full.take_in()
    with pytest.raises(TooDeepError):
        repository.sessions.hold("s", "testing")
    vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    with pytest.raises(TooDeepError):
        vfs.session("s")
    vfs.reset("s", None)
    vfs.close()
    assert tree(repository) == before


def test_removing_the_session_removes_it(repository: Repository, left: Tree):
    repository.sessions.remove(repository.sessions.hold("s", "removing it"))
    assert os.listdir(os.path.join(repository.path, "sessions")) == []


def kills(action: Callable[[], object], error: int | None = None) -> Iterator[int]:
    """Yields how many changes of the disk came to pass each time, until all do."""
    for after in range(1000):
        KILLER.arm(after, error)
        try:
            action()
        except (Killed, OSError):
            pass
        else:
            if KILLER.armed:
                return
        finally:
            KILLER.disarm()
        yield after
    raise AssertionError("it never ended")


@pytest.mark.parametrize("error", [None, errno.ENOSPC])
def test_killed_while_it_is_made_or_taken_in(
    repository: Repository, session: str, error: int | None
):
    before = tree(repository)
    phase = ["nothing"]
    seen: list[Tree] = []

    def run() -> None:
        phase[0], seen[:] = "made", []
        held = repository.sessions.hold("s", "testing")
        try:
            full = SessionTree(repository.store, repository.objects, held)
            with repository.storing():
                full.make()
                armed, KILLER.armed = KILLER.armed, False
                change(Path(full.path))
                seen.append(settled(of_directory(full.path)))
                phase[0], KILLER.armed = "taken in", armed
                full.take_in()
        finally:
            held.lease.release()

    count = 0
    for _ in kills(run, error):
        count += 1
        assert tree(repository) == (seen[0] if phase[0] == "taken in" else before)
        with repository.sessions.hold("s", "a test") as held:
            held.reset()
            held.clean()
        assert tree(repository) == before
    assert count > 50
    assert tree(repository) == seen[0]


def test_held_by_another(repository: Repository, left: Tree):
    with repository.sessions.hold("s", "testing"), pytest.raises(LeaseHeldError):
        repository.sessions.hold("s", "testing, too")
