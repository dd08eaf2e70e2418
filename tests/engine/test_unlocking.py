"""Checkouts with directories and files that keep their owner out: an ordinary user works on them.

The tests run as an ordinary user in a process of their own, for root may read everything.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.host.removing import remove_tree
from engine.host.unlocking import LOCKED, true_mode, unlocked
from engine.mounted.inodes import Changes
from engine.mounted.overlay_directory import open_overlay
from engine.plain.importing import ImportSourceError
from engine.repository import Repository
from engine.sessions.session_tree import SessionTree
from engine.storage.nodes import Owner
from tests.conftest import run_as_user

pytestmark = pytest.mark.unprivileged


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def make(home: Path) -> tuple[Repository, Path]:
    """Makes a store with two snapshots that have locked directories, and a checkout of one."""
    source = home / "source"
    (source / "locked/inner").mkdir(parents=True)
    for name in ("locked/f", "locked/inner/g", "secret", "plain"):
        (source / name).write_text(name)
    os.link(source / "locked/inner/g", source / "another")
    repository = Repository.create(str(home / "store"))
    for ref in ("one", "two"):
        (source / "locked/inner/h").write_text(ref)
        repository.import_directory(str(source), ref=ref)
        workspace = repository.workspace(ref)
        for name in ("locked/inner", "locked", "secret", ""):
            if name or ref == "two":
                workspace.chmod(name, 0)
        repository.set_ref(ref, workspace.commit(ref).snapshot)
    out = home / "out"
    check_out(repository, "one", out)
    return repository, out


def check_out(repository: Repository, ref: str, out: Path) -> None:
    snapshot = repository.resolve(ref)
    repository.check_out(repository.snapshot(snapshot).root, str(out), snapshot=snapshot)


def modes(out: Path) -> list[int]:
    names = ["", "locked", "secret"] if os.access(out, os.X_OK) else [""]
    return [mode_of(out / name) for name in names]


def edits(repository: Repository, out: Path) -> list[bytes]:
    return [edit.path for edit in repository.checkouts.status(str(out))]


def commands(home: Path) -> None:
    repository, out = make(home)
    with repository:
        two = repository.resolve("two")
        assert edits(repository, out) == []
        os.utime(out / "secret", ns=(5, 5))
        assert edits(repository, out) == [b"secret"]
        made = repository.checkouts.commit(str(out))
        assert [made.changed, modes(out)] == [True, [0o755, 0, 0]]
        assert edits(repository, out) == []
        repository.checkouts.switch(str(out), repository.snapshot(two).root, snapshot=two)
        assert (modes(out), edits(repository, out)) == ([0], [])
        os.chmod(out, 0o700)
        os.chmod(out / "locked", 0o700)
        assert edits(repository, out) == [b"", b"locked"]
        with pytest.raises(ImportSourceError, match="Permission denied"):  # no checkout's business
            repository.import_directory(str(out))


def killed(home: Path) -> None:
    repository, out = make(home)
    with repository:
        child = os.fork()
        if not child:
            with unlocked(os.fsencode(out / "locked")):
                os._exit(0)
        os.waitpid(child, 0)
        assert mode_of(out / "locked") == 0o700
        with unlocked(os.fsencode(out / "locked")) as fd:
            assert true_mode(fd) == 0
        assert LOCKED.decode() not in os.listxattr(out)
        assert mode_of(out / "locked") == 0
        assert edits(repository, out) == []


def removed(home: Path) -> None:
    repository, out = make(home)
    repository.close()
    remove_tree(os.fsencode(out))
    assert not out.exists()


def full_tree(home: Path) -> None:
    repository, _ = make(home)
    with repository:
        two = repository.resolve("two")
        repository.sessions.create("s", (None, None, two))
        with repository.sessions.hold("s", "test") as held:
            tree = SessionTree(repository.store, repository.objects, held)
            with repository.storing():
                tree.make()
                os.chmod(tree.path, 0o755)
                Path(tree.path, "new").write_text("x")
                os.chmod(tree.path, 0)
                tree.take_in()
            root = held.session.root
        old = repository.snapshot(two).root
        changed = [(each.kind.name, each.path) for each in repository.diff(old, root)]
        assert changed == [("ADDED", b"new")], changed


def chowned(home: Path) -> None:
    """A file without u+w has its set-id bits aside, where the host's chown(2) does not see them."""
    repository, _ = make(home)
    with repository:
        one = repository.resolve("one")
        repository.sessions.create("s", (None, None, one))
        with repository.sessions.hold("s", "test") as held:
            owner = Owner(os.getuid(), os.getgid())
            view = open_overlay(repository.objects, held.upper(), held.session.root, b"k", owner)
            file = view.root.create(b"tool", 0o6555, owner)
            assert stat.S_IMODE(file.attributes().mode) == 0o6555
            after = file.change(Changes(gid=os.getgid()))
            assert stat.S_IMODE(after.mode) == 0o555
            view.close()


@pytest.mark.parametrize("what", ["chowned", "commands", "killed", "removed", "full_tree"])
def test_what_was_written_can_be_read(public_path, what):
    code = (
        "import sys; from pathlib import Path; from tests.engine import test_unlocking as t; "
        f"t.{what}(Path(sys.argv[1])); print('all is well')"
    )
    if os.geteuid() == 0:
        done = run_as_user("-c", code, str(public_path))
    else:
        done = subprocess.run(
            [sys.executable, "-c", code, str(public_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout == "all is well\n", done.stdout + done.stderr
