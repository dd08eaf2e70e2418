import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdriver.mountpoint import our_mount, unmount
from mountctl.mounts import users_of

pytestmark = pytest.mark.fuse


@pytest.fixture
def mounted(mountctl, first, tmp_path) -> Iterator[Path]:
    """A mount of a store with a session called work."""
    mountctl("session", "create", "work", "main")
    place = tmp_path / "mnt"
    place.mkdir()
    assert mountctl.run("mount", place).stdout == f"{place}\n"
    yield place
    if our_mount(str(place)) is not None:
        unmount(str(place), lazy=True)


def pid_of(mountctl) -> int:
    pid = mountctl.json("status")["mount"]["pid"]
    assert isinstance(pid, int)
    return pid


def kill(mountctl) -> None:
    """Kills the daemon and waits until its lease has gone with it."""
    pid = pid_of(mountctl)
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([handle], [], [], 10)
    os.close(handle)


def test_mount_status_umount(mountctl, mounted, first):
    assert (mounted / "snapshots" / "main" / "src" / "main.c").exists()
    status = mountctl.json("status")["mount"]
    assert status["mountpoint"] == str(mounted)
    assert status["log"] == f"{mountctl.store}/log/mount.log"
    shown = mountctl("status").stdout
    assert f"mount   {mounted}\ndaemon  process {status['pid']}, since " in shown
    result = mountctl("umount")
    assert result.stdout == f"{mounted}\n"
    assert our_mount(str(mounted)) is None
    assert mountctl.json("status")["mount"] is None


def test_mount_under_json(mountctl, first, tmp_path):
    (tmp_path / "mnt").mkdir()
    log = tmp_path / "here.log"
    done = mountctl.run("mount", tmp_path / "mnt", "--log", log, "--json")
    made = json.loads(done.stdout)
    assert made == {
        "mountpoint": f"{tmp_path}/mnt", "store": str(mountctl.store),
        "pid": pid_of(mountctl), "log": str(log),
    }  # fmt: skip
    assert "mounted" in log.read_text()
    assert mountctl.json("umount", tmp_path / "mnt") == {"mountpoint": f"{tmp_path}/mnt"}


def test_sessions_go_through_the_daemon(mountctl, mounted, first):
    work = mounted / "sessions" / "work"
    (work / "new").write_text("new")
    assert "work     " in mountctl("session", "list").stdout
    assert mountctl.json("session", "show", "work")["held_by"] == "the mount"
    assert mountctl("status", "work").stdout == "A new\n"
    assert mountctl("diff", "main", "@work").stdout == "A new\n"
    mountctl("session", "fork", "work", "other")
    assert (mounted / "sessions" / "other" / "new").read_text() == "new"
    made = mountctl.json("commit", "work", "-m", "second", "--ref", "next", "--meta", "n:=2")
    assert (mounted / "snapshots" / made["snapshot"] / "new").read_text() == "new"
    assert mountctl.json("snapshot", "show", "next")["metadata"] == {"n": 2}
    assert (mounted / "snapshots" / "next").readlink() == Path(made["snapshot"])
    mountctl("session", "rename", "other", "third")
    assert sorted(os.listdir(mounted / "sessions")) == ["third", "work"]
    assert "'new'" in mountctl.fails(4, "session", "rm", "third")
    assert "'new'" in mountctl.fails(4, "session", "reset", "third", "--to", "main")
    back = ["session", "reset", "third", "--to", "main", "--force"]
    assert mountctl.json(*back)["snapshot"] == first
    assert not (mounted / "sessions" / "third" / "new").exists()
    mountctl("session", "rm", "third")
    assert os.listdir(mounted / "sessions") == ["work"]
    mountctl("checkout", "@work", mountctl.home / "out")
    assert (mountctl.home / "out" / "new").read_text() == "new"


def test_what_is_done_beside_the_daemon_is_seen_at_once(mountctl, mounted, tree, first):
    snapshots = mounted / "snapshots"
    (tree / "more").write_text("x")
    second = mountctl.json("import", tree)["snapshot"]
    assert (snapshots / second / "more").exists()
    mountctl("ref", "set", "v2", second)
    assert (snapshots / "v2" / "more").exists()
    mountctl("ref", "set", "v2", first)
    assert not (snapshots / "v2" / "more").exists()
    mountctl("ref", "rm", "v2")
    assert not os.path.lexists(snapshots / "v2")
    mountctl("snapshot", "rm", second)
    assert not (snapshots / second).exists()
    mountctl("session", "create", "late", "main")
    assert (mounted / "sessions" / "late" / "src").exists()


def test_errors_of_the_daemon_are_told_as_ours(mountctl, mounted):
    assert mountctl.fails(3, "commit", "none") == "no session is called 'none'"
    assert "exists already" in mountctl.fails(4, "session", "fork", "work", "work")
    assert mountctl.fails(3, "diff", "@none") == "no session is called 'none'"


def test_a_store_is_mounted_once(mountctl, mounted, tmp_path):
    (tmp_path / "second").mkdir()
    message = mountctl.fails(5, "mount", tmp_path / "second")
    assert f"mounted on '{mounted}' already (process {pid_of(mountctl)})" in message
    assert "already" in mountctl.fails(5, "mount", mounted)


def test_a_place_with_another_store_is_refused(mountctl, mounted, tmp_path):
    other = tmp_path / "other"
    mountctl("init", "--store", other)
    result = mountctl("mount", mounted, "--store", other, code=4)
    assert f"the store {mountctl.store} is mounted there" in result.stderr


def test_a_busy_mount_names_who_uses_it(mountctl, mounted):
    with open(mounted / "snapshots" / "main" / "src" / "main.c"):
        sleeper = subprocess.Popen(["sleep", "100"], cwd=mounted / "sessions")
        message = mountctl.fails(5, "umount")
        assert f"sleep ({sleeper.pid})" in message
        assert (sleeper.pid, "sleep") in users_of(str(mounted))
        sleeper.kill()
        sleeper.wait()
    mountctl("umount")


@pytest.mark.parametrize("words", [[], ["mnt"]])
def test_umount_removes_a_dead_mount(mountctl, mounted, words):
    kill(mountctl)
    result = mountctl("umount", *(mounted.parent / word for word in words))
    assert result.stdout == f"{mounted}\n"
    assert "daemon was killed" in result.stderr
    assert our_mount(str(mounted)) is None


@pytest.mark.parametrize("place", ["mnt", "elsewhere"])
def test_mount_removes_a_dead_mount(mountctl, mounted, tmp_path, place):
    (mounted / "sessions" / "work" / "new").write_text("x")
    kill(mountctl)
    assert "dead mounts" in mountctl("doctor").stdout
    checks = mountctl.json("doctor")["checks"]
    assert next(c for c in checks if c["name"] == "dead mounts")["status"] == "warn"
    (tmp_path / "elsewhere").mkdir()
    result = mountctl.run("mount", tmp_path / place)
    assert f"removed the dead mount on '{mounted}'" in result.stderr
    assert (tmp_path / place / "sessions" / "work" / "new").read_text() == "x"
    mountctl("umount")
    assert our_mount(str(mounted)) is None


def test_a_mount_in_the_foreground_ends_on_ctrl_c(mountctl, first, tmp_path):
    place = tmp_path / "mnt"
    place.mkdir()
    child = subprocess.Popen(
        mountctl.command("mount", place, "--foreground"), env=mountctl.environment(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    said = child.stderr
    assert any("event=mounted" in line for line in iter(said.readline, ""))
    assert pid_of(mountctl) == child.pid
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert our_mount(str(place)) is None


def test_a_log_in_the_mount_is_refused(mountctl, first, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    for log in (place / "log", tmp_path / "link" / "log"):
        refused = mountctl("mount", place, "--log", log, code=2)
        assert "name a file elsewhere" in refused.stderr
    assert list(place.iterdir()) == []


def test_a_hanging_daemon_does_not_hang_status(mountctl, mounted, monkeypatch):
    monkeypatch.setattr("mountctl.commands.status.ANSWER_SECONDS", 0.2)
    pid = pid_of(mountctl)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "does not answer" in mountctl("status").stdout
        assert mountctl.json("status")["mount"]["pid"] == pid
    finally:
        os.kill(pid, signal.SIGCONT)
    mountctl("umount")


def test_a_hanging_daemon_is_named_and_ended_by_force(mountctl, mounted, monkeypatch):
    for name in ("mountctl.mounts.ANSWER_SECONDS", "mountctl.checks._ANSWER_SECONDS"):
        monkeypatch.setattr(name, 0.2)
    monkeypatch.setattr("fsdriver.ending.ASK_SECONDS", 0.2)
    (mounted / "sessions" / "work" / "new").write_text("kept")
    pid = pid_of(mountctl)
    os.kill(pid, signal.SIGSTOP)
    message = f"the mount's daemon (process {pid}) does not answer: it is stopped"
    assert mountctl.fails(10, "umount") == message
    assert mountctl.fails(10, "mount", mounted) == message
    assert "hint: `mountctl umount --force` ends process" in mountctl("umount", code=10).stderr
    checks = mountctl.json("doctor", code=1)["checks"]
    check = next(check for check in checks if check["name"] == "mount")
    assert (check["status"], check["message"]) == ("fail", message)
    assert "umount --force" in check["hint"]
    result = mountctl("umount", "--force")
    assert result.stdout == f"{mounted}\n"
    assert f"asking process {pid} to end" in result.stderr
    assert our_mount(str(mounted)) is None
    mountctl.run("mount", mounted)
    assert (mounted / "sessions" / "work" / "new").read_text() == "kept"
    assert mountctl.json("umount", "--force") == {"mountpoint": str(mounted)}
    assert "is not mounted" in mountctl.fails(3, "umount", "--force")


def test_top(mountctl, mounted):
    (mounted / "sessions/work/watched").write_text("some")
    text = mountctl.run("top", "--times", "1", "--interval", "0.2").stdout
    assert "messages/s" in text
    assert "of a processor" in text
    picture = mountctl.json("top", "--times", "1", "--interval", "0.1")
    assert picture["seconds"] >= 0.1
    assert picture["process"]["resident"] > 1 << 20
    assert picture["vfs"]["sessions"] == 1


def test_top_ends_quietly_on_ctrl_c(mountctl, mounted):
    child = subprocess.Popen(
        mountctl.command("top", "--interval", "0.1", "--json"), env=mountctl.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    json.loads(child.stdout.readline())
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=120)[1] == ""
    assert child.returncode == 0


def test_top_without_a_mount(mountctl, first):
    assert "is not mounted" in mountctl.fails(3, "top", "--times", "1")
