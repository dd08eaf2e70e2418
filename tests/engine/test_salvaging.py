"""A store whose file is damaged in its frame: named, made anew, and nothing else changes."""

import os
import random
import shutil
import struct
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.errors import CorruptObjectError
from engine.ids import digest
from engine.storage.lmdb_store import LmdbStore
from engine.storage.pages import BRANCH, LEAF, META, OVERFLOW
from engine.storage.snapshots import decode_snapshot
from engine.storage.store import Db, StoreDamagedError
from engine.upkeep.inspecting import repair_store, verify_store
from engine.upkeep.salvaging import examine
from tests.engine.trees import noise

PAGE = 4096
Contents = dict[Db, dict[bytes, bytes]]


def contents(path: Path) -> Contents:
    store = LmdbStore(str(path))
    try:
        with store.read() as reader:
            return {db: {key: bytes(raw) for key, raw in reader.items(db)} for db in Db}
    finally:
        store.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with branch, leaf, overflow and free pages."""
    place = tmp_path_factory.mktemp("salvaging")
    tree = place / "tree"
    for number in range(200):
        path = tree / f"d{number % 40:02}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise((300, 900, 1500, 6000)[number % 4], number))
    with Repository.create(str(place / "store")) as repository:
        for turn in range(3):
            (tree / "turn").write_bytes(noise(8000, 1000 + turn))
            snapshot = SnapshotId(repository.import_directory(str(tree)).snapshot)
            repository.set_ref(f"turn-{turn}", snapshot)
        for number in range(30):
            repository.set_ref(f"name-{number:02}", snapshot)
        repository.sessions.create("work", (None, None, snapshot))
        repository.remove_ref("turn-0")
    return place / "store"


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def used_pages(data: bytes) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {BRANCH: [], LEAF: [], OVERFLOW: [], META: []}
    number = 0
    while number < len(data) // PAGE:
        own, _, flags, lower, upper = struct.unpack_from("=QHHHH", data, number * PAGE)
        if own == number and flags in found:
            found[flags].append(number)
        number += lower | upper << 16 if (own, flags) == (number, OVERFLOW) else 1
    return found


def flips(data: bytes) -> list[tuple[int, int]]:
    """Returns places and bits of every kind, the same each time."""
    rng = random.Random(3)
    found: list[tuple[int, int]] = []
    pages = used_pages(data)
    for kind in (BRANCH, LEAF):
        for page in pages[kind]:
            at = page * PAGE
            lower = struct.unpack_from("=H", data, at + 12)[0]
            start = at + struct.unpack_from("=H", data, at + 16)[0]
            places = [rng.randrange(8), 10, 12, 14, rng.randrange(16, lower)]
            found += [(at + place, rng.randrange(5)) for place in places]
            found += [(start + rng.randrange(8), rng.randrange(8))]
            found += [(start + 8, rng.randrange(8))]
    found += [(page * PAGE + place, 2) for page in pages[OVERFLOW][:3] for place in (0, 10, 12)]
    found += [(page * PAGE + place, 3) for page in (0, 1) for place in (16, 61, 64, 130, 136, 145)]
    return found


def flip(path: Path, data: bytes, at: int, bit: int) -> None:
    (path / "db" / "data.mdb").write_bytes(
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    )


def restore(path: Path, original: Path, data: bytes, at: int, bit: int) -> None:
    shutil.rmtree(path)
    shutil.copytree(original, path)
    flip(path, data, at, bit)


def test_any_flip_is_mended_from_another_store(original: Path, tmp_path: Path):
    data = (original / "db" / "data.mdb").read_bytes()
    right = contents(Path(shutil.copytree(original, tmp_path / "right")))
    path = tmp_path / "copy"
    path.mkdir()
    mended = 0
    chosen = flips(data)
    for at, bit in random.Random(5).sample(chosen, 32):
        restore(path, original, data, at, bit)
        if not examine(str(path)):
            continue  # in a free page, or a byte that nobody reads
        report = verify_store(str(path))
        assert report.damage, (at, bit)
        assert all(damage.problem for damage in report.damage)
        repaired, salvaged = repair_store(str(path), str(tmp_path / "right"))
        assert repaired.left.damage == [], (at, bit)
        assert salvaged is not None
        assert salvaged.lost == {}, (at, bit)
        found = contents(path)
        for db in Db:
            if db is not Db.IMPORTS:
                assert found[db].items() >= right[db].items(), (at, bit, db)
        for db in (Db.REFS, Db.SESSIONS):
            more = set(found[db]) - set(right[db])
            assert not more or salvaged.older[db.value] == len(more), (at, bit, more)
        assert os.path.getsize(salvaged.kept) == len(data)
        mended += 1
    assert mended > 15


def test_most_flips_are_mended_without_another_store(original: Path, tmp_path: Path):
    data = (original / "db" / "data.mdb").read_bytes()
    right = contents(Path(shutil.copytree(original, tmp_path / "right")))
    path = tmp_path / "copy"
    path.mkdir()
    whole = tried = 0
    for at, bit in random.Random(6).sample(flips(data), 16):
        restore(path, original, data, at, bit)
        if not examine(str(path)):
            continue
        report, salvaged = repair_store(str(path))
        found = contents(path)
        tried += 1
        assert salvaged is not None
        same = all(found[db].items() >= right[db].items() for db in Db if db is not Db.IMPORTS)
        whole += same
        # What is not there is named, now or by `verify`.
        assert same or salvaged.lost or report.left.damage, (at, bit)
    assert whole > tried * 0.6, (whole, tried)


def test_a_collection_and_a_compaction_refuse(copy: Path, original: Path):
    data = (original / "db" / "data.mdb").read_bytes()
    leaf = used_pages(data)[OVERFLOW][0]
    flip(copy, data, leaf * PAGE + 12, 2)
    before = (copy / "db" / "data.mdb").read_bytes()
    with Repository.open(str(copy)) as repository:
        assert repository.verify().damage
        with pytest.raises(StoreDamagedError):
            repository.collect()
        with pytest.raises(StoreDamagedError):
            repository.compact()
        with pytest.raises(StoreDamagedError):
            repository.repair()
    assert (copy / "db" / "data.mdb").read_bytes() == before


def test_what_a_session_wrote_outlives_its_record(copy: Path, original: Path):
    data = bytearray((original / "db" / "data.mdb").read_bytes())
    uid = os.listdir(copy / "sessions")[0]
    while (at := data.find(uid.encode())) >= 0:
        # The leaf of its record, and older copies of it, become something else.
        page = at // PAGE * PAGE
        data[page : page + PAGE] = os.urandom(PAGE)
    (copy / "db" / "data.mdb").write_bytes(data)
    wrote = copy / "sessions" / uid / "upper.0" / "wrote"
    wrote.write_text("work of an hour")
    assert verify_store(str(copy)).damage
    _, salvaged = repair_store(str(copy))
    assert salvaged is not None
    assert salvaged.lost.get("sessions") == 1, salvaged
    (kept,) = salvaged.uppers
    assert Path(kept, "upper.0", "wrote").read_text() == "work of an hour"
    with Repository.open(str(copy)) as repository:
        repository.collect()
    assert Path(kept, "upper.0", "wrote").exists()


def test_a_lost_name_comes_from_the_other_store(copy: Path, original: Path, tmp_path: Path):
    other = Path(shutil.copytree(original, tmp_path / "other"))
    right = contents(other)
    data = bytearray((original / "db" / "data.mdb").read_bytes())
    while (at := data.find(b"name-07")) >= 0:
        page = at // PAGE * PAGE
        data[page : page + PAGE] = os.urandom(PAGE)
    (copy / "db" / "data.mdb").write_bytes(data)
    _, salvaged = repair_store(str(copy), str(other))
    assert salvaged is not None
    assert salvaged.taken["refs"] == len(right[Db.REFS])
    assert salvaged.lost == {}
    assert contents(copy)[Db.REFS] == right[Db.REFS]


def test_a_ref_whose_bytes_flipped_is_set_as_the_other_store_has_it(
    copy: Path, original: Path, tmp_path: Path
):
    other = Path(shutil.copytree(original, tmp_path / "other"))
    right = contents(other)[Db.REFS]
    store = LmdbStore(str(copy))
    value = right[b"turn-2"]
    store.write(lambda writer: writer.put(Db.REFS, b"turn-2", value[:-1] + b"\0"))
    store.close()
    assert verify_store(str(copy)).damage
    report, salvaged = repair_store(str(copy), str(other))
    assert salvaged is None
    assert report.left.damage == []
    assert contents(copy)[Db.REFS] == right


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def decodes(value: bytes) -> bool:
    try:
        decode_snapshot(SnapshotId(digest(value)), value)
    except CorruptObjectError:
        return False
    return True


def test_a_snapshot_with_a_flipped_bit_is_left_out(copy: Path, original: Path):
    """It would be a snapshot that nobody made, under an id that nobody has."""
    data = bytearray((original / "db" / "data.mdb").read_bytes())
    before = contents(original)[Db.SNAPSHOTS]
    identifier, value = next(iter(before.items()))
    where = next(at for at in range(len(value)) if decodes(flipped(value, at)))
    changed = 0
    at = data.find(identifier + value)
    while at >= 0:
        data[at + len(identifier) + where] ^= 1
        changed += 1
        at = data.find(identifier + value, at + 1)
    assert changed
    for page in used_pages(bytes(data))[BRANCH]:
        data[page * PAGE + 4] ^= 1  # the frame is damaged as well, so the file is made anew
    (copy / "db" / "data.mdb").write_bytes(data)
    assert examine(str(copy))
    repair_store(str(copy))
    assert contents(copy)[Db.SNAPSHOTS].keys() == before.keys() - {identifier}
