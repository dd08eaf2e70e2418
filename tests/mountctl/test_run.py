"""`mountctl run`: what reaches the command, what comes back, and what is said beside it."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine.host.leases import is_held
from fsdriver.mountpoint import our_mount, unmount
from fsdriver.run_records import this_machine
from tests.fsdriver.conftest import until

pytestmark = pytest.mark.fuse


@pytest.fixture
def work(mountctl, first, tmp_path) -> Iterator[Path]:
    """A session called work in a mount."""
    mountctl("session", "create", "work", "main")
    (tmp_path / "mnt").mkdir()
    mountctl.run("mount", tmp_path / "mnt")
    yield tmp_path / "mnt" / "sessions" / "work"
    if our_mount(str(tmp_path / "mnt")) is not None:
        unmount(str(tmp_path / "mnt"), lazy=True)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """Returns what `--json` tells at the end."""
    run = json.loads(done.stderr.splitlines()[-1])["run"]
    assert isinstance(run, dict)
    return run


def test_streams_arguments_and_exit_code_are_the_commands(mountctl, work):
    done = subprocess.run(
        mountctl.command("run", "work", "--", "sh", "-c", 'cat; echo "$@"; echo err >&2; exit 7',
                         "sh", "--json", "-q", "--"),
        env=mountctl.environment(), input="given\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "given\n--json -q --\n", "err\n")


@pytest.mark.parametrize("mode", ["overlay", "lazy", "full"])
def test_result_under_json(mountctl, work, mode):
    command = ["sh", "-c", "kill -TERM $$"]
    done = mountctl.run("run", "@work", "--mode", mode, "--json", "--", *command, code=143)
    facts = result(done)
    assert 0 < float(str(facts.pop("seconds"))) < 60
    assert facts == {
        "exit_code": 143, "signal": 15, "left": False, "mode": mode, "refused": [],
        "session": "work",
    }  # fmt: skip
    assert done.stdout == ""


def test_commit_if_it_succeeded(mountctl, work, first):
    failing, working = ["sh", "-c", "echo x >> new; exit 1"], ["sh", "-c", "echo y >> new"]
    assert "snapshot" not in result(
        mountctl.run("run", "work", "--commit", "--json", "--", *failing, code=1)
    )
    words = ("run", "work", "--json", "-m", "told", "--ref", "next")
    made = result(mountctl.run(*words, "--commit", "--", *working))
    assert made["changed"] is True
    assert mountctl.json("ref", "list")[-1]["snapshot"] == made["snapshot"] != first
    snapshot = work.parents[1] / "snapshots" / str(made["snapshot"])
    assert (snapshot / "new").read_text() == "x\ny\n"
    more = result(mountctl.run(*words, "--commit-always", "--", *failing, code=1))
    assert more["snapshot"] != made["snapshot"]
    done = mountctl.run("run", "work", "--commit", "--", "true")
    assert done.stderr == "nothing has changed in @work\n"


def test_where_a_mode_is_not_possible_it_says_so(mountctl, work):
    costs = {"overlay": {"start": 0.0}, "full": {"start": 1.0}, "lazy": {"start": 9.0}}
    (mountctl.store / "costs").write_text(
        json.dumps({"mount": 0.0, "modes": costs, "machine": this_machine()})
    )
    for command in ("pwd", "true"):  # overlay is for what was seen to rename no directory
        mountctl("run", "work", "--mode", "lazy", "--", command)
    with (work / "data.bin").open("rb"):
        done = mountctl.run("run", "work", "--", "pwd")
        assert done.stdout == f"{work}\n"
        said = done.stderr.splitlines()
        assert len(said) == 2
        assert all(line.startswith(f"runs in {work} by lazy: ") for line in said)
        assert all(line.endswith("data.bin") for line in said)
        assert mountctl.run("run", "work", "-q", "--", "true").stderr == ""
        for mode in ("overlay", "full"):
            said = mountctl.fails(4, "run", "work", "--mode", mode, "--", "true")
            assert "data.bin" in said


def test_without_a_mount(mountctl, first):
    mountctl("session", "create", "work", "main")
    done = mountctl.run("run", "work", "--commit", "--", "sh", "-c", "pwd; echo new > new")
    place = Path(done.stdout.strip())
    assert not place.exists()
    assert not is_held(str(mountctl.store), "mount")
    assert mountctl("diff", "main", "@work").stdout == "A new\n"


def test_it_runs_where_the_caller_stands(mountctl, work, tmp_path):
    def pwd(cwd: Path, *words: str) -> str:
        done = subprocess.run(
            mountctl.command("run", "work", *words, "--", "pwd"), env=mountctl.environment(),
            cwd=cwd, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.strip()

    assert pwd(work / "src") == str(work / "src")
    assert pwd(work) == pwd(tmp_path) == str(work)
    (tmp_path / "place").mkdir()
    assert pwd(work / "src", "--at", f"{tmp_path}/place") == f"{tmp_path}/place/src"
    for mode in ("lazy", "overlay", "full"):
        assert pwd(work / "src", "--mode", mode) == str(work / "src")
        assert pwd(work, "--mode", mode, "--at", f"{tmp_path}/place") == f"{tmp_path}/place"


def test_descriptors_are_passed_on_and_no_others(mountctl, work):
    ours, theirs = os.pipe()
    command = mountctl.command("run", "work", "--mode", "overlay", "--", "ls", "/proc/self/fd")
    done = subprocess.run(
        command, env=mountctl.environment(), pass_fds=[theirs], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    os.close(ours)
    os.close(theirs)
    found = {int(word) for word in done.stdout.split()}
    listing = {0, 1, 2, theirs, 100}
    assert listing <= found
    assert len(found - listing) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["work", "--", "./nothing"], 127),
        (["work", "--", "./data.bin"], 126),
        (["none", "--", "true"], 3),
        (["work"], 2),
        (["work", "--mode", "fast", "--", "true"], 2),
        (["--", "true"], 2),
        (["work", "--explain", "--history", "--", "true"], 2),
        (["@none", "--", "true"], 3),
        (["work", "-m", "x", "--", "true"], 2),
    ],
)
def test_what_cannot_be_run(mountctl, work, words, code):
    lines = mountctl.run("run", *words, code=code).stderr.splitlines()
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    assert (work / "src").is_dir()


COUNT = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
print("ready", flush=True)
while True:
    number = signal.sigwait([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    print("got", number.name, flush=True)
    if number == signal.SIGUSR1:
        sys.exit(5)
"""


SHELL = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(job, os.WUNTRACED)
print("stopped by", signal.Signals(os.WSTOPSIG(status)).name, flush=True)
os.killpg(job, signal.SIGCONT)
os.kill(job, signal.SIGUSR1)
_, status = os.waitpid(job, 0)
print("ended with", os.waitstatus_to_exitcode(status), flush=True)
"""
"""A shell's part in job control: the kernel stops nothing that has no shell to resume it."""


class Terminal:
    """`mountctl run` on a terminal of its own, which controls it."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.execve(words[0], words, environment)
        self.text = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            self.text += os.read(self.master, 4096).decode()

    def close(self) -> None:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminal(mountctl, work) -> Iterator[Terminal]:
    words = mountctl.command("run", "work", "--mode", "overlay", "--", sys.executable, "-c", COUNT)
    made = Terminal(words, mountctl.environment(TERM="dumb"))
    made.wait_for("ready")
    yield made
    made.close()


def above(pid: int) -> list[int]:
    """Returns mountctl's process and what stands between it and the command."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, below)]


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Tells whether a signal waits for a process to take it; one more like it would be lost."""
    (waiting,) = re.findall(r"ShdPnd:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(waiting, 16) >> (number - 1) & 1)


def test_signals_reach_the_command_once(terminal):
    os.write(terminal.master, b"\x03")  # Ctrl-C: the terminal sends it to all
    terminal.wait_for("got SIGINT")
    until(lambda: not any(is_pending(pid, signal.SIGINT) for pid in above(terminal.pid)))
    os.kill(terminal.pid, signal.SIGINT)  # somebody sends one more, to mountctl alone
    terminal.wait_for("got SIGINT\r\ngot SIGINT")
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.wait_for("got SIGTERM")
    os.write(terminal.master, b"\x03")
    terminal.wait_for("SIGTERM\r\n^Cgot SIGINT")
    os.kill(terminal.pid, signal.SIGUSR1)
    terminal.wait_for("got SIGUSR1")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    words = [line.removeprefix("^C") for line in terminal.text.split("\r\n") if "got" in line]
    assert words == ["got SIGINT"] * 2 + ["got SIGTERM", "got SIGINT", "got SIGUSR1"]


def test_the_terminal_stops_and_resumes_it(mountctl, work):
    words = mountctl.command("run", "work", "--", sys.executable, "-c", COUNT)
    environment = mountctl.environment(TERM="dumb")
    terminal = Terminal([sys.executable, "-c", SHELL, *words], environment)
    try:
        terminal.wait_for("ready")
        os.write(terminal.master, b"\x1a")  # Ctrl-Z
        terminal.wait_for("ended with 5")
        assert terminal.text.split("\r\n")[1:4] == [
            "^Zstopped by SIGTSTP", "got SIGUSR1", "ended with 5",
        ]  # fmt: skip
    finally:
        terminal.close()


def test_a_command_that_stops_itself_is_seen_to(mountctl, work):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    child = subprocess.Popen(
        mountctl.command("run", "work", "--", *command), env=mountctl.environment()
    )
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    child.send_signal(signal.SIGCONT)
    assert child.wait(120) == 0


def test_a_mount_with_a_running_command_stays(terminal, mountctl):
    message = mountctl.fails(5, "umount")
    assert "session 'work' is in use by running" in message
    assert "(running " in mountctl.fails(5, "commit", "work")
    assert "running " in mountctl("status").stdout


def test_killed_it_kills_the_command(terminal, work):
    os.kill(terminal.pid, signal.SIGKILL)
    os.waitpid(terminal.pid, 0)

    def is_let_go() -> bool:
        try:
            return bool(os.listdir(work))
        except OSError:
            return False

    until(is_let_go)


def test_killed_in_a_checkout_what_it_wrote_is_the_sessions(mountctl, work):
    (uid,) = os.listdir(mountctl.store / "sessions")
    command = ["sh", "-c", "echo new > new; rm data.bin; echo ready; exec sleep 100"]
    child = subprocess.Popen(
        mountctl.command("run", "work", "--mode", "full", "--", *command),
        env=mountctl.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert "(running " in mountctl.fails(5, "commit", "work")
    child.kill()
    child.communicate()
    until(lambda: not is_held(str(mountctl.store), f"session-{uid}"))
    assert mountctl("diff", "main", "@work").stdout == "D data.bin\nA new\n"
    assert (work / "new").read_text() == "new\n"


# On a snapshot.


@pytest.mark.parametrize("mode", ["overlay", "lazy", "full", "auto"])
@pytest.mark.parametrize("is_mounted", [True, False], ids=["mounted", "not mounted"])
def test_on_a_snapshot_nothing_is_left(mountctl, first, request, mode, is_mounted):
    if is_mounted:
        request.getfixturevalue("work")
    before = mountctl("session", "list").stdout
    done = mountctl.run("run", "main", "--mode", mode, "--", "sh", "-c", "pwd; echo x > new; ls")
    path, *names = done.stdout.split()
    assert Path(path).name == f"run-{first[:12]}"
    assert "new" in names
    assert mountctl("session", "list").stdout == before
    again = mountctl.run("run", "main", "--mode", mode, "--", "sh", "-c", "pwd; ls")
    assert again.stdout.split() == [path, *(name for name in names if name != "new")]
    assert mountctl.json("snapshot", "list")[0]["snapshot"] == first


@pytest.mark.parametrize("mode", ["overlay", "lazy", "full"])
def test_on_a_snapshot_it_is_committed(mountctl, first, mode):
    words = ["--mode", mode, "--commit", "-m", "made", "--ref", "made", "--json"]
    made = result(mountctl.run("run", "main", *words, "--", "sh", "-c", "echo x > new"))
    assert mountctl("diff", "main", "made").stdout == "A new\n"
    assert mountctl.json("snapshot", "show", "made")["parents"] == [first]
    assert made["changed"] is True


def test_runs_on_a_snapshot_at_the_same_time(mountctl, work):
    script = "pwd; read line; ls"
    children = [
        subprocess.Popen(
            mountctl.command("run", "main", "--mode", mode, "--", "sh", "-c", script),
            env=mountctl.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for mode in ("overlay", "lazy", "full", "full")
    ]  # fmt: skip
    places = {child.stdout.readline() for child in children if child.stdout is not None}
    outputs = [child.communicate("go\n")[0].split() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert len(places) == 4
    assert len({tuple(output) for output in outputs}) == 1
    assert "run-" not in mountctl("session", "list").stdout


def test_runs_in_checkouts_share_their_place(mountctl, first):
    """The one that ends first leaves the others' mounts where they are."""
    script = "echo ready; read line; ls $PWD; pwd"

    def start(mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            mountctl.command("run", "main", "--mode", mode, "--", "sh", "-c", script),
            env=mountctl.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    places = set()
    children = [start("full"), start("full")]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    mountctl("session", "create", "other", "main")
    mountctl.run("run", "other", "--mode", "lazy", "--", "true")
    for child in children:
        output, _ = child.communicate("go\n")
        *names, place = output.split()
        assert "data.bin" in names
        places.add(Path(place).parent)
    assert len(places) == 1
    assert not places.pop().parent.exists()


@pytest.mark.parametrize("mode", ["overlay", "lazy", "full"])
def test_killed_on_a_snapshot_the_next_run_removes_it(mountctl, work, mode):
    before = set(os.listdir(mountctl.store / "sessions"))
    leases = ["run"] if mode == "lazy" else ["run", "session"]
    command = ["sh", "-c", "echo ready; exec sleep 99"]
    child = subprocess.Popen(
        mountctl.command("run", "main", "--mode", mode, "--", *command),
        env=mountctl.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert "run-" in mountctl("session", "list").stdout
    (uid,) = set(os.listdir(mountctl.store / "sessions")) - before
    child.kill()
    child.communicate()
    until(lambda: not any(is_held(str(mountctl.store), f"{what}-{uid}") for what in leases))
    mountctl("run", "main", "--mode", mode, "--", "true")
    assert "run-" not in mountctl("session", "list").stdout
    assert len(list((mountctl.store / "sessions").iterdir())) == 1


# Which mode.


def test_what_a_mode_should_take_and_took(mountctl, first):
    def explain() -> Any:
        return json.loads(mountctl("run", "main", "--explain", "--json", "--", "true").stdout)

    plan = explain()
    assert plan["runs"] == 0
    assert sorted(each["mode"] for each in plan["estimates"]) == ["full", "lazy", "overlay"]
    seconds = [each["seconds"] for each in plan["estimates"]]
    assert seconds == sorted(seconds)
    taken = result(mountctl.run("run", "main", "--json", "--", "true"))
    assert taken["mode"] == plan["mode"] == plan["estimates"][0]["mode"]
    mountctl("run", "main", "--mode", "lazy", "--", "sleep", "0.01")
    first_run, other = mountctl.json("run", "--history")
    log = (mountctl.store / "log/mount.log").read_text()
    (*_, made) = re.findall(r"timestamp=(\S+) level=info event=mounted", log)
    until_mounted = datetime.fromisoformat(made).timestamp() - other["started_ns"] / 1e9
    assert other["outcome"]["seconds"] > until_mounted + 0.01  # a mount was made for it, and ended
    assert first_run["command"] == "true"
    assert first_run["estimates"][plan["mode"]] == pytest.approx(seconds[0])
    assert first_run["outcome"]["seconds"] == pytest.approx(taken["seconds"], abs=1e-3)
    assert (other["asked"], other["outcome"]["mode"]) == ("lazy", "lazy")
    again = explain()
    own = {each["mode"]: (each["own"], each["runs"]) for each in again["estimates"]}
    assert own[taken["mode"]][1] == 1
    assert len({own for own, _ in own.values()}) == 1  # the others are judged by it
    shown = mountctl("run", "--history").stdout.splitlines()
    assert len(shown) == 3
    assert "(auto)" in shown[1]
    assert mountctl.run("run", "--history", "other").stderr.startswith("nothing ran here yet")


def test_a_mode_that_proves_slow_is_left(mountctl, first):
    slow_in_a_checkout = ["sh", "-c", "case $(stat -fc %T .) in fuse*) ;; *) sleep $SLOW;; esac"]

    def run(*words: str, slow: float = 0.0) -> dict[str, object]:
        command = ["run", "main", "--json", *words, "--", *slow_in_a_checkout]
        return result(mountctl.run(*command, SLOW=str(slow)))

    seconds = float(str(run("--mode", "lazy")["seconds"]))
    assert run("--mode", "full", slow=1 + 2 * seconds)["mode"] == "full"
    assert run()["mode"] == "lazy"


def test_a_directory_of_the_base_is_renamed_in_every_mode_that_auto_takes(mountctl, work):
    costs = {"overlay": {"start": 0.0}, "full": {"start": 9.0}, "lazy": {"start": 1.0}}
    (mountctl.store / "costs").write_text(
        json.dumps({"mount": 0.0, "modes": costs, "machine": this_machine()})
    )
    swap = [sys.executable, "-c", "import os; os.rename('src', 'x'); os.rename('x', 'src')"]
    assert mountctl.run("run", "work", "--mode", "overlay", "--", *swap, code=1).stderr
    for _ in range(3):  # the last two by what the first has shown
        assert result(mountctl.run("run", "work", "--json", "--", *swap))["mode"] == "lazy"
    for known, command in (("some", swap), ("unknown", ["false"])):
        plan = json.loads(mountctl("run", "work", "--explain", "--json", "--", *command).stdout)
        assert (plan["mode"], plan["moves"]) == ("lazy", known)
        assert plan["estimates"][0]["mode"] == "overlay"
        assert "leaves overlay out" in mountctl("run", "work", "--explain", "--", *command).stderr
    taken = [result(mountctl.run("run", "work", "--json", "--", "true"))["mode"] for _ in range(2)]
    assert taken == ["lazy", "overlay"]
    failed = ["run", "work", "--json", "--", "false"]  # it may have failed before it renamed
    assert [result(mountctl.run(*failed, code=1))["mode"] for _ in range(2)] == ["lazy", "lazy"]


@pytest.mark.skipif(os.geteuid() != 0, reason="hides a device")
def test_without_fuse_there_is_the_checkout(mountctl, first):
    hidden = 'mount --bind /dev/null /dev/fuse && exec "$@"'

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = mountctl.command("run", "main", *words, "--", "sh", "-c", "pwd; ls")
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", hidden, "sh", *command],
            env=mountctl.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    path, *names = run("--mode", "full").stdout.split()
    assert "data.bin" in names
    costs = {"lazy": {"start": 0.0}, "overlay": {"start": 0.0}, "full": {"start": 9.0}}
    (mountctl.store / "costs").write_text(
        json.dumps({"mount": 0.0, "modes": costs, "machine": this_machine()})
    )
    done = run()
    assert done.stdout.split() == [path, *names]
    assert done.stderr.startswith(f"runs in {path} by full: ")
    assert done.stderr.count("runs in") == 1
    assert "error: " in run("--mode", "lazy", code=10).stderr
    assert not is_held(str(mountctl.store), "mount")


def test_what_a_killed_run_left_mounted_is_cleared(mountctl, first, tmp_path):
    """And so the next one shows the tree at the same path, which a build may have written down."""
    mountctl("session", "create", "w", "main")
    mark = {"AMALGAMFS_TEST_MARK": str(tmp_path)}
    child = subprocess.Popen(
        mountctl.command("run", "w", "--mode", "lazy", "--", "sh", "-c", "pwd; exec sleep 99"),
        env=mountctl.environment(**mark), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    place = child.stdout.readline()
    mine = f"AMALGAMFS_TEST_MARK={tmp_path}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mine in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    child.communicate()
    left = str(Path(place.strip()).parents[1])
    assert our_mount(left) is not None
    until(lambda: not is_held(str(mountctl.store), "mount"))
    again = mountctl.run("run", "w", "--mode", "lazy", "--", "pwd")
    assert again.stdout == place
    assert our_mount(left) is None
    assert not os.path.exists(left)
