"""Verify: names what is damaged by snapshot and path, and everything else can still be read."""

import os
from collections.abc import Callable
from pathlib import Path

import cbor2
import msgspec
import pytest

from engine import Repository, SnapshotId
from engine.errors import CorruptObjectError
from engine.ids import NodeId, digest
from engine.storage import content
from engine.storage.nodes import Entry, Kind, Totals, decode
from engine.storage.objects import NodeBuffer
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db
from engine.trees.directory import find, walk
from engine.upkeep.verifying import Damage
from tests.engine.test_session_machine import make_base
from tests.engine.trees import noise, of_directory, of_entry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    make_base(path)
    (path / "copy").write_bytes(noise(5_000, 1))  # as a/c
    return path


def imported(repository: Repository, path: Path) -> SnapshotId:
    return SnapshotId(repository.import_directory(str(path)).snapshot)


Spoil = Callable[[bytes], bytes | None]


def flip(value: bytes) -> bytes:
    return value[:-3] + bytes([value[-3] ^ 0x10]) + value[-2:]


def change(repository: Repository, db: Db, key: bytes, spoil: Spoil) -> None:
    def write(writer) -> None:
        value = spoil(bytes(writer.get(db, key)))
        if value is None:
            writer.delete(db, key)
        else:
            writer.put(db, key, value)

    repository.store.write(write)
    repository.objects.shed()


SPOILS: dict[str, Spoil] = {
    "a bit": flip,
    "cut": lambda value: value[:-1],
    "longer": lambda value: value + b"\0",
    "empty": lambda value: b"",
    "gone": lambda value: None,
}


def places(repository: Repository) -> list[tuple[str, bytes]]:
    report = repository.verify()
    assert all(damage.problem for damage in report.damage)
    return sorted((damage.where, damage.path) for damage in report.damage)


def readable(repository: Repository, root: Entry) -> set[bytes]:
    """Returns the paths of the files that can be read in whole."""
    found = set()

    def visit(path: bytes, directory: Entry) -> None:
        try:
            below = list(walk_one(repository, directory))
        except CorruptObjectError:
            return
        for entry in below:
            child = path + b"/" + entry.name if path else entry.name
            if entry.kind == Kind.DIRECTORY:
                visit(child, entry)
            elif entry.kind == Kind.FILE:
                try:
                    data = content.read(repository.objects, entry, 0, entry.size)
                except CorruptObjectError:
                    continue
                assert len(data) == entry.size
                found.add(child)

    visit(b"", root)
    return found


def walk_one(repository: Repository, directory: Entry) -> list[Entry]:
    from engine.trees.directory import Directory, directory_id

    return list(Directory(repository.objects, directory_id(directory)))


def test_a_whole_store(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.sessions.create("s", (None, None, first))
    repository.set_ref("main", first)
    seen: list[tuple[int, int | None]] = []
    report = repository.verify(lambda done, total, *_: seen.append((done, total)))
    with repository.store.read() as reader:
        assert report.chunks == reader.count(Db.CHUNKS)
        assert report.nodes == reader.count(Db.NODES)
    assert (report.snapshots, report.sessions, report.damage) == (1, 1, [])
    assert report.bytes > 90_000


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_chunk(repository: Repository, base: Path, spoil: str):
    first = imported(repository, base)
    (base / "added").touch()
    second = imported(repository, base)
    entry = find(repository.objects, repository.snapshot(first).root, b"a/c")
    assert entry is not None
    assert isinstance(entry.content, tuple)
    assert entry.content[0].id is not None
    files = readable(repository, repository.snapshot(second).root)
    change(repository, Db.CHUNKS, entry.content[0].id, SPOILS[spoil])
    assert places(repository) == sorted(
        (where.hex(), path) for where in (first, second) for path in (b"a/c", b"copy")
    )
    whole = readable(repository, repository.snapshot(second).root)
    assert whole == files - {b"a/c", b"copy"}
    with pytest.raises(CorruptObjectError):
        content.read(repository.objects, entry, 0, entry.size)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_node(repository: Repository, base: Path, spoil: str):
    first = imported(repository, base)
    entry = find(repository.objects, repository.snapshot(first).root, b"a/sub")
    assert entry is not None
    assert isinstance(entry.content, bytes)
    change(repository, Db.NODES, entry.content, SPOILS[spoil])
    assert places(repository) == [(first.hex(), b"a/sub")]
    files = readable(repository, repository.snapshot(first).root)
    assert {b"a/b", b"c", b"copy"} <= files
    assert not any(path.startswith(b"a/sub/") for path in files)


@pytest.mark.parametrize("spoil", [name for name in SPOILS if name != "gone"])
def test_a_snapshot_record(repository: Repository, base: Path, spoil: str):
    first = imported(repository, base)
    (base / "added").touch()
    second = imported(repository, base)
    change(repository, Db.SNAPSHOTS, first, SPOILS[spoil])
    assert places(repository) == [(first.hex(), b"")]
    with pytest.raises(CorruptObjectError):
        repository.snapshot(first)
    assert of_entry(repository.objects, repository.snapshot(second).root) == of_directory(base)
    assert sorted(repository.snapshots()) == sorted([first, second])


def test_a_snapshot_record_that_a_ref_names(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.set_ref("main", first)
    change(repository, Db.SNAPSHOTS, first, SPOILS["gone"])
    (damage,) = repository.verify().damage
    assert damage == Damage("", b"", "ref 'main' names no snapshot", "snapshot", first)


@pytest.mark.parametrize("spoil", [name for name in SPOILS if name != "gone"])
def test_a_session_record(repository: Repository, base: Path, spoil: str):
    repository.sessions.create("s", (None, None, imported(repository, base)))
    change(repository, Db.SESSIONS, b"s", SPOILS[spoil] if spoil != "a bit" else lambda v: v[1:])
    assert places(repository) == [("@s", b"")]


def test_what_a_session_stands_on(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.sessions.create("s", (None, None, first))
    entry = find(repository.objects, repository.snapshot(first).root, b"d")
    assert entry is not None
    assert isinstance(entry.content, bytes)
    change(repository, Db.NODES, entry.content, SPOILS["gone"])
    assert places(repository) == sorted([(first.hex(), b"d"), ("@s", b"d")])


def test_a_page_of_a_large_directory(repository: Repository, tmp_path: Path):
    base = tmp_path / "base"
    (base / "large").mkdir(parents=True)
    for n in range(2_500):
        os.mknod(base / "large" / f"{n}")
    first = imported(repository, base)
    from engine.trees.directory import Directory, directory_id

    entry = find(repository.objects, repository.snapshot(first).root, b"large")
    assert entry is not None
    pages = list(Directory(repository.objects, directory_id(entry)).page_ids())
    change(repository, Db.NODES, pages[2], SPOILS["a bit"])
    assert places(repository) == [(first.hex(), b"large")]
    other = list(Directory(repository.objects, directory_id(entry)).outside({pages[2]}))
    assert 1_000 < len(other) < 2_500


def test_a_list_of_a_long_file(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(content, "LIST_REFS", 4)
    base = tmp_path / "base"
    base.mkdir()
    (base / "long").write_bytes(noise(5_000_000))
    first = imported(repository, base)
    entry = find(repository.objects, repository.snapshot(first).root, b"long")
    assert entry is not None
    assert isinstance(entry.content, tuple)
    assert entry.content[1].level
    change(repository, Db.NODES, entry.content[1].id or b"", SPOILS["a bit"])
    assert places(repository) == [(first.hex(), b"long")]
    length = entry.content[0].length
    assert content.read(repository.objects, entry, 0, length) == noise(5_000_000)[:length]
    with pytest.raises(CorruptObjectError):
        content.read(repository.objects, entry, length, 1)
    end = sum(ref.length for ref in entry.content[:2])
    assert content.read(repository.objects, entry, end, 99) == noise(5_000_000)[end : end + 99]


@pytest.mark.parametrize(
    "lie", [{"size": 1}, {"totals": Totals(99, 0)}, {"totals": Totals(25, 25)}]
)
def test_sums_that_are_wrong(repository: Repository, base: Path, lie: dict[str, object]):
    root = repository.snapshot(imported(repository, base)).root
    nodes = NodeBuffer()
    identifier, record = encode_snapshot(make_snapshot(msgspec.structs.replace(root, **lie)))
    repository.store.write(nodes.flush)
    repository.store.write(lambda w: w.put(Db.SNAPSHOTS, identifier, record))
    assert places(repository) == [(identifier.hex(), b"")]
    assert dict(walk(repository.objects, root))


def test_a_byte_of_the_file_itself(tmp_path: Path, base: Path):
    """Not through LMDB, which has no checksums of its own."""
    data = noise(100_000, 77)
    (base / "victim").write_bytes(data)
    store = str(tmp_path / "store")
    with Repository.create(store) as repository:
        first = imported(repository, base)
    path = Path(store, "db/data.mdb")
    raw = bytearray(path.read_bytes())
    at = raw.index(data[500:560])
    raw[at] ^= 1
    path.write_bytes(raw)
    with Repository.open(store) as repository:
        assert places(repository) == [(first.hex(), b"victim")]
        entry = find(repository.objects, repository.snapshot(first).root, b"victim")
        assert entry is not None
        with pytest.raises(CorruptObjectError):
            content.read(repository.objects, entry, 0, 1_000)


@pytest.mark.parametrize("spoil", SPOILS)
def test_importing_the_same_bytes_without_the_cache_heals(
    repository: Repository, base: Path, spoil: str
):
    first = imported(repository, base)
    with repository.store.read() as reader:
        keys = [(db, key) for db in (Db.CHUNKS, Db.NODES) for key in reader.keys(db)]
    for db, key in keys:
        change(repository, db, key, SPOILS[spoil])
    assert repository.verify().damage
    again = repository.import_directory(str(base), use_cache=False)
    assert again.snapshot == first
    repository.objects.shed()
    assert repository.verify().damage == []


def test_a_node_that_is_not_canonical_is_damage_that_can_be_read(repository: Repository):
    entry = [b"file", int(Kind.FILE), 0o644, 0, 3, b"abc", [], None, None]
    written = b"\x82\x18\x01" + cbor2.dumps([entry])  # 1 in two bytes
    assert cbor2.loads(written) == [1, [entry]]
    node = NodeId(digest(written))
    root = Entry(b"", Kind.DIRECTORY, 0o755, 0, 3, node, (), None, Totals(1, 0))
    identifier, record = encode_snapshot(make_snapshot(root))

    def store(writer) -> None:
        writer.put(Db.NODES, node, written)
        writer.put(Db.SNAPSHOTS, identifier, record)

    repository.store.write(store)
    with pytest.raises(CorruptObjectError, match="canonical"):
        decode(node, written)
    assert [found.name for _, found in walk(repository.objects, root)] == [b"file"]
    (damage,) = repository.verify().damage
    assert damage.where == identifier.hex()
    assert "canonical" in damage.problem
