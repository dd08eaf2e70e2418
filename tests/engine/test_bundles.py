"""Bundles: what comes out of one is what went in, and nothing that is forged comes in."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.archives.bundle_applying
import engine.trees.directory
from engine import Repository, SnapshotId
from engine.archives.bundle_applying import BundleBaseError, apply_bundle
from engine.archives.bundle_creating import below, create_bundle
from engine.archives.bundle_inspecting import inspect_bundle
from engine.archives.bundles import (
    CHUNK,
    END,
    LONGEST_RECORD,
    MAGIC,
    MANIFEST,
    NODE,
    SNAPSHOT,
    BundleFormatError,
    BundleReader,
    BundleTruncatedError,
    BundleVersionError,
    BundleWriter,
    Counts,
    Manifest,
)
from engine.ids import digest
from engine.storage.codec import pack
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import (
    Entry,
    Kind,
    Page,
    Ref,
    Totals,
    directory_node,
    encode,
    index_node,
    list_node,
    node_id,
)
from engine.storage.objects import Objects
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.trees.directory import directory_id
from tests.conftest import ROOT
from tests.engine.planted import trees
from tests.engine.plants import Garden, Leaf
from tests.engine.trees import noise, of_entry

many = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def snapshot_of(garden: Garden, root: Entry, *parents: SnapshotId) -> SnapshotId:
    identifier, record = encode_snapshot(make_snapshot(root, parents, "made", {"n": 1}))
    garden.store.write(lambda writer: writer.put(Db.SNAPSHOTS, identifier, record))
    return identifier


def bundled(garden: Garden, *snapshots: SnapshotId, have: tuple[SnapshotId, ...] = ()) -> bytes:
    out = io.BytesIO()
    create_bundle(garden.objects, out, snapshots, have=have)
    return out.getvalue()


def everything(store: MemoryStore) -> dict[Db, dict[bytes, bytes]]:
    with store.read() as reader:
        return {db: {key: bytes(raw) for key, raw in reader.items(db)} for db in Db}


def visible(store: MemoryStore) -> list[tuple[bytes, bytes]]:
    found = everything(store)
    return [*found[Db.SNAPSHOTS].items(), *found[Db.REFS].items()]


def refused(
    data: bytes, match: str = "not a sound bundle", store: MemoryStore | None = None
) -> BundleFormatError:
    """Applies what must be refused, and leave nothing that can be seen."""
    store = MemoryStore() if store is None else store
    before = visible(store)
    with pytest.raises(BundleFormatError, match=match) as caught:
        apply_bundle(store, Objects(store), io.BytesIO(data), set_id=True)
    assert visible(store) == before
    return caught.value


# Round trips.


@given(trees(), st.booleans())
@many
def test_a_tree_comes_out_as_it_went_in(tree, small_pages):
    with pytest.MonkeyPatch.context() as patch:
        if small_pages:
            patch.setattr(engine.trees.directory, "PAGED_FROM", 2)
            patch.setattr(
                engine.trees.directory, "_ends_page", lambda name, level: name[0] % 2 > level
            )
        garden = Garden()
        root = tree(garden)
        identifier = snapshot_of(garden, root)
        data = bundled(garden, identifier)
        assert data == bundled(garden, identifier)
        store = MemoryStore()
        report = apply_bundle(store, Objects(store), io.BytesIO(data), set_id=True)
        assert report.new_snapshots == (identifier,)
        assert of_entry(Objects(store), root) == of_entry(garden.objects, root)
        assert visible(store) == visible(garden.store)
        parts = set[bytes]()
        list(below(garden.objects, directory_id(root), parts))
        found = everything(store)
        assert found[Db.CHUNKS].keys() | found[Db.NODES].keys() == parts


@given(trees(), trees())
@many
def test_what_the_receiver_has_is_not_sent(one, other):
    garden = Garden()
    first, second = one(garden), other(garden)
    old = snapshot_of(garden, first)
    new = snapshot_of(garden, second, old)
    store = MemoryStore()
    apply_bundle(store, Objects(store), io.BytesIO(bundled(garden, old)), set_id=True)
    data = bundled(garden, new, have=(old,))
    report = apply_bundle(store, Objects(store), io.BytesIO(data), set_id=True)
    assert report.known_objects == 0
    assert of_entry(Objects(store), second) == of_entry(garden.objects, second)
    empty = MemoryStore()
    with pytest.raises(BundleBaseError, match=old.hex()):
        apply_bundle(empty, Objects(empty), io.BytesIO(data))
    assert everything(empty) == everything(MemoryStore())


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Repository]:
    with Repository.create(str(tmp_path / "other")) as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "deep" / "er").mkdir(parents=True)
    (path / "long").write_bytes(noise(9_000_000))
    (path / "deep" / "text").write_text("line\n" * 20_000)
    (path / "deep" / "er" / "one").write_bytes(b"x" * 300)
    os.link(path / "deep" / "text", path / "deep" / "er" / "two")
    (path / "link").symlink_to("/etc/passwd")
    return path


def test_a_real_directory_through_a_pipe(repository: Repository, other: Repository, tree: Path):
    made = repository.import_directory(str(tree), ref="main")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writing)
            with open(reading, "rb") as stream, Repository.open(other.path) as its_own:
                its_own.apply_bundle(stream)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(reading)
    with open(writing, "wb") as out:
        report = repository.create_bundle(out)
    assert os.waitpid(child, 0)[1] == 0
    assert report.refs == {"main": made.snapshot}
    assert other.refs() == {"main": made.snapshot}
    assert other.verify().damage == []
    assert of_entry(other.objects, made.root) == of_entry(repository.objects, made.root)
    removed = other.collect()
    assert (removed.chunks, removed.nodes) == (0, 0)


def test_history_goes_along_up_to_what_the_receiver_has(
    repository: Repository, other: Repository, tree: Path
):
    ids = []
    for number in range(4):
        (tree / "number").write_text(str(number))
        ids.append(SnapshotId(repository.import_directory(str(tree), ref="main").snapshot))
    out = io.BytesIO()
    report = repository.create_bundle(out, [ids[3]], have=[ids[1]], history=True)
    assert report.snapshots == tuple(sorted(ids[2:]))
    with pytest.raises(BundleBaseError):
        other.apply_bundle(io.BytesIO(out.getvalue()))
    whole = io.BytesIO()
    repository.create_bundle(whole, ids[:2])
    other.apply_bundle(io.BytesIO(whole.getvalue()))
    other.apply_bundle(io.BytesIO(out.getvalue()))
    assert [each for each, _ in other.log(ids[3])] == ids[::-1]
    assert other.verify().damage == []


def test_refs_are_made_left_or_moved(repository: Repository, other: Repository, tree: Path):
    mine = SnapshotId(other.import_directory(str(tree / "deep"), ref="main").snapshot)
    made = repository.import_directory(str(tree), ref="main").snapshot
    repository.set_ref("also", SnapshotId(made))
    out = io.BytesIO()
    repository.create_bundle(out)
    apply = lambda **options: other.apply_bundle(io.BytesIO(out.getvalue()), **options)  # noqa: E731
    assert apply(take_refs=False).refs == {}
    assert other.refs() == {"main": mine}
    report = apply()
    assert (report.refs, report.kept_refs) == ({"also": made}, {"main": made})
    assert other.refs() == {"main": mine, "also": made}
    assert apply(move_refs=True).refs == {"main": made, "also": made}


def test_a_bundle_of_nothing_new_moves_refs(repository: Repository, other: Repository, tree: Path):
    made = SnapshotId(repository.import_directory(str(tree), ref="main").snapshot)
    out = io.BytesIO()
    repository.create_bundle(out)
    other.apply_bundle(io.BytesIO(out.getvalue()))
    other.remove_ref("main")
    out = io.BytesIO()
    assert repository.create_bundle(out, have=[made]).snapshots == ()
    other.apply_bundle(io.BytesIO(out.getvalue()))
    assert other.refs() == {"main": made}


# Cut short and damaged.


def small() -> tuple[Garden, Entry, SnapshotId]:
    garden = Garden()
    root = garden.plant(
        {b"a/b": Leaf(noise(200)), b"a/c": Leaf(b"text\n" * 90), b"d": Leaf(b"short"),
         b"long": Leaf(noise(3_000_000))}
    )  # fmt: skip
    return garden, root, snapshot_of(garden, root)


def test_cut_short_anywhere_and_applied_again():
    garden, root, identifier = small()
    data = bundled(garden, identifier)
    store = MemoryStore()
    for end in [*range(200), *range(200, len(data), 40_009), *range(len(data) - 60, len(data))]:
        error = refused(data[:end], "it ends there", store)
        assert isinstance(error, BundleTruncatedError)
        assert error.offset == end
    report = apply_bundle(store, Objects(store), io.BytesIO(data))
    assert report.new_snapshots == (identifier,)
    assert of_entry(Objects(store), root) == of_entry(garden.objects, root)


def test_what_came_of_one_cut_short_is_not_stored_again(monkeypatch):
    monkeypatch.setattr(engine.archives.bundle_applying, "BATCH_BYTES", 100_000)
    garden, _, identifier = small()
    data = bundled(garden, identifier)
    store = MemoryStore()
    refused(data[: len(data) // 2], store=store)
    report = apply_bundle(store, Objects(store), io.BytesIO(data))
    assert report.known_objects > 10
    assert report.new_bytes < 0.65 * len(data)


@given(st.data())
@many
def test_a_flipped_bit_anywhere_is_seen(data):
    garden = Garden()
    root = garden.plant({b"a/b": Leaf(noise(200)), b"a/c": Leaf(b"text\n" * 90), b"d": Leaf(b"1")})
    good = bundled(garden, snapshot_of(garden, root))
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    store = MemoryStore()
    with pytest.raises((BundleFormatError, BundleVersionError)):
        apply_bundle(store, Objects(store), io.BytesIO(bytes(bad)))
    assert visible(store) == []
    with pytest.raises((BundleFormatError, BundleVersionError)):
        inspect_bundle(io.BytesIO(bytes(bad)))
    apply_bundle(store, Objects(store), io.BytesIO(good))
    assert of_entry(Objects(store), root) == of_entry(garden.objects, root)


@given(st.binary(max_size=300), st.booleans())
@many
def test_noise_is_refused(data, begun):
    refused(MAGIC + data if begun else data)


KILLED = """
import io, os, sys
import engine.archives.bundle_applying as applying
from engine import Repository
applying.BATCH_BYTES = 200_000
class Slow(io.RawIOBase):
    def __init__(self, path): self.file = open(path, "rb")
    def read(self, n):
        data = self.file.read(min(n, 50_000))
        print(self.file.tell(), flush=True)
        return data
with Repository.open(sys.argv[1]) as repository:
    repository.apply_bundle(Slow(sys.argv[2]))
"""


def test_killed_while_it_applies(repository: Repository, tmp_path: Path, tree: Path):
    made = repository.import_directory(str(tree), ref="main")
    path = tmp_path / "bundle"
    with path.open("wb") as out:
        size = repository.create_bundle(out).bytes
    Repository.create(str(tmp_path / "other")).close()
    for part in (0.2, 0.5, 0.8):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "other", path],
            stdout=subprocess.PIPE, cwd=ROOT, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) > part * size:
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        with Repository.open(str(tmp_path / "other")) as other:
            assert other.snapshots() == []
            assert other.refs() == {}
            assert other.verify().damage == []
    with Repository.open(str(tmp_path / "other")) as other:
        report = _applied(other, path)
        assert report.known_objects > 50
        assert other.refs() == {"main": made.snapshot}
        assert other.verify().damage == []


def _applied(repository: Repository, path: Path) -> engine.archives.bundle_applying.ApplyReport:
    with path.open("rb") as stream:
        return repository.apply_bundle(stream)


# Forged.

TIME = 7


def directory(name: bytes, node: bytes, size: int = 0, entries: int = 0) -> Entry:
    totals = Totals(entries, 0)
    return Entry(name, Kind.DIRECTORY, 0o755, TIME, size, node, (), None, totals)


def file(name: bytes, refs: tuple[Ref, ...]) -> Entry:
    return Entry(name, Kind.FILE, 0o644, TIME, sum(ref.length for ref in refs), refs)


EMPTY = encode(directory_node(()))
HUNDRED = pack(b"x" * 200)


def forged(*objects: tuple[int, bytes, bytes], root: Entry | None = None) -> bytes:
    """Returns a bundle of these objects with one snapshot, sound but for what they say."""
    root = directory(b"", node_id(EMPTY)) if root is None else root
    identifier, record = encode_snapshot(make_snapshot(root))
    chunks = sum(kind == CHUNK for kind, _, _ in objects)
    counts = Counts(chunks, len(objects) - chunks, 1)
    out = io.BytesIO()
    writer = BundleWriter(out, Manifest(1, (identifier,), (), (), counts))
    for each in objects:
        writer.add(*each)
    writer.add(SNAPSHOT, identifier, record)
    writer.end()
    return out.getvalue()


def node(value: object) -> tuple[int, bytes, bytes]:
    data = encode(value)  # type: ignore[arg-type]
    return NODE, node_id(data), data


def chunk(plain: bytes) -> tuple[int, bytes, bytes]:
    return CHUNK, digest(plain), pack(plain)


def test_the_forge_makes_sound_bundles():
    store = MemoryStore()
    apply_bundle(store, Objects(store), io.BytesIO(forged((NODE, node_id(EMPTY), EMPTY))))


def test_what_is_named_must_be_there():
    missing = digest(b"missing")
    refused(forged(), "not there before it")
    refused(forged(node(directory_node((directory(b"d", missing),)))), "not there before it")
    one = file(b"f", (Ref(missing, 200, 0),))
    refused(forged(node(directory_node((one,)))), "not there before it")
    refused(forged(node(list_node((Ref(missing, 200, 0),)))), "not there before it")


def test_what_is_named_must_be_what_is_said():
    plain = b"x" * 200
    pieces = node(list_node((Ref(digest(plain), 200, 0),)))
    empty = (NODE, node_id(EMPTY), EMPTY)
    wrong = [
        file(b"f", (Ref(digest(plain), 201, 0),)),  # a chunk of another length
        file(b"f", (Ref(pieces[1], 201, 1),)),  # a list of another length
        file(b"f", (Ref(pieces[1], 200, 2),)),  # of another level
        file(b"f", (Ref(empty[1], 200, 1),)),  # no list
        directory(b"d", pieces[1]),  # no directory
        directory(b"d", empty[1], size=5),
        directory(b"d", empty[1], entries=1 << 40),
    ]
    for entry in wrong:
        refused(forged(chunk(plain), pieces, empty, node(directory_node((entry,)))))
    for root in (
        directory(b"", pieces[1]),
        directory(b"", empty[1], 1),
        directory(b"", empty[1], 0, 9),
    ):
        refused(forged(chunk(plain), pieces, empty, root=root))


def test_pages_must_be_what_their_index_says():
    fifo = lambda name: Entry(name, Kind.FIFO, 0, TIME, 0, b"")  # noqa: E731
    ab, cd = directory_node((fifo(b"a"), fifo(b"b"))), directory_node((fifo(b"c"), fifo(b"d")))
    parts = [node(ab), node(cd)]
    a, c = parts[0][1], parts[1][1]
    good = node(index_node(1, (Page(b"b", a, 2), Page(b"d", c, 2))))
    store = MemoryStore()
    sound = forged(*parts, good, root=directory(b"", good[1], 0, 4))
    apply_bundle(store, Objects(store), io.BytesIO(sound))
    for pages in [
        (Page(b"b", a, 3), Page(b"d", c, 2)),
        (Page(b"bb", a, 2), Page(b"d", c, 2)),
        (Page(b"b", a, 2), Page(b"c", c, 2)),
        (Page(b"b", a, 2), Page(b"bb", a, 2)),
    ]:
        refused(forged(*parts, node(index_node(1, pages))))
    refused(forged(*parts, node(index_node(2, (Page(b"b", a, 2), Page(b"d", c, 2))))), "page")


def test_a_tree_too_deep_and_one_of_a_million_million_paths():
    objects: list[tuple[int, bytes, bytes]] = [(NODE, node_id(EMPTY), EMPTY)]
    entry = directory(b"d", node_id(EMPTY))
    for depth in range(1, 515):
        made = node(directory_node((entry,)))
        objects.append(made)
        entry = directory(b"d", made[1], 0, depth)
        if depth == 511:
            at_most = forged(*objects, root=directory(b"", made[1], 0, depth))
    store = MemoryStore()
    apply_bundle(store, Objects(store), io.BytesIO(at_most))
    refused(forged(*objects, root=directory(b"", objects[-1][1], 0, 514)), "too deep")
    # Half of it came before: the store's own nodes count, too.
    refused(forged(objects[-1], objects[-2], root=directory(b"", objects[-1][1], 0, 514)))

    objects, entries = [(NODE, node_id(EMPTY), EMPTY)], 0
    below: bytes = node_id(EMPTY)
    for _ in range(60):
        entries = 2 * (entries + 1)
        made = node(directory_node((directory(b"a", below, 0, (entries - 2) // 2),
                                    directory(b"b", below, 0, (entries - 2) // 2))))  # fmt: skip
        objects.append(made)
        below = made[1]
    store = MemoryStore()  # honest sums: it is taken, and quickly
    sound = forged(*objects, root=directory(b"", below, 0, entries))
    apply_bundle(store, Objects(store), io.BytesIO(sound))


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../escaped", b"/etc/x", b"a\0b", b"x" * 256])
def test_hostile_names(name: bytes):
    entry = Entry(name, Kind.FILE, 0o644, TIME, 1, b"x")
    refused(forged(node(directory_node((entry,)))))
    twice = Entry(b"same", Kind.FILE, 0o644, TIME, 1, b"x")
    refused(forged(node(directory_node((twice, twice)))), "not sorted")


def test_devices_are_no_kind():
    refused(forged(node(directory_node((Entry(b"null", 5, 0o666, TIME, 0, b""),)))), "unknown kind")


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return bytes([kind]) + (len(payload) if length is None else length).to_bytes(4, "big") + payload


def test_forged_lengths_allocate_nothing():
    manifest = frame(MANIFEST, encode(Manifest(1, (), (), (), Counts(9, 9, 0))))
    for kind, length in [(NODE, LONGEST_RECORD), (NODE, 2**32 - 1), (CHUNK, 2**32 - 1),
                         (CHUNK, 300_000), (END, 2**31), (MANIFEST, LONGEST_RECORD)]:  # fmt: skip
        refused(MAGIC + manifest + frame(kind, b"x", length))
    refused(MAGIC + frame(MANIFEST, b"", LONGEST_RECORD), "it ends there")
    # A chunk that says it has gigabytes.
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    refused(forged((CHUNK, digest(bytes(64 << 20)), b"\x01" + bomb)), "it says it has")


def test_frames_in_a_wrong_order():
    garden, _, identifier = small()
    data = bundled(garden, identifier)
    refused(data + b"x", "something follows")
    reader = BundleReader(io.BytesIO(data))
    manifest = reader.manifest
    records = [(each.kind, each.identifier, bytes(each.value)) for each in reader]

    def rebuilt(parts: list[tuple[int, bytes, bytes]], counts: Counts = manifest.counts) -> bytes:
        out = io.BytesIO()
        writer = BundleWriter(out, Manifest(1, manifest.snapshots, (), (), counts))
        for part in parts:
            writer.add(*part)
        writer.end()
        return out.getvalue()

    store = MemoryStore()
    apply_bundle(store, Objects(store), io.BytesIO(rebuilt(records)))
    refused(rebuilt(records[::-1]), "not there before it")
    refused(rebuilt(records[1:]))
    refused(rebuilt(records[:-1]), "fewer")
    refused(rebuilt([*records, records[0]]), "more than")
    fewer = Counts(manifest.counts.chunks, manifest.counts.nodes, 0)
    refused(rebuilt(records[:-1], fewer), "is not in it")


def manifests() -> Iterator[Manifest]:
    a, b = digest(b"a"), digest(b"b")
    low, high = sorted([a, b])
    none = Counts(0, 0, 0)
    yield Manifest(1, (high, low), (), (), none)
    yield Manifest(1, (low, low), (), (), none)
    yield Manifest(1, (low[:31],), (), (), none)
    yield Manifest(1, (low,), (low,), (), none)
    yield Manifest(1, (), (), (("main", low),), none)
    yield Manifest(1, (low,), (), (("../x", low),), none)
    yield Manifest(1, (low,), (), (("b", low), ("a", low)), none)
    yield Manifest(1, (low,), (), (), Counts(-1, 0, 1))
    yield Manifest(0, (low,), (), (), none)


@pytest.mark.parametrize("manifest", list(manifests()))
def test_wrong_manifests(manifest: Manifest):
    refused(MAGIC + frame(MANIFEST, encode(manifest)), "its manifest is wrong")


def test_a_later_version_and_bytes_that_are_not_canonical():
    later = encode(Manifest(3, (), (), (), Counts(0, 0, 0)))
    with pytest.raises(BundleVersionError, match="version 3"):
        BundleReader(io.BytesIO(MAGIC + frame(MANIFEST, later)))
    now = encode(Manifest(1, (), (), (), Counts(0, 0, 0)))
    refused(MAGIC + frame(MANIFEST, now + b"\0"), "manifest is wrong")
    refused(MAGIC + frame(MANIFEST, b"\x81" * 5000), "manifest is wrong")


def test_a_disk_that_is_full_and_a_writer_that_has_gone(repository: Repository, tree: Path):
    repository.import_directory(str(tree), ref="main")
    with open("/dev/full", "wb", buffering=0) as out, pytest.raises(OSError, match="No space"):
        repository.create_bundle(out)


def test_damage_in_the_store_makes_no_bundle():
    from engine.errors import CorruptObjectError

    garden, _, identifier = small()
    chunks = everything(garden.store)[Db.CHUNKS]
    key = min(chunks)
    garden.store.write(lambda writer: writer.put(Db.CHUNKS, key, chunks[key][:-1] + b"!"))
    with pytest.raises(CorruptObjectError, match=key.hex()):
        bundled(garden, identifier)


def test_the_vector_of_the_documentation():
    page = (ROOT / "docs/reference/bundle.md").read_text()
    data = bytes.fromhex(page.rpartition("## Test vector")[2].split("```")[1])
    store = MemoryStore()
    report = apply_bundle(store, Objects(store), io.BytesIO(data))
    (identifier,) = report.new_snapshots
    assert report.refs == {"main": identifier}
    out = io.BytesIO()
    names = {"main": SnapshotId(identifier)}
    create_bundle(Objects(store), out, [SnapshotId(identifier)], refs=names)
    assert out.getvalue() == data


def _put_node(identifier: bytes, value: bytes, writer: Writer) -> None:
    writer.put(Db.NODES, identifier, value)


def test_a_node_in_the_store_whose_parts_are_gone():
    """A collection that was ended half-way leaves such."""
    plain = b"x" * 200
    pieces = node(list_node((Ref(digest(plain), 200, 0),)))
    above = node(directory_node((file(b"f", (Ref(pieces[1], 200, 1),)),)))
    root = directory(b"", above[1], 200, 1)
    whole = forged(chunk(plain), pieces, above, root=root)
    for left in ([pieces, above], [above]):
        store = MemoryStore()
        for _, identifier, value in left:
            store.write(partial(_put_node, identifier, value))
        refused(forged(root=root), "not whole", store)
        refused(forged(above, root=root), store=store)
        apply_bundle(store, Objects(store), io.BytesIO(whole))
        found = everything(store)
        assert found[Db.CHUNKS].keys() == {digest(plain)}
        assert found[Db.NODES].keys() == {pieces[1], above[1]}
