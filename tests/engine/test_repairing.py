"""Repair: what rotted on the disk comes back from where the same bytes still are."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import engine.storage.content
import engine.trees.directory
from engine import Repository, SnapshotId
from engine.episodes.steps import NewStep
from engine.errors import CorruptObjectError
from engine.plain import importing
from engine.plain.importing import ImportSourceError
from engine.storage.nodes import Entry, directory_node, encode, index_node, node_id
from engine.storage.nodes import Page as IndexPage
from engine.storage.objects import NodeBuffer
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, NotAStoreError, Writer
from engine.trees.directory import Directory, directory_id, find, store_directory
from tests.engine.test_session_machine import make_base
from tests.engine.test_verifying import SPOILS, change, flip, imported
from tests.engine.trees import Tree, noise, of_directory, of_entry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    make_base(path)
    (path / "long").write_bytes(noise(3_000_000, 8))
    return path


def tree_of(repository: Repository, identifier: SnapshotId) -> Tree:
    repository.objects.shed()
    return of_entry(repository.objects, repository.snapshot(identifier).root)


def keys(repository: Repository, db: Db) -> list[bytes]:
    with repository.store.read() as reader:
        return list(reader.keys(db))


Objects = dict[tuple[Db, bytes], bytes]


def everything(repository: Repository) -> Objects:
    with repository.store.read() as reader:
        return {
            (db, key): bytes(raw)
            for db in (Db.CHUNKS, Db.NODES, Db.SNAPSHOTS)
            for key, raw in reader.items(db)
        }


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("db", [Db.CHUNKS, Db.NODES, Db.SNAPSHOTS])
def test_every_object_comes_back_from_another_store(
    repository: Repository, base: Path, tmp_path: Path, spoil: str, db: Db
):
    first = imported(repository, base)
    repository.set_ref("main", first)
    with Repository.create(str(tmp_path / "other")) as other:
        assert other.import_directory(str(base)).root == repository.snapshot(first).root
        copy = everything(repository)
        other.store.write(lambda w: [w.put(db, key, value) for (db, key), value in copy.items()])
    tree = tree_of(repository, first)
    before = everything(repository)
    for key in keys(repository, db):
        change(repository, db, key, SPOILS[spoil])
    assert repository.verify().damage
    report = repository.repair(str(tmp_path / "other"))
    assert report.left.damage == []
    assert report.repaired == sum(which is db for which, _ in before)
    assert everything(repository) == before
    assert tree_of(repository, first) == tree


@pytest.mark.parametrize("spoil", SPOILS)
def test_chunks_and_nodes_come_back_from_a_directory(
    repository: Repository, base: Path, spoil: str
):
    first = imported(repository, base)
    tree, before = tree_of(repository, first), everything(repository)
    for db in (Db.CHUNKS, Db.NODES):
        for key in keys(repository, db):
            change(repository, db, key, SPOILS[spoil])
    report = repository.repair(str(base))
    assert report.left.damage == []
    assert everything(repository) == before
    assert tree_of(repository, first) == tree


def test_a_directory_with_some_of_the_files(repository: Repository, base: Path, tmp_path: Path):
    """Wherever they are and whatever they are called; nothing else of it is stored."""
    first = imported(repository, base)
    tree = tree_of(repository, first)
    elsewhere = tmp_path / "elsewhere/x"
    elsewhere.mkdir(parents=True)
    (elsewhere / "y").write_bytes((base / "long").read_bytes())
    (elsewhere / "other").write_bytes(noise(500_000, 77))
    entry = find(repository.objects, repository.snapshot(first).root, b"a/c")
    assert entry is not None
    assert isinstance(entry.content, tuple)
    lost = entry.content[0].id
    chunks = keys(repository, Db.CHUNKS)
    for key in chunks:
        change(repository, Db.CHUNKS, key, flip)
    report = repository.repair(str(elsewhere.parent))
    assert sorted(keys(repository, Db.CHUNKS)) == sorted(chunks)
    left = {damage.path for damage in report.left.damage}
    assert b"a/c" in left
    assert b"long" not in left
    assert {d.where for d in report.left.damage} == {first.hex()}
    assert lost in {damage.identifier for damage in report.left.damage}
    again = repository.repair(str(base))
    assert again.left.damage == []
    assert tree_of(repository, first) == tree


def test_what_is_damaged_in_the_other_store_is_not_taken(
    repository: Repository, base: Path, tmp_path: Path
):
    first = imported(repository, base)
    with Repository.create(str(tmp_path / "other")) as other:
        other.import_directory(str(base))
        for key in keys(other, Db.CHUNKS):
            change(other, Db.CHUNKS, key, flip)
    for key in keys(repository, Db.CHUNKS):
        change(repository, Db.CHUNKS, key, flip)
    report = repository.repair(str(tmp_path / "other"))
    assert report.repaired == 0
    assert {damage.where for damage in report.left.damage} == {first.hex()}
    repository.objects.shed()
    entry = find(repository.objects, repository.snapshot(first).root, b"a/c")
    assert entry is not None
    with pytest.raises(CorruptObjectError):
        engine.storage.content.read(repository.objects, entry, 0, 10)


def test_a_lost_subtree_comes_back_level_by_level(
    repository: Repository, base: Path, tmp_path: Path
):
    """What is below a missing node is not seen before the node is there again."""
    first = imported(repository, base)
    tree = tree_of(repository, first)
    with Repository.create(str(tmp_path / "other")) as other:
        other.import_directory(str(base))
    for db in (Db.NODES, Db.CHUNKS):
        for key in keys(repository, db):
            change(repository, db, key, SPOILS["gone"])
    assert [d.path for d in repository.verify().damage if d.where] == [b""]
    report = repository.repair(str(tmp_path / "other"))
    assert report.left.damage == []
    assert tree_of(repository, first) == tree


def test_damage_that_nobody_needs_goes(repository: Repository, base: Path):
    first = imported(repository, base)
    (base / "more").mkdir()
    (base / "more/file").write_bytes(noise(70_000, 3))
    second = imported(repository, base)
    needed = set(keys(repository, Db.CHUNKS)), set(keys(repository, Db.NODES))
    repository.remove_snapshot(second)
    tree = tree_of(repository, first)
    doomed = repository.collect(dry_run=True)
    assert doomed.chunks > 0
    kept_chunks = {key for key in needed[0] if key in reachable(repository, first)}
    for key in needed[0] - kept_chunks:
        change(repository, Db.CHUNKS, key, flip)
    damage = repository.verify().damage
    assert damage
    assert {(item.where, item.path, item.kind) for item in damage} >= {("", b"", "chunk")}
    assert all("unreachable" in item.problem or item.kind == "row" for item in damage)
    report = repository.repair()
    assert report.left.damage == []
    assert report.dropped == len(damage)
    assert set(keys(repository, Db.CHUNKS)) == kept_chunks
    assert tree_of(repository, first) == tree
    imported(repository, base)  # by the stat cache, as far as that is left
    assert repository.verify().damage == []


def reachable(repository: Repository, identifier: SnapshotId) -> set[bytes]:
    from engine.upkeep.marking import Marks

    marks = Marks()
    marks.add([directory_id(repository.snapshot(identifier).root)])
    marks.walk_all(repository.store)
    return {key for key in keys(repository, Db.CHUNKS) if key in marks.chunks}


def test_a_row_of_the_cache_that_leads_to_nothing_whole(
    repository: Repository, base: Path, monkeypatch: pytest.MonkeyPatch
):
    """An import would take what it leads to unread."""
    monkeypatch.setattr(importing, "FRESH_NS", -(10**18))
    first = imported(repository, base)
    entry = find(repository.objects, repository.snapshot(first).root, b"a/sub")
    assert entry is not None
    repository.remove_snapshot(first)
    change(repository, Db.NODES, directory_id(entry), SPOILS["gone"])
    damage = repository.verify().damage
    assert {(item.where, item.kind) for item in damage} == {("", "row")}
    assert len(damage) == 3  # of a/sub and of what it is in
    report = repository.repair()
    assert (report.dropped, report.left.damage) == (3, [])
    again = imported(repository, base)
    assert repository.verify().damage == []
    assert of_directory(base) == tree_of(repository, again)


@pytest.mark.parametrize("how", ["bit", "page"])
def test_bytes_of_the_file_itself(repository: Repository, base: Path, tmp_path: Path, how: str):
    """Real rot: bytes of data.mdb change while nobody has it open."""
    first = imported(repository, base)
    tree = tree_of(repository, first)
    entry = find(repository.objects, repository.snapshot(first).root, b"long")
    assert entry is not None
    with Repository.create(str(tmp_path / "other")) as other:
        other.import_directory(str(base))
    repository.close()
    data = Path(repository.path) / "db/data.mdb"
    content = data.read_bytes()
    at = content.index((base / "long").read_bytes()[1000:1100])
    rot = bytes([content[at] ^ 1]) if how == "bit" else bytes(4096)
    at = at if how == "bit" else (at + 4096) // 4096 * 4096
    data.write_bytes(content[:at] + rot + content[at + len(rot) :])
    with Repository.open(repository.path) as again:
        damage = again.verify().damage
        assert {(item.where, item.path) for item in damage} == {(first.hex(), b"long")}
        assert again.repair(str(tmp_path / "other")).left.damage == []
        assert tree_of(again, first) == tree


def test_without_a_source_what_is_needed_stays_named(repository: Repository, base: Path):
    first = imported(repository, base)
    key = keys(repository, Db.CHUNKS)[0]
    change(repository, Db.CHUNKS, key, flip)
    report = repository.repair()
    assert (report.repaired, report.dropped) == (0, 0)
    assert {item.where for item in report.left.damage} == {first.hex()}
    assert len(keys(repository, Db.CHUNKS)) > 1


def test_wrong_sources(repository: Repository, base: Path, tmp_path: Path):
    imported(repository, base)
    change(repository, Db.CHUNKS, keys(repository, Db.CHUNKS)[0], flip)
    for source in [tmp_path / "nothing", base / "c", Path(repository.path) / "locks"]:
        with pytest.raises(ImportSourceError):
            repository.repair(str(source))
    (tmp_path / "fake/db").mkdir(parents=True)
    with pytest.raises(NotAStoreError):
        repository.repair(str(tmp_path / "fake"))


# What verify says of structure.


def put_tree(repository: Repository, root: Entry, nodes: NodeBuffer) -> SnapshotId:
    identifier, record = encode_snapshot(make_snapshot(root))

    def write(writer: Writer) -> None:
        nodes.flush(writer)
        writer.put(Db.SNAPSHOTS, identifier, record)

    repository.store.write(write)
    return identifier


Cut = Callable[[NodeBuffer, tuple[Entry, ...]], bytes]


def in_halves(nodes: NodeBuffer, entries: tuple[Entry, ...]) -> bytes:
    """Pages that a reader can use and no writer would make."""
    half = len(entries) // 2
    pages = tuple(
        IndexPage(part[-1].name, nodes.put(directory_node(part)), len(part))
        for part in (entries[:half], entries[half:])
    )
    return nodes.put(index_node(1, pages))


def uncut(nodes: NodeBuffer, entries: tuple[Entry, ...]) -> bytes:
    return nodes.put(directory_node(entries))


@pytest.mark.parametrize("cut", [in_halves, uncut])
def test_pages_cut_otherwise(repository: Repository, tmp_path: Path, cut: Cut):
    source = tmp_path / "source"
    source.mkdir()
    for n in range(engine.trees.directory.PAGED_FROM + 50):
        (source / f"{n:05}").touch()
    first = imported(repository, source)
    root = repository.snapshot(first).root
    entries = tuple(Directory(repository.objects, directory_id(root)))
    assert store_directory(lambda node: node_id(encode(node)), entries) == root.content
    assert repository.verify().damage == []
    nodes = NodeBuffer()
    other = msgspec.structs.replace(root, content=cut(nodes, entries))
    second = put_tree(repository, other, nodes)
    (damage,) = repository.verify().damage
    assert (damage.where, damage.path) == (second.hex(), b"")
    assert "pages" in damage.problem


def test_a_session_whose_layer_is_gone(repository: Repository, base: Path):
    first = imported(repository, base)
    repository.sessions.create("s", (None, None, first))
    change(repository, Db.SNAPSHOTS, first, SPOILS["gone"])
    (damage,) = repository.verify().damage
    assert (damage.where, damage.kind, damage.identifier) == ("@s", "snapshot", first)


def test_a_directory_with_the_database_elsewhere(repository: Repository, base: Path):
    """The file may be on another disk, by a link; repair and compaction follow it."""
    first = imported(repository, base)
    repository.close()
    home = Path(repository.path)
    os.rename(home / "db", home.parent / "db-elsewhere")
    (home / "db").symlink_to(home.parent / "db-elsewhere")
    with Repository.open(repository.path) as again:
        again.compact()
        assert again.verify().damage == []
        assert again.has_snapshot(first)
    assert sorted(os.listdir(home.parent / "db-elsewhere")) == ["data.mdb", "lock.mdb", "reserve"]


@pytest.mark.parametrize("db", [Db.CHUNKS, Db.NODES, Db.SNAPSHOTS])
def test_a_whole_object_under_a_key_with_a_flipped_bit(repository: Repository, base: Path, db: Db):
    imported(repository, base)
    before = everything(repository)
    for key in keys(repository, db):
        wrong = key[:9] + bytes([key[9] ^ 4]) + key[10:]

        def move(writer: Writer, key: bytes = key, wrong: bytes = wrong) -> None:
            value = before[db, key]
            writer.delete(db, key)
            writer.put(db, wrong, value)

        repository.store.write(move)
    assert repository.verify().damage
    report = repository.repair()
    assert report.left.damage == []
    assert report.dropped == 0
    assert report.repaired == sum(which is db for which, _ in before)
    assert everything(repository) == before


@pytest.mark.parametrize("db", [Db.EPISODES, Db.SESSIONS])
def test_a_damaged_record_comes_from_another_store(
    repository: Repository, base: Path, tmp_path: Path, db: Db
):
    first = imported(repository, base)
    repository.sessions.create("work", (None, None, first))
    repository.episodes.create("search", first)
    repository.episodes.append("search", NewStep(action="a" * 40, snapshot=first))
    shutil.copytree(repository.path, tmp_path / "other")
    with repository.store.read() as reader:
        before = {key: bytes(raw) for key, raw in reader.items(db)}
    spoiled = [key for key, raw in before.items() if raw]
    for key in spoiled:
        change(repository, db, key, SPOILS["cut"])
    assert repository.verify().damage
    assert repository.repair().left.damage
    report = repository.repair(str(tmp_path / "other"))
    assert report.left.damage == []
    assert report.repaired == len(spoiled)
    with repository.store.read() as reader:
        assert {key: bytes(raw) for key, raw in reader.items(db)} == before
