"""Whose a store is, and what stands in it for a file: nothing leads a process to other files."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import Repository
from engine.host.leases import acquire, holder_of, is_held
from engine.host.own_files import StrangeFileError
from engine.storage.names import look_up
from engine.storage.ownership import check_owner
from engine.storage.store import StoreOwnerError

SOMEBODY = 12_345
"""A user that there need not be."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that nobody has open, with a session."""
    path = tmp_path / "store"
    with Repository.create(str(path)) as repository:
        workspace = repository.workspace()
        workspace.write("a", "a")
        repository.sessions.create("s", (None, None, workspace.commit("first").snapshot))
    return path


def give_away(store: Path) -> None:
    """Makes all of a store another user's."""
    for path in [store, *store.rglob("*")]:
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


def commit(store: str) -> None:
    with Repository.open(store, trusted=True) as repository:
        workspace = repository.workspace()
        workspace.write("b", os.urandom(8).hex())
        workspace.commit("another")


def hold(store: str) -> None:
    with Repository.open(store, trusted=True) as repository:
        repository.sessions.hold("s", "a test").release()


def collect(store: str) -> None:
    with Repository.open(store, trusted=True) as repository:
        repository.collect()


WRITERS: dict[str, Callable[[str], object]] = {
    "locks/gc": collect,
    "locks/objects": collect,
    "locks/store": lambda store: Repository.open(store, trusted=True),
    "locks/mount": lambda store: acquire(store, "mount", what="a test"),
    "locks/commits/turn": commit,
}


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_file_is_neither_followed_nor_waited_for(
    store: Path, tmp_path: Path, name: str, what: str
):
    precious, planted = tmp_path / "precious", store / name
    precious.write_text("precious")
    planted.parent.mkdir(exist_ok=True)
    planted.unlink(missing_ok=True)
    if what == "link":
        planted.symlink_to(precious)
    elif what == "pipe":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    with pytest.raises((StrangeFileError, IsADirectoryError)):
        WRITERS[name](str(store))
    assert precious.read_text() == "precious"


def test_who_holds_a_lease_is_not_read_elsewhere(store: Path, tmp_path: Path):
    (tmp_path / "elsewhere").write_text('{"pid": 1, "socket": "/secret"}')
    (store / "locks/mount").unlink()
    (store / "locks/mount").symlink_to(tmp_path / "elsewhere")
    assert holder_of(str(store), "mount") == {}
    with pytest.raises(StrangeFileError, match="symbolic link"):
        is_held(str(store), "mount")


def test_a_session_that_leads_elsewhere_is_not_emptied(store: Path, tmp_path: Path):
    with Repository.open(str(store)) as repository:
        home = store / "sessions" / repository.sessions.get("s").uid
        kept = tmp_path / "kept"
        (kept / "work" / "deep").mkdir(parents=True)
        (kept / "upper.0").mkdir()
        shutil.rmtree(home)
        home.symlink_to(kept)
        if os.geteuid() == 0:
            os.chown(home, SOMEBODY, SOMEBODY, follow_symlinks=False)
            with pytest.raises(StrangeFileError, match=f"that user {SOMEBODY} made"):
                repository.sessions.hold("s", "a test")
            assert (kept / "work" / "deep").is_dir()
        else:
            repository.sessions.hold("s", "a test").release()


@pytest.mark.parametrize("part", ["db", "sessions", "locks", "log"])
def test_ones_own_link_may_lead_to_another_disk(store: Path, tmp_path: Path, part: str):
    (store / part).rename(tmp_path / "disk")
    (store / part).symlink_to(tmp_path / "disk")
    hold(str(store))
    commit(str(store))


@as_root
def test_a_store_of_another_user_is_refused_and_not_touched(store: Path, tmp_path: Path):
    give_away(store)
    for path in (store / "locks").iterdir():
        if path.is_file():
            path.unlink()
    before = sorted(store.rglob("*"))
    for use in (
        lambda: Repository.open(str(store)),
        lambda: Repository.create(str(store)),
        lambda: look_up(str(store)).__enter__(),
    ):
        with pytest.raises(StoreOwnerError, match=f"it belongs to user {SOMEBODY}") as caught:
            use()
        assert (caught.value.path, caught.value.owner) == (str(store), str(SOMEBODY))
    with Repository.create(str(tmp_path / "mine")) as mine:
        with pytest.raises(StoreOwnerError):
            mine.repair(str(store))
        assert not mine.repair(str(store), trusted=True).left.damage
    assert set(before) <= set(store.rglob("*"))
    (tmp_path / "empty").mkdir()
    os.chown(tmp_path / "empty", SOMEBODY, SOMEBODY)
    with pytest.raises(StoreOwnerError):
        Repository.create(str(tmp_path / "empty"))
    assert not list((tmp_path / "empty").iterdir())


@as_root
@pytest.mark.parametrize("part", ["db", "db/data.mdb", "db/lock.mdb", "locks", "log", "sessions"])
def test_a_part_of_another_user_is_refused(store: Path, part: str):
    os.chown(store / part, SOMEBODY, SOMEBODY)
    with pytest.raises(StoreOwnerError, match=f"/{part}' belongs to user {SOMEBODY}"):
        Repository.open(str(store))
    Repository.open(str(store), trusted=True).close()


@as_root
@pytest.mark.parametrize("part", ["db", "db/data.mdb", "db/lock.mdb", "locks", "log", "sessions"])
def test_a_link_of_another_user_is_never_followed(store: Path, tmp_path: Path, part: str):
    give_away(store)
    (store / part).rename(tmp_path / "elsewhere")
    (store / part).symlink_to(tmp_path / "elsewhere")
    os.chown(store / part, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(StrangeFileError, match=f"symbolic link that user {SOMEBODY} made"):
        Repository.open(str(store), trusted=True)


@as_root
def test_a_second_name_of_a_file_is_not_written(store: Path, tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    give_away(store)
    (store / "locks/gc").unlink()
    os.link(tmp_path / "precious", store / "locks/gc")
    with pytest.raises(StrangeFileError, match="another name"):
        collect(str(store))
    (store / "locks/gc").unlink()
    (store / "locks/gc").write_text("of a third user")
    os.chown(store / "locks/gc", SOMEBODY + 1, SOMEBODY)
    with pytest.raises(StrangeFileError, match=f"belongs to user {SOMEBODY + 1}"):
        collect(str(store))
    assert (tmp_path / "precious").read_text() == "precious"


@as_root
def test_what_root_makes_there_is_its_owners(store: Path):
    give_away(store)
    shutil.rmtree(store / "locks")
    commit(str(store))
    collect(str(store))
    hold(str(store))
    with Repository.open(str(store), trusted=True) as repository:
        uid = repository.sessions.get("s").uid
        repository.sessions.create("t", (None, None, repository.snapshots()[0]))
    mine = [path for path in store.rglob("*") if path.lstat().st_uid == 0]
    assert {path.name for path in mine} <= {"upper.0"}, mine  # which a command of root writes
    assert uid


def test_there_need_not_be_a_store(tmp_path: Path):
    check_owner(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    check_owner(str(tmp_path / "file"))
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
