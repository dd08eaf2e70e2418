"""A store of another user, as the command line meets it; what stands for its files there."""

import os
import pwd
import socket
import subprocess
from pathlib import Path

import pytest

from engine.host.leases import acquire
from engine.host.own_files import StrangeFileError
from fsdriver.client import DaemonLostError, bind, find_daemon
from fsdriver.cost_model import ELSEWHERE, Outcome, Tree, Work
from fsdriver.launch import DEVICE, LaunchError, launch
from fsdriver.run_records import RunRecord, RunRecords
from tests.conftest import ROOT, Run
from tests.mountctl.conftest import Program

RECORD = RunRecord(
    started_ns=1, key="k", command="c", base="b", target="t", asked="lazy", exit_code=0,
    outcome=Outcome(mode="lazy", seconds=1.0, tree=Tree(1, 1), work=Work()),
)  # fmt: skip


@pytest.mark.parametrize("name", ["runs", "costs", "log/mount.log"])
def test_what_is_no_file_of_the_store_is_not_followed(tmp_path: Path, name: str):
    precious, store = tmp_path / "precious", str(tmp_path / "store")
    precious.write_text("precious")
    (tmp_path / "store/log").mkdir(parents=True)
    (tmp_path / "store" / name).symlink_to(precious)
    records = RunRecords(store)
    if name == "runs":
        for use in (records.all, lambda: records.add(RECORD)):
            with pytest.raises(StrangeFileError):
                use()
    elif name == "costs":
        with pytest.raises(StrangeFileError):
            records.costs()
        records.set_costs(ELSEWHERE)  # takes its place
        assert not (tmp_path / "store" / name).is_symlink()
    else:
        # Where there is no FUSE, nothing gets as far as the log.
        with pytest.raises(StrangeFileError if os.path.exists(DEVICE) else LaunchError):
            launch(store, str(tmp_path))
    assert precious.read_text() == "precious"


def test_nobody_is_led_to_another_socket(tmp_path: Path):
    store = str(tmp_path / "store")
    with socket.socket(socket.AF_UNIX) as other, acquire(store, "mount") as lease:
        bind(other, str(tmp_path / "other"))
        other.listen()
        other.settimeout(0)
        lease.describe(socket=str(tmp_path / "other"))
        with pytest.raises(DaemonLostError):
            find_daemon(store)
        (tmp_path / "store/locks/control").symlink_to(tmp_path / "other")
        with pytest.raises(DaemonLostError):
            find_daemon(store)
        with pytest.raises(BlockingIOError):
            other.accept()


@pytest.fixture
def theirs(public_path: Path, as_user: Run) -> Program:
    """The program of root, with a store that an ordinary user has made."""
    if os.geteuid() != 0 or "AMALGAMFS_TEST_USER" not in os.environ:
        pytest.skip("needs root, and AMALGAMFS_TEST_USER to name an ordinary user")
    store = public_path / "store"
    done = as_user("-m", "mountctl", "init", "--store", str(store))
    assert done.returncode == 0, done.stderr
    return Program(store, public_path)


@pytest.mark.unprivileged
def test_root_is_not_led_to_write_where_a_user_wants(theirs: Program, as_user: Run):
    precious = theirs.home / "precious"
    precious.write_text("precious")
    precious.chmod(0o600)
    lock = str(theirs.store / "locks/gc")
    link = f"import os; os.unlink({lock!r}); os.symlink({str(precious)!r}, {lock!r})"
    assert as_user("-c", link).returncode == 0
    for words in (["gc"], ["status"], ["mount", "."], ["top"], ["verify"], ["init"], ["doctor"]):
        result = theirs(*words, code=1 if words == ["doctor"] else 7)
        assert "belongs to user" in result.output
        assert "--trust-store" in result.output
    assert "no file of a store" in theirs("--trust-store", "gc", code=4).stderr
    assert precious.read_text() == "precious"


@pytest.mark.unprivileged
def test_the_hint_helps(theirs: Program, as_user: Run, monkeypatch: pytest.MonkeyPatch):
    name = os.environ["AMALGAMFS_TEST_USER"]
    hint = theirs("gc", code=7).stderr.splitlines()[-1]
    assert f"run it as user {name}" in hint
    assert "with --trust-store" in hint
    theirs("gc", "--trust-store")
    assert f"or name {theirs.store} in AMALGAMFS_TRUST_STORE" in hint
    for listed, code in {f"/nowhere:{theirs.store}": 0, "*": 0, "/nowhere": 7}.items():
        monkeypatch.setenv("AMALGAMFS_TRUST_STORE", listed)
        theirs("gc", code=code)
    monkeypatch.delenv("AMALGAMFS_TRUST_STORE")
    # As git: whoever used sudo is trusted, and nobody else.
    for uid, code in {str(pwd.getpwnam(name).pw_uid): 0, "4711": 7, "x": 7}.items():
        monkeypatch.setenv("SUDO_UID", uid)
        theirs("gc", code=code)
    # What root did is in nobody's way.
    done = as_user("-m", "mountctl", "gc", "--store", str(theirs.store))
    assert done.returncode == 0, done.stderr


@pytest.mark.unprivileged
def test_another_store_is_trusted_by_itself(
    theirs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = Program(tmp_path / "mine", tmp_path)
    mine("init")
    words: list[str | Path] = ["verify", "--repair", "--from", theirs.store]
    assert "belongs to user" in mine.fails(7, *words)
    mine(*words, "--trust-store")
    monkeypatch.setenv("AMALGAMFS_TRUST_STORE", str(theirs.store))
    mine(*words)


@pytest.mark.unprivileged
def test_a_shell_completes_nothing_of_it(theirs: Program):
    environment = theirs.environment(
        _MOUNTCTL_COMPLETE="bash_complete", COMP_WORDS="mountctl log ", COMP_CWORD="2"
    )
    done = subprocess.run(
        theirs.command(), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
