"""A session of root's in a mount that others use: whose files they are, whatever happens to it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from fsdriver import messages
from tests.conftest import as_somebody
from tests.fsdriver.conftest import Mount
from tests.fsdriver.test_users import user_number

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away"),
]


@pytest.fixture
def mount(public_path: Path):
    made = Mount(public_path)
    source = public_path / "source"
    (source / "data").mkdir(parents=True)
    (source / "data/table").write_text("one\n")
    (source / "other").write_text("other\n")
    with Repository.create(str(made.store)) as repository:
        found = SnapshotId(repository.import_directory(str(source)).snapshot)
        repository.sessions.create("s", (None, None, found))
    made.start(allow_other=True)
    yield made
    made.stop()


class Server:
    """A program of another user that has a file open and goes on writing to it."""

    def __init__(self, at: Path) -> None:
        script = 'exec 3>>"$1/data/table"; while read line; do echo "$line" >&3 && echo done; done'
        self._process = subprocess.Popen(
            [*as_somebody()[:4], "sh", "-c", script, "server", str(at)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def write(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        return self._process.stdout.readline()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def as_other(at: Path, script: str) -> str:
    command = [*as_somebody()[:4], "sh", "-ec", script]
    return subprocess.run(command, cwd=at, capture_output=True, text=True, check=True).stdout


def test_a_server_of_another_user_goes_on_over_commits_and_a_killed_daemon(mount: Mount):
    at, number = mount.sessions / "s", user_number()
    for path in (at / "data", at / "data/table"):
        os.chown(path, number, number)
    server = Server(at)
    try:
        assert server.write("two") == "done\n"
        for number_of_commit in range(2):
            reply = mount.ask(messages.Commit("s"))
            assert isinstance(reply, messages.Committed)
            assert reply.lost_owners == 2 + number_of_commit
            assert server.write(f"after {number_of_commit}") == "done\n"
            as_other(at, "echo by name >> data/table; echo new > data/new; test -O data/new")
        status = (at / "data/table").stat()
        assert (status.st_uid, status.st_gid) == (number, number)
        mount.commit("s")
    finally:
        server.end()
    os.kill(mount.pid, signal.SIGKILL)
    mount.wait_for_end()
    subprocess.run(["umount", "-l", mount.path], check=False)
    mount.start(allow_other=True)
    assert as_other(at, "echo again >> data/table; cat data/table") == (
        "one\ntwo\nafter 0\nby name\nafter 1\nby name\nagain\n"
    )
    assert (at / "other").stat().st_uid == 0


def test_snapshots_that_keep_owners_are_shown_with_them(mount: Mount, public_path: Path):
    source, number = public_path / "source", user_number()
    os.chown(source / "data/table", number, number)
    (source / "data/table").chmod(0o600)
    with mount.repository() as repository:
        identifier = repository.import_directory(str(source), owners=True).snapshot
        without = repository.import_directory(str(source)).snapshot
    mount.ask(messages.Refresh())
    kept, lost = (mount.snapshots / each.hex() / "data/table" for each in (identifier, without))
    assert (kept.stat().st_uid, lost.stat().st_uid) == (number, 0)
    assert kept.stat().st_ino != lost.stat().st_ino
    assert as_other(mount.path, f"cat {kept}") == "one\n"
    with pytest.raises(subprocess.CalledProcessError):
        as_other(mount.path, f"cat {lost}")
