"""Usage: counted by the claims of roots, compared with counting the slow way."""

import random
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.ids import digest
from engine.storage.codec import LEVEL, CompressionError, parse_compression
from engine.storage.idset import IdMap, IdSet
from engine.storage.store import Db
from engine.trees.directory import directory_id
from engine.upkeep.marking import Marks
from engine.upkeep.usage import Bytes
from tests.engine.test_session_machine import make_base
from tests.engine.test_verifying import imported
from tests.engine.trees import noise


def test_a_set_of_ids_is_a_set():
    rng, ours = random.Random(1), IdSet()
    theirs: set[bytes] = set()
    for _ in range(20_000):
        # Few buckets, and ids whose middles look like other ids' beginnings.
        key = rng.choice([b"\0\0", b"\0\1"]) + bytes(rng.choices(b"\0\1", k=8)) * 3 + bytes(6)
        assert (key in ours) == (key in theirs)
        assert ours.add(key) == (key not in theirs)
        theirs.add(key)
    assert len(ours) == len(theirs)
    for n in range(1000):
        assert ours.add(digest(b"%d" % n))
    assert digest(b"1000") not in ours
    assert b"" not in ours
    with pytest.raises(ValueError, match="31 bytes"):
        ours.add(bytes(31))


def test_a_map_of_ids_is_a_map():
    rng, ours = random.Random(2), IdMap()
    theirs: dict[bytes, int] = {}
    for _ in range(20_000):
        key = bytes(2) + bytes(rng.choices(b"\0\1", k=8)) * 3 + bytes(6)
        assert ours.get(key) == theirs.get(key)
        number = rng.choice([0, 1, 0x01010101, 0xFFFFFFFF])
        ours.set(key, number)
        theirs[key] = number
    assert all(ours.get(key) == number for key, number in theirs.items())


Objects = dict[tuple[Db, bytes], tuple[int, int]]


def needed(repository: Repository, root: bytes) -> set[tuple[Db, bytes]]:
    marks = Marks()
    marks.add([root])
    marks.walk_all(repository.store)
    with repository.store.read() as reader:
        return {(Db.NODES, key) for key in reader.keys(Db.NODES) if key in marks.nodes} | {
            (Db.CHUNKS, key) for key in reader.keys(Db.CHUNKS) if key in marks.chunks
        }


def sums(repository: Repository, objects: set[tuple[Db, bytes]]) -> Bytes:
    found = Bytes()
    with repository.store.read() as reader:
        for db, key in objects:
            raw = reader.get(db, key)
            assert raw is not None
            plain = len(repository.objects.chunk(key)) if db is Db.CHUNKS else 0  # type: ignore[arg-type]
            found.count(1, db is Db.NODES, plain, len(raw))
    return found


def test_usage_is_what_counting_everything_gives(repository: Repository, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    make_base(base)
    rng = random.Random(3)
    for n in range(8):
        for name in rng.sample(["x", "a/x", "a/sub/x", "b/x"], 2):
            (base / name).write_bytes(noise(rng.choice([200, 20_000, 400_000]), rng.randrange(4)))
        imported(repository, base)
        if n == 3:
            last = repository.snapshots()[0]
            repository.sessions.create("s", (None, None, last))
    repository.remove_snapshot(
        next(i for i in repository.snapshots() if i != repository.sessions.get("s").parent)
    )
    usage = repository.usage(repository.snapshots())
    trees = {
        (tree.kind, tree.name): needed(
            repository,
            directory_id(
                repository.snapshot(SnapshotId(bytes.fromhex(tree.name))).root
                if tree.kind == "snapshot"
                else repository.sessions.get(tree.name).root
            ),
        )
        for tree in usage.trees
    }
    assert len(trees) == len(repository.snapshots()) + 1
    count: dict[tuple[Db, bytes], int] = {}
    for objects in trees.values():
        for item in objects:
            count[item] = count.get(item, 0) + 1
    assert usage.total == sums(repository, set(count))
    assert usage.shared == sums(repository, {item for item, n in count.items() if n > 1})
    with repository.store.read() as reader:
        there = reader.count(Db.NODES) + reader.count(Db.CHUNKS)
    assert usage.unreferenced == there - len(count)
    for tree in usage.trees:
        objects = trees[tree.kind, tree.name]
        assert tree.own == sums(repository, {item for item in objects if count[item] == 1})
        assert tree.all == (sums(repository, objects) if tree.kind == "snapshot" else None)
    assert usage.logical == sum(tree.logical for tree in usage.trees)


def test_compression_changes_what_is_new_only(repository: Repository, tmp_path: Path):
    assert repository.compression() == LEVEL
    (tmp_path / "one").mkdir()
    (tmp_path / "one/text").write_text("text " * 10_000)
    first = imported(repository, tmp_path / "one")
    repository.set_compression(0)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/text").write_text("text " * 10_000)
    (tmp_path / "two/more").write_text("more " * 10_000)
    imported(repository, tmp_path / "two")
    with repository.store.read() as reader:
        assert sorted(bytes(raw[:1]) for _, raw in reader.items(Db.CHUNKS)) == [b"\0", b"\1"]
    assert repository.verify().damage == []
    assert repository.has_snapshot(first)
    with pytest.raises(CompressionError):
        repository.set_compression(20)
    repository.store.write(lambda writer: writer.put(Db.META, b"compression", b"lzma:9"))
    assert repository.compression() == LEVEL
    for text in ["zstd:19", "off"]:
        assert parse_compression(text) in {0, 19}
