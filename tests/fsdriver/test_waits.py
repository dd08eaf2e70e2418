"""Who waits for whom: no process waits for its own mount, and each wait has an end."""

import ast
import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdriver import client, messages
from fsdriver.apart import is_inside
from fsdriver.client import Client, DaemonLostError
from fsdriver.control import SPARES
from fsdriver.ending import force_end
from fsdriver.errand import Errand, call
from fsdriver.mountpoint import is_dead, mounts_of, our_mount
from tests.fsdriver.conftest import PATIENCE, ROOT, Mount, until
from tests.fsdriver.syscalls import refused
from tests.fsdriver.test_guard import guard_of

# What the modules that run in a daemon may do with the path of its mount: none of it leads inside.
HARMLESS = {
    "Channel", "Control", "Mounted", "Part", "Status", "_arguments", "_connection", "_helper",
    "abspath", "acquire", "any", "call", "check_unmounted", "describe", "info", "join",
    "keep_apart", "mount", "mount_part", "parts_in", "realpath", "remove_own_directory", "unmount",
    "unmount_command", "warning", "_prepare_process", "_start", "enter_context",
    "add_argument",
}  # fmt: skip
IN_THE_DAEMON = ["daemon", "channel", "control", "operations", "readahead", "housekeeping"]


@pytest.mark.parametrize("module", IN_THE_DAEMON)
def test_nothing_in_a_daemon_is_asked_of_its_mount(module: str):
    """By what the code does with the mount's path; the rest is in test_deaths."""
    tree = ast.parse((ROOT / "fsdriver" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        names = {
            part.attr if isinstance(part, ast.Attribute) else part.id
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]
            for part in ast.walk(argument)
            if isinstance(part, (ast.Attribute, ast.Name))
        }
        if any("mountpoint" in name for name in names):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            assert called in HARMLESS, f"{module}.py:{node.lineno}: {called}"


def test_a_process_is_kept_apart_from_a_mount(tmp_path: Path):
    mountpoint, other = tmp_path / "mnt", tmp_path / "other"
    mountpoint.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(mountpoint)
    inside, linked = str(mountpoint / "sessions/w"), str(tmp_path / "link/bin")
    program = (
        "import json, os, sys; from fsdriver.apart import keep_apart; keep_apart(sys.argv[1]); "
        "print(json.dumps([os.getcwd(), sys.path, os.environ['PATH'], os.environ['PYTHONPATH']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(mountpoint)], cwd=mountpoint, check=True,
        capture_output=True, text=True,
        env={
            "PATH": f"{inside}:/usr/bin:bin:{linked}", "PYTHONPATH": f"{inside}:{ROOT}:{other}",
        },
    )  # fmt: skip
    cwd, modules, path, python_path = json.loads(done.stdout)
    assert cwd == "/"
    assert path == "/usr/bin"
    assert python_path == f"{ROOT}:{other}"
    assert str(other) in modules
    assert not any(is_inside(str(mountpoint), os.path.realpath(each)) for each in modules)


def test_an_errand_tells_the_errno(tmp_path: Path):
    with Errand(call("statvfs", str(tmp_path))) as errand:
        assert errand.wait(PATIENCE)
        assert errand.done() == (0, "")
    with Errand(call("statvfs", str(tmp_path / "none"))) as errand:
        assert errand.wait(PATIENCE)
        assert errand.done()[0] == 2


def test_an_errand_that_does_not_come_back_is_left():
    with Errand(["sleep", "1000"]) as errand:
        assert not errand.wait(0.01)
        pid = errand._process.pid
    until(lambda: not Path(f"/proc/{pid}").exists())


# A client, and a daemon that does not answer it.


class Server:
    """Listens as a daemon does; answers GetStatus if it `serves`, and the rest by `answer`."""

    def __init__(self, path: str, *, serves: bool) -> None:
        self.serves, self._rest, self.asked = serves, threading.Event(), 0
        self._listener = socket.socket(socket.AF_UNIX)
        client.bind(self._listener, path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def answer(self) -> None:
        self._rest.set()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                status = json.loads(line)["type"] == "GetStatus"
                self.asked += status
                if not status or not self.serves:
                    self._rest.wait()
                reply = b'{"type":"Status","pid":1,"store":"","mountpoint":"","log":"",' \
                        b'"started_ns":0,"sessions":[]}\n'  # fmt: skip
                connection.sendall(reply if status else b'{"type":"Done"}\n')


def test_a_busy_daemon_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(client, "STILL_SECONDS", 0.0)
    server = Server(str(tmp_path / "control"), serves=True)
    answers: list[object] = []

    def ask() -> None:
        with Client(str(tmp_path / "control"), os.getpid()) as asking:
            answers.append(asking.ask(messages.Compact()))

    thread = threading.Thread(target=ask)
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.2)
    thread.start()
    until(lambda: server.asked > 2)
    server.answer()
    thread.join(PATIENCE)
    assert answers == [messages.Done()]


def test_a_daemon_that_answers_nobody_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(client, "STILL_SECONDS", 0.05)
    Server(str(tmp_path / "control"), serves=False)
    with (
        Client(str(tmp_path / "control"), os.getpid()) as asking,
        pytest.raises(DaemonLostError, match="does not answer"),
    ):
        asking.ask(messages.Compact())


# Mounts.


@pytest.fixture
def hung(own: Mount) -> Iterator[Mount]:
    """A mount whose daemon is stopped."""
    own.start()
    (own.sessions / "s" / "kept").write_bytes(b"kept")
    os.kill(own.pid, signal.SIGSTOP)
    yield own
    own.clear()


@pytest.mark.fuse
def test_who_looks_at_a_hanging_mount_does_not_hang(hung: Mount, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fsdriver.mountpoint.ANSWER_SECONDS", 0.2)
    assert not is_dead(str(hung.path))


@pytest.mark.fuse
@pytest.mark.parametrize("guard", [None, signal.SIGSTOP])
def test_a_hanging_mount_is_ended_by_force(
    hung: Mount, guard: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fsdriver.ending.ASK_SECONDS", 0.2)
    if guard is not None and guard_of(hung.pid):
        os.kill(guard_of(hung.pid), guard)
    said: list[str] = []
    assert force_end(str(hung.store), said.append) == str(hung.path)
    assert f"asking process {hung.pid} to end" in said[0]
    hung.wait_for_end()
    assert our_mount(str(hung.path)) is None
    hung.start()
    assert (hung.sessions / "s" / "kept").read_bytes() == b"kept"
    hung.stop()


@pytest.mark.fuse
def test_a_busy_mount_is_ended_by_force(own: Mount):
    own.start()
    file = os.open(own.sessions / "s" / "new", os.O_CREAT | os.O_WRONLY)
    said: list[str] = []
    try:
        assert force_end(str(own.store), said.append) == str(own.path)
        assert any("it refuses" in line for line in said)
        with refused(errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            os.write(file, b"x")
    finally:
        with contextlib.suppress(OSError):
            os.close(file)
    own.wait_for_end()
    assert mounts_of(str(own.store)) == []
    assert force_end(str(own.store), said.append) == ""


@pytest.mark.fuse
@pytest.mark.parametrize("request_", [messages.Commit("s"), messages.Fork("s", "t")])
def test_a_mount_is_served_while_others_write_to_the_store(
    own: Mount, request_: messages.AnyRequest
):
    own.start()
    (own.sessions / "s" / "new").write_bytes(b"new")
    writing, let_go, answers = threading.Event(), threading.Event(), []

    def write() -> None:
        with own.repository() as repository:
            repository.store.write(lambda _: [writing.set(), let_go.wait(PATIENCE)])

    def ask() -> None:
        answers.append(own.ask(request_))

    writer, asking = threading.Thread(target=write), threading.Thread(target=ask)
    writer.start()
    try:
        assert writing.wait(PATIENCE)
        asking.start()
        until(lambda: _doing(own))
        for number in range(20):
            (own.sessions / "s" / f"{number}").write_bytes(b"%d" % number)
        assert (own.snapshots / "main" / "README").read_bytes() == b"read me\n"
        assert _doing(own)
        assert not answers
    finally:
        let_go.set()
        writer.join()
        asking.join(PATIENCE)
    assert len(answers) == 1
    assert (own.sessions / "s" / "19").read_bytes() == b"19"
    own.stop()


def _doing(mount: Mount) -> list[messages.Doing]:
    reply = mount.ask(messages.GetStatus())
    assert isinstance(reply, messages.Status)
    return reply.doing


def test_a_daemon_without_descriptors_still_answers_and_ends(own: Mount):
    """And who finds none left is not kept waiting."""
    own.start()
    descriptors = [int(name) for name in os.listdir(f"/proc/{own.pid}/fd")]
    limit = max(descriptors) + 1
    resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (limit, limit))
    path = client.socket_path(str(own.store))
    with contextlib.ExitStack() as all_others:
        for _ in range(limit - len(descriptors)):
            client.connect(all_others.enter_context(socket.socket(socket.AF_UNIX)), path)
        assert isinstance(own.ask(messages.GetStatus()), messages.Status)
        with contextlib.ExitStack() as more:
            for _ in range(2 * SPARES):
                client.connect(more.enter_context(socket.socket(socket.AF_UNIX)), path)
            with pytest.raises(DaemonLostError):
                own.ask(messages.GetStatus(), 0.2)
        until(lambda: len(os.listdir(f"/proc/{own.pid}/fd")) == limit)
        assert isinstance(own.ask(messages.GetStatus()), messages.Status)
        own.ask(messages.Shutdown())
    until(lambda: not mounts_of(str(own.store)))
