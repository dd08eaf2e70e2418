"""The names in a store, looked up without opening it for use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Repository
from engine.host.leases import LeaseHeldError, acquire
from engine.storage.lmdb_store import FORMAT, LmdbStore, look
from engine.storage.names import look_up
from engine.storage.store import Db, NewerFormatError, NotAStoreError, StoreDamagedError


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    tree = tmp_path / "tree"
    tree.mkdir()
    with Repository.create(path) as repository:
        for number in range(20):
            (tree / "file").write_text(str(number))
            made = repository.import_directory(str(tree), ref="main", message=f"try {number}")
        repository.set_ref("v1", repository.resolve("main"))
        repository.sessions.create("work", (None, None, repository.resolve("main")))
        repository.episodes.create("search", None, {})
        repository.episodes.create("later", repository.resolve("main"), {})
        assert made.changed
    return path


def state(path: str) -> dict[str, tuple[int, int, bytes]]:
    """Returns every file of a store but LMDB's table of readers."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if name != "lock.mdb":
                data = file.read_bytes()
                found[str(file)] = (file.stat().st_mtime_ns, file.stat().st_mode, data)
    return found


def test_all_names_are_found_and_nothing_is_written(store):
    before = state(store)
    with look_up(store) as names:
        assert [name for name, _ in names.refs()] == ["main", "v1"]
        assert names.sessions() == ["work"]
        assert names.episodes() == ["later", "search"]
        ((_, main), _) = names.refs()
        for digits in (1, 2, 3, 12, 63, 64):
            begin = main.hex()[:digits]
            assert main in names.snapshots(begin, 100)
            assert all(each.hex().startswith(begin) for each in names.snapshots(begin, 100))
        assert len(names.snapshots("", 7)) == 7
        assert names.snapshots("f" * 64, 7) == []
        record = names.record(main)
        assert record is not None
        assert record.message == "try 19"
    assert state(store) == before


def test_a_name_that_no_command_makes_is_left_out(store):
    with Repository.open(store) as repository:
        target = repository.resolve("main")

        def change(writer):
            for name in (b"$(reboot)", b"a b", b"-rf", b"\xff", b"\x1b[2J", b"a\nb"):
                writer.put(Db.REFS, name, target)
                writer.put(Db.SESSIONS, name, b"damaged")

        repository.store.write(change)
    with look_up(store) as names:
        assert [name for name, _ in names.refs()] == ["main", "v1"]
        assert names.sessions() == ["work"]


def test_a_damaged_record_is_none(store):
    with Repository.open(store) as repository:
        target = repository.resolve("main")
        repository.store.write(lambda writer: writer.put(Db.SNAPSHOTS, target, b"damaged"))
    with look_up(store) as names:
        assert names.record(target) is None
        assert target in names.snapshots(target.hex()[:4], 5)


def test_it_looks_while_others_have_the_store_open_and_write(store):
    program = (
        "import sys; from engine.storage.names import look_up\n"
        "with look_up(sys.argv[1]) as names: print(names.sessions())"
    )
    with Repository.open(store) as repository:
        child = subprocess.Popen([sys.executable, "-c", program, store], stdout=subprocess.PIPE)
        for number in range(20):
            repository.set_ref(f"new-{number}", repository.resolve("main"))
        assert child.communicate(timeout=120)[0] == b"['work']\n"


def test_nobody_is_waited_for_while_the_file_is_replaced(store):
    with acquire(store, "store"), pytest.raises(LeaseHeldError), look(store):
        pass


@pytest.mark.parametrize(
    ("number", "error"), [(FORMAT - 1, NotAStoreError), (FORMAT + 1, NewerFormatError)]
)
def test_another_format_is_left_as_it_is(store, number, error):
    opened = LmdbStore(store)
    opened.write(lambda writer: writer.put(Db.META, b"format", str(number).encode()))
    opened.close()
    before = state(store)
    with pytest.raises(error), look(store):
        pass
    assert state(store) == before


def test_a_file_that_was_cut_short_is_no_crash_and_stays_short(store):
    data = Path(store, "db", "data.mdb")
    os.truncate(data, data.stat().st_size - 8192)
    before = state(store)
    with pytest.raises(StoreDamagedError), look(store):
        pass
    assert state(store) == before


@pytest.mark.parametrize("missing", ["", "db", "db/data.mdb", "db/lock.mdb", "locks/store"])
def test_where_there_is_no_store_none_is_made(store, missing):
    where = Path(store, missing)
    where.rename(where.parent / "elsewhere")
    before = state(os.path.dirname(store))
    with pytest.raises(NotAStoreError), look(store):
        pass
    assert state(os.path.dirname(store)) == before
