"""The daemon: how it starts, is refused, ends and dies, and what it leaves behind."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from engine import Repository
from engine.ids import SnapshotId
from engine.storage.content import chunk_ids
from engine.storage.nodes import Kind
from engine.storage.store import Db
from engine.trees.directory import directory_id, find
from fsdriver import launch, messages
from fsdriver.client import DaemonError, DaemonLostError, bind, connect
from fsdriver.mountpoint import PART, MountPointError, check, is_dead, mounts, our_mount, unmount
from tests.conftest import run_as_user
from tests.engine.trees import of_directory
from tests.fsdriver.conftest import PATIENCE, Mount, left_behind, until, until_forgotten
from tests.fsdriver.syscalls import refused

pytestmark = pytest.mark.fuse

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

GONE = (errno.ENOTCONN, errno.ECONNABORTED)


# Starting.


def test_it_serves_when_launch_returns(own):
    own.start()
    assert (own.sessions / "s" / "README").read_text() == "read me\n"
    mounted = our_mount(str(own.path))
    assert mounted is not None
    assert mounted.source == str(own.store)
    status = own.ask(messages.GetStatus())
    assert isinstance(status, messages.Status)
    assert (status.pid, status.mountpoint, status.sessions) == (own.pid, str(own.path), ["s"])
    assert os.getsid(own.pid) == own.pid
    assert "event=mounted" in own.log()
    own.stop()
    assert left_behind(own) == []
    assert "event=ended" in own.log()
    own.start()
    own.stop()


def test_a_store_is_mounted_once(own, tmp_path):
    own.start()
    (tmp_path / "second").mkdir()
    with pytest.raises(launch.LaunchError, match=str(own.path)):
        launch.launch(str(own.store), str(tmp_path / "second"))
    assert our_mount(str(tmp_path / "second")) is None
    assert (own.sessions / "s" / "README").exists()
    with pytest.raises(MountPointError, match="mounted there"):
        check(str(own.path), str(own.store))


@pytest.mark.parametrize(("device", "why"), [("fuse", "No such file"), ("/dev/null", "another")])
def test_where_there_is_no_fuse_no_daemon_is_started(own, tmp_path, monkeypatch, device, why):
    monkeypatch.setattr(launch, "DEVICE", str(tmp_path / device))
    with pytest.raises(launch.LaunchError, match=why) as refused:
        launch.launch(str(own.store), str(own.path))
    assert refused.value.kind == "MountRefusedError"
    assert not own.store.joinpath("log/mount.log").exists()


def test_what_cannot_be_mounted_on_is_refused(own, tmp_path):
    for name in ["full/x", "empty", "store/inside"]:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "through").symlink_to(".")
    for name, why in {
        "full": "not empty", "file": "not a directory", "link": "symbolic link",
        "dangling": "symbolic link", "nothing": "no such directory",
        "store/inside": "inside of the store", "through/store/inside": "inside of the store",
        ".": "not empty", "store": "not empty",
    }.items():  # fmt: skip
        with pytest.raises(MountPointError, match=why):
            check(str(tmp_path / name), str(own.store))
    assert check(str(tmp_path / "through" / "empty"), str(own.store)) == str(tmp_path / "empty")
    with pytest.raises(launch.LaunchError):
        launch.launch(str(own.store), str(tmp_path / "nothing"))
    with pytest.raises(launch.LaunchError):
        launch.launch(str(tmp_path / "full"), str(tmp_path / "empty"))
    assert left_behind(own) == []


def test_names_that_are_hard_to_say(tmp_path, tree):
    home = tmp_path / "a, b\\c\td #é\nf=g:h"
    home.mkdir()
    mount = Mount(home)
    with Repository.create(str(mount.store)) as repository:
        repository.import_directory(str(tree), ref="main")
    try:
        mount.start()
        assert (mount.snapshots / "main" / "README").exists()
        with pytest.raises(MountPointError, match="mounted there"):
            check(str(mount.path), str(mount.store))
        mount.kill()
        mount.start()
        mount.stop()
        assert left_behind(mount) == []
    finally:
        mount.clear()


def test_paths_longer_than_a_sockets(tmp_path, tree):
    home = tmp_path / ("long" * 50)
    home.mkdir()
    mount = Mount(home)
    Repository.create(str(mount.store)).close()
    try:
        mount.start()
        assert isinstance(mount.ask(messages.GetStatus()), messages.Status)
        mount.stop()
    finally:
        mount.clear()


def test_the_device_itself_serves_as_well(own, tree):
    """`plain` leaves the channel out: pyfuse3 on the device."""
    own.start(plain=True)
    session = own.sessions / "s"
    assert of_directory(session) == of_directory(tree)
    (session / "src").rename(session / "code")
    with (session / "code/lib/big").open("r+b") as file:
        file.write(b"changed")
        file.truncate(100)
    with refused(errno.EROFS):
        (own.snapshots / "main" / "README").open("r+b")
    found = own.commit("s")
    assert of_directory(own.snapshots / found.hex()) == of_directory(session)
    own.stop()


# Ending.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_busy_mount(own, number):
    own.start()
    session = own.sessions / "s"
    directory = os.open(session / "src", os.O_RDONLY)
    file = os.open(session / "new", os.O_RDWR | os.O_CREAT)
    os.write(file, b"written")
    os.kill(own.pid, number)
    own.wait_for_end()
    assert left_behind(own) == []
    with refused(*GONE):
        os.pwrite(file, b"late", 0)
    with refused(*GONE):
        os.stat("lib", dir_fd=directory)
    for fd in [file, directory]:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert f"signal={number.name}" in own.log()
    assert "error" not in own.log()
    own.start()
    assert (session / "new").read_bytes() == b"written"
    own.stop()


def test_a_signal_right_after_the_start_ends_it_cleanly(own):
    for _ in range(4):
        own.start()
        os.kill(own.pid, signal.SIGTERM)
        own.wait_for_end()
        assert left_behind(own) == []


def test_signals_one_upon_the_other_end_it_as_cleanly(own):
    own.start()
    file = os.open(own.snapshots / "main" / "README", os.O_RDONLY)
    for number in [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTERM] * 5:
        with contextlib.suppress(ProcessLookupError):
            os.kill(own.pid, number)
        time.sleep(0.001)
    own.wait_for_end()
    with contextlib.suppress(OSError):
        os.close(file)
    assert left_behind(own) == []


def test_signals_while_it_works(own):
    own.start()
    session = own.sessions / "s"

    def work() -> None:
        with contextlib.suppress(OSError):
            for number in range(1_000_000):
                (session / f"{number}").write_bytes(b"x" * 5000)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    until((session / "50").exists)
    os.kill(own.pid, signal.SIGTERM)
    own.wait_for_end()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a program hangs"
    assert left_behind(own) == []
    assert "level=error" not in own.log()


def test_a_busy_mount_refuses_to_be_asked(own):
    own.start()
    with (own.snapshots / "main" / "README").open("rb"):
        with pytest.raises(DaemonError, match="busy"):
            own.ask(messages.Shutdown())
        assert (own.sessions / "s" / "README").exists()
    own.stop()
    assert left_behind(own) == []


@pytest.mark.parametrize("lazy", [False, True])
def test_an_unmount_from_outside_ends_it(own, lazy):
    own.start()
    (own.sessions / "s" / "new").write_text("x")
    unmount(str(own.path), lazy=lazy)
    own.wait_for_end()
    assert left_behind(own) == []


def test_fusermount_ends_it(own):
    tool = shutil.which("fusermount3")
    assert tool is not None, "fusermount3 is missing"
    own.start()
    inside = our_part(own)
    if inside:  # as with any two mounts, the inner one goes first, or both with -z
        subprocess.run([tool, "-u", inside], check=True)
        assert os.listdir(own.snapshots) == []
    subprocess.run([tool, "-u", own.path], check=True)
    own.wait_for_end()
    assert left_behind(own) == []


def test_a_busy_mount_is_refused_and_stays_whole(own):
    own.start()
    before = sorted(os.listdir(own.snapshots))
    with (own.path / ".amalgam/status").open():
        with pytest.raises(DaemonError, match="busy"):
            own.ask(messages.Shutdown())
        assert sorted(os.listdir(own.snapshots)) == before
        assert (own.snapshots / before[0]).is_dir()
    with (own.snapshots / before[0] / "README").open("rb") as file:
        with pytest.raises(DaemonError, match="busy"):
            own.ask(messages.Shutdown())
        assert file.read() == b"read me\n"
    own.stop()


@as_root
def test_a_copy_of_the_mount_in_another_namespace_does_not_keep_it(own):
    own.start()
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read wait"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        seen = f"/proc/{other.pid}/root{own.path}"
        assert os.listdir(seen)
        own.stop()
        with refused(*GONE):
            os.stat(f"{seen}/sessions/s")
        other.communicate(b"\n", timeout=PATIENCE)
    assert left_behind(own) == []


def our_part(mount):
    """Returns where `/snapshots` is mounted by itself, which users cannot have, else None."""
    parts = [m.path for m in mounts() if m.kind == PART]
    return str(mount.snapshots) if str(mount.snapshots) in parts else None


# Dying.


def test_a_killed_daemon_is_replaced_and_nothing_is_lost(own):
    own.start()
    session = own.sessions / "s"
    (session / "src").rename(session / "code")
    (session / "code/new").write_bytes(b"new" * 1000)
    (session / "README").write_text("changed")
    (session / "docs/link").unlink()
    os.setxattr(session / "empty", b"user.x", b"y")
    before = of_directory(session)
    own.kill()
    with refused(*GONE):
        os.listdir(own.path)
    own.start()
    assert of_directory(session) == before
    found = own.commit("s")
    own.kill()
    own.start()
    assert of_directory(session) == before
    assert of_directory(own.snapshots / found.hex()) == before
    own.stop()
    assert left_behind(own) == []


def test_a_dead_mount_is_replaced_however_long_it_was_left_alone(own):
    own.start()
    os.listdir(own.snapshots)
    time.sleep(1.1)  # the kernel kept attributes on the way to /snapshots for a second
    own.kill()
    own.start()
    assert (own.snapshots / "main" / "README").exists()
    own.stop()
    assert left_behind(own) == []


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
number = 0
try:
    while True:
        os.pwrite(fd, b"%07d\\n" % number, 8 * number)
        number += 1
        if number % 50 == 0:
            os.close(os.open(sys.argv[1] + f".{number}", os.O_WRONLY | os.O_CREAT))
        os.write(1, b".")
except OSError as error:
    print(error.errno, number, file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["new", "src/lib/zero"])
def test_writes_that_returned_survive_a_kill(own, name):
    own.start()
    target = own.sessions / "s" / name
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    acknowledged = 0
    while acknowledged < 300:
        acknowledged += len(os.read(writer.stdout.fileno(), 1000))
    own.kill()
    acknowledged += len(writer.stdout.read())
    code, written = map(int, writer.stderr.read().split())
    assert writer.wait() == 0
    writer.stdout.close()
    writer.stderr.close()
    assert code in GONE
    assert acknowledged in {written, written - 1}
    own.start()
    data = target.read_bytes()
    assert data[: 8 * acknowledged] == b"".join(b"%07d\n" % n for n in range(acknowledged))
    assert len(data) in {8 * acknowledged, 8 * acknowledged + 8}
    for number in range(50, acknowledged, 50):
        assert target.with_name(f"{target.name}.{number}").exists()
    own.stop()


def test_a_kill_at_any_moment_of_a_commit_loses_nothing(own):
    dice = random.Random(5)
    session = own.sessions / "s"
    for turn in range(5):
        own.start()
        for number in range(40):
            (session / f"{turn}-{number}").write_bytes(os.urandom(20_000))
        (session / ("src" if turn == 0 else f"src{turn - 1}")).rename(session / f"src{turn}")
        before = of_directory(session)
        pid = own.pid

        def strike(pid: int = pid, after: float = dice.uniform(0, 0.03)) -> None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=strike)
        killer.start()
        with contextlib.suppress(DaemonLostError):
            own.commit("s", "latest")
        killer.join()
        own.wait_for_end()
        assert is_dead(str(own.path))
        own.start()
        assert of_directory(session) == before
        with own.repository() as repository:
            assert not repository.verify().damage
            refs = repository.refs()
        if "latest" in refs:
            assert (own.snapshots / "latest" / "README").exists()
        own.stop()
    assert left_behind(own) == []


# The control socket.


def test_the_socket_is_its_owners_alone(own):
    own.start()
    where = own.store / "locks" / "control"
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.store.stat().st_mode) & 0o077 == 0


ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(10)
    try:
        sock.connect(sys.argv[1])
    except PermissionError:
        print("may not connect")
        sys.exit()
    try:
        sock.sendall(b'{"type":"GetStatus"}\\n')
        print("answer:", sock.recv(1000))
    except (BrokenPipeError, ConnectionResetError):
        print("answer: b''")
"""


@as_root
def test_another_user_is_not_answered(public_path, tree):
    mount = Mount(public_path)
    Repository.create(str(mount.store)).close()
    try:
        mount.start()
        where = mount.store / "locks" / "control"
        mount.store.chmod(0o755)
        where.parent.chmod(0o755)
        assert run_as_user("-c", ASK, str(where)).stdout == "may not connect\n"
        where.chmod(0o666)
        assert run_as_user("-c", ASK, str(where)).stdout == "answer: b''\n"
        assert "refused a client" in mount.log()
        assert isinstance(mount.ask(messages.GetStatus()), messages.Status)
        mount.stop()
    finally:
        mount.clear()


def talk(mount: Mount, data: bytes) -> bytes:
    """Sends bytes and returns all that comes back until the daemon hangs up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        connect(sock, str(mount.store / "locks" / "control"))
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                answer += part
    return answer


def test_garbage_on_the_socket_is_answered_or_hung_up_on(mount, session):
    before = of_directory(session)
    for line in [
        b"hello\n", b"\n", b"{}\n", b'{"type":"Nothing"}\n', b"\xff\xfe\x00\n", b"[1, 2]\n",
        b'{"type":"Commit"}\n', b'{"type":"Commit","session":5}\n', b"null\n",
        b'{"type":"Commit","session":"\\ud800"}\n', b'{"type":"Remove","session":"../../x"}\n',
        b'{"type":"Remove","session":""}\n', b'{"type":"Rename","session":"\\u0000","name":"x"}\n',
        b'{"type":"Reset","session":"nobody","to":"xyz"}\n',
        b'{"type":"Fork","session":"' + b"x" * 10_000 + b'","name":"y"}\n',
    ]:  # fmt: skip
        answer = talk(mount, line)
        assert json.loads(answer)["type"] == "Failed", line
        assert answer.count(b"\n") == 1
    assert talk(mount, b"") == b""
    assert talk(mount, b'{"type":"GetStatus"}') == b""
    assert talk(mount, b"x" * (3 << 20)) == b""
    assert talk(mount, os.urandom(100_000).replace(b"\n", b"") + b"\n").startswith(b'{"type":"Fa')
    two = talk(mount, b'{"type":"GetStatus"}\n{"type":"Refresh"}\n').splitlines()
    assert [json.loads(line)["type"] for line in two] == ["Status", "Done"]
    assert of_directory(session) == before


def test_silent_clients_keep_nobody_waiting(mount, session):
    silent = [socket.socket(socket.AF_UNIX) for _ in range(30)]
    try:
        for sock in silent:
            connect(sock, str(mount.store / "locks" / "control"))
            sock.sendall(b'{"type":"GetSta')
        assert isinstance(mount.ask(messages.GetStatus()), messages.Status)
        deaf = silent[0]
        deaf.sendall(b'tus"}\n' + b'{"type":"GetStatistics"}\n' * 5000)
        assert isinstance(mount.ask(messages.GetStatus()), messages.Status)
        (session / "file").write_text("x")
    finally:
        for sock in silent:
            sock.close()


def test_a_socket_left_by_a_killed_daemon_is_no_obstacle(own):
    with socket.socket(socket.AF_UNIX) as sock:
        bind(sock, str(own.store / "locks" / "control"))
    own.start()
    assert isinstance(own.ask(messages.GetStatus()), messages.Status)
    own.stop()


# Damage.


def spoil(mount: Mount, db: Db, identifier: bytes, value: bytes | None) -> None:
    with mount.repository() as repository:
        if value is None:
            repository.store.write(lambda writer: writer.delete(db, identifier))
        else:
            repository.store.write(lambda writer: writer.put(db, identifier, value))


def ids_of(mount: Mount, path: bytes) -> list[bytes]:
    """Returns the ids of a file's chunks, or of a directory's node."""
    with mount.repository() as repository:
        root = repository.snapshot(repository.resolve("main")).root
        entry = find(repository.objects, root, path)
        assert entry is not None
        if entry.kind == Kind.DIRECTORY:
            return [directory_id(entry)]
        return list(chunk_ids(repository.objects, entry, set()))


@pytest.mark.parametrize("value", [b"\x00garbage", b"", b"\x01not zstd", None])
def test_a_corrupt_chunk_hurts_its_file_alone(own, tree, value):
    chunk = ids_of(own, b"src/lib/big")[-1]
    spoil(own, Db.CHUNKS, chunk, value)
    own.start()
    session = own.sessions / "s"
    for root in [own.snapshots / "main", session]:
        with refused(errno.EIO):
            (root / "src/lib/big").read_bytes()
        assert (root / "src/lib/big").stat().st_size == 3_000_000
        start = (tree / "src/lib/big").read_bytes()[:1000]
        with (root / "src/lib/big").open("rb", buffering=0) as file:
            assert file.read(1000) == start
        for name in ["README", "src/main.c", "src/lib/deep/text"]:
            assert (root / name).read_bytes() == (tree / name).read_bytes()
    with refused(errno.EIO), (session / "src/lib/big").open("r+b", buffering=0) as file:
        file.write(b"x")
    (session / "other").write_text("x")
    os.truncate(session / "src/lib/big", 0)
    assert (session / "src/lib/big").read_bytes() == b""
    own.commit("s")
    assert chunk.hex() in own.log()
    own.stop()


@pytest.mark.parametrize("value", [b"garbage", None])
def test_a_corrupt_directory_hurts_itself_alone(own, tree, value):
    spoil(own, Db.NODES, ids_of(own, b"src/lib")[0], value)
    own.start()
    for root in [own.snapshots / "main", own.sessions / "s"]:
        with refused(errno.EIO):
            os.listdir(root / "src/lib")
        with refused(errno.EIO):
            (root / "src/lib/zero").stat()
        assert sorted(os.listdir(root / "src")) == ["lib", "main.c", "tool.sh"]
        assert (root / "README").read_text() == "read me\n"
    (own.sessions / "s" / "src/main.c").write_text("x")
    (own.sessions / "s" / "src").rename(own.sessions / "s" / "code")
    own.stop()


def test_a_damaged_session_does_not_hide_the_others(own):
    with own.repository() as repository:
        repository.sessions.create("t", (None, None, repository.resolve("main")))
        repository.store.write(lambda writer: writer.put(Db.SESSIONS, b"t", b"garbage"))
    own.start()
    assert (own.sessions / "s" / "README").exists()
    assert own.commit("s")
    assert (own.snapshots / "main" / "README").exists()
    own.stop()


@as_root
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, tree):
    home = tmp_path / "disk"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "amalgamfs-test", home], check=True)
    mount = Mount(home)
    try:
        with Repository.create(str(mount.store)) as repository:
            main = SnapshotId(repository.import_directory(str(tree), ref="main").snapshot)
        mount.start()
        session = mount.create("s", main)
        (session / "kept").write_bytes(b"kept" * 1000)
        with refused(errno.ENOSPC), (session / "large").open("wb", buffering=0) as file:
            for _ in range(50):
                file.write(os.urandom(1 << 20))
        with refused(errno.ENOSPC), (session / "src/lib/big").open("r+b", buffering=0) as file:
            file.write(b"x")
        assert (session / "src/lib/big").read_bytes() == (tree / "src/lib/big").read_bytes()
        with pytest.raises(DaemonError):
            mount.commit("s")
        assert (session / "kept").read_bytes() == b"kept" * 1000
        (session / "large").unlink()
        until_forgotten(mount)
        (session / "src/lib/big").write_bytes(b"fits")
        found = mount.commit("s")
        assert of_directory(mount.snapshots / found.hex()) == of_directory(session)
        mount.stop()
    finally:
        mount.clear()
        subprocess.run(["umount", "-l", home], check=True)


# Others on the same store.

IMPORTER = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    for number in range(5):
        with open(f"{sys.argv[2]}/{number}", "w") as file:
            file.write(f"{sys.argv[2]} {number}" * 1000)
        print(repository.import_directory(sys.argv[2], ref=sys.argv[3]).snapshot.hex(), flush=True)
"""

COLLECTOR = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    for _ in range(3):
        repository.collect()
"""


def test_imports_commits_and_collections_beside_a_mount(own, tmp_path):
    own.start()
    session = own.sessions / "s"
    (session / "kept").write_bytes(b"kept" * 50_000)
    with (session / "src/lib/big").open("rb") as unlinked:
        running = []
        for number in range(2):
            (tmp_path / f"source{number}").mkdir()
            arguments = ["-c", IMPORTER, own.store, tmp_path / f"source{number}", f"r{number}"]
            running.append(subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE))
        running.append(subprocess.Popen([sys.executable, "-c", COLLECTOR, own.store]))
        commits = []
        for number in range(6):
            (session / f"new{number}").write_bytes(os.urandom(50_000))
            commits.append((own.commit("s", "work"), of_directory(session)))
        outputs = [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0]
        assert unlinked.read() == (own.snapshots / "main/src/lib/big").read_bytes()
    for output in outputs[:2]:
        for found in output.decode().split():
            assert max(os.listdir(own.snapshots / found)) in "01234"
    for found, moment in commits:
        assert of_directory(own.snapshots / found.hex()) == moment
    with own.repository() as repository:
        repository.collect()
        assert not repository.verify().damage
    assert of_directory(session) == commits[-1][1]
    own.stop()
    assert "level=error" not in own.log()


def test_many_sessions_at_once(own):
    """Every session that somebody looks at is held; they all are given back."""
    with own.repository() as repository:
        main = repository.resolve("main")
        for number in range(40):
            repository.sessions.create(f"n{number}", (None, None, main))
    own.start()
    for number in range(40):
        (own.sessions / f"n{number}" / "README").write_text(f"{number}")
    assert len(os.listdir(own.sessions)) == 41
    for number in range(0, 40, 2):
        own.ask(messages.Remove(f"n{number}", force=True))
    assert sorted(os.listdir(own.sessions)) == sorted(["s", *(f"n{n}" for n in range(1, 40, 2))])
    assert (own.sessions / "n7" / "README").read_text() == "7"
    own.stop()
    with own.repository() as repository:
        with repository.sessions.hold("n7", "a test") as held:
            assert held.session.name == "n7"
        assert repository.commit("n7").changed
    assert left_behind(own) == []


def test_programs_hang_on_nothing_when_the_daemon_stops_for_a_while(own):
    """Programs wait for a stopped daemon; a continued one answers, a killed one fails them."""
    own.start()
    session = own.sessions / "s"
    os.kill(own.pid, signal.SIGSTOP)
    answers: list[object] = []

    def look() -> None:
        try:
            answers.append((session / "src/lib/deep").stat().st_mode)
        except OSError as error:
            answers.append(error.errno)

    for end in [signal.SIGCONT, signal.SIGKILL]:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(0.05)
        os.kill(own.pid, end)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        if end == signal.SIGCONT:
            assert answers == [stat.S_IFDIR | 0o755]
            (session / "src/lib/deep").rename(session / "deep")
            os.kill(own.pid, signal.SIGSTOP)
            answers.clear()
    assert answers[0] in {*GONE, errno.ENOENT}
    own.wait_for_end()
