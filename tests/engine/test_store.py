"""What a store promises, asked of both; and what happens to the one on disk that is not whole."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from engine.storage import lmdb_store
from engine.storage.lmdb_store import FORMAT, LIBRARY, LmdbStore
from engine.storage.memory_store import MemoryStore
from engine.storage.objects import ChunkSink, Objects
from engine.storage.store import (
    LONGEST_KEY,
    Db,
    NewerFormatError,
    NotAStoreError,
    Store,
    StoreDamagedError,
    StoreExistsError,
    StoreFullError,
    Writer,
)
from tests.conftest import ROOT, Run
from tests.engine.trees import noise

MIB = 1 << 20


def on_disk(path: Path) -> LmdbStore:
    return LmdbStore(str(path / "store"), create=True)


def in_memory(path: Path) -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=[on_disk, in_memory])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def put(store: Store, *pairs: tuple[bytes, bytes]) -> None:
    store.write(lambda txn: txn.put_many(Db.NODES, list(pairs)))


def get(store: Store, key: bytes) -> bytes | None:
    with store.read() as txn:
        value = txn.get(Db.NODES, key)
        return None if value is None else bytes(value)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that has LmdbStore and Db in another process."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


PRELUDE = """
import os, sys
from engine.errors import EngineError
from engine.storage.lmdb_store import LmdbStore
from engine.storage.store import Db, StoreDamagedError, StorePermissionError
path = sys.argv[1]
"""


# What both promise.


def test_a_value_is_what_was_put_last(store: Store):
    assert get(store, b"k") is None
    put(store, (b"k", b"one"))
    assert get(store, b"k") == b"one"
    put(store, (b"k", b""))
    assert get(store, b"k") == b""
    with store.read() as txn:
        assert txn.has(Db.NODES, b"k")
        assert not txn.has(Db.NODES, b"l")
        assert not txn.has(Db.CHUNKS, b"k")


def test_values_may_be_large_and_keys_of_any_bytes(store: Store):
    keys = [b"\0", b"\0\0", b"\xff" * LONGEST_KEY, b"a" * 255]
    put(store, *((key, key * 9000) for key in keys))
    for key in keys:
        assert get(store, key) == key * 9000
    with store.read() as txn:
        assert list(txn.keys(Db.NODES)) == sorted(keys)


def test_keys_and_items_come_in_order_from_where_they_are_asked(store: Store):
    pairs = [(b"%03d" % n, b"value %d" % n) for n in range(0, 200, 2)]
    put(store, *reversed(pairs))
    with store.read() as txn:
        assert list(txn.keys(Db.NODES)) == [key for key, _ in pairs]
        assert [(key, bytes(value)) for key, value in txn.items(Db.NODES)] == pairs
        assert list(txn.keys(Db.NODES, b"100")) == [key for key, _ in pairs[50:]]
        assert list(txn.keys(Db.NODES, b"101")) == [key for key, _ in pairs[51:]]
        assert next(txn.items(Db.NODES, b"10"))[0] == b"100"
        assert not list(txn.keys(Db.NODES, b"2"))
        assert not list(txn.items(Db.NODES, b"2"))
        assert list(txn.keys(Db.CHUNKS)) == []
        assert txn.count(Db.NODES) == len(pairs)
        assert txn.count(Db.CHUNKS) == 0


def test_a_writer_sees_its_own_changes(store: Store):
    def change(txn: Writer) -> list[bytes]:
        txn.put(Db.NODES, b"b", b"2")
        txn.put_many(Db.NODES, [(b"a", b"1"), (b"c", b"3")])
        value = txn.get(Db.NODES, b"b")
        assert value is not None
        assert bytes(value) == b"2"
        assert txn.delete(Db.NODES, b"a")
        assert not txn.delete(Db.NODES, b"a")
        assert not txn.has(Db.NODES, b"a")
        assert txn.count(Db.NODES) == 2
        return list(txn.keys(Db.NODES))

    assert store.write(change) == [b"b", b"c"]
    assert get(store, b"a") is None


def test_an_exception_rolls_back_and_comes_out(store: Store):
    put(store, (b"kept", b"1"), (b"changed", b"1"))
    before = store.transaction_id()

    def change(txn: Writer) -> None:
        txn.put(Db.NODES, b"changed", b"2")
        txn.put(Db.CHUNKS, b"new", b"2")
        txn.delete(Db.NODES, b"kept")
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        store.write(change)
    assert (get(store, b"kept"), get(store, b"changed")) == (b"1", b"1")
    assert store.transaction_id() == before
    put(store, (b"changed", b"3"))
    assert get(store, b"changed") == b"3"


def test_a_reader_sees_the_state_it_was_opened_on(store: Store):
    put(store, (b"k", b"old"))
    opened, written = threading.Event(), threading.Event()
    seen: list[bytes | None] = []

    def reader() -> None:
        with store.read() as txn:
            opened.set()
            written.wait(120)
            value = txn.get(Db.NODES, b"k")
            seen.append(bytes(value) if value is not None else None)
            seen.extend(txn.keys(Db.NODES))

    thread = threading.Thread(target=reader)
    thread.start()
    assert opened.wait(120)
    put(store, (b"k", b"new"), (b"l", b"new"))
    written.set()
    thread.join(120)
    assert seen == [b"old", b"k"]
    assert get(store, b"k") == b"new"


def test_who_closes_waits_for_the_readers_in_other_threads(path: str, monkeypatch):
    monkeypatch.setattr(lmdb_store, "CLOSE_WAIT", 1000.0)
    store = LmdbStore(path, create=True)
    put(store, (b"k", b"value" * 1000))
    opened, go_on = threading.Event(), threading.Event()
    seen: list[object] = []

    def reader() -> None:
        try:
            with store.read() as txn:
                value = txn.get(Db.NODES, b"k")
                opened.set()
                go_on.wait(120)
                seen.extend([bytes(value or b"") == b"value" * 1000, txn.has(Db.NODES, b"k")])
        except Exception as error:  # noqa: BLE001 - the test looks at it
            seen.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    assert opened.wait(120)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.05)
    go_on.set()
    thread.join(120)
    closing.join(120)
    assert not closing.is_alive()
    assert seen == [True, True]


def test_what_a_writer_does_is_seen_by_nobody_before_it_commits(store: Store):
    put(store, (b"k", b"old"))
    seen: list[bytes | None] = []

    def change(txn: Writer) -> None:
        txn.put(Db.NODES, b"k", b"new")
        if isinstance(store, LmdbStore):  # the strict one makes readers wait for a writer
            thread = threading.Thread(target=lambda: seen.append(get(store, b"k")))
            thread.start()
            thread.join(120)

    store.write(change)
    assert seen == ([b"old"] if isinstance(store, LmdbStore) else [])
    assert get(store, b"k") == b"new"


def test_writers_take_turns(store: Store):
    def count(_: int) -> None:
        for _ in range(10):
            store.write(increment)

    def increment(txn: Writer) -> None:
        raw = txn.get(Db.NODES, b"n")
        txn.put(Db.NODES, b"n", b"%d" % (int(bytes(raw)) + 1 if raw else 1))

    threads = [threading.Thread(target=count, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert get(store, b"n") == b"40"


def test_the_transaction_id_grows(store: Store):
    seen = [store.transaction_id()]
    for n in range(5):
        put(store, (b"%d" % n, b""))
        seen.append(store.transaction_id())
    assert sorted(set(seen)) == seen
    get(store, b"0")
    assert store.transaction_id() == seen[-1]


def test_statistics_count_every_database(store: Store):
    put(store, (b"a", b"1"), (b"b", bytes(50_000)))
    statistics = store.statistics()
    assert set(statistics.counts) == {db.value for db in Db}
    assert statistics.counts["nodes"] == 2
    assert 50_000 < statistics.used_bytes <= statistics.file_bytes <= statistics.map_bytes


def test_trim_changes_nothing(store: Store):
    put(store, (b"a", bytes(100_000)))
    with store.read() as txn:
        value = txn.get(Db.NODES, b"a")
        store.trim()
        assert value is not None
        assert bytes(value) == bytes(100_000)


# What the strict one refuses.


def test_a_value_ends_with_its_transaction():
    store = MemoryStore()
    put(store, (b"k", b"value"))
    with store.read() as txn:
        value = txn.get(Db.NODES, b"k")
        (_, other), *_ = txn.items(Db.NODES)
    assert value is not None
    for view in [value, other]:
        with pytest.raises(ValueError, match="released"):
            bytes(view)
    with pytest.raises(RuntimeError, match="ended"):
        txn.get(Db.NODES, b"k")


def test_the_strict_one_refuses_what_is_left_open_and_impossible_keys():
    store = MemoryStore()
    for key in [b"", b"k" * (LONGEST_KEY + 1)]:
        with pytest.raises(ValueError, match="a key of"):
            put(store, (key, b""))
    with pytest.raises(RuntimeError, match="a write inside a write"):
        store.write(lambda txn: put(store, (b"k", b"")))
    with store.read(), pytest.raises(RuntimeError, match="are open"):
        store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        get(store, b"k")
    with pytest.raises(RuntimeError, match="closed"):
        put(store, (b"k", b""))


# The one on disk.


def test_a_write_inside_a_read_is_refused(path: str):
    store = LmdbStore(path, create=True)
    with store.read(), store.read(), pytest.raises(RuntimeError, match="inside a read"):
        put(store, (b"k", b""))
    put(store, (b"k", b"v"))
    assert get(store, b"k") == b"v"
    store.close()


def test_what_was_written_is_there_when_it_is_opened_again(path: str):
    store = LmdbStore(path, create=True)
    put(store, (b"k", bytes(10_000)))
    store.close()
    store = LmdbStore(path)
    assert get(store, b"k") == bytes(10_000)
    store.close()
    assert sorted(os.listdir(path)) == ["db", "locks", "log", "sessions"]
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert os.stat(f"{path}/db/data.mdb").st_mode & 0o777 == 0o600


def test_the_map_grows_under_a_writer(path: str):
    store = LmdbStore(path, create=True, map_bytes=MIB)
    first = store.statistics().map_bytes
    for n in range(8):
        put(store, *((b"%d/%d" % (n, k), b"%d" % n * 50_000) for k in range(10)))
    assert first < store.statistics().map_bytes
    for n in range(8):
        assert get(store, b"%d/9" % n) == b"%d" % n * 50_000
    store.close()


def test_the_map_grows_after_readers_in_other_threads_have_ended(path: str):
    store = LmdbStore(path, create=True, map_bytes=MIB)
    put(store, (b"old", b"old" * 9000))
    opened, full = threading.Event(), threading.Event()
    seen: list[object] = []

    def reader() -> None:
        with store.read() as txn:
            opened.set()
            full.wait(120)  # the writer waits for us from now on
            for _ in range(200):
                value = txn.get(Db.NODES, b"old")
                assert value is not None
                seen.append(bytes(value) == b"old" * 9000)
            seen.append(get(store, b"old") == b"old" * 9000)  # a read inside of ours does not

    def change(txn: Writer) -> None:
        try:
            for n in range(60):
                txn.put(Db.NODES, b"%d" % n, bytes(100_000))
        finally:
            full.set()

    thread = threading.Thread(target=reader)
    thread.start()
    assert opened.wait(120)
    store.write(change)
    thread.join(120)
    assert seen == [True] * 201
    assert get(store, b"59") == bytes(100_000)
    store.close()


GROW = """
store = LmdbStore(path, map_bytes=1 << 20)
for n in range(6):
    store.write(lambda txn: txn.put(Db.NODES, b"other%d" % n, bytes(1 << 20)))
store.close()
"""


@pytest.mark.parametrize("first", ["read", "write"])
def test_another_process_grows_the_map(path: str, first: str):
    store = LmdbStore(path, create=True, map_bytes=MIB)
    put(store, (b"k", b"v"))
    done = run(GROW, path)
    assert done.returncode == 0, done.stderr
    if first == "write":
        put(store, (b"after", b"v"))
    assert get(store, b"other5") == bytes(MIB)
    put(store, (b"after", bytes(3 * MIB)))
    assert get(store, b"after") == bytes(3 * MIB)
    assert get(store, b"k") == b"v"
    store.close()


def test_another_process_grows_the_map_while_this_one_reads(path: str):
    store = LmdbStore(path, create=True, map_bytes=MIB)
    put(store, (b"k", b"v"))
    seen: list[bool] = []

    def read_within_a_read() -> None:
        with store.read() as txn:
            done = run(GROW, path)
            assert done.returncode == 0, done.stderr
            with store.read() as inner:  # could wait for the outer one for ever
                seen.append(inner.has(Db.NODES, b"k"))
            seen.append(txn.has(Db.NODES, b"other5"))

    thread = threading.Thread(target=read_within_a_read, daemon=True)
    thread.start()
    thread.join(120)
    assert seen == [True, False]
    assert get(store, b"other5") == bytes(MIB)
    store.close()


COUNT = """
store = LmdbStore(path)
def increment(txn):
    raw = txn.get(Db.NODES, b"n")
    txn.put(Db.NODES, b"n", b"%d" % (int(bytes(raw)) + 1 if raw else 1))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    store.write(increment)
store.close()
"""


def test_two_processes_write_in_turns(path: str):
    store = LmdbStore(path, create=True)
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + COUNT, path],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.communicate("go\n", timeout=120)
        assert program.returncode == 0
    assert get(store, b"n") == b"100"
    store.close()


KILLED = """
store = LmdbStore(path)
store.write(lambda txn: txn.put(Db.NODES, b"committed", b"1"))
def change(txn):
    txn.put_many(Db.NODES, [(b"%d" % n, bytes(9000)) for n in range(200)])
    os.kill(os.getpid(), 9)
store.write(change)
"""


def test_a_killed_writer_leaves_the_last_commit(path: str):
    LmdbStore(path, create=True).close()
    assert run(KILLED, path).returncode == -9
    store = LmdbStore(path)
    with store.read() as txn:
        assert list(txn.keys(Db.NODES)) == [b"committed"]
    put(store, (b"k", b"v"))  # nor does it hold the others up
    store.close()


# What cannot be opened or made.


def test_there_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "db").mkdir()
    for name in ["missing", "file", "empty", "", "file/below"]:
        with pytest.raises(NotAStoreError) as caught:
            LmdbStore(str(tmp_path / name))
        assert caught.value.path == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["db", "empty", "file"]


def test_nothing_is_made_over_something_else(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ["file", "full", "dangling"]:
        with pytest.raises(StoreExistsError):
            LmdbStore(str(tmp_path / name), create=True)
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_a_store_is_not_made_twice_and_keeps_what_it_has(path: str):
    store = LmdbStore(path, create=True)
    put(store, (b"k", b"v"))
    store.close()
    with pytest.raises(StoreExistsError):
        LmdbStore(path, create=True)
    store = LmdbStore(path)
    assert get(store, b"k") == b"v"
    store.close()


def test_a_store_is_made_in_an_empty_directory_and_where_one_was_begun(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    LmdbStore(str(tmp_path / "empty"), create=True).close()
    (tmp_path / "begun/locks").mkdir(parents=True)
    (tmp_path / "begun/db").mkdir()
    LmdbStore(str(tmp_path / "begun"), create=True).close()
    LmdbStore(str(tmp_path / "begun")).close()


def test_a_newer_format_is_refused(path: str):
    store = LmdbStore(path, create=True)
    store.write(lambda txn: txn.put(Db.META, b"format", str(FORMAT + 1).encode()))
    store.close()
    with pytest.raises(NewerFormatError) as caught:
        LmdbStore(path)
    assert (caught.value.found, caught.value.known) == (FORMAT + 1, FORMAT)


def older(path: str, number: int = 1) -> None:
    """Makes a store of an older format, as the program wrote it that knew no later one."""
    os.makedirs(os.path.join(path, "db"))
    with lmdb.Environment(os.path.join(path, "db"), max_dbs=9, lib_version=LIBRARY) as env:
        names = ["chunks", "nodes", "snapshots", "refs", "sessions", "imports", "meta"]
        for name in names + ["episodes"] * (number > 1):
            env.open_db(name.encode())
        with env.begin(write=True) as txn:
            txn.put(b"format", b"%d" % number, db=env.open_db(b"meta", txn))
            txn.put(b"kept", b"value", db=env.open_db(b"nodes", txn))


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_an_older_format_is_brought_up_once(path: str, number: int):
    older(path, number)
    for _ in range(2):
        store = LmdbStore(path)
        assert get(store, b"kept") == b"value"
        store.write(lambda txn: txn.put(Db.EPISODES, b"key", b"value"))
        with store.read() as txn:
            assert bytes(txn.get(Db.META, b"format") or b"") == str(FORMAT).encode()
            assert txn.has(Db.EPISODES, b"key")
            assert txn.count(Db.EPISODES) == 1
        written = store.transaction_id()
        store.close()
    store = LmdbStore(path)
    assert store.transaction_id() == written  # opening it again wrote nothing
    store.close()


def test_an_older_format_is_brought_up_by_one_of_many(path: str):
    older(path)
    code = "LmdbStore(path).close()"
    children = [
        subprocess.Popen([sys.executable, "-c", PRELUDE + code, path], cwd=ROOT) for _ in range(4)
    ]
    assert [child.wait(120) for child in children] == [0] * 4
    LmdbStore(path).close()


KILLED_WHILE_BRINGING_UP = """
import os, signal
import engine.storage.lmdb_store as module
put = module._LmdbTransaction.put
def die(*arguments):
    put(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module._LmdbTransaction.put = die
LmdbStore(path)
"""


def test_a_kill_while_it_is_brought_up_leaves_the_older_format(path: str):
    older(path)
    assert run(KILLED_WHILE_BRINGING_UP, path).returncode == -9
    with lmdb.Environment(os.path.join(path, "db"), max_dbs=9, lib_version=LIBRARY) as env:
        with env.begin(db=env.open_db(b"meta")) as txn:
            assert txn.get(b"format") == b"1"
        with pytest.raises(lmdb.NotFoundError):
            env.open_db(b"episodes", create=False)
    store = LmdbStore(path)
    assert get(store, b"kept") == b"value"
    store.close()


def test_an_older_format_that_may_not_be_written_is_left(public_path: Path, as_user: Run):
    path = str(public_path / "store")
    older(path)
    os.chmod(path, 0o755)
    os.chmod(os.path.join(path, "db"), 0o555)
    for name in ("data.mdb", "lock.mdb"):
        os.chmod(os.path.join(path, "db", name), 0o444)
    code = "try: LmdbStore(path)\nexcept StorePermissionError: print('refused')"
    before = Path(path, "db/data.mdb").read_bytes()
    if os.geteuid() == 0:
        assert as_user("-c", PRELUDE + code, path).stdout == "refused\n"
    assert Path(path, "db/data.mdb").read_bytes() == before


def test_the_last_key_below_another(store: Store):
    put(store, *((key, b"") for key in (b"b", b"b\0", b"d")))
    with store.read() as txn:
        found = {key: txn.last(Db.NODES, key) for key in (b"a", b"b", b"b\0", b"c", b"d", b"e")}
        assert found == {
            b"a": None, b"b": None, b"b\0": b"b", b"c": b"b\0", b"d": b"b\0", b"e": b"d"
        }  # fmt: skip
        assert txn.last(Db.CHUNKS, b"x") is None


@pytest.mark.parametrize("data", [b"", b"garbage" * 5000, b"\xff" * 100, bytes(100_000)])
def test_a_file_that_lmdb_did_not_write(path: str, data: bytes):
    LmdbStore(path, create=True).close()
    Path(path, "db/data.mdb").write_bytes(data)
    with pytest.raises((StoreDamagedError, NotAStoreError)):
        LmdbStore(path)


CUT = """
import json, shutil
from engine import Repository
from engine.errors import CorruptObjectError
source = sys.argv[2]
whole = os.stat(source + "/db/data.mdb").st_size
outcomes = {}
for step in range(41):
    size = whole * step // 41 + (step * 1000) % 5000
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    os.truncate(path + "/db/data.mdb", min(size, whole - 1))
    try:
        with Repository.open(path) as repository:
            damage = repository.verify().damage
            assert damage or step == 40, step  # the last page is a free one
            for identifier in repository.snapshots():
                root = repository.snapshot(identifier).root
                repository.check_out(root, path + ".out", outside_links=True)
                shutil.rmtree(path + ".out")
            outcome = "lost nothing"
    except (CorruptObjectError, EngineError) as error:
        outcome = type(error).__name__
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(json.dumps(sorted(outcomes)))
"""


def test_a_file_that_was_cut_short_never_ends_the_process(tmp_path: Path):
    from engine import Repository
    from tests.engine.trees import noise

    tree = tmp_path / "tree"
    tree.mkdir()
    for n in range(40):
        (tree / f"{n}").write_bytes(noise(3000 * n, n))
    with Repository.create(str(tmp_path / "whole")) as repository:
        repository.import_directory(str(tree))
    done = run(CUT, str(tmp_path / "cut"), str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    outcomes = set(json.loads(done.stdout))
    assert outcomes <= {
        "CorruptObjectError", "MissingObjectError", "NotAStoreError", "StoreDamagedError",
        "lost nothing",
    }  # fmt: skip
    assert outcomes & {"CorruptObjectError", "MissingObjectError", "StoreDamagedError"}


OPEN = """
try:
    LmdbStore(path, create=len(sys.argv) > 2)
except StorePermissionError as error:
    print(error.path == path)
"""


@pytest.mark.unprivileged
@pytest.mark.parametrize("closed", ["", "db", "db/data.mdb", "db/lock.mdb"])
def test_somebody_else_may_not_open_it(public_path: Path, as_user: Run, closed: str):
    store = public_path / "store"
    LmdbStore(str(store), create=True).close()
    for part, mode in {"db/data.mdb": 0o666, "db/lock.mdb": 0o666, "db": 0o777, "": 0o777}.items():
        (store / part).chmod(0 if part == closed else mode)
    done = as_user("-c", PRELUDE + OPEN, str(store))
    (store / closed).chmod(0o700)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.unprivileged
def test_a_store_cannot_be_made_where_one_may_not_write(public_path: Path, as_user: Run):
    public_path.chmod(0o555)
    done = as_user("-c", PRELUDE + OPEN, str(public_path / "store"), "create")
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "amalgamfs-test", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path):
    store = LmdbStore(str(small_disk / "store"), create=True)
    put(store, (b"before", b"kept"))
    before = store.transaction_id()
    for _ in range(2):
        with pytest.raises(StoreFullError) as caught:
            put(store, *((b"%03d" % n, bytes(100_000)) for n in range(100)))
        assert caught.value.path == str(small_disk / "store")
        assert get(store, b"before") == b"kept"
        assert get(store, b"000") is None
        assert store.transaction_id() == before
    put(store, (b"after", b"there is room for this"))
    store.close()
    store = LmdbStore(str(small_disk / "store"))
    with store.read() as txn:
        assert list(txn.keys(Db.NODES)) == [b"after", b"before"]
    store.close()


def test_chunks_for_a_full_disk(small_disk: Path):
    store = LmdbStore(str(small_disk / "store"), create=True)
    sink = ChunkSink(store, batch_bytes=500_000)
    data = noise(10_000_000)
    for at in range(0, len(data), 50_000):
        try:
            sink.put(data[at : at + 50_000])
        except StoreFullError:
            break
    else:
        pytest.fail("there was room for more than the disk has")
    with pytest.raises(StoreFullError):
        sink.flush()  # what did not get there is not forgotten
    sink = ChunkSink(store)
    identifier = sink.put(data[:50_000])
    sink.flush()
    assert Objects(store).chunk(identifier) == data[:50_000]
    store.close()


def fill(file: io.FileIO) -> None:
    """Writes until there is no room at all."""
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_a_disk_filled_by_others(small_disk: Path):
    store = LmdbStore(str(small_disk / "store"), create=True)
    put(store, (b"before", b"kept"))
    with (small_disk / "filler").open("wb", buffering=0) as file:
        fill(file)
    with pytest.raises(StoreFullError):
        put(store, (b"k", bytes(100_000)))
    assert get(store, b"before") == b"kept"
    with pytest.raises(StoreFullError):
        LmdbStore(str(small_disk / "another"), create=True)
    (small_disk / "filler").unlink()
    put(store, (b"k", bytes(100_000)))
    assert get(store, b"k") == bytes(100_000)
    store.close()


# Turns.


def test_a_turn_is_waited_for_once(store: Store):
    order: list[str] = []

    def other() -> None:
        put(store, (b"k", b"other"))
        order.append("other")

    thread = threading.Thread(target=other)
    with store.turn():
        thread.start()
        put(store, (b"k", b"mine"))
        order.append("mine")
    thread.join()
    assert order == ["mine", "other"]


def test_a_turn_that_is_not_used_changes_nothing(store: Store):
    before = store.transaction_id()
    with store.turn():
        pass
    assert store.transaction_id() == before
    put(store, (b"k", b"v"))


def test_many_chunks_in_a_turn(store: Store):
    """A sink writes in a thread of its own, which is not to wait for whoever waits for it."""
    sink = ChunkSink(store, batch_bytes=1000)
    with store.turn():
        identifiers = [sink.put(noise(600, number)) for number in range(10)]
        sink.flush()
    with store.read() as reader:
        assert all(reader.has(Db.CHUNKS, identifier) for identifier in identifiers)


def test_opening_waits_for_nobody_who_writes(path: str):
    put(LmdbStore(path, create=True), (b"k", b"v"))
    program = """
import sys
from engine.storage.lmdb_store import LmdbStore
from engine.storage.store import Db
store = LmdbStore(sys.argv[1], to_read=True)
with store.read() as reader:
    print(bytes(reader.get(Db.NODES, b"k")))
store.close()
"""
    command = [sys.executable, "-c", program, path]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=ROOT,
    )  # fmt: skip
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    writer.communicate(b"end\n")
    assert done.stdout == b"b'v'\n"


WRITER = """
import sys
from engine.storage.lmdb_store import LmdbStore
store = LmdbStore(sys.argv[1])
store.write(lambda _: [print("writing", flush=True), sys.stdin.readline()])
store.close()
"""
