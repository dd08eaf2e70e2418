"""Sessions that are committed, forked, reset, renamed and removed while programs use them."""

import errno
import mmap
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.host.leases import LeaseHeldError
from fsdriver import messages
from fsdriver.client import DaemonError
from tests.engine.trees import Tree, noise, of_directory
from tests.fsdriver.syscalls import EXCHANGE, refused, renameat2

pytestmark = pytest.mark.fuse


def numbers(root: Path) -> dict[str, int]:
    found = {".": root.stat().st_ino}
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(directory, name)
            found[str(path.relative_to(root))] = path.lstat().st_ino
    return found


def change(root: Path) -> None:
    """Does one of everything."""
    (root / "src/lib").rename(root / "lib")
    (root / "lib/deep/new").write_text("new")
    (root / "lib/big").open("ab").close()
    with (root / "lib/big").open("ab") as file:
        file.write(b"more")
    (root / "made/below").mkdir(parents=True)
    (root / "made/below/file").write_bytes(noise(200_000, 7))
    os.link(root / "made/below/file", root / "made/linked")
    (root / "docs/linked").unlink()
    (root / "docs/link").unlink()
    (root / "empty").rmdir()
    (root / "empty").write_text("a file now")
    renameat2(root / "src/main.c", root / "README", EXCHANGE)
    (root / "src/tool.sh").chmod(0o4711)
    os.utime(root / "docs/fifo", ns=(1, 2))
    os.setxattr(root / "made", b"user.x", b"y")
    (root / "made/link").symlink_to("below/file")


@contextmanager
def working(*workers: Callable[[], object]) -> Iterator[None]:
    """Lets functions run over and over beside the block; what they raise, it raises."""
    done, errors = threading.Event(), []

    def repeat(worker: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                worker()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a worker hangs"
    if errors:
        raise errors[0]


def test_a_commit_is_what_the_session_shows(mount, session, tree):
    change(session)
    before, had = of_directory(session), numbers(session)
    found = mount.commit(session.name, "changed")
    assert of_directory(mount.snapshots / found.hex()) == before
    assert (mount.snapshots / "changed").readlink() == Path(found.hex())
    assert of_directory(session) == before
    assert numbers(session) == had
    assert of_directory((mount.snapshots / "main").resolve()) == of_directory(tree)
    again = mount.ask(messages.Commit(session.name))
    assert isinstance(again, messages.Committed)
    assert (again.snapshot, again.changed) == (found.hex(), False)


def test_many_commits_each_keep_their_moment(mount, session):
    moments: dict[str, Tree] = {}
    for number in range(8):
        (session / f"dir{number}").mkdir()
        source = session / ("src" if number == 0 else f"dir{number - 1}/src")
        source.rename(session / f"dir{number}/src")
        (session / f"dir{number}/src/lib/deep/text").write_text(f"{number}")
        os.link(session / f"dir{number}/src/main.c", session / f"link{number}")
        with (session / "README").open("ab") as file:
            file.write(b"line\n")
        if number % 3 == 1:
            os.rmdir(session / f"dir{number - 1}")
        moments[mount.commit(session.name).hex()] = of_directory(session)
    assert len(moments) == 8
    for found, moment in moments.items():
        assert of_directory(mount.snapshots / found) == moment
    with mount.repository() as repository:
        assert not repository.verify().damage


def test_open_files_write_on_after_a_commit(mount, session):
    names = ["README", "src/lib/big", "new"]
    (session / "new").write_bytes(b"new " * 100)
    files = [os.open(session / name, os.O_RDWR) for name in names]
    status = [os.fstat(fd) for fd in files]
    for fd in files:
        os.pwrite(fd, b"before", 0)
    append = os.open(session / "new", os.O_WRONLY | os.O_APPEND)
    os.write(append, b"one")
    found = mount.snapshots / mount.commit(session.name).hex()
    for name, fd, old in zip(names, files, status, strict=True):
        assert os.fstat(fd).st_ino == old.st_ino
        assert os.pread(fd, 6, 0) == b"before"
        os.pwrite(fd, b"AFTER", 0)
        assert (session / name).read_bytes()[:6] == b"AFTERe"
        assert (found / name).read_bytes()[:6] == b"before"
        os.fsync(fd)
        os.ftruncate(fd, 5)
        os.close(fd)
        assert (session / name).read_bytes() == b"AFTER"
    os.write(append, b"two")
    os.close(append)
    assert (session / "new").read_bytes() == b"AFTERtwo"
    assert (found / "new").read_bytes().endswith(b"new one")


def test_removed_files_live_on_over_a_commit(mount, session):
    (session / "new").write_bytes(b"new " * 100)
    with (session / "README").open("r+b") as copied:
        copied.write(b"READ")
        copied.flush()
    files = {name: os.open(session / name, os.O_RDWR) for name in ["new", "README", "src/lib/big"]}
    texts = {name: os.pread(fd, 5_000_000, 0) for name, fd in files.items()}
    for name in files:
        (session / name).unlink()
    mount.commit(session.name)
    for name, fd in files.items():
        assert os.pread(fd, 5_000_000, 0) == texts[name]
        os.pwrite(fd, b"late", 0)
        assert os.pread(fd, 4, 0) == b"late"
        if name != "README":  # that has two more names
            assert os.fstat(fd).st_nlink == 0
        os.close(fd)
        assert not (session / name).exists()


def test_working_directories_and_listings_go_on_over_a_commit(mount, session, monkeypatch):
    monkeypatch.chdir(session / "src" / "lib")
    (session / "src").rename(session / "moved")
    with os.scandir(".") as listing:
        first = next(listing).name
        mount.commit(session.name)
        rest = [entry.name for entry in listing]
    assert sorted([first, *rest]) == ["big", "deep", "sparse", "zero"]
    Path("made").write_text("here")
    assert (session / "moved/lib/made").read_text() == "here"
    assert Path.cwd() == session / "moved/lib"


@pytest.mark.parametrize("name", ["README", "new"])
def test_maps_write_on_after_a_commit(mount, session, name):
    (session / "new").write_bytes(bytes(10_000))
    with (session / name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[0:4] = b"one "
        shared.flush()
        found = mount.commit(session.name)
        shared[0:4] = b"two "
        shared.flush()
    assert (session / name).read_bytes()[:4] == b"two "
    assert (mount.snapshots / found.hex() / name).read_bytes()[:4] == b"one "
    again = mount.commit(session.name)
    assert (mount.snapshots / again.hex() / name).read_bytes()[:4] == b"two "


def test_holes_of_gigabytes_are_committed_as_holes(mount, session):
    far = 5 << 30
    with (session / "far").open("w+b", buffering=0) as file:
        file.truncate(far + 1000)
        os.pwrite(file.fileno(), b"far away", far)
        found = mount.snapshots / mount.commit(session.name).hex()
        for place in [found / "far", session / "far"]:
            with place.open("rb", buffering=0) as other:
                assert os.pread(other.fileno(), 12, far - 2) == b"\0\0far away\0\0"
                assert os.pread(other.fileno(), 10, 1 << 30) == bytes(10)
                assert os.fstat(other.fileno()).st_size == far + 1000
        os.pwrite(file.fileno(), b"again", 0)
        assert os.pread(file.fileno(), 8, far) == b"far away"
        file.truncate(0)


def test_sockets_and_devices_stay_in_the_session(mount, session, monkeypatch):
    """A snapshot cannot hold them; the session that a server runs in still can."""
    (session / "run/deep").mkdir(parents=True)
    monkeypatch.chdir(session)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as late:
        server.bind("run/deep/socket")
        late.bind("src/socket")
        server.listen()
        late.listen()
        if os.geteuid() == 0:
            os.mknod("run/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        had = numbers(session)
        reply = mount.ask(messages.Commit(session.name))
        assert isinstance(reply, messages.Committed)
        assert len(reply.warnings) == (3 if os.geteuid() == 0 else 2)
        assert "socket" in " ".join(reply.warnings)
        assert numbers(session) == had
        found = mount.snapshots / reply.snapshot
        assert not (found / "src/socket").exists()
        for name in ["run/deep/socket", "src/socket"]:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)
        again = mount.ask(messages.Commit(session.name))
        assert isinstance(again, messages.Committed)
        assert not again.changed
        assert numbers(session) == had
    shutil.rmtree("run")
    Path("src/socket").unlink()


def test_a_commit_is_one_moment(mount, session):
    """Two files are written in turn: no snapshot has the second line without the first."""
    one, two = session / "one", session / "src/two"
    counts = [0]

    def write() -> None:
        for path in (one, two):
            with path.open("ab", buffering=0) as file:
                file.write(b"%06d\n" % counts[0])
        counts[0] += 1

    write()
    with working(write):
        found = [mount.commit(session.name) for _ in range(12)]
    last = 0
    for identifier in found:
        first = (mount.snapshots / identifier.hex() / "one").read_bytes().splitlines()
        second = (mount.snapshots / identifier.hex() / "src/two").read_bytes().splitlines()
        assert first == [b"%06d" % n for n in range(len(first))]
        assert second == first[: len(second)]
        assert len(first) - len(second) in {0, 1}
        assert len(first) >= last
        last = len(first)
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) == 7 * counts[0]


def test_commits_under_all_kinds_of_work(mount, session):
    for number in range(3):
        shutil.copytree(session / "src", session / f"w{number}/src", symlinks=True)

    def churn(home: Path) -> None:
        (home / "a").mkdir()
        for number in range(10):
            (home / f"a/{number}").write_bytes(b"%d" % number * 100)
        (home / "src").rename(home / "a/src")
        (home / "a").rename(home / "b")
        with (home / "b/src/lib/deep/text").open("r+b") as file:
            (home / "b/src/lib/deep/text").rename(home / "text")
            file.write(b"changed")
        assert (home / "text").read_bytes()[:7] == b"changed"
        os.link(home / "text", home / "b/src/lib/deep/text")
        (home / "text").unlink()
        (home / "b/src").rename(home / "src")
        assert sorted(os.listdir(home / "b"), key=int) == [f"{number}" for number in range(10)]
        shutil.rmtree(home / "b")

    def build() -> None:
        (session / "out").mkdir(exist_ok=True)
        temporary = session / "out/.new"
        temporary.write_bytes(noise(60_000, 3))
        temporary.replace(session / "out/result")
        assert (session / "out/result").read_bytes() == noise(60_000, 3)

    with working(*(lambda n=n: churn(session / f"w{n}") for n in range(3)), build):
        found = [mount.commit(session.name) for _ in range(15)]
    found.append(mount.commit(session.name))
    assert of_directory(mount.snapshots / found[-1].hex()) == of_directory(session)
    with mount.repository() as repository:
        assert not repository.verify().damage


def test_a_fork_begins_with_all_and_goes_its_own_way(mount, session):
    change(session)
    before = of_directory(session)
    name = f"{session.name}-fork"
    with (session / "lib/zero").open("r+b") as file:
        mount.ask(messages.Fork(session.name, name))
        fork = mount.sessions / name
        file.write(b"ours")
    assert of_directory(fork) == before
    (fork / "lib/zero").write_text("theirs")
    (fork / "made").rename(fork / "elsewhere")
    assert (session / "lib/zero").read_bytes() == b"ours"
    assert (session / "made/linked").exists()
    mine, theirs = mount.commit(session.name), mount.commit(name)
    assert (mount.snapshots / mine.hex() / "lib/zero").read_bytes() == b"ours"
    assert (mount.snapshots / theirs.hex() / "lib/zero").read_bytes() == b"theirs"
    mount.ask(messages.Remove(name, force=True))


def test_a_reset_session_begins_anew(mount, session, tree):
    change(session)
    # What the kernel has of a file it may still give; this it has not.
    reader = os.open(session / "lib/big", os.O_RDONLY)
    writer = os.open(session / "README", os.O_RDWR)
    directory = os.open(session / "made", os.O_RDONLY)
    os.pwrite(writer, b"written", 0)
    for request in (messages.Reset(session.name), messages.Remove(session.name)):
        with pytest.raises(DaemonError, match="uncommitted changes: 'README'") as caught:
            mount.ask(request)
        assert caught.value.kind == "UncommittedChangesError"
        os.pwrite(writer, b"written", 0)  # whoever writes goes on
    mount.ask(messages.Reset(session.name, force=True))
    assert of_directory(session) == of_directory(tree)
    with refused(errno.ESTALE):
        os.pwrite(writer, b"late", 0)
    with refused(errno.ESTALE):
        os.pread(reader, 10, 2_000_000)
    with refused(errno.ESTALE, errno.ENOENT):
        os.stat("below", dir_fd=directory)
    with refused(errno.ESTALE, errno.ENOENT):
        os.close(os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=directory))
    for fd in [reader, writer, directory]:
        os.close(fd)
    (session / "README").write_text("anew")
    assert (session / "README").read_text() == "anew"


def test_a_session_goes_back_to_what_it_was_made_of(mount, session, tree):
    change(session)
    found = mount.commit(session.name)
    mount.ask(messages.Reset(session.name, factory=True, paths=[b"README"]))
    assert (session / "README").read_bytes() == (tree / "README").read_bytes()
    (session / "README").write_text("anew")
    mount.ask(messages.Reset(session.name, force=True))
    committed = mount.snapshots / found.hex() / "README"
    assert (session / "README").read_bytes() == committed.read_bytes()
    mount.ask(messages.Reset(session.name, factory=True))
    assert of_directory(session) == of_directory(tree)


def test_a_session_is_reset_to_another_snapshot(mount, session, snapshot):
    change(session)
    before = of_directory(session)
    found = mount.commit(session.name)
    mount.ask(messages.Reset(session.name, snapshot.hex()))
    assert (session / "src/lib/zero").exists()
    mount.ask(messages.Reset(session.name, found.hex()))
    assert of_directory(session) == before
    for wrong in ["00" * 32, "zz", ""]:
        with pytest.raises(DaemonError):
            mount.ask(messages.Reset(session.name, wrong))
    assert of_directory(session) == before


def test_a_renamed_session_takes_its_programs_along(mount, session, monkeypatch):
    name = session.name + "-new"
    (session / "file").write_text("one")
    monkeypatch.chdir(session / "src")
    number = session.stat().st_ino
    with (session / "file").open("r+b") as file:
        mount.ask(messages.Rename(session.name, name))
        try:
            assert not session.exists()
            assert name in os.listdir(mount.sessions)
            assert session.name not in os.listdir(mount.sessions)
            assert (mount.sessions / name).stat().st_ino == number
            file.write(b"two")
            file.flush()
            assert (mount.sessions / name / "file").read_text() == "two"
            Path("made").write_text("here")
            assert (mount.sessions / name / "src/made").read_text() == "here"
        finally:
            mount.ask(messages.Rename(name, session.name))
    assert (session / "file").read_text() == "two"


def test_a_removed_session_is_gone_for_its_programs_too(mount, snapshot):
    at = mount.create("short", snapshot)
    (at / "file").write_text("one")
    fd = os.open(at / "file", os.O_RDWR)
    below = os.open(at / "src", os.O_RDONLY)
    directory = os.open(at, os.O_RDONLY)
    mount.ask(messages.Remove("short", force=True))
    assert not at.exists()
    assert "short" not in os.listdir(mount.sessions)
    with refused(errno.ESTALE, errno.ENOENT):
        os.pwrite(fd, b"late", 0)
    with refused(errno.ESTALE, errno.ENOENT):
        os.stat("nothing", dir_fd=below)
    with refused(errno.ESTALE, errno.ENOENT):
        os.stat("main.c", dir_fd=below)
    with refused(errno.ESTALE, errno.ENOENT):
        os.mkdir("new", dir_fd=directory)
    for opened in [fd, below, directory]:
        os.close(opened)
    again = mount.create("short", snapshot)
    assert (again / "README").read_text() == "read me\n"
    assert not (again / "file").exists()
    mount.ask(messages.Remove("short", force=True))


def test_what_cannot_be_done_is_told_and_changes_nothing(mount, session):
    before = of_directory(session)
    for request in [
        messages.Commit("nobody"),
        messages.Commit(session.name, "", "a/b"),
        messages.Commit(session.name, "", "@x"),
        messages.Fork(session.name, session.name),
        messages.Fork(session.name, "../x"),
        messages.Fork("nobody", "other"),
        messages.Rename(session.name, ""),
        messages.Rename("nobody", "other"),
        messages.Reset("nobody"),
        messages.Remove("nobody"),
        messages.Freeze("nobody"),
    ]:
        with pytest.raises(DaemonError):
            mount.ask(request)
    assert of_directory(session) == before
    assert (session / "README").exists()


def test_a_session_that_another_process_holds_is_busy(mount, snapshot):
    with mount.repository() as repository:
        repository.sessions.create("held", (None, None, snapshot))
        with repository.sessions.hold("held", "a test"):
            with refused(errno.EBUSY):
                os.listdir(mount.sessions / "held")
            assert "held" in os.listdir(mount.sessions)
            assert (mount.sessions / "held").is_dir()
            with pytest.raises(DaemonError, match="held"):
                mount.ask(messages.Commit("held"))
        assert (mount.sessions / "held" / "README").exists()
    mount.ask(messages.Remove("held", force=True))


def test_listing_the_sessions_takes_none(mount, snapshot):
    with mount.repository() as repository:
        repository.sessions.create("looked-at", (None, None, snapshot))
        found = {entry.name: entry.stat().st_ino for entry in os.scandir(mount.sessions)}
        number = (mount.sessions / "looked-at").stat().st_ino
        assert found["looked-at"] == number
        directory = os.open(mount.sessions / "looked-at", os.O_PATH)
        repository.sessions.hold("looked-at", "another process").release()
        Path(f"/proc/self/fd/{directory}/made").write_text("made")
        assert (mount.sessions / "looked-at").stat().st_ino == number
        assert os.fstat(directory).st_ino == number
        os.close(directory)
        with pytest.raises(LeaseHeldError):
            repository.sessions.hold("looked-at", "another process")
    mount.ask(messages.Remove("looked-at", force=True))


def test_a_freeze_gives_the_tree_without_a_snapshot(mount, session):
    (session / "new").write_text("x")
    before = set(os.listdir(mount.snapshots))
    reply = mount.ask(messages.Freeze(session.name))
    assert isinstance(reply, messages.Frozen)
    assert reply.root
    assert set(os.listdir(mount.snapshots)) == before
    (session / "new").write_text("y")


def test_syncs_while_commits_change_over(mount, session):
    """More files than are kept open: a sync opens them again."""
    files = [os.open(session / f"n{n}", os.O_RDWR | os.O_CREAT) for n in range(300)]

    def write_and_sync() -> None:
        for fd in files:
            os.pwrite(fd, b"x", 0)
        for fd in files:
            os.fsync(fd)

    with working(write_and_sync):
        for _ in range(12):
            mount.commit(session.name)
    for fd in files:
        os.close(fd)
