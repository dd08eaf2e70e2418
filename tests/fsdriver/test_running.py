"""Commands in a session under the kernel's overlayfs, and the session before and after.

`test_users` runs all of this once more as an ordinary user.
"""

import ctypes
import errno
import json
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import NotFoundError
from engine.host.leases import holder_of, is_held
from engine.ids import SnapshotId
from fsdriver import messages, running
from fsdriver.choosing import Attempt
from fsdriver.client import DaemonError
from fsdriver.cost_model import FULL, LAZY, MODES, OVERLAY
from fsdriver.mountpoint import FILESYSTEM, mounts
from fsdriver.running import (
    CommandMissingError,
    CommandRefusedError,
    Ended,
    ModeRefusedError,
    Place,
    Run,
    SupervisorLostError,
)
from fsdriver.supervisor import Job
from tests.conftest import ROOT
from tests.engine.trees import Tree, blurred, of_directory, of_entry
from tests.fsdriver.conftest import Mount, until

pytestmark = pytest.mark.fuse

LOOK = """
import pickle, sys
from tests.engine.trees import blurred, of_directory
with open(sys.argv[1], "wb") as file:
    pickle.dump(blurred(of_directory(".")), file)
"""
CHANGE = """
import os, shutil
os.mkdir("made")
open("made/file", "w").write("new")
open("README", "a").write("more")
os.unlink("src/main.c")
shutil.rmtree("src/lib/deep")
open("src/lib/deep", "w").write("a file now")
os.unlink("docs/link")
os.mkdir("docs/link")
open("docs/link/in", "w").close()
os.rename("src/tool.sh", "made/tool")
os.rename("made", "docs/made")
os.link("docs/made/file", "linked")
os.setxattr("src", "user.more", b"more")
os.setxattr("docs/made/file", "user.new", b"new")
os.chmod("src/lib/big", 0o440)
os.chown("src/lib/big", os.getuid(), os.getgid())
os.chmod("docs/made", 0o555)
os.rmdir("empty")
os.mkfifo("pipe")
os.symlink("README", "soft")
os.mkdir("private", 0o500)
"""


class Runner:
    """Runs commands in the session `s` of a mount."""

    def __init__(self, mount: Mount, home: Path) -> None:
        self.mount, self.seen = mount, home / "seen"

    @contextmanager
    def attempt(self, *command: str, modes: Sequence[str], session: str = "s") -> Iterator[Attempt]:
        with (
            self.mount.repository() as repository,
            Attempt(repository, session, modes) as attempt,
        ):
            attempt.start(command)
            yield attempt

    @contextmanager
    def run(self, *command: str, mode: str = OVERLAY, session: str = "s") -> Iterator[Run]:
        with self.attempt(*command, modes=[mode], session=session) as attempt:
            yield attempt.run

    def __call__(self, *command: str, mode: str = OVERLAY, session: str = "s") -> Ended:
        with self.run(*command, mode=mode, session=session) as run:
            return run.wait()

    def python(self, code: str, *words: str, session: str = "s") -> None:
        assert self(sys.executable, "-c", code, *words, session=session).exit_code == 0

    def look(self, session: str = "s") -> Tree:
        self.python(LOOK, str(self.seen), session=session)
        tree: Tree = pickle.loads(self.seen.read_bytes())
        return without_links(tree)

    def ours(self, session: str = "s") -> Tree:
        return without_links(blurred(of_directory(self.mount.sessions / session)))


def without_links(tree: Tree) -> Tree:
    """overlayfs breaks the hard links of what is below."""
    return {path: seen._replace(names=()) for path, seen in tree.items()}


@pytest.fixture
def run(own: Mount, tmp_path: Path) -> Runner:
    own.start()
    return Runner(own, tmp_path)


@contextmanager
def sleeping(run: Runner) -> Iterator[Run]:
    """A command that waits, and surely has begun."""
    ours, theirs = os.pipe()
    with (
        run.mount.repository() as repository,
        running.mounted(str(run.mount.store)) as place,
        Run(repository, "s", OVERLAY, place) as running_one,
    ):
        command = ["sh", "-c", f"echo written > new; echo > /proc/self/fd/{theirs}; exec sleep 100"]
        running_one.start(command, inherit=[theirs])
        os.close(theirs)
        assert os.read(ours, 1)
        os.close(ours)
        yield running_one


def test_a_path_from_the_root_asks_the_daemon_for_nothing(run: Runner):
    code = """
import os
for _ in range(200):
    os.stat(os.getcwd() + "/README")
"""
    run.python(code)
    before = run.mount.statistics()["messages"]
    run.python(code)
    after = run.mount.statistics()["messages"]
    assert sum(after.values()) - sum(before.values()) < 100


def test_what_a_command_does_is_what_the_session_shows(run: Runner):
    assert run.look() == run.ours()
    run.python(CHANGE)
    shown = run.look()
    assert b"docs/made/tool" in shown
    assert run.ours() == shown
    with run.mount.repository() as repository:
        root = repository.snapshot(run.mount.commit("s")).root
        assert without_links(blurred(of_entry(repository.objects, root, counts=False))) == shown
    assert run.look() == shown


def test_what_a_session_does_is_what_a_command_sees(run: Runner):
    at = run.mount.sessions / "s"
    (at / "made").mkdir()
    (at / "made/file").write_text("new")
    (at / "made/file").chmod(0o444)
    (at / "README").write_text("changed")
    (at / "docs/dangling").unlink()
    (at / "src/tool.sh").chmod(0o500)
    (at / "empty").rmdir()
    (at / "empty").write_text("a file")
    (at / "made").chmod(0o555)
    shown = run.ours()
    assert run.look() == shown
    run.python("import os; os.chmod('made/file', 0o640); os.chmod('made', 0o755)")
    after = run.ours()
    assert after[b"made/file"].mode == 0o640
    assert after == run.look()
    run.mount.stop()
    run.mount.start()
    assert run.ours() == after


NUMBERS = """
import os, pickle, sys
def numbers(at):
    device = os.stat(at).st_dev
    for entry in os.scandir(at):
        status = entry.stat(follow_symlinks=False)
        assert entry.inode() == status.st_ino, entry.path
        assert status.st_dev == device, entry.path
        yield entry.path, status.st_ino
        if entry.is_dir(follow_symlinks=False):
            yield from numbers(entry.path)
with open(sys.argv[1], "wb") as file:
    pickle.dump(dict(numbers(".")), file)
"""


def test_numbers_are_those_of_the_listing_and_stay(run: Runner, tmp_path: Path):
    seen = []
    for code in ("import os; os.makedirs('new/in'); open('new/file', 'w')", "pass"):
        run.python(code)
        run.python(NUMBERS, str(tmp_path / "numbers"))
        seen.append(pickle.loads((tmp_path / "numbers").read_bytes()))
    assert {"./new/in", "./src/lib"} <= set(seen[0])
    assert seen[0] == seen[1]


def test_renamed_directories_of_the_base_are_folded(run: Runner):
    at = run.mount.sessions / "s"
    (at / "src").rename(at / "docs/sources")
    shown = run.ours()
    assert run.look() == shown
    run.python("open('docs/sources/main.c', 'a').write('more')")
    assert run.ours() == run.look() != shown
    with run.mount.repository() as repository:
        session = repository.sessions.get("s")
        assert repository.resolve("main") == session.parent
        assert session.generation == 1


def test_a_fork_with_changes_is_seen_with_them(run: Runner):
    (run.mount.sessions / "s/README").write_text("changed")
    run.mount.ask(messages.Fork("s", "t"))
    shown = run.ours("t")
    assert run.look("t") == shown
    assert shown[b"README"].data == b"changed"


def test_a_session_with_open_files_is_left_to_the_mount(run: Runner):
    with (run.mount.sessions / "s/README").open() as file:
        with pytest.raises(ModeRefusedError, match="files open in it: README"):
            run("true")
        command = ["sh", "-c", "echo lazily >> new"]
        with run.attempt(*command, modes=[OVERLAY, FULL, LAZY]) as lazily:
            assert lazily.run.wait() == Ended(0, None, False)
            assert lazily.run.mode == LAZY
            assert all("README" in str(why) for why in lazily.refused)
            assert len(lazily.refused) == 2
        assert file.read() == "read me\n"
    assert run("sh", "-c", "echo overlaid >> new").exit_code == 0
    assert (run.mount.sessions / "s/new").read_text() == "lazily\noverlaid\n"


def test_the_session_is_busy_meanwhile(run: Runner):
    at = run.mount.sessions / "s"
    assert not (at / "new").exists()
    with sleeping(run) as sleeper:
        assert os.listdir(run.mount.sessions) == ["s"]
        assert at.is_dir()
        with pytest.raises(OSError, match="busy") as caught:
            os.listdir(at)
        assert caught.value.errno == errno.EBUSY
        with (
            Run(sleeper._repository, "s", OVERLAY, Place(str(run.mount.path), "")) as second,
            pytest.raises(DaemonError, match="running sh"),
        ):
            second.prepare("true")
        for request in (messages.Commit("s"), messages.Rename("s", "t"), messages.Remove("s"),
                        messages.Reset("s"), messages.Shutdown()):  # fmt: skip
            with pytest.raises(DaemonError, match="session 's'"):
                run.mount.ask(request)
        sleeper.send_signal(signal.SIGTERM)
        assert sleeper.wait() == Ended(143, signal.SIGTERM, False)
    assert (at / "new").read_text() == "written\n"
    assert not is_held(str(run.mount.store), "nothing")
    run.mount.stop()


def test_a_shell_that_stands_in_the_session_may_go_on(run: Runner, monkeypatch):
    at = run.mount.sessions / "s"
    (at / "build").mkdir()
    for place in (at, at / "src/lib", at / "build"):
        monkeypatch.chdir(place)
        assert not Path("new").exists()
        run("sh", "-c", f"echo {place.name} > {place}/new")
        os.stat(place)
        assert Path.cwd() == place
        assert Path("new").read_text() == f"{place.name}\n"
        Path("new").unlink()


@pytest.mark.parametrize("mode", MODES)
def test_where_a_command_runs(run: Runner, tmp_path: Path, mode: str):
    at = run.mount.sessions / "s"
    (tmp_path / "elsewhere").mkdir()
    for place, below, expected in [
        (None, "", at), (None, "src/lib", at / "src/lib"), (None, "none", at),
        (str(tmp_path / "elsewhere"), "src", tmp_path / "elsewhere/src"),
    ]:  # fmt: skip
        with (
            run.mount.repository() as repository,
            Run(repository, "s", mode, Place(str(run.mount.path), ""), at=place) as one,
        ):
            one.start(["sh", "-c", f"pwd > {tmp_path}/pwd; ls README ../README"], below=below)
            one.wait()
        assert (tmp_path / "pwd").read_text() == f"{expected}\n"
    assert os.listdir(tmp_path / "elsewhere") == []


def test_it_sees_itself_as_the_user_without_privilege(run: Runner, tmp_path: Path):
    run("sh", "-c", f"id -u > {tmp_path}/id; id -g >> {tmp_path}/id; grep CapEff /proc/self/status"
        f" >> {tmp_path}/id; touch file")  # fmt: skip
    uid, gid, capabilities = (tmp_path / "id").read_text().splitlines()
    assert (int(uid), int(gid)) == (os.getuid(), os.getgid())
    if os.getuid():
        assert int(capabilities.split()[1], 16) == 0
    assert (run.mount.sessions / "s/file").stat().st_uid == os.getuid()
    assert "overlay" not in [mount.kind for mount in mounts()]


@pytest.mark.parametrize("mode", MODES)
def test_how_it_ends(run: Runner, mode: str):
    assert run("sh", "-c", "exit 3", mode=mode) == Ended(3, None, False)
    assert run("sh", "-c", "kill -9 $$", mode=mode) == Ended(137, signal.SIGKILL, False)
    with pytest.raises(CommandMissingError):
        run("./nonsense", mode=mode)
    with pytest.raises(CommandRefusedError):
        run("./src/lib", mode=mode)
    with pytest.raises(NotFoundError):
        run("true", mode=mode, session="none")
    assert run("true", mode=mode).exit_code == 0


def test_what_the_kernel_refuses_is_said(run: Runner, monkeypatch):
    monkeypatch.setattr(running, "base_path", lambda *_: "snapshots/none")
    with pytest.raises(ModeRefusedError, match="directories: No such file"):
        run("true")
    with run.attempt("touch", "new", modes=[OVERLAY, LAZY]) as lazily:
        assert lazily.run.wait().exit_code == 0
        assert (lazily.run.mode, lazily.run.shown) == (LAZY, str(run.mount.sessions / "s"))
    assert (run.mount.sessions / "s/new").exists()


def test_what_a_command_leaves_running_keeps_the_session(run: Runner, tmp_path: Path):
    os.mkfifo(tmp_path / "go")
    daemon = f"exec 3>&- >/dev/null 2>&1 </dev/null; read x < {tmp_path}/go; echo late > late"
    assert run("sh", "-c", f"setsid sh -c '{daemon}' 100>&- &") == Ended(0, None, True)
    with run.mount.repository() as repository:
        lease = f"session-{repository.sessions.get('s').uid}"
    assert "left running" in holder_of(str(run.mount.store), lease)["what"]
    try:
        with pytest.raises(DaemonError, match="left running"):
            run("true")
        with pytest.raises(OSError, match="busy"):
            os.listdir(run.mount.sessions / "s")
    finally:
        (tmp_path / "go").write_text("go\n")
    until(lambda: not is_held(str(run.mount.store), lease))
    assert (run.mount.sessions / "s/late").read_text() == "late\n"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(handle: int) -> None:
    assert select.select([handle], [], [], 120)[0]
    os.close(handle)


def test_with_the_supervisor_the_command_is_killed(run: Runner):
    with sleeping(run) as sleeper:
        assert sleeper._supervisor is not None
        (command,) = children(sleeper._supervisor.pid)
        handle = os.pidfd_open(command)
        sleeper._supervisor.kill()
        with pytest.raises(SupervisorLostError):
            sleeper.wait()
        wait_for(handle)
    assert (run.mount.sessions / "s/new").read_text() == "written\n"


SLOW_TO_BEGIN = """
import os, sys
from fsdriver import supervisor
fork = os.fork
def slow_fork():
    child = fork()
    if not child:
        os.write(1, b"%d\\n" % os.getpid())
        os.read(0, 1)
    return child
os.fork = slow_fork
sys.exit(supervisor.main(sys.argv[1:]))
"""


def test_killed_before_the_command_could_begin_it_does_not(tmp_path: Path):
    """Who asks to be killed with its parent is not, where that is dead already."""
    (_, told), (life, _) = pipes = os.pipe(), os.pipe()
    job = Job(told, life, -1, -1, -1, "", "", "", "", "", "/", "", str(tmp_path), [])
    one = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_BEGIN, json.dumps(job), "touch", str(tmp_path / "begun")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(told, life), cwd=ROOT,
    )  # fmt: skip
    assert one.stdout is not None
    assert one.stdin is not None
    command = os.pidfd_open(int(one.stdout.readline()))
    one.kill()
    one.wait()
    one.stdin.close()  # and so it goes on
    wait_for(command)
    one.stdout.close()
    assert not (tmp_path / "begun").exists()
    for end in (end for pipe in pipes for end in pipe):
        os.close(end)


STARTER = """
import os, sys
from engine import Repository
from fsdriver.cost_model import OVERLAY
from fsdriver.running import Run, mounted
with (Repository.open(sys.argv[1]) as repository, mounted(sys.argv[1]) as place,
      Run(repository, "s", OVERLAY, place) as run):
    command = "import os, time; os.mkdir('sealed', 0o500); print(flush=True); time.sleep(100)"
    run.start([sys.executable, "-c", command])
    run.wait()
"""


@pytest.mark.parametrize("is_mounted", [True, False], ids=["mounted", "not mounted"])
def test_killed_with_it_the_command_ends_and_nothing_is_left(
    own: Mount, tmp_path: Path, is_mounted: bool
):
    if is_mounted:
        own.start()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(own.store)], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    assert starter.stdout.readline()
    supervisor = next(
        pid for pid in children(starter.pid)
        if b"fsdriver.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )  # fmt: skip
    handles = [os.pidfd_open(pid) for pid in (supervisor, *children(supervisor))]
    starter.kill()
    starter.communicate()
    for handle in handles:
        wait_for(handle)
    if is_mounted:
        (own.sessions / "s/sealed").chmod(0o700)
        (own.sessions / "s/sealed/in").touch()
        return
    until(lambda: not is_held(str(own.store), "mount"))
    assert [m for m in mounts() if m.kind == FILESYSTEM and m.source == str(own.store)] == []
    with own.repository() as repository, repository.sessions.hold("s", "a test") as held:
        upper = held.upper()
        assert os.listdir(upper.work) == []
        assert upper.mode(upper.at(b"sealed"), os.lstat(upper.at(b"sealed"))) == 0o500


def test_without_a_mount_there_is_one_for_the_while(own: Mount, tmp_path: Path):
    run = Runner(own, tmp_path)
    assert run("sh", "-c", f"echo new > new; pwd > {tmp_path}/pwd").exit_code == 0
    place = Path((tmp_path / "pwd").read_text().strip())
    assert place.parts[-2:] == ("sessions", "s")
    assert not is_held(str(own.store), "mount")
    until(lambda: not place.parents[1].exists())
    own.start()
    assert (own.sessions / "s/new").read_text() == "new\n"


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_given_up_kills_the_command_alone(own: Mount, tmp_path: Path, mode: str):
    os.mkfifo(tmp_path / "go")
    daemon = f"read x < {tmp_path}/go; echo late > late"
    command = f"({daemon}) & touch {tmp_path}/ready; exec sleep 100"
    run = Runner(own, tmp_path)
    with own.repository() as repository:
        uid = repository.sessions.get("s").uid
    lease = "mount" if mode == LAZY else f"session-{uid}"
    try:
        with run.run("sh", "-c", command, mode=mode) as given_up:
            assert given_up._supervisor is not None
            until((tmp_path / "ready").exists)
            handle = os.pidfd_open(children(given_up._supervisor.pid)[0])
        wait_for(handle)
        assert is_held(str(own.store), lease)  # for what goes on
    finally:
        (tmp_path / "go").write_text("go\n")
    until(lambda: not is_held(str(own.store), lease))
    own.start()
    assert (own.sessions / "s/late").read_text() == "late\n"


def test_a_prepared_run_that_never_starts_gives_the_session_back(run: Runner):
    with run.mount.repository() as repository:
        with Run(repository, "s", OVERLAY, Place(str(run.mount.path), "")) as one:
            one.prepare("nothing")
        assert one.mode == OVERLAY
    assert (run.mount.sessions / "s/README").read_text() == "read me\n"


def test_a_committed_session_goes_on_under_overlayfs(run: Runner):
    run("sh", "-c", "echo one > one; rm README")
    second = run.mount.commit("s")
    run("sh", "-c", "cat one > two")
    with run.mount.repository() as repository:
        assert SnapshotId(repository.sessions.get("s").parent) == second
    assert run.ours() == run.look()
    assert (run.mount.sessions / "s/two").read_text() == "one\n"


def test_it_is_the_only_reaper_of_what_a_command_started():
    """The numbers that the supervisor uses are the kernel's."""
    libc = ctypes.CDLL(None, use_errno=True)
    value = ctypes.c_int(-1)
    assert libc.prctl(37, ctypes.byref(value), 0, 0, 0) == 0
    assert value.value == 0
